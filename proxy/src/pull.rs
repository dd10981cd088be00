//! Reading: one state, the states under a prefix, the changes of a stream, what became of an operation; and the calls of the
//! hosts' cache and of embeddings.

mod starts;
mod vectors;

use std::sync::atomic::Ordering;

use p2p_sync_proto::{
    Code, Path, Position, Problem, Scope,
    at_least::AtLeast,
    ids::read_id,
    limits::{BATCH_BYTES_MAX, MESSAGE_BYTES_MAX, PAGE_STATES_MAX, PATH_BYTES_MAX},
    path::{HOST_STREAM, PLAYER_STREAM, check_map},
    v1::{self, pull_reply, pull_request::What},
};
use prost::{Message, length_delimiter_len};
use uuid::Uuid;

use crate::{
    cursor::{Kind, Request, bad_cursor},
    host_cache::Writer,
    open::Sender,
    operation::COUNTER_MAX,
    pipeline::Hub,
    store::StateRow,
};

/// States read from the database at once: the largest payloads take 32 MiB then.
const STATES_PER_READ: u32 = 128;

/// Answers a request of a host; what is wrong is told inside the answer.
pub async fn answer(hub: &Hub, sender: &Sender, request: v1::PullRequest) -> v1::PullReply {
    let host_id = sender.host_id();
    let writer = || Writer::new(sender.label());
    let answered = match request.what {
        Some(What::Get(get)) => get_state(hub, host_id, &get).await,
        Some(What::Scan(scan)) => read_scan(hub, host_id, &scan).await,
        Some(What::ChangesSince(changes)) => read_changes(hub, host_id, &changes).await,
        Some(What::OperationStatus(question)) => operation_status(hub, host_id, &question).await,
        Some(What::CacheGet(get)) => cached(hub, host_id, &get.key).await,
        Some(What::CacheSet(set)) => {
            let kept = hub
                .host_cache
                .set(writer(), &set.key, set.value, set.expiry_seconds)
                .await;
            kept.map(|()| pull_reply::What::CacheFlag(true))
        }
        Some(What::CacheDelete(delete)) => {
            let deleted = hub.host_cache.delete(writer(), &delete.key).await;
            deleted.map(pull_reply::What::CacheFlag)
        }
        Some(What::CacheExists(exists)) => {
            let there = hub.host_cache.exists(host_id, &exists.key).await;
            there.map(pull_reply::What::CacheFlag)
        }
        Some(What::Publish(publish)) => {
            let told = hub
                .host_cache
                .publish(writer(), &publish.channel, &publish.message)
                .await;
            told.map(|()| pull_reply::What::CacheFlag(true))
        }
        Some(What::CreateEmbedding(create)) => vectors::create(hub, sender, create).await,
        Some(What::SearchEmbeddings(search)) => vectors::search(hub, sender, search).await,
        None => Err(Problem::new(
            Code::BadRequest,
            "the request asks for nothing this hub knows: update the agent",
        )),
    };
    match answered.and_then(within_a_message) {
        Ok(what) => v1::PullReply {
            timeline: hub.timeline.load(Ordering::Relaxed),
            what: Some(what),
            ..Default::default()
        },
        Err(problem) => refused(hub, problem),
    }
}

/// Whether answering may take as long as a provider of embeddings does.
pub fn is_slow(request: &v1::PullRequest) -> bool {
    let what = &request.what;
    matches!(what, Some(What::CreateEmbedding(_) | What::SearchEmbeddings(_)))
}

/// The answer that nothing was done.
pub fn refused(hub: &Hub, problem: Problem) -> v1::PullReply {
    v1::PullReply {
        timeline: hub.timeline.load(Ordering::Relaxed),
        code: problem.code.into(),
        message: problem.sentence,
        what: None,
    }
}

/// Pages end before they outgrow a message; a single state that does, such as one the operator wrote, cannot be told.
fn within_a_message(what: pull_reply::What) -> Result<pull_reply::What, Problem> {
    /// The reply's own fields.
    const REST_BYTES: usize = 64;
    let bytes = what.encoded_len();
    if bytes + REST_BYTES <= MESSAGE_BYTES_MAX {
        return Ok(what);
    }
    let path = match &what {
        pull_reply::What::State(state) => state.path.as_str(),
        pull_reply::What::Page(page) => page.states.first().map_or("", |state| &state.path),
        pull_reply::What::CacheValue(_) => return Err(too_large_to_tell()),
        _ => "",
    };
    let sentence = format!(
        "the state at {path} takes {bytes} bytes, more than the {MESSAGE_BYTES_MAX} of a message: ask the operator to \
         make it smaller"
    );
    Err(Problem::new(Code::TooLarge, sentence))
}

/// What hosts write always fits; what the operator writes may not.
fn too_large_to_tell() -> Problem {
    let sentence = "the value is larger than a message may be: ask the operator to make it smaller";
    Problem::new(Code::TooLarge, sentence)
}

async fn cached(hub: &Hub, host_id: Uuid, key: &str) -> Result<pull_reply::What, Problem> {
    let found = hub.host_cache.get(host_id, key).await?;
    let missing = || Problem::new(Code::NotFound, "there is no value at this key");
    found.map(pull_reply::What::CacheValue).ok_or_else(missing)
}

/// What a host says of itself, and of others, is for it and the operator.
fn is_of_another_host(host_id: Uuid, path: &Path) -> bool {
    matches!(path.parts().scope, Scope::Host(owner) if owner != host_id)
}

async fn get_state(hub: &Hub, host_id: Uuid, get: &v1::Get) -> Result<pull_reply::What, Problem> {
    let path = Path::parse(&get.path)?;
    if is_of_another_host(host_id, &path) {
        let sentence = format!("{path} is another host's own: only that host and the operator read it");
        return Err(Problem::new(Code::NotAllowed, sentence));
    }
    let at_least = AtLeast::of(get, host_id)?;
    let cached = hub.cache.get(&path).await;
    let state = match cached.filter(|state| at_least.is_held_by(Some(state))) {
        Some(state) => Some(state),
        None => stored(hub, &path, &at_least).await?,
    };
    let there = state.filter(|state| !state.deleted);
    let missing = || Problem::new(Code::NotFound, format!("there is no state at {path}"));
    there.map(pull_reply::What::State).ok_or_else(missing)
}

/// The newest state of a path as the database has it, a deleted one included.
async fn stored(hub: &Hub, path: &Path, at_least: &AtLeast) -> Result<Option<v1::State>, Problem> {
    let _permit = permit(hub).await?;
    let read = async || Ok(hub.store.get(path).await?.map(|row| row.to_wire()));
    let state = read().await?;
    if at_least.is_held_by(state.as_ref()) {
        return Ok(state);
    }
    // What the path holds need not be what was asked for: that may have been refused, deleted and forgotten, or another host's.
    if !hub.store.has_come_to(path, at_least).await? {
        let sentence = format!("the hub does not hold that version of {path}: ask again, for it may be on its way");
        return Err(Problem::new(Code::NotYetSettled, sentence));
    }
    // It may have come after the state was read.
    read().await
}

async fn read_scan(hub: &Hub, host_id: Uuid, scan: &v1::Scan) -> Result<pull_reply::What, Problem> {
    if scan.prefix.len() > PATH_BYTES_MAX || scan.prefix.contains('\0') {
        let sentence = format!("a prefix has at most {PATH_BYTES_MAX} bytes and no NUL: scan by a shorter one");
        return Err(Problem::new(Code::BadPath, sentence));
    }
    let _permit = permit(hub).await?;
    let request = Request {
        kind: Kind::Scan,
        subject: &scan.prefix,
        timeline: hub.store.timeline().await?,
    };
    let position = request.position(&scan.cursor)?;
    let text = |bytes: &[u8]| match std::str::from_utf8(bytes) {
        Ok(path) if path.starts_with(&scan.prefix) && !path.contains('\0') => Ok(path.to_owned()),
        _ => Err(bad_cursor()),
    };
    let mut after = position.map(text).transpose()?;
    // Before the first state is read: what is committed from then on is told from there on.
    let starts = match after {
        None => Some(starts::read(hub, &scan.prefix, request.timeline).await?),
        Some(_) => None,
    };
    let mut page = PageBuilder::new(scan.limit);
    while let Some(limit) = page.wanted() {
        let rows = hub.store.scan(&scan.prefix, after.as_deref(), limit).await?;
        page.add(&rows, limit);
        after = page.states.last().map(|state| state.path.clone()).or(after);
    }
    page.leave_out_other_hosts(host_id);
    let mut page = page.finish(&request, after.as_deref().map(str::as_bytes));
    if let Some(starts) = starts {
        page.starts_left_out = starts.is_none();
        page.starts = starts.unwrap_or_default();
    }
    Ok(pull_reply::What::Page(page))
}

async fn read_changes(hub: &Hub, host_id: Uuid, changes: &v1::ChangesSince) -> Result<pull_reply::What, Problem> {
    let stream = changes.stream.as_str();
    if stream != PLAYER_STREAM && stream != HOST_STREAM {
        check_map(stream)?;
    }
    let _permit = permit(hub).await?;
    let request = Request {
        kind: Kind::Changes,
        subject: stream,
        timeline: hub.store.timeline().await?,
    };
    let sequence = |bytes: &[u8]| {
        let sequence = bytes.try_into().map(u64::from_be_bytes);
        sequence
            .ok()
            .filter(|sequence| *sequence <= COUNTER_MAX)
            .ok_or_else(bad_cursor)
    };
    let mut after = request
        .position(&changes.cursor)?
        .map(sequence)
        .transpose()?
        .unwrap_or(0);
    let mut page = PageBuilder::new(changes.limit);
    while let Some(limit) = page.wanted() {
        let rows = hub.store.changes_since(stream, after, limit).await?;
        page.add(&rows, limit);
        after = page.states.last().map_or(after, |state| state.stream_sequence);
    }
    page.leave_out_other_hosts(host_id);
    let page = page.finish(&request, Some(&after.to_be_bytes()));
    Ok(pull_reply::What::Page(page))
}

async fn operation_status(
    hub: &Hub,
    host_id: Uuid,
    question: &v1::OperationStatus,
) -> Result<pull_reply::What, Problem> {
    let bad = |what: &str| Problem::new(Code::BadRequest, what.to_owned());
    let operation_id = read_id(&question.operation_id)
        .ok_or_else(|| bad("an operation id has 16 bytes: give the one that was returned for the operation"))?;
    let position = question.position.map(Position::from);
    if position.is_some_and(|position| position.incarnation.max(position.sequence) > COUNTER_MAX) {
        return Err(bad(
            "the position is larger than the hub counts: give the one the operation was sent with",
        ));
    }
    let _permit = permit(hub).await?;
    let outcome = hub.store.operation_status(host_id, operation_id, position).await?;
    let wire = outcome
        .as_ref()
        .and_then(|outcome| outcome.to_wire(0))
        .unwrap_or_default();
    Ok(pull_reply::What::OperationStatus(v1::OperationStatusReply {
        settled: outcome.is_some(),
        state: wire.state,
        code: wire.code,
        message: wire.message,
    }))
}

/// Bounds what is read at one time.
async fn permit(hub: &Hub) -> Result<tokio::sync::SemaphorePermit<'_>, Problem> {
    let shut_down = |_| Problem::new(Code::HubUnavailable, "the hub is shutting down; try again");
    hub.reads.acquire().await.map_err(shut_down)
}

/// A page in the making: ends at the limit asked for, or before it grows past what one message takes.
struct PageBuilder {
    states: Vec<v1::State>,
    bytes: usize,
    limit: u32,
    more: bool,
    full: bool,
}

impl PageBuilder {
    /// A limit of 0 asks for as many as there may be.
    fn new(limit: u32) -> Self {
        let limit = if limit == 0 {
            PAGE_STATES_MAX
        } else {
            limit.min(PAGE_STATES_MAX)
        };
        Self {
            states: Vec::new(),
            bytes: 0,
            limit,
            more: true,
            full: false,
        }
    }

    /// How many states to read next; `None` when the page is done.
    fn wanted(&self) -> Option<u32> {
        let room = self.limit - u32::try_from(self.states.len()).unwrap_or(self.limit);
        (self.more && !self.full && room > 0).then(|| room.min(STATES_PER_READ))
    }

    /// Adds what a read for `limit` states gave; fewer say that there are no more.
    fn add(&mut self, rows: &[StateRow], limit: u32) {
        self.more = rows.len() >= limit as usize;
        for state in rows.iter().map(StateRow::to_wire) {
            let length = state.encoded_len();
            // As a field of the page: a tag of one byte, the length, the state.
            let bytes = 1 + length_delimiter_len(length) + length;
            if self.bytes + bytes > BATCH_BYTES_MAX && !self.states.is_empty() {
                (self.more, self.full) = (true, true);
                return;
            }
            self.bytes += bytes;
            self.states.push(state);
        }
    }

    /// Once the page is whole, for where that ends is where the next one begins.
    fn leave_out_other_hosts(&mut self, host_id: Uuid) {
        let is_others = |path: &str| Path::parse(path).is_ok_and(|path| is_of_another_host(host_id, &path));
        self.states.retain(|state| !is_others(&state.path));
    }

    fn finish(self, request: &Request<'_>, position: Option<&[u8]>) -> v1::Page {
        let cursor = position.map(|position| request.cursor(position)).unwrap_or_default();
        v1::Page {
            states: self.states,
            cursor: cursor.into(),
            more: self.more,
            ..Default::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(count: u64, payload_bytes: usize) -> Vec<StateRow> {
        let row = |stream_sequence| StateRow {
            path: format!("prontera/MAP_STATE/{stream_sequence}"),
            tenure: 1,
            position: Position {
                incarnation: 1,
                sequence: stream_sequence,
            },
            deleted: false,
            payload: Some("x".repeat(payload_bytes)),
            account_id: 0,
            host_id: Uuid::nil(),
            stream_sequence,
            received_at_ms: 0,
            group_id: None,
            hub_edit: 0,
            keeps_every: false,
        };
        (1..=count).map(row).collect()
    }

    #[test]
    fn a_page_ends_where_the_states_end() {
        let mut page = PageBuilder::new(0);
        assert_eq!(page.wanted(), Some(STATES_PER_READ));
        page.add(&rows(3, 10), STATES_PER_READ);
        assert_eq!((page.wanted(), page.more, page.states.len()), (None, false, 3));
    }

    #[test]
    fn a_page_ends_at_the_limit_and_says_that_there_may_be_more() {
        let mut page = PageBuilder::new(130);
        page.add(&rows(128, 10), page.wanted().expect("room"));
        assert_eq!(page.wanted(), Some(2));
        page.add(&rows(2, 10), 2);
        assert_eq!((page.wanted(), page.more, page.states.len()), (None, true, 130));
    }

    #[test]
    fn a_page_ends_before_it_outgrows_a_message_and_always_moves_on() {
        let mut page = PageBuilder::new(0);
        page.add(&rows(10, 256 * 1024), STATES_PER_READ);
        assert!(page.more && page.wanted().is_none() && page.bytes <= BATCH_BYTES_MAX);
        assert_eq!(page.states.len(), 3);
        let mut page = PageBuilder::new(0);
        page.add(&rows(2, BATCH_BYTES_MAX), STATES_PER_READ);
        assert_eq!(page.states.len(), 1, "a state too large for a page is a page by itself");
    }

    #[test]
    fn a_page_is_counted_as_it_is_encoded() {
        let mut page = PageBuilder::new(0);
        page.add(&rows(100, 200), STATES_PER_READ);
        let encoded = v1::Page {
            states: page.states,
            ..Default::default()
        };
        assert_eq!(page.bytes, encoded.encoded_len());
    }

    #[test]
    fn a_state_that_no_message_takes_is_told_with_its_path() {
        let state = |payload_bytes| pull_reply::What::State(rows(1, payload_bytes)[0].to_wire());
        assert!(within_a_message(state(MESSAGE_BYTES_MAX - 1024)).is_ok());
        let problem = within_a_message(state(MESSAGE_BYTES_MAX)).expect_err("too large");
        assert_eq!(problem.code, Code::TooLarge);
        assert!(problem.sentence.contains("prontera/MAP_STATE/1"), "{problem}");
    }
}

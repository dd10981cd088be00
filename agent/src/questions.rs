//! Questions to the hub that nobody waits for: asked in the background, bounded, their answers kept as results.

use std::{
    collections::{HashSet, VecDeque},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use p2p_sync_proto::{
    Code, Policies, Problem,
    cache::check_key,
    ids,
    policy::Place,
    v1::{self, SyncDataType, pull_reply, pull_request::What},
};
use tokio::{
    runtime::Handle,
    sync::{OwnedSemaphorePermit, Semaphore, TryAcquireError},
    time::timeout,
};
use uuid::Uuid;

use crate::{
    edits,
    events::Events,
    link::Puller,
    maps::{self, MapCall, MapsAnswer},
    read,
    replica::Replicas,
    results::{OperationState, Results, Settled},
    shared::Shared,
    similar,
};

/// Questions that are not answered yet.
const QUESTIONS_MAX: usize = 256;
/// Of what one of them asks with.
const QUESTION_BYTES_MAX: usize = 64 * 1024;
/// Answers kept; beyond it the oldest give way.
const ANSWER_BYTES_MAX: usize = 16 * 1024 * 1024;
/// Counted for an answer beside its data.
const ANSWER_BYTES: usize = 256;
/// For the hub to answer. Longer than a critical call's, for nobody's game loop waits for it.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// Something to ask the hub in the background.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Question {
    /// State, as `request` says: a JSON object, or nothing for an empty one.
    ///
    /// | `request` | reads |
    /// |---|---|
    /// | `{}` | the path that the type's policy gives for `map` and `account_id`; where it needs a character or an entity, `"char_id"` and `"entity"`, or the members that the policy names (`"monster_id"`), say which |
    /// | `{"path": "prontera/MAP_STATE"}` | that path, whatever the type |
    /// | `{"prefix": "prontera/", "limit": 100, "cursor": ""}` | a page of the states below the prefix, in the order of their paths; `limit` and `cursor` may be left out, the next page's cursor is in the answer |
    ///
    /// Each may have `"kept": true`: it is answered at once, without the hub, from what the program follows
    /// ([`crate::Agent::subscribe`]) or the agent has a copy of, as it was pushed: of a map that this host stood by for, two
    /// minutes beyond the moment when it was given it. `NOT_KEPT` where that does not cover what is asked for, its snapshot
    /// has not come whole, or the hub is not heard.
    ///
    /// They may also say what the answer must not be older than, for the hub's caches may be behind for a moment:
    /// `"at_least_sequence": 812`, the `stream_sequence` of an answer or an update, and
    /// `"at_least": {"tenure": 3, "incarnation": 7, "sequence": 5, "host_id": "…"}`, the `version` and the `host_id` of an
    /// answer, or without a `"host_id"` one of this host's own. `NOT_YET_SETTLED` where the hub does not hold that yet, and
    /// `NOT_KEPT` where what is kept here may be older. A page is never older than the question.
    ///
    /// Other members are refused with `BAD_REQUEST` and the nearest known one. The answer's data is
    /// `{"path", "version", "deleted", "account_id", "host_id", "stream_sequence", "received_at_ms", "hub_edit", "data"}`, for
    /// a page `{"states": […], "more", "cursor", "starts": [{"stream", "sequence"}, …], "starts_left_out"}`: the first one says
    /// how far its streams were before it was read. `NOT_FOUND` where there is no state at the path. `hub_edit` is the number
    /// of the last edit of the path by the hub's operator, 0 for none: what is written here afterwards counts as knowing it.
    Read {
        /// What it tells of.
        data_type: SyncDataType,
        /// On which map; may be empty where the type's owner is not one.
        map: String,
        /// Whose; 0 for nobody's.
        account_id: u32,
        /// What to read.
        request: String,
    },
    /// The value that the hosts' cache holds under a key. The answer's data is the value as it is.
    CacheGet {
        /// Under which key.
        key: String,
    },
    /// Whether the hosts' cache holds a value under a key. The answer's data is `true` or `false`.
    CacheExists {
        /// Under which key.
        key: String,
    },
    /// The embedding of a text. The answer's data is a JSON array of numbers.
    CreateEmbedding {
        /// What to embed.
        text: String,
    },
    /// What lies nearest to an embedding, or to a text. The answer's data is a JSON array of objects, the nearest first:
    /// `{"path", "id", "type", "map", "account_id", "text", "similarity", "received_at_ms", "stream_sequence", "metadata"}`.
    SearchEmbeddings {
        /// A JSON array of numbers; or a JSON object with `"embedding"` or `"text"`, and with `"maps"`, `"types"`,
        /// `"since_ms"`, `"until_ms"`, `"min_similarity"` and `"limit"` where it is to be narrowed.
        embedding: String,
        /// How many at most, up to 100; 0: as many as there may be.
        limit: u32,
        /// On this map alone; empty: on all that this host sees.
        map: String,
    },
    /// What lies nearest to a text; answered as [`Self::SearchEmbeddings`].
    SearchTexts {
        /// What to look near to.
        text: String,
        /// How many at most, up to 100; 0: as many as there may be.
        limit: u32,
        /// On this map alone; empty: on all that this host sees.
        map: String,
    },
    /// Who holds a map, who stands by for it. The answer's data, here and with the following, is `{"maps": [{"map", "host_id",
    /// "tenure", "expires_in_ms", "backups", "assistants", "successor", "stream_head"}]}`, hosts' ids as texts or null.
    ListMaps {
        /// Which one; empty: all that this host holds, stands by for, or may be given.
        map: String,
    },
    /// Asks for a map that nobody holds; it is this host's when [`crate::AgentEvent::LeaseGranted`] is told.
    AssignMap {
        /// Which one.
        map: String,
    },
    /// Has a map of this host's handed over while it goes on; [`crate::AgentEvent::LeaseHandingOver`] says when to end it.
    MigrateMap {
        /// Which one.
        map: String,
        /// To whom; `None`: the best that stands by, or may have it.
        to: Option<Uuid>,
    },
    /// Gives a map up: answered when the operations that were taken before are settled, as far as that takes no longer than
    /// 10 s or, of a map that is handed over, the hub's time for it, and the hub has the map. It may not be written from the
    /// call on; what is made for it after is sent too, and goes to limbo once the map has passed on.
    ReleaseMap {
        /// Which one.
        map: String,
    },
}

/// What becomes of a question.
enum Asked {
    Pull(v1::PullRequest),
    Kept(v1::PullRequest),
    Maps(MapCall),
}

impl Question {
    /// What it asks of maps, if that is what it does.
    fn map_call(&self) -> Option<MapCall> {
        Some(match self.clone() {
            Self::ListMaps { map } => MapCall::List { map },
            Self::AssignMap { map } => MapCall::Assign { map },
            Self::MigrateMap { map, to } => MapCall::Migrate { map, to },
            Self::ReleaseMap { map } => MapCall::Release { map },
            _ => return None,
        })
    }

    /// The question, checked.
    fn asked(&self, asker: &dyn Asker) -> Result<Asked, Problem> {
        if let Some(call) = self.map_call() {
            call.check()?;
            return Ok(Asked::Maps(call));
        }
        let request = self.request(&asker.policies(), asker.host_id()?)?;
        let is_kept = matches!(self, Self::Read { request, .. } if read::asks_for_kept(request));
        Ok(if is_kept {
            Asked::Kept(request)
        } else {
            Asked::Pull(request)
        })
    }

    /// The question as it is sent.
    fn request(&self, policies: &Policies, host_id: Uuid) -> Result<v1::PullRequest, Problem> {
        let (Self::Read { request: text, .. }
        | Self::CacheGet { key: text }
        | Self::CacheExists { key: text }
        | Self::CreateEmbedding { text }
        | Self::SearchTexts { text, .. }
        | Self::SearchEmbeddings { embedding: text, .. }
        | Self::ListMaps { map: text }
        | Self::AssignMap { map: text }
        | Self::MigrateMap { map: text, .. }
        | Self::ReleaseMap { map: text }) = self;
        if text.len() > QUESTION_BYTES_MAX {
            let sentence = format!(
                "a question has {} bytes of text, {QUESTION_BYTES_MAX} at most: ask for less",
                text.len()
            );
            return Err(Problem::new(Code::TooLarge, sentence));
        }
        match self {
            Self::Read {
                data_type,
                map,
                account_id,
                request,
            } => {
                let place = Place {
                    host_id,
                    map,
                    account_id: *account_id,
                    char_id: None,
                    entity: None,
                };
                read::requested(policies, *data_type, &place, request)
            }
            Self::CacheGet { key } => {
                check_key(key)?;
                Ok(asking(What::CacheGet(v1::CacheGet { key: key.clone() })))
            }
            Self::CacheExists { key } => {
                check_key(key)?;
                Ok(asking(What::CacheExists(v1::CacheExists { key: key.clone() })))
            }
            Self::CreateEmbedding { text } => Ok(asking(What::CreateEmbedding(v1::CreateEmbedding {
                text: text.clone(),
            }))),
            Self::SearchEmbeddings { embedding, limit, map } => {
                Ok(asking(What::SearchEmbeddings(similar::search(embedding, *limit, map)?)))
            }
            Self::SearchTexts { text, limit, map } => {
                Ok(asking(What::SearchEmbeddings(similar::near_to(text, *limit, map))))
            }
            Self::ListMaps { .. } | Self::AssignMap { .. } | Self::MigrateMap { .. } | Self::ReleaseMap { .. } => {
                unreachable!("these are calls of another kind")
            }
        }
    }

    /// The reply as the JSON that is given to who asked.
    fn answer(&self, reply: v1::PullReply) -> Result<String, Problem> {
        match self {
            Self::Read { .. } => read::answer_json(reply).map(|answer| answer.to_string()),
            _ => match reply.what {
                Some(pull_reply::What::CacheValue(told)) => Ok(told.value),
                Some(pull_reply::What::CacheFlag(there)) => Ok(there.to_string()),
                Some(pull_reply::What::Embedding(told)) => Ok(similar::embedding_json(&told)),
                Some(pull_reply::What::Hits(told)) => Ok(similar::hits_json(&told).to_string()),
                _ => Err(read::unexpected()),
            },
        }
    }
}

fn asking(what: What) -> v1::PullRequest {
    v1::PullRequest { what: Some(what) }
}

/// Whom questions are asked for: who keeps the answers, and knows what a question needs to be told.
pub(crate) trait Asker: Send + Sync {
    fn policies(&self) -> Arc<Policies>;
    /// `HUB_UNAVAILABLE` or `BAD_CREDENTIAL` where it is not known.
    fn host_id(&self) -> Result<Uuid, Problem>;
    fn results(&self) -> &Results;
    fn events(&self) -> &Events;
    /// Notes what was read for the program.
    fn has_read(&self, reply: &v1::PullReply);
    /// As [`maps::call`].
    fn call_maps(self: Arc<Self>, call: MapCall) -> MapsAnswer;
}

impl Asker for Shared {
    fn policies(&self) -> Arc<Policies> {
        self.lanes.policies()
    }

    fn host_id(&self) -> Result<Uuid, Problem> {
        self.config.credential().map(|credential| credential.host_id)
    }

    fn results(&self) -> &Results {
        &self.results
    }

    fn events(&self) -> &Events {
        &self.events
    }

    fn has_read(&self, reply: &v1::PullReply) {
        Self::has_read(self, edits::of_reply(reply));
    }

    fn call_maps(self: Arc<Self>, call: MapCall) -> MapsAnswer {
        maps::call(&self, call)
    }
}

/// Asks, and keeps what was answered.
pub(crate) struct Questions {
    asker: Arc<dyn Asker>,
    puller: Arc<Puller>,
    /// What can be read without the hub.
    replicas: Vec<Arc<Replicas>>,
    places: Arc<Semaphore>,
    unanswered: Mutex<HashSet<Uuid>>,
    kept: Mutex<Kept>,
    /// Who waited for an answer has waited in vain, and the hub has answered no question since.
    silent: AtomicBool,
}

impl Questions {
    pub(crate) fn new(asker: Arc<dyn Asker>, puller: Arc<Puller>, replicas: Vec<Arc<Replicas>>) -> Arc<Self> {
        Arc::new(Self {
            asker,
            puller,
            replicas,
            places: Arc::new(Semaphore::new(QUESTIONS_MAX)),
            unanswered: Mutex::default(),
            kept: Mutex::default(),
            silent: AtomicBool::new(false),
        })
    }

    /// Takes a question and gives the id that its answer comes under. Waits for nothing.
    pub(crate) fn ask(self: &Arc<Self>, runtime: &Handle, question: Question, notify: bool) -> Result<Uuid, Problem> {
        let asker = &self.asker;
        let what = question.asked(&**asker)?;
        let place = self.places.clone().try_acquire_owned().map_err(|error| match error {
            TryAcquireError::Closed => shut_down(),
            TryAcquireError::NoPermits => {
                let sentence =
                    format!("{QUESTIONS_MAX} questions wait for the hub's answer: ask again when some are answered");
                Problem::new(Code::QueueFull, sentence)
            }
        })?;
        if notify {
            asker.events().check_answers()?;
            asker.events().reserve_settled()?;
        }
        let id = ids::new_id();
        asker.results().accept_question(id, notify);
        self.unanswered().insert(id);
        let unanswered = Unanswered {
            questions: self.clone(),
            id,
            settled: None,
            _place: place,
        };
        match what {
            Asked::Pull(request) => drop(runtime.spawn(unanswered.ask(question, request, false))),
            Asked::Kept(request) => match self.kept(&request) {
                Err(problem) if problem.code == Code::NotKept && self.puller.keeps() => {
                    runtime.spawn(unanswered.ask(question, request, true));
                }
                kept => unanswered.ask_here(&question, kept),
            },
            Asked::Maps(call) => {
                let _inside = runtime.enter();
                runtime.spawn(unanswered.ask_of_maps(asker.clone().call_maps(call)));
            }
        }
        Ok(id)
    }

    /// What a request to read asks for, without the hub; `NOT_KEPT` where nobody here can say.
    pub(crate) fn kept(&self, request: &v1::PullRequest) -> Result<v1::PullReply, Problem> {
        let asker = self.asker.host_id()?;
        let mut answers = self.replicas.iter().map(|replicas| replicas.answer(request, asker));
        let is_known = |answer: &Result<_, Problem>| !matches!(answer, Err(problem) if problem.code == Code::NotKept);
        let known = answers.find(is_known);
        let not_kept = || {
            let sentence = "this is not kept here: follow its stream, wait for its snapshot, or ask the hub";
            Err(Problem::new(Code::NotKept, sentence))
        };
        known.unwrap_or_else(not_kept)
    }

    /// Takes no more questions, and settles those that are not answered: the agent shuts down, whatever becomes of the
    /// tasks that ask.
    pub(crate) fn close(&self) {
        self.places.close();
        let unanswered: Vec<Uuid> = self.unanswered().iter().copied().collect();
        for id in unanswered {
            self.settle(id, &Settled::rejected(shut_down()));
        }
    }

    fn unanswered(&self) -> MutexGuard<'_, HashSet<Uuid>> {
        self.unanswered.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for an answer, at most `timeout`; `UNKNOWN` where it is not there by then. After one such wait was in vain,
    /// and where the link does not answer, gives what is there at once, until the hub answers a question again.
    pub(crate) fn wait(&self, id: Uuid, link_answers: bool, timeout: Duration) -> Settled {
        let results = self.asker.results();
        let is_worth_waiting = link_answers && !self.silent.load(Ordering::Relaxed);
        let settled = results.wait(id, Some(if is_worth_waiting { timeout } else { Duration::ZERO }));
        if is_worth_waiting && settled.state == OperationState::Unknown {
            self.silent.store(true, Ordering::Relaxed);
        }
        settled
    }

    fn settle(&self, id: Uuid, settled: &Settled) {
        if !self.unanswered().remove(&id) {
            return;
        }
        let code = settled.problem.as_ref().map_or(Code::None, |problem| problem.code);
        if !matches!(code, Code::HubUnavailable | Code::ShutDown) {
            self.silent.store(false, Ordering::Relaxed);
        }
        let bytes = settled.data.as_ref().map_or(0, |data| data.len());
        self.asker.results().answer_question(id, settled);
        let too_many = self.kept.lock().unwrap_or_else(PoisonError::into_inner).add(id, bytes);
        for oldest in too_many {
            self.asker.results().forget(oldest);
        }
    }
}

/// A question on its way; settles even where its task is ended before the answer.
struct Unanswered {
    questions: Arc<Questions>,
    id: Uuid,
    settled: Option<Settled>,
    _place: OwnedSemaphorePermit,
}

impl Unanswered {
    /// Asks the hub; `kept`: what the agent in between has, without the hub.
    async fn ask(mut self, question: Question, request: v1::PullRequest, kept: bool) {
        let link = self.questions.puller.clone();
        let pulled = timeout(ANSWER_TIMEOUT, link.pull_kept(request, ANSWER_TIMEOUT, kept)).await;
        let silent = |_| Err(Problem::new(Code::HubUnavailable, "the hub did not answer in time"));
        self.answered(&question, pulled.unwrap_or_else(silent));
    }

    /// Answers what is kept here.
    fn ask_here(mut self, question: &Question, kept: Result<v1::PullReply, Problem>) {
        self.answered(question, kept);
    }

    async fn ask_of_maps(mut self, answer: MapsAnswer) {
        let answer = answer.await.map(|maps| maps.to_string());
        self.settled_by(answer);
    }

    fn answered(&mut self, question: &Question, pulled: Result<v1::PullReply, Problem>) {
        if let Ok(reply) = &pulled {
            self.questions.asker.has_read(reply);
        }
        self.settled_by(pulled.and_then(|reply| question.answer(reply)));
    }

    fn settled_by(&mut self, answer: Result<String, Problem>) {
        self.settled = Some(match answer {
            Ok(data) => Settled {
                data: Some(data.into()),
                ..Settled::plain(OperationState::Applied)
            },
            // Asked just before. A connection that ends with the runtime may tell its callers before their tasks are ended.
            Err(_) if self.questions.places.is_closed() => return,
            Err(problem) => Settled::rejected(problem),
        });
    }
}

impl Drop for Unanswered {
    fn drop(&mut self) {
        let settled = self.settled.take().unwrap_or_else(|| Settled::rejected(shut_down()));
        self.questions.settle(self.id, &settled);
    }
}

fn shut_down() -> Problem {
    let sentence = "the agent shut down before the hub answered: ask again after it has started";
    Problem::new(Code::ShutDown, sentence)
}

/// The answers that are kept, oldest first. Those that results has let go by their time are among the oldest.
#[derive(Default)]
struct Kept {
    answers: VecDeque<(Uuid, usize)>,
    bytes: usize,
}

impl Kept {
    /// Counts an answer; gives those that have to go.
    fn add(&mut self, id: Uuid, bytes: usize) -> Vec<Uuid> {
        self.answers.push_back((id, ANSWER_BYTES + bytes));
        self.bytes += ANSWER_BYTES + bytes;
        let mut too_many = Vec::new();
        while self.bytes > ANSWER_BYTES_MAX
            && let Some((oldest, bytes)) = self.answers.pop_front()
        {
            self.bytes -= bytes;
            too_many.push(oldest);
        }
        too_many
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    /// Who asks where there is neither agent nor hub.
    struct Nobody {
        results: Results,
        events: Arc<Events>,
    }

    impl Asker for Nobody {
        fn policies(&self) -> Arc<Policies> {
            Arc::new(Policies::builtin())
        }

        fn host_id(&self) -> Result<Uuid, Problem> {
            Ok(Uuid::nil())
        }

        fn results(&self) -> &Results {
            &self.results
        }

        fn events(&self) -> &Events {
            &self.events
        }

        fn has_read(&self, _: &v1::PullReply) {}

        fn call_maps(self: Arc<Self>, _: MapCall) -> MapsAnswer {
            unreachable!("nobody asks for maps here")
        }
    }

    #[test]
    fn a_connection_that_breaks_because_the_agent_ends_is_told_as_its_end() {
        let events = Arc::new(Events::new());
        let nobody = Arc::new(Nobody {
            results: Results::new(Duration::from_mins(1), None, None, events.clone()),
            events,
        });
        let (breaks, broken) = mpsc::sync_channel::<()>(0);
        let broken = Mutex::new(broken);
        let ask = move |_: &v1::PullRequest, _, _| {
            let _ = broken.lock().expect("one asks at a time").recv();
            Err(Problem::new(Code::HubUnavailable, "the connection is closed"))
        };
        let questions = Questions::new(nobody.clone(), Arc::new(Puller::through_agent(Arc::new(ask))), vec![]);
        let runtime = tokio::runtime::Runtime::new().expect("can be made");
        let question = || Question::CacheGet { key: "key".to_owned() };
        let code_of = |id| {
            let settled = nobody.results.wait(id, Some(Duration::from_mins(1)));
            settled.problem.map(|problem| problem.code)
        };
        let before = questions.ask(runtime.handle(), question(), false).expect("room");
        breaks.send(()).expect("it is asked");
        assert_eq!(code_of(before), Some(Code::HubUnavailable));

        let asked = questions.ask(runtime.handle(), question(), false).expect("room");
        questions.close();
        assert_eq!(code_of(asked), Some(Code::ShutDown), "before its task has ended");
        breaks.send(()).expect("it is asked");
        drop(runtime);
        assert_eq!(code_of(asked), Some(Code::ShutDown));
        let runtime = tokio::runtime::Runtime::new().expect("can be made");
        let refused = questions.ask(runtime.handle(), question(), false).expect_err("over");
        assert_eq!(refused.code, Code::ShutDown);
    }

    #[test]
    fn answers_beyond_the_bound_push_the_oldest_out() {
        let mut kept = Kept::default();
        let mebibyte = 1024 * 1024 - ANSWER_BYTES;
        for number in 0..16 {
            assert!(kept.add(Uuid::from_u128(number), mebibyte).is_empty());
        }
        assert_eq!(kept.add(Uuid::from_u128(16), 0), [Uuid::from_u128(0)]);
        let next = kept.add(Uuid::from_u128(17), 3 * mebibyte);
        assert_eq!(next, [Uuid::from_u128(1), Uuid::from_u128(2)]);
    }

    #[test]
    fn small_answers_are_bounded_too() {
        let mut kept = Kept::default();
        for number in 0..100_000 {
            kept.add(Uuid::from_u128(number), 0);
        }
        assert_eq!(kept.answers.len(), ANSWER_BYTES_MAX / ANSWER_BYTES);
    }
}

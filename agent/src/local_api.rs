//! What local programs say to an agent, one JSON object a line, and what it answers: over a Unix socket in the outbox's
//! folder, or over standard input.

use std::{
    io::{self, BufRead, Write},
    path::Path,
    time::Duration,
};

use p2p_sync_proto::{Code, Problem, path, policy::parse_type, v1};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json, value::RawValue};
use uuid::Uuid;

use crate::{
    agent::Agent,
    lanes::{Priority, Submission},
    outbox::DeadLetter,
    results::{Event, Settled},
};

/// Longest line read, bytes: the largest payload and what goes around it.
const LINE_BYTES_MAX: u64 = (p2p_sync_proto::limits::PAYLOAD_BYTES_MAX + 4096) as u64;

/// What a local program can ask for.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Action {
    /// An operation; without `data` it deletes.
    Put,
    Get,
    Scan,
    Result,
    #[default]
    Status,
    Flush,
    DeadLetters,
}

/// One line to the agent: an action and what it takes. Flat, so that `data` stays the text it is.
#[derive(Debug, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Request {
    #[serde(rename = "do")]
    pub(crate) action: Action,
    /// Given back with the answer, so that answers can be told apart.
    #[serde(skip_serializing_if = "Value::is_null")]
    pub(crate) tag: Value,
    /// By name or number.
    #[serde(rename = "type")]
    pub(crate) data_type: String,
    pub(crate) map: String,
    pub(crate) account_id: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) entity: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) char_id: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) data: Option<Box<RawValue>>,
    /// By the critical lane, whatever the type.
    pub(crate) priority: bool,
    /// Waits so long for the operation to be settled; 0 does not wait.
    pub(crate) wait_ms: u64,
    /// Of the state to get.
    pub(crate) path: String,
    /// Of the paths to scan.
    pub(crate) prefix: String,
    /// How many to show; 0 as many as the hub gives.
    pub(crate) limit: u32,
    /// From the last page's answer.
    pub(crate) cursor: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) operation_id: Option<Uuid>,
    /// For a flush.
    pub(crate) timeout_ms: u64,
}

/// Answers lines until the input ends.
pub(crate) fn serve(agent: &Agent, mut input: impl BufRead, mut output: impl Write) -> io::Result<()> {
    let mut line = Vec::new();
    loop {
        line.clear();
        if io::Read::take(&mut input, LINE_BYTES_MAX).read_until(b'\n', &mut line)? == 0 {
            return Ok(());
        }
        if line.iter().all(u8::is_ascii_whitespace) {
            continue;
        }
        if line.last() != Some(&b'\n') && line.len() as u64 == LINE_BYTES_MAX {
            let sentence = format!("a line has more than {LINE_BYTES_MAX} bytes: send less at once");
            writeln!(
                output,
                "{}",
                told(Value::Null, Err(Problem::new(Code::TooLarge, sentence)))
            )?;
            return Ok(());
        }
        writeln!(output, "{}", answer_line(agent, &line))?;
        output.flush()?;
    }
}

fn answer_line(agent: &Agent, line: &[u8]) -> Value {
    match serde_json::from_slice::<Request>(line) {
        Ok(request) => told(request.tag.clone(), answer(agent, &request)),
        Err(error) => {
            let sentence = format!("not a request: {error}; see `p2p-sync-agent run --help`");
            told(Value::Null, Err(Problem::new(Code::BadRequest, sentence)))
        }
    }
}

fn told(tag: Value, answer: Result<Value, Problem>) -> Value {
    let mut told = answer.unwrap_or_else(
        |problem| json!({ "code": problem.code as i32, "label": problem.code.label(), "error": problem.sentence }),
    );
    if !tag.is_null() {
        told["tag"] = tag;
    }
    told
}

/// Answers one request; waits as it says.
pub(crate) fn answer(agent: &Agent, request: &Request) -> Result<Value, Problem> {
    match request.action {
        Action::Put => put(agent, request),
        Action::Get | Action::Scan => read(request, |question| agent.pull(question, Some(READ_TIMEOUT))),
        Action::Result => {
            let needed = || Problem::new(Code::BadRequest, "say which operation: \"operation_id\"");
            let id = request.operation_id.ok_or_else(needed)?;
            Ok(result_json(id, &agent.result(id)))
        }
        Action::Status => Ok(serde_json::to_value(agent.status()).expect("plain data")),
        Action::Flush => {
            let flushed = agent.flush(Duration::from_millis(request.timeout_ms));
            Ok(json!({ "flushed": flushed, "outbox_operations": agent.status().outbox_operations }))
        }
        Action::DeadLetters => {
            let letters = agent.dead_letters(request.limit as usize)?;
            Ok(json!({ "dead_letters": letters.iter().map(dead_letter_json).collect::<Vec<_>>() }))
        }
    }
}

/// How long a command line waits for a page of state.
pub(crate) const READ_TIMEOUT: Duration = Duration::from_secs(10);

fn put(agent: &Agent, put: &Request) -> Result<Value, Problem> {
    let submission = Submission {
        data_type: parse_type(&put.data_type)?,
        map: &put.map,
        account_id: put.account_id,
        entity: put.entity.as_deref(),
        char_id: put.char_id,
        payload: put.data.as_deref().map(RawValue::get),
        priority: if put.priority {
            Priority::Critical
        } else {
            Priority::ByType
        },
    };
    let id = agent.submit(&submission)?;
    let settled = match put.wait_ms {
        0 => agent.result(id),
        wait_ms => agent.wait(id, Some(Duration::from_millis(wait_ms))),
    };
    Ok(result_json(id, &settled))
}

/// Answers what is asked of the hub alone, by whoever can ask it.
pub(crate) fn read(
    request: &Request,
    ask: impl FnOnce(v1::PullRequest) -> Result<v1::PullReply, Problem>,
) -> Result<Value, Problem> {
    let what = if matches!(request.action, Action::Scan) {
        let not_one = || Problem::new(Code::BadCursor, "the cursor is not one: leave it out to begin again");
        let cursor = read_hex(&request.cursor).ok_or_else(not_one)?.into();
        v1::pull_request::What::Scan(v1::Scan {
            prefix: request.prefix.clone(),
            limit: request.limit,
            cursor,
        })
    } else {
        let path = path::Path::parse(&request.path)?;
        v1::pull_request::What::Get(v1::Get {
            path: path.as_str().to_owned(),
        })
    };
    match ask(v1::PullRequest { what: Some(what) })?.what {
        Some(v1::pull_reply::What::State(state)) => Ok(state_json(&state)),
        Some(v1::pull_reply::What::Page(page)) => {
            let states: Vec<Value> = page.states.iter().map(state_json).collect();
            Ok(json!({ "states": states, "more": page.more, "cursor": write_hex(&page.cursor) }))
        }
        _ => Err(Problem::new(
            Code::Internal,
            "the hub answered something else: update the agent",
        )),
    }
}

fn state_json(state: &v1::State) -> Value {
    let version = state.version.unwrap_or_default();
    let data: Value = serde_json::from_slice(&state.payload).unwrap_or_default();
    json!({
        "path": state.path,
        "version": { "tenure": version.tenure, "incarnation": version.incarnation, "sequence": version.sequence },
        "deleted": state.deleted,
        "account_id": state.account_id,
        "stream_sequence": state.stream_sequence,
        "received_at_ms": state.received_at_ms,
        "data": data,
    })
}

fn result_json(operation_id: Uuid, settled: &Settled) -> Value {
    let mut result = json!({ "operation_id": operation_id, "state": settled.state });
    if let Some(problem) = &settled.problem {
        result["code"] = json!(problem.code as i32);
        result["label"] = json!(problem.code.label());
        result["error"] = json!(problem.sentence);
    }
    result
}

/// A change of an operation's state, as `run --events` writes it.
pub(crate) fn event_json(event: &Event) -> Value {
    let mut line = result_json(event.operation_id, &event.settled);
    line["position"] = json!(event.position.to_string());
    line
}

fn dead_letter_json(letter: &DeadLetter) -> Value {
    let operation = letter.operation.as_ref();
    let data = operation.and_then(|operation| match operation.payload.as_ref()? {
        v1::operation::Payload::Full(json) => serde_json::from_slice::<Value>(json).ok(),
        _ => None,
    });
    let id = operation.and_then(|operation| p2p_sync_proto::ids::read_id(&operation.operation_id));
    json!({
        "position": letter.position.to_string(),
        "operation_id": id,
        "path": operation.map(|operation| operation.path.as_str()),
        "code": letter.problem.code as i32,
        "label": letter.problem.code.label(),
        "error": letter.problem.sentence,
        "at_ms": letter.at_ms,
        "data": data,
    })
}

fn write_hex(bytes: &[u8]) -> String {
    bytes
        .iter()
        .fold(String::new(), |text, byte| text + &format!("{byte:02x}"))
}

fn read_hex(text: &str) -> Option<Vec<u8>> {
    let digit = |at: usize| u8::from_str_radix(text.get(at..at + 2)?, 16).ok();
    (0..text.len()).step_by(2).map(digit).collect()
}

#[cfg(unix)]
mod socket {
    use std::{
        io::{BufReader, Write as _},
        os::unix::{
            fs::PermissionsExt as _,
            net::{UnixListener, UnixStream},
        },
        sync::{
            Arc,
            atomic::{AtomicUsize, Ordering},
        },
        time::Duration,
    };

    use super::{Agent, BufRead as _, Code, Path, Problem, Request, Value, io};

    /// Programs connected at a time.
    const CONNECTIONS_MAX: usize = 16;

    fn path(outbox_dir: &Path) -> std::path::PathBuf {
        outbox_dir.join("agent.sock")
    }

    /// Serves local programs on the outbox's socket, each on a thread, as long as the process lives.
    ///
    /// Who may open the outbox may use it: the socket is the owner's alone.
    pub(crate) fn listen(agent: &Arc<Agent>, outbox_dir: &Path) -> io::Result<()> {
        let path = path(outbox_dir);
        // The outbox is locked by this process: a socket that is there is a dead one's.
        let _ = std::fs::remove_file(&path);
        let listener = UnixListener::bind(&path)?;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))?;
        let agent = agent.clone();
        let connections = Arc::new(AtomicUsize::new(0));
        std::thread::Builder::new()
            .name("p2p-local".to_owned())
            .spawn(move || {
                for stream in listener.incoming().flatten() {
                    if connections.fetch_add(1, Ordering::Relaxed) >= CONNECTIONS_MAX {
                        connections.fetch_sub(1, Ordering::Relaxed);
                        continue;
                    }
                    let (agent, connections) = (agent.clone(), connections.clone());
                    std::thread::spawn(move || {
                        if let Err(error) = super::serve(&agent, BufReader::new(&stream), &stream) {
                            tracing::debug!(%error, "a local program went away");
                        }
                        connections.fetch_sub(1, Ordering::Relaxed);
                    });
                }
            })?;
        Ok(())
    }

    /// Takes the socket away, so that nobody waits at a closed door.
    pub(crate) fn close(outbox_dir: &Path) {
        // Gone already is as good.
        let _ = std::fs::remove_file(path(outbox_dir));
    }

    /// Asks the agent that runs on an outbox; `None` where none does.
    pub(crate) fn ask(outbox_dir: &Path, request: &Request) -> Option<Result<Value, Problem>> {
        let mut stream = UnixStream::connect(path(outbox_dir)).ok()?;
        Some(exchange(&mut stream, request).unwrap_or_else(|error| {
            Err(Problem::new(
                Code::Internal,
                format!("the running agent did not answer: {error}"),
            ))
        }))
    }

    fn exchange(stream: &mut UnixStream, request: &Request) -> io::Result<Result<Value, Problem>> {
        stream.set_read_timeout(Some(Duration::from_mins(10)))?;
        let line = serde_json::to_string(request)?;
        writeln!(stream, "{line}")?;
        let mut answer = String::new();
        BufReader::new(stream).read_line(&mut answer)?;
        let answer: Value = serde_json::from_str(&answer)?;
        Ok(
            match (
                answer["error"].as_str(),
                answer["code"].as_i64(),
                answer["state"].as_str(),
            ) {
                (Some(sentence), Some(code), None) => {
                    let code = i32::try_from(code)
                        .ok()
                        .and_then(|code| Code::try_from(code).ok())
                        .unwrap_or(Code::Internal);
                    Err(Problem::new(code, sentence))
                }
                _ => Ok(answer),
            },
        )
    }
}

#[cfg(unix)]
pub(crate) use socket::{ask, close, listen};

/// Without Unix sockets there is standard input, and commands open the outbox themselves.
#[cfg(not(unix))]
pub(crate) fn ask(_: &Path, _: &Request) -> Option<Result<Value, Problem>> {
    None
}

/// See the counterpart for Unix: nothing is served here.
#[cfg(not(unix))]
pub(crate) fn listen(_: &std::sync::Arc<Agent>, _: &Path) -> io::Result<()> {
    Ok(())
}

/// See the counterpart for Unix: there is nothing to take away.
#[cfg(not(unix))]
pub(crate) fn close(_: &Path) {}

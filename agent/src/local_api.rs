//! What local programs say to an agent, one JSON object a line, and what it answers: over a Unix socket in the outbox's
//! folder, or over standard input.

#[cfg(unix)]
mod client;
#[cfg(unix)]
mod socket;
#[cfg(unix)]
mod watch_lines;

use std::{
    io::{self, BufRead, Write},
    time::Duration,
};

use p2p_sync_proto::{
    Code, Problem,
    group::{readable, refused_member},
    limits::{GROUP_BYTES_MAX, GROUP_MEMBERS_MAX, PAYLOAD_BYTES_MAX},
    policy::parse_type,
    v1::{self, pull_request::What},
};
use prost::Message as _;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json, value::RawValue};
use uuid::Uuid;

use crate::{
    agent::Agent,
    attach_lines::{read_base64, write_base64},
    edits,
    lanes::{Priority, Submission},
    maps::{MapCall, read_host},
    outbox::DeadLetter,
    read,
    results::{Event, Settled},
    similar,
    subscriptions::Subscription,
    unsaid::Unsaid,
};

/// Longest line read, bytes: the largest group, or value with its quotes escaped, and what goes around it.
pub(crate) const LINE_BYTES_MAX: u64 = (GROUP_BYTES_MAX + GROUP_MEMBERS_MAX * 256 + 4096) as u64;
const _: () = assert!(LINE_BYTES_MAX > 2 * p2p_sync_proto::limits::CACHE_VALUE_BYTES_MAX as u64 + 4096);
/// A payload in base64 fits too.
const _: () = assert!(LINE_BYTES_MAX > (PAYLOAD_BYTES_MAX / 3 * 4 + 8192) as u64);

/// What a local program can ask for.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Action {
    /// An operation; without `data` it deletes.
    Put,
    /// Operations that take effect together or not at all.
    Group,
    Get,
    Scan,
    /// Each change of a stream, a line for each until the connection ends.
    Watch,
    Result,
    #[default]
    Status,
    Flush,
    DeadLetters,
    CacheGet,
    CacheSet,
    CacheDelete,
    CacheExists,
    Publish,
    /// The embedding of a text.
    Embed,
    /// What lies nearest to an embedding or a text.
    Similar,
    /// One map, or all that this host has to do with.
    ListMaps,
    AssignMap,
    MigrateMap,
    ReleaseMap,
    /// Gives all maps away; tells how far that is.
    Leave,
    /// Ends the agent.
    Stop,
    /// One request of the contract's `Pull` service, and its reply.
    Pull,
    /// Begins a connection that hands operations over; see `attach_lines`.
    Attach,
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
    /// Of a group.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) members: Vec<Member>,
    /// By the critical lane, whatever the type.
    pub(crate) priority: bool,
    /// Waits so long for the operation to be settled; 0 does not wait.
    pub(crate) wait_ms: u64,
    /// Of the state to get.
    pub(crate) path: String,
    /// What it must not be older than: a version,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) at_least: Option<read::Known>,
    /// and a position in its stream.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) at_least_sequence: Option<u64>,
    /// Of the paths to scan or watch.
    pub(crate) prefix: String,
    /// To watch.
    pub(crate) stream: String,
    /// To watch, by name or number; empty: all.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) types: Vec<String>,
    /// How many to show; 0 as many as the hub gives.
    pub(crate) limit: u32,
    /// From the last page's answer.
    pub(crate) cursor: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) operation_id: Option<Uuid>,
    /// For a flush, for a pull, and for what asks the hub's cache; 0 takes `critical_timeout_ms` there.
    pub(crate) timeout_ms: u64,
    /// Of a cached value.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(crate) key: String,
    /// To cache.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(crate) value: String,
    /// 0 takes `cache_expiry_seconds`.
    pub(crate) expiry_seconds: u32,
    /// To publish on.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(crate) channel: String,
    /// To publish.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(crate) message: String,
    /// To embed.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(crate) text: String,
    /// An embedding, or an object that says what is searched.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) search: Option<Box<RawValue>>,
    /// Base64 of a `PullRequest`; to watch, of a `SubscribeRequest`, whose updates come as they are.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(crate) pull: String,
    /// Of a `pull`: what the agent has without the hub.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub(crate) kept: bool,
    /// Whom a map goes to: a host's id, or nothing for whom the hub chooses.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub(crate) to: String,
    /// Which program attaches: drawn anew at each of its starts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) client: Option<Uuid>,
}

/// One operation of a group; without `data` it deletes.
#[derive(Debug, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Member {
    /// By name or number.
    #[serde(rename = "type")]
    data_type: String,
    map: String,
    account_id: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    entity: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    char_id: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    data: Option<Box<RawValue>>,
}

/// Answers lines until the input ends. `is_gone` tells whether the reader of a watch went away; where nobody can tell,
/// there is none.
pub(crate) fn serve(
    agent: &Agent,
    mut input: impl BufRead,
    mut output: impl Write,
    is_gone: Option<&dyn Fn() -> bool>,
) -> io::Result<()> {
    let mut line = Vec::new();
    let read = Unsaid::default();
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
        let not_one = |error| {
            let sentence = format!("not a request: {error}; see `p2p-sync-agent run --help`");
            (Value::Null, Err(Problem::new(Code::BadRequest, sentence)))
        };
        let (tag, answered) = match (serde_json::from_slice::<Request>(&line), is_gone) {
            (Ok(request), Some(is_gone)) if matches!(request.action, Action::Watch) => {
                if !request.pull.is_empty() {
                    return match agent.pass_on(&request.pull, &mut output) {
                        Ok(passed) => passed,
                        Err(problem) => writeln!(output, "{}", told(request.tag, Err(problem))),
                    };
                }
                match followed(&request).and_then(|subscription| agent.watch(subscription)) {
                    Ok(watch) => return watch.write_lines(&mut output, is_gone),
                    Err(problem) => (request.tag, Err(problem)),
                }
            }
            (Ok(request), _) => (request.tag.clone(), answer(agent, &request, &read)),
            (Err(error), _) => not_one(error),
        };
        writeln!(output, "{}", told(tag, answered))?;
        output.flush()?;
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

/// Answers one request; waits as it says. `read` is what was read over the same connection: what is then written there
/// counts as knowing it. What others read, people at a command line among them, says nothing of who writes.
pub(crate) fn answer(agent: &Agent, request: &Request, read: &Unsaid) -> Result<Value, Problem> {
    match request.action {
        Action::Put => {
            say(agent, read);
            put(agent, request)
        }
        Action::Group => {
            say(agent, read);
            group(agent, request)
        }
        Action::Get | Action::Scan => ask_hub(request, |question| {
            let reply = agent.pull_for_another(question, Some(READ_TIMEOUT))?;
            read.has_read(edits::of_reply(&reply));
            Ok(reply)
        }),
        Action::Watch => Err(Problem::new(
            Code::BadRequest,
            "watching takes a connection of its own: connect to agent.sock in the outbox's folder",
        )),
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
        Action::CacheGet => {
            let value = agent.cache_get(&request.key, cache_timeout(agent, request))?;
            Ok(json!({ "value": value.as_deref() }))
        }
        Action::CacheExists => {
            let exists = agent.cache_exists(&request.key, cache_timeout(agent, request))?;
            Ok(json!({ "exists": exists }))
        }
        Action::CacheSet => {
            agent.cache_set(&request.key, &request.value, request.expiry_seconds)?;
            Ok(json!({ "taken": true }))
        }
        Action::CacheDelete => {
            agent.cache_delete(&request.key)?;
            Ok(json!({ "taken": true }))
        }
        Action::Publish => {
            agent.publish(&request.channel, &request.message)?;
            Ok(json!({ "taken": true }))
        }
        Action::Embed | Action::Similar => {
            let reply = agent.pull_for_another(vectors_asked(request)?, Some(READ_TIMEOUT))?;
            match reply.what {
                Some(v1::pull_reply::What::Embedding(told)) => Ok(json!({ "embedding": told.values })),
                Some(v1::pull_reply::What::Hits(told)) => Ok(json!({ "hits": similar::hits_json(&told) })),
                _ => Err(read::unexpected()),
            }
        }
        Action::ListMaps | Action::AssignMap | Action::MigrateMap | Action::ReleaseMap => {
            agent.call_maps(map_call(request)?)
        }
        Action::Leave => agent.leave(),
        Action::Stop => {
            agent.ask_to_end();
            Ok(json!({ "stopping": true }))
        }
        Action::Pull => {
            let not_one = || Problem::new(Code::BadRequest, "\"pull\" is no base64 of a PullRequest");
            let bytes = read_base64(&request.pull).ok_or_else(not_one)?;
            let question = v1::PullRequest::decode(bytes.as_slice()).map_err(|_| not_one())?;
            let timeout = Duration::from_millis(request.timeout_ms).min(READ_TIMEOUT);
            let reply = if request.kept {
                agent.kept(&question)?
            } else {
                agent.pull_for_another(question, Some(timeout))?
            };
            Ok(json!({ "reply": write_base64(&reply.encode_to_vec()) }))
        }
        Action::Attach => Err(Problem::new(
            Code::BadRequest,
            "attaching is the first line of a connection to the agent's socket",
        )),
    }
}

fn map_call(request: &Request) -> Result<MapCall, Problem> {
    let map = request.map.clone();
    Ok(match request.action {
        Action::AssignMap => MapCall::Assign { map },
        Action::MigrateMap => MapCall::Migrate {
            map,
            to: read_host(&request.to)?,
        },
        Action::ReleaseMap => MapCall::Release { map },
        _ => MapCall::List { map },
    })
}

fn vectors_asked(request: &Request) -> Result<v1::PullRequest, Problem> {
    let what = if matches!(request.action, Action::Embed) {
        let text = request.text.clone();
        What::CreateEmbedding(v1::CreateEmbedding { text })
    } else {
        let sought = request.search.as_deref().map_or("", RawValue::get);
        What::SearchEmbeddings(similar::search(sought, request.limit, &request.map)?)
    };
    Ok(v1::PullRequest { what: Some(what) })
}

fn cache_timeout(agent: &Agent, request: &Request) -> Duration {
    match request.timeout_ms {
        0 => agent.critical_timeout(),
        timeout_ms => Duration::from_millis(timeout_ms),
    }
}

/// How long a command line waits for a page of state.
pub(crate) const READ_TIMEOUT: Duration = Duration::from_secs(10);

fn say(agent: &Agent, read: &Unsaid) {
    loop {
        let seen = read.take(0);
        if seen.is_empty() {
            return;
        }
        agent.has_read(seen.iter().map(|(path, edit)| (path.as_str(), *edit)));
    }
}

fn put(agent: &Agent, put: &Request) -> Result<Value, Problem> {
    let submission = Submission {
        data_type: parse_type(&put.data_type)?,
        map: &put.map,
        account_id: put.account_id,
        entity: put.entity.as_deref(),
        char_id: put.char_id,
        payload: put.data.as_deref().map(RawValue::get),
        priority: priority(put),
        notify: false,
    };
    let id = agent.submit(&submission)?;
    Ok(settled_in(agent, id, put.wait_ms))
}

fn group(agent: &Agent, group: &Request) -> Result<Value, Problem> {
    let members: Vec<Submission<'_>> = (0..)
        .zip(&group.members)
        .map(|(at, member)| {
            Ok(Submission {
                data_type: parse_type(&member.data_type).map_err(|problem| refused_member(at, problem))?,
                map: &member.map,
                account_id: member.account_id,
                entity: member.entity.as_deref(),
                char_id: member.char_id,
                payload: member.data.as_deref().map(RawValue::get),
                priority: priority(group),
                notify: false,
            })
        })
        .collect::<Result<_, _>>()?;
    let id = agent.submit_group(&members, false)?;
    Ok(settled_in(agent, id, group.wait_ms))
}

fn priority(request: &Request) -> Priority {
    if request.priority {
        Priority::Critical
    } else {
        Priority::ByType
    }
}

fn settled_in(agent: &Agent, id: Uuid, wait_ms: u64) -> Value {
    let settled = match wait_ms {
        0 => agent.result(id),
        wait_ms => agent.wait(id, Some(Duration::from_millis(wait_ms))),
    };
    result_json(id, &settled)
}

/// Answers what is asked of the hub alone, by whoever can ask it.
pub(crate) fn ask_hub(
    request: &Request,
    ask: impl FnOnce(v1::PullRequest) -> Result<v1::PullReply, Problem>,
) -> Result<Value, Problem> {
    let question = if let Action::Scan = request.action {
        read::scan(&request.prefix, request.limit, &request.cursor)
    } else {
        let at_least = read::AtLeast {
            version: request.at_least,
            sequence: request.at_least_sequence.unwrap_or_default(),
        };
        read::get(&request.path, &at_least)
    };
    read::answer_json(ask(question?)?)
}

/// What a request to watch follows.
pub(crate) fn followed(request: &Request) -> Result<Subscription, Problem> {
    let types: Result<_, Problem> = request.types.iter().map(|name| parse_type(name)).collect();
    Ok(Subscription {
        stream: request.stream.clone(),
        types: types?,
        path_prefix: request.prefix.clone(),
    })
}

pub(crate) fn result_json(operation_id: Uuid, settled: &Settled) -> Value {
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
        v1::operation::Payload::Group(group) => serde_json::from_str(&readable(group)).ok(),
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

/// How a watch ended whose input or output failed: a reader that went away has seen what it wanted.
pub(crate) fn watched(error: &io::Error) -> Result<(), Problem> {
    if error.kind() == io::ErrorKind::BrokenPipe {
        return Ok(());
    }
    Err(Problem::new(Code::Internal, format!("watching failed: {error}")))
}

/// Without Unix sockets there is standard input, and commands open the outbox themselves.
#[cfg(not(unix))]
mod socket {
    use std::{io::Write, path::Path, sync::Arc, time::Duration};

    use p2p_sync_proto::Problem;
    use serde_json::Value;

    use super::Request;
    use crate::agent::Agent;

    pub(crate) fn ask(_: &Path, _: &Request) -> Option<Result<Value, Problem>> {
        None
    }

    pub(crate) fn ask_within(_: &Path, _: &Request, _: Duration) -> Option<Result<Value, Problem>> {
        None
    }

    /// No agent can be asked.
    pub(crate) fn watch(_: &Path, _: &Request, _: impl Write) -> Option<Result<(), Problem>> {
        None
    }

    /// Nothing is served here.
    pub(crate) fn listen(_: &Arc<Agent>, _: &Path) -> Result<(), Problem> {
        Ok(())
    }

    /// There is nothing to take away.
    pub(crate) fn close(_: &Path) {}
}

pub(crate) use socket::{ask, ask_within, close, listen, watch};
#[cfg(unix)]
pub(crate) use {
    socket::{connect, exchange},
    watch_lines::{WatchLines, pass_on},
};

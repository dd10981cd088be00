//! A program that attaches to a standalone agent, as a map server does: reads operations, one JSON object a line, and
//! writes their ids and what becomes of them.

use std::{
    io::{BufRead as _, Write as _, stdin, stdout},
    path::Path,
    process::ExitCode,
    time::Duration,
};

use p2p_sync_agent::{Attached, Config, Priority, Submission};
use p2p_sync_proto::{Problem, policy::parse_type};
use serde::Deserialize;
use serde_json::{Value, json, value::RawValue};

/// As the standalone agent reads it.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Request {
    #[serde(rename = "do")]
    action: String,
    tag: Value,
    #[serde(rename = "type")]
    data_type: String,
    map: String,
    account_id: u32,
    entity: Option<String>,
    data: Option<Box<RawValue>>,
    timeout_ms: u64,
}

/// Until the input ends.
pub(crate) fn run(config: &Path) -> ExitCode {
    let config = Config::load(config).expect("made by the stack");
    let attached = Attached::start_observed(config, |event| {
        say(&json!({ "operation_id": event.operation_id, "state": event.settled.state }));
    });
    let attached = attached.expect("a socket is named");
    for line in stdin().lock().lines().map_while(Result::ok) {
        let request: Request = serde_json::from_str(&line).expect("written by the stack");
        let mut answer = match answer(&attached, &request) {
            Ok(answer) => answer,
            Err(problem) => json!({ "label": problem.code.label(), "error": problem.sentence }),
        };
        answer["tag"] = request.tag;
        say(&answer);
    }
    match attached.shutdown() {
        Ok(()) => ExitCode::SUCCESS,
        Err(problem) => {
            eprintln!("{problem}");
            ExitCode::FAILURE
        }
    }
}

fn answer(attached: &Attached, request: &Request) -> Result<Value, Problem> {
    Ok(match request.action.as_str() {
        "put" => {
            let id = attached.submit(&Submission {
                data_type: parse_type(&request.data_type)?,
                map: &request.map,
                account_id: request.account_id,
                entity: request.entity.as_deref(),
                char_id: None,
                payload: request.data.as_deref().map(RawValue::get),
                priority: Priority::ByType,
                notify: false,
            })?;
            json!({ "operation_id": id, "state": attached.result(id).state })
        }
        "flush" => json!({ "flushed": attached.flush(Duration::from_millis(request.timeout_ms)) }),
        _ => serde_json::to_value(attached.status()).expect("plain data"),
    })
}

fn say(line: &Value) {
    // A reader that went away is told nothing more.
    let _ = writeln!(stdout().lock(), "{line}");
}

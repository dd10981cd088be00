//! `feed follow`: one batch after the other to a command, acknowledged when it ends well.

use std::{
    ffi::OsString,
    io::{ErrorKind, Write as _},
    process::{Command, Stdio},
    time::Duration,
};

use p2p_sync_proto::{Code, Problem};
use tokio::{
    sync::watch,
    task::spawn_blocking,
    time::{sleep, timeout},
};

use super::{
    super::serve::{internal, shutdown_signal},
    Follow, lines,
};
use crate::store::{Batch, ConsumerReader, Store, Told};

/// Between two looks whether there is something new.
const POLL_INTERVAL: Duration = Duration::from_millis(500);
/// Before something that failed is tried again, the first time; twice as long each further time.
const RETRY_DELAY: Duration = Duration::from_secs(1);
const RETRY_DELAY_MAX: Duration = Duration::from_mins(1);

/// By which a command, or the database that it writes to, refuses a batch that comes after a later one: see `README.md`.
const NUMBER_VARIABLE: &str = "P2P_SYNC_BATCH";

/// Follows a consumer until it is told to stop, or all that there is was told and that is enough.
pub(super) async fn follow(store: &Store, wanted: &Follow) -> Result<(), Problem> {
    let stop = shutdown_signal().map_err(|error| internal(&error))?;
    let (stops, mut stopping) = watch::channel(false);
    tokio::spawn(async move {
        stop.await;
        stops.send_replace(true);
    });
    let most = wanted.bound.limit;
    let (mut limit, mut failures) = (most, 0_u32);
    let mut reader = Some(store.read_consumer(&wanted.name).await?);
    while !*stopping.borrow() {
        let problem = match step(store, &mut reader, wanted, limit).await {
            Ok(has_more) => {
                (limit, failures) = ((limit * 2).min(most), 0);
                if has_more {
                    continue;
                }
                if wanted.once {
                    break;
                }
                rest(&mut stopping, POLL_INTERVAL).await;
                continue;
            }
            Err(problem) => problem,
        };
        let is_final = matches!(problem.code, Code::NotFound | Code::BadValue);
        if is_final || wanted.once {
            return Err(problem);
        }
        if problem.code == Code::UnknownOutcome {
            // What cannot be applied is in the end told alone, and what is before it is not held up.
            limit = (limit / 2).max(1);
        } else {
            // The connection, and with it the right to read, may be gone.
            reader = None;
        }
        let delay = RETRY_DELAY.saturating_mul(1 << failures.min(6)).min(RETRY_DELAY_MAX);
        eprintln!("{problem}; again in {} s", delay.as_secs());
        failures += 1;
        rest(&mut stopping, delay).await;
    }
    Ok(())
}

/// One batch, if there is one; gives whether there is more.
async fn step(
    store: &Store,
    reader: &mut Option<ConsumerReader>,
    wanted: &Follow,
    limit: u32,
) -> Result<bool, Problem> {
    let reader = match reader {
        Some(reader) => reader,
        none => none.insert(store.read_consumer(&wanted.name).await?),
    };
    let batch = reader.next(limit).await?;
    if batch.is_empty() {
        return Ok(false);
    }
    if !batch.told.is_empty() {
        let (command, number, text) = (wanted.command.clone(), reader.number().await?, lines::of(&batch));
        let applied = spawn_blocking(move || apply(&command, number, &text)).await;
        let applied =
            applied.map_err(|error| Problem::new(Code::Internal, format!("the command cannot be run ({error})")))?;
        applied.map_err(|problem| Problem::new(problem.code, format!("{}: {}", problem.sentence, extent(&batch))))?;
    }
    reader.acknowledge(&batch).await?;
    Ok(batch.has_more)
}

/// Runs the command to its end. `BAD_VALUE` where there is no such command, `UNKNOWN_OUTCOME` where it failed.
fn apply(command: &[OsString], number: u64, text: &str) -> Result<(), Problem> {
    let (program, arguments) = command.split_first().expect("clap asks for one");
    let named = program.to_string_lossy();
    let spawned = Command::new(program)
        .args(arguments)
        .env(NUMBER_VARIABLE, number.to_string())
        .stdin(Stdio::piped())
        .spawn();
    let mut child = spawned.map_err(|error| {
        let code = match error.kind() {
            ErrorKind::NotFound | ErrorKind::PermissionDenied => Code::BadValue,
            _ => Code::UnknownOutcome,
        };
        Problem::new(code, format!("{named} cannot be run ({error})"))
    })?;
    // Dropped at once, which tells the command that this is all.
    let written = child
        .stdin
        .take()
        .map_or(Ok(()), |mut input| input.write_all(text.as_bytes()));
    let failed = |how: String| {
        Problem::new(
            Code::UnknownOutcome,
            format!("{named} {how}, so nothing is acknowledged"),
        )
    };
    let status = child
        .wait()
        .map_err(|error| failed(format!("cannot be waited for ({error})")))?;
    if !status.success() {
        return Err(failed(format!("ended with {status}")));
    }
    written.map_err(|_| failed("did not read to the end of its input".to_owned()))
}

/// Which changes are in a batch, for people.
fn extent(batch: &Batch) -> String {
    let mut places = batch.told.iter().filter_map(|told| match told {
        Told::Change { stream, row } => Some(format!(
            "{stream} {} ({})",
            row.stream_sequence,
            row.path.escape_debug()
        )),
        Told::Snapshot { .. } => None,
    });
    match (places.next(), places.next_back()) {
        (None, _) => "the beginning of a snapshot".to_owned(),
        (Some(only), None) => only,
        (Some(first), Some(last)) => format!("{} lines, {first} to {last}", batch.told.len()),
    }
}

/// Waits, unless it is time to stop.
async fn rest(stopping: &mut watch::Receiver<bool>, time: Duration) {
    // An error means that nobody is left to say so.
    let told = async {
        if stopping.wait_for(|stopping| *stopping).await.is_err() {
            sleep(time).await;
        }
    };
    let _over = timeout(time, told).await;
}

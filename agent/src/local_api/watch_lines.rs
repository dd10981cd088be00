//! A watch through an agent: its updates as lines, passed on as the hub told them.
//!
//! Nothing is queued in between. Who reads slowly has the agent read slowly, and the hub cut the watch at last.

use std::{
    io::{self, Write},
    path::Path,
};

use p2p_sync_proto::{
    Code, Problem,
    v1::{SubscribeRequest, Update},
};
use prost::Message as _;
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::UnixStream,
    runtime::Handle,
    sync::mpsc,
};

use super::{Action, Request, told};
use crate::{
    attach_lines::{read_base64, write_base64},
    link::Watcher,
};

/// Longest line, bytes: the longest message in base64.
const LINE_BYTES_MAX: u64 = 4 * 1024 * 1024;
/// Messages between the task that reads them and the thread that writes them.
const WAITING_MAX: usize = 1;

/// The lines of one watch.
pub(crate) struct WatchLines {
    input: BufReader<UnixStream>,
    line: Vec<u8>,
}

impl WatchLines {
    /// Asks the agent that serves on a socket; `HUB_UNAVAILABLE` where none does.
    pub(crate) async fn open(socket: &Path, request: &SubscribeRequest) -> Result<Self, Problem> {
        let request = Request {
            action: Action::Watch,
            pull: write_base64(&request.encode_to_vec()),
            ..Default::default()
        };
        let line = serde_json::to_string(&request).expect("plain data") + "\n";
        let connect = async {
            let stream = super::connect(socket)?;
            stream.set_nonblocking(true)?;
            let mut stream = UnixStream::from_std(stream)?;
            stream.write_all(line.as_bytes()).await?;
            Ok(stream)
        };
        let stream = connect.await.map_err(|error| away(&error))?;
        Ok(Self {
            input: BufReader::new(stream),
            line: Vec::new(),
        })
    }

    /// The next update; none after the last.
    pub(crate) async fn next(&mut self) -> Result<Option<Update>, Problem> {
        self.line.clear();
        let mut input = (&mut self.input).take(LINE_BYTES_MAX);
        let read = input.read_until(b'\n', &mut self.line).await;
        if read.map_err(|error| away(&error))? == 0 {
            return Ok(None);
        }
        let text = std::str::from_utf8(&self.line).unwrap_or_default().trim_end();
        let update = read_base64(text).and_then(|bytes| Update::decode(bytes.as_slice()).ok());
        update.map(Some).ok_or_else(|| {
            // A refusal of the agent's own is JSON, as all of its answers are.
            let sentence = format!("the agent does not follow the stream: {text}");
            Problem::new(Code::HubUnavailable, sentence)
        })
    }
}

fn away(error: &io::Error) -> Problem {
    Problem::new(
        Code::HubUnavailable,
        format!("the standalone agent cannot be asked: {error}"),
    )
}

/// Passes a watch on, line by line, until it ends or the output fails: a reader that went away is noticed by the next
/// heartbeat.
pub(crate) fn pass_on(
    runtime: &Handle,
    watcher: &std::sync::Arc<Watcher>,
    request: &str,
    output: &mut impl Write,
) -> io::Result<()> {
    let request = read_base64(request).and_then(|bytes| SubscribeRequest::decode(bytes.as_slice()).ok());
    let Some(request) = request else {
        let problem = Problem::new(Code::BadRequest, "the watch cannot be read: update the program");
        return writeln!(output, "{}", told(serde_json::Value::Null, Err(problem)));
    };
    let (sender, mut updates) = mpsc::channel(WAITING_MAX);
    let watcher = watcher.clone();
    let task = runtime.spawn(async move {
        let watch = async {
            let (answer, mut told) = watcher.open(request).await?;
            let mut update = answer;
            // The thread that writes is gone.
            while sender.send(update).await.is_ok() {
                update = told.next().await?;
            }
            Ok::<(), Problem>(())
        };
        if let Err(problem) = watch.await {
            let refusal = Update {
                code: problem.code.into(),
                message: problem.sentence,
                ..Default::default()
            };
            // As above.
            let _ = sender.send(refusal).await;
        }
    });
    let mut write = || {
        while let Some(update) = updates.blocking_recv() {
            writeln!(output, "{}", write_base64(&update.encode_to_vec()))?;
            output.flush()?;
        }
        Ok(())
    };
    let written = write();
    task.abort();
    written
}

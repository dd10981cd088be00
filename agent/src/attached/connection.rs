//! The thread that keeps an attached program connected: writes what is queued, and has another read what it is told.

use std::{
    io::{self, BufRead, BufReader, Read as _, Write as _},
    net::Shutdown,
    os::unix::net::UnixStream,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use p2p_sync_proto::{Code, Problem};
use serde_json::json;
use uuid::Uuid;

use super::{inner::Inner, lock};
use crate::{
    attach_lines::{self, STATES_MAX, Told},
    local_api,
    spooler::{COMMIT_WINDOW, SLEEP_AFTER},
};

/// For the agent to answer the attaching.
const ATTACH_TIMEOUT: Duration = Duration::from_secs(5);
/// An agent that says nothing for so long hangs: it tells how it is four times a second.
const SILENCE_MAX: Duration = Duration::from_secs(2);
/// How often an agent that is not there is looked for.
const CONNECT_EVERY: Duration = Duration::from_millis(100);
/// Of operations, written at a time.
const WRITE_BYTES: usize = 64 * 1024;
/// Longest line read, bytes.
const LINE_BYTES_MAX: u64 = 1024 * 1024;

/// Keeps connected until the program stops, and then until the agent has what was taken or the time for that is over.
pub(super) fn run(inner: &Arc<Inner>) {
    inner.alarm.wakes_this_thread();
    while !inner.is_ending() {
        let problem = match Connection::open(inner) {
            Ok(connection) => {
                let problem = connection.serve();
                inner.queue().rewind();
                problem
            }
            Err(problem) => problem,
        };
        *lock(&inner.stream) = None;
        inner.detached(problem);
        if !inner.is_ending() {
            thread::park_timeout(CONNECT_EVERY);
        }
    }
}

struct Connection<'i> {
    inner: &'i Arc<Inner>,
    stream: Arc<UnixStream>,
    input: BufReader<ReadHalf>,
    /// Operations whose states are to be asked for.
    unknown: Vec<Uuid>,
}

impl<'i> Connection<'i> {
    fn open(inner: &'i Arc<Inner>) -> Result<Self, Problem> {
        let stream = local_api::connect(&inner.socket).map_err(|error| inner.not_there(&error))?;
        let stream = Arc::new(stream);
        // Before anything is waited for: who shuts down ends it.
        *lock(&inner.stream) = Some(stream.clone());
        let attach = json!({ "do": "attach", "client": inner.client }).to_string() + "\n";
        let mut input = BufReader::new(ReadHalf(stream.clone()));
        let answer = (|| {
            stream.set_read_timeout(Some(ATTACH_TIMEOUT))?;
            (&*stream).write_all(attach.as_bytes())?;
            let answer = read_line(&mut input)?;
            stream.set_read_timeout(Some(SILENCE_MAX))?;
            Ok(answer)
        })();
        let problem_of = |error: io::Error| {
            if is_silence(&error) {
                inner.silent()
            } else {
                inner.not_there(&error)
            }
        };
        let answer = answer.map_err(problem_of)?;
        let unknown = inner.attached(answer)?;
        Ok(Self {
            inner,
            stream,
            input,
            unknown,
        })
    }

    /// Until the connection fails or is done with; gives why.
    fn serve(self) -> Problem {
        let Self {
            inner,
            stream,
            mut input,
            mut unknown,
        } = self;
        let is_broken = Arc::new(AtomicBool::new(false));
        let may_ask = Arc::new(AtomicBool::new(true));
        let reader = {
            let (inner, is_broken, may_ask) = (inner.clone(), is_broken.clone(), may_ask.clone());
            // Deaf to signals and nicer already, as this thread is.
            thread::Builder::new().name("p2p-told".to_owned()).spawn(move || {
                let error = loop {
                    match read_line(&mut input) {
                        Ok(told) => {
                            if told.answered {
                                may_ask.store(true, Ordering::SeqCst);
                            }
                            inner.told(told);
                        }
                        Err(error) => break error,
                    }
                };
                // Whoever writes may wait for an agent that reads nothing.
                let _ = input.get_ref().0.shutdown(Shutdown::Both);
                is_broken.store(true, Ordering::SeqCst);
                inner.alarm.ring();
                error
            })
        };
        let reader = match reader {
            Ok(reader) => reader,
            Err(error) => return Problem::new(Code::Internal, format!("no thread could be started: {error}")),
        };
        let written = write(inner, &stream, &mut unknown, &is_broken, &may_ask);
        let _ = stream.shutdown(Shutdown::Both);
        match (written, reader.join()) {
            (_, Ok(error)) if is_silence(&error) => inner.silent(),
            (Err(error), _) | (Ok(()), Ok(error)) => inner.not_there(&error),
            (Ok(()), Err(_)) => Problem::new(Code::Internal, "the thread that reads had panicked"),
        }
    }
}

/// Writes what comes until the connection is broken, or all is done.
fn write(
    inner: &Inner,
    mut stream: &UnixStream,
    unknown: &mut Vec<Uuid>,
    is_broken: &AtomicBool,
    may_ask: &AtomicBool,
) -> io::Result<()> {
    let mut busy = Instant::now();
    let mut text = String::new();
    while !is_broken.load(Ordering::SeqCst) && !inner.is_ending() {
        for (number, line) in inner.queue().next_to_write(WRITE_BYTES) {
            attach_lines::numbered(number, &line, &mut text);
        }
        if !unknown.is_empty() && may_ask.swap(false, Ordering::SeqCst) {
            let page = unknown.split_off(unknown.len().saturating_sub(STATES_MAX));
            text += &attach_lines::states(&page);
        }
        if !text.is_empty() {
            stream.write_all(text.as_bytes())?;
            text.clear();
            busy = Instant::now();
        } else if busy.elapsed() < SLEEP_AFTER || !unknown.is_empty() {
            thread::park_timeout(COMMIT_WINDOW);
        } else {
            let is_work = || inner.queue().has_unwritten() || is_broken.load(Ordering::SeqCst) || inner.is_ending();
            inner.alarm.sleep_unless(is_work);
        }
    }
    Ok(())
}

/// Whether nothing came in time, as the system tells it.
fn is_silence(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
}

fn read_line(input: &mut BufReader<ReadHalf>) -> io::Result<Told> {
    let mut line = Vec::new();
    input.take(LINE_BYTES_MAX).read_until(b'\n', &mut line)?;
    if line.last() != Some(&b'\n') {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(serde_json::from_slice(&line)?)
}

/// Reads from a stream that is written by another thread.
struct ReadHalf(Arc<UnixStream>);

impl io::Read for ReadHalf {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        (&*self.0).read(buffer)
    }
}

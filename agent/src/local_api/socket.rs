//! The socket that local programs reach an agent by.

use std::{
    fs,
    io::{self, BufRead, BufReader, Read as _, Write as _},
    os::{
        fd::OwnedFd,
        unix::{
            fs::{FileTypeExt as _, PermissionsExt as _},
            net::{UnixListener, UnixStream},
        },
    },
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use p2p_sync_proto::{Code, Problem};
use serde_json::Value;

use super::{Action, LINE_BYTES_MAX, Request, client};
use crate::{agent::Agent, subscriptions::SUBSCRIPTIONS_MAX, threads};

/// Connections at a time: 16 programs, and the streams that one of them follows.
const CONNECTIONS_MAX: usize = 16 + SUBSCRIPTIONS_MAX;
/// Longest answer read, bytes: the longest page of states and what base64 adds.
const ANSWER_BYTES_MAX: u64 = 16 * 1024 * 1024;
/// For an answer to a command line.
const ANSWER_TIMEOUT: Duration = Duration::from_mins(10);

/// Serves local programs on a socket, each on a thread, as long as the process lives.
///
/// Who may open the outbox may use it: the socket is the owner's alone, and who connects has to be the owner or root.
///
/// `DATA_DIRECTORY_IN_USE` where another agent serves there, `BAD_VALUE` where no socket can be made.
pub(crate) fn listen(agent: &Arc<Agent>, path: &Path) -> Result<(), Problem> {
    let listener = bind(path).map_err(|error| {
        let at = path.display();
        if error.kind() == io::ErrorKind::AddrInUse {
            let sentence = format!("{at}: {error}: stop it, or give this one an agent_socket of its own");
            return Problem::new(Code::DataDirectoryInUse, sentence);
        }
        let sentence = format!("no socket can be made at {at}: {error}; choose another agent_socket, below 100 bytes");
        Problem::new(Code::BadValue, sentence)
    })?;
    let agent = agent.clone();
    let connections = Arc::new(AtomicUsize::new(0));
    threads::spawn("p2p-local", move || {
        for stream in listener.incoming().flatten() {
            if let Err(problem) = admit(&stream, &connections) {
                // Who does not read why it is refused is refused all the same.
                let _ = writeln!(&stream, "{}", super::told(Value::Null, Err(problem)));
                continue;
            }
            let (agent, place) = (agent.clone(), Place(connections.clone()));
            let serve = move || {
                let _place = place;
                if let Err(error) = serve(&agent, &stream) {
                    tracing::debug!(%error, "a local program went away");
                }
            };
            // It is deaf to signals and nicer already, as the thread that starts it is.
            let started = std::thread::Builder::new().name("p2p-program".to_owned()).spawn(serve);
            if let Err(error) = started {
                tracing::warn!(%error, "a local program cannot be served");
            }
        }
    })
    .map_err(|error| Problem::new(Code::Internal, format!("no thread could be started: {error}")))?;
    Ok(())
}

/// Takes the socket away, so that nobody waits at a closed door.
pub(crate) fn close(path: &Path) {
    // Gone already is as good.
    let _ = fs::remove_file(path);
}

/// Makes the socket. It has its mode before it has its name; a dead agent's socket gives way to it.
fn bind(path: &Path) -> io::Result<UnixListener> {
    match fs::symlink_metadata(path) {
        Ok(there) if !there.file_type().is_socket() => {
            let sentence = "something that is no socket is in the way";
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, sentence));
        }
        Ok(_) if connect(path).is_ok() => {
            let sentence = "another agent serves there";
            return Err(io::Error::new(io::ErrorKind::AddrInUse, sentence));
        }
        _ => {}
    }
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".new");
    let unnamed: PathBuf = path.with_file_name(name);
    let _ = fs::remove_file(&unnamed);
    let listener = UnixListener::bind(&unnamed)?;
    fs::set_permissions(&unnamed, fs::Permissions::from_mode(0o600))?;
    fs::rename(&unnamed, path)?;
    Ok(listener)
}

/// Whether a program may come in. Counts it if so.
fn admit(stream: &UnixStream, connections: &AtomicUsize) -> Result<(), Problem> {
    if !is_own(stream) {
        let sentence = "this agent serves programs of its own user and root alone: run both as one user";
        return Err(Problem::new(Code::NotOpened, sentence));
    }
    if connections.fetch_add(1, Ordering::SeqCst) >= CONNECTIONS_MAX {
        connections.fetch_sub(1, Ordering::SeqCst);
        let sentence = format!("{CONNECTIONS_MAX} programs are connected already: close one");
        return Err(Problem::new(Code::RateLimited, sentence));
    }
    Ok(())
}

/// A place among the connected programs; given up when dropped.
struct Place(Arc<AtomicUsize>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

#[cfg(target_os = "linux")]
fn is_own(stream: &UnixStream) -> bool {
    let peer = nix::sys::socket::getsockopt(stream, nix::sys::socket::sockopt::PeerCredentials);
    peer.is_ok_and(|peer| peer.uid() == 0 || peer.uid() == nix::unistd::geteuid().as_raw())
}

/// Elsewhere the socket's mode alone keeps others out.
#[cfg(not(target_os = "linux"))]
fn is_own(_: &UnixStream) -> bool {
    true
}

/// A program that begins with `attach` hands operations over; any other asks and is answered.
fn serve(agent: &Agent, stream: &UnixStream) -> io::Result<()> {
    let mut input = BufReader::new(stream);
    let mut first = Vec::new();
    io::Read::take(&mut input, LINE_BYTES_MAX).read_until(b'\n', &mut first)?;
    if let Ok(Request {
        action: Action::Attach,
        client: Some(client),
        ..
    }) = serde_json::from_slice(&first)
    {
        return client::serve(agent, client, input, stream);
    }
    let is_gone = || is_gone(stream);
    super::serve(agent, io::Read::chain(first.as_slice(), input), stream, Some(&is_gone))
}

/// Whether the other side has closed its end; what it says instead is passed over.
fn is_gone(mut stream: &UnixStream) -> bool {
    let looked = stream.set_nonblocking(true).and_then(|()| stream.read(&mut [0; 512]));
    let is_open = looked
        .as_ref()
        .map_or_else(|error| error.kind() == io::ErrorKind::WouldBlock, |&read| read > 0);
    !is_open || stream.set_nonblocking(false).is_err()
}

/// Connects, and never waits for an agent that does not accept: that is as good as none.
pub(crate) fn connect(path: &Path) -> io::Result<UnixStream> {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
    use std::os::fd::AsRawFd as _;
    let address = UnixAddr::new(path)?;
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket: OwnedFd = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    connect(socket.as_raw_fd(), &address)?;
    let stream = UnixStream::from(socket);
    stream.set_nonblocking(false)?;
    Ok(stream)
}

/// Asks the agent that serves on a socket; `None` where none does.
pub(crate) fn ask(path: &Path, request: &Request) -> Option<Result<Value, Problem>> {
    ask_within(path, request, ANSWER_TIMEOUT)
}

/// As [`ask`], and waits for the answer so long at most.
pub(crate) fn ask_within(path: &Path, request: &Request, timeout: Duration) -> Option<Result<Value, Problem>> {
    let stream = connect(path).ok()?;
    Some(
        exchange(&stream, request, Instant::now() + timeout).unwrap_or_else(|error| {
            let sentence = format!("the running agent did not answer: {error}");
            Err(Problem::new(Code::HubUnavailable, sentence))
        }),
    )
}

/// Follows what the agent that serves on a socket tells, until it ends; `None` where none serves.
pub(crate) fn watch(path: &Path, request: &Request, mut output: impl io::Write) -> Option<Result<(), Problem>> {
    let mut stream = connect(path).ok()?;
    let mut copy = || {
        writeln!(stream, "{}", serde_json::to_string(request)?)?;
        for line in BufReader::new(&stream).lines() {
            let line = line?;
            if let Ok(Err(problem)) = serde_json::from_str(&line).map(refusal) {
                return Ok(Err(problem));
            }
            writeln!(output, "{line}")?;
            output.flush()?;
        }
        Ok(Err(Problem::new(
            Code::ShutDown,
            "the running agent has ended: watch again when it runs",
        )))
    };
    Some(copy().unwrap_or_else(|error: io::Error| super::watched(&error)))
}

/// One request over a connection, and its answer.
pub(crate) fn exchange(
    mut stream: &UnixStream,
    request: &Request,
    deadline: Instant,
) -> io::Result<Result<Value, Problem>> {
    let line = serde_json::to_string(request)? + "\n";
    stream.set_write_timeout(Some(left(deadline)?))?;
    stream.write_all(line.as_bytes())?;
    let mut answer = Vec::new();
    let mut input = BufReader::new(stream).take(ANSWER_BYTES_MAX);
    while answer.last() != Some(&b'\n') {
        stream.set_read_timeout(Some(left(deadline)?))?;
        let read = input.fill_buf()?;
        if read.is_empty() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let end = read
            .iter()
            .position(|byte| *byte == b'\n')
            .map_or(read.len(), |at| at + 1);
        answer.extend_from_slice(&read[..end]);
        input.consume(end);
    }
    Ok(refusal(serde_json::from_slice(&answer)?))
}

/// An answer, or the refusal that it is.
fn refusal(answer: Value) -> Result<Value, Problem> {
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
    }
}

/// Until a deadline; an error when it has passed.
fn left(deadline: Instant) -> io::Result<Duration> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Err(io::ErrorKind::TimedOut.into());
    }
    Ok(left)
}

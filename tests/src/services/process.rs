//! Server processes that run as an ordinary user and leave nothing behind.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::fs::chown;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, geteuid, kill_process};
use tempfile::TempDir;

use super::POLL_INTERVAL;

/// How long a server may take to start, a recovery after a kill included, or to end.
const SERVER_TIMEOUT: Duration = Duration::from_mins(1);

const STARTS_MAX: usize = 20;

/// The user and group `nobody` and `nogroup`, the same number everywhere: Postgres refuses to run as root.
const NOBODY: u32 = 65_534;

/// A server process. Dropping it kills it and all it has forked, and waits until they are gone.
pub(super) struct Process(Child);

impl Process {
    /// Starts `command` and waits until `answers`, given the process id, says that it serves. One that ends at once,
    /// such as a Postgres that finds its predecessor's memory in use, is started again, `STARTS_MAX` times in all.
    pub(super) async fn start<F>(mut command: Command, log: &Path, answers: impl Fn(u32) -> F) -> Self
    where
        F: Future<Output = bool>,
    {
        let output = File::create(log).expect("the server's directory is writable");
        command.stdout(output.try_clone().expect("a file can be cloned"));
        command.stderr(output).stdin(Stdio::null());
        let asked = Instant::now();
        for _ in 0..STARTS_MAX {
            let started = command.spawn();
            let mut process = Self(started.unwrap_or_else(|error| panic!("{command:?} does not run: {error}")));
            while !process.has_ended() && asked.elapsed() < SERVER_TIMEOUT {
                if answers(process.0.id()).await {
                    return process;
                }
                tokio::time::sleep(POLL_INTERVAL).await;
            }
        }
        let log = fs::read_to_string(log).unwrap_or_default();
        panic!("{command:?} does not serve. Its log:\n{log}");
    }

    /// Asks it to end by `signal` and waits until it has; one that does not in time is killed.
    pub(super) fn end(mut self, signal: Signal) {
        self.signal(signal);
        let asked = Instant::now();
        while !self.has_ended() && asked.elapsed() < SERVER_TIMEOUT {
            thread::sleep(POLL_INTERVAL);
        }
    }

    fn signal(&self, signal: Signal) {
        // It may have ended by itself; not having been waited for, its id is not given to another.
        let _ = kill_process(Pid::from_child(&self.0), signal);
    }

    fn has_ended(&mut self) -> bool {
        self.0.try_wait().expect("a child can be waited for").is_some()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.has_ended() {
            return;
        }
        // Stopped first, so that it forks no more while its children are looked up.
        self.signal(Signal::STOP);
        let children = children_of(Pid::from_child(&self.0));
        self.signal(Signal::KILL);
        for &child in &children {
            let _ = kill_process(child, Signal::KILL);
        }
        self.0.wait().expect("a child can be waited for");
        let killed = Instant::now();
        while children.iter().any(|&child| runs(child)) && killed.elapsed() < SERVER_TIMEOUT {
            thread::sleep(Duration::from_millis(1));
        }
    }
}

/// A command that runs as a user who is not root, in a directory that this user can enter.
pub(super) fn as_server(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new(program);
    command.current_dir("/");
    if geteuid().is_root() {
        command.uid(NOBODY).gid(NOBODY);
    }
    command
}

/// A temporary directory that a server can write in, removed with the value.
pub(super) fn server_dir() -> TempDir {
    let dir = tempfile::Builder::new()
        .prefix("p2p-sync-server-")
        .tempdir()
        .expect("the temporary directory exists");
    give_to_server(dir.path());
    dir
}

/// Makes what root has made at `path` the property of the servers' user.
pub(super) fn give_to_server(path: &Path) {
    if geteuid().is_root() {
        chown(path, Some(NOBODY), Some(NOBODY)).expect("root can give a file away");
    }
}

fn children_of(parent: Pid) -> Vec<Pid> {
    let processes = fs::read_dir("/proc").expect("Linux has /proc").flatten();
    let pids = processes.filter_map(|entry| Pid::from_raw(entry.file_name().to_str()?.parse().ok()?));
    pids.filter(|&pid| state_and_parent(pid).is_some_and(|(_, of)| of == parent.as_raw_pid()))
        .collect()
}

/// Whether `pid` is still there, and is more than an entry that its parent has not read yet.
fn runs(pid: Pid) -> bool {
    state_and_parent(pid).is_some_and(|(state, _)| !matches!(state, 'Z' | 'X'))
}

/// The state letter and the parent's process id in `/proc/<pid>/stat`, which follow the name in parentheses.
fn state_and_parent(pid: Pid) -> Option<(char, i32)> {
    let stat = fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_pid())).ok()?;
    let (_name, rest) = stat.rsplit_once(") ")?;
    let mut fields = rest.split(' ');
    Some((fields.next()?.parse().ok()?, fields.next()?.parse().ok()?))
}

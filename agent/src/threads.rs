//! How the agent's own threads begin: deaf to signals, and behind the game loop in the queue for a core.

use std::{io, thread::JoinHandle};

/// How much nicer the agent's threads are than the thread that started them: as much as can be. Of a core they contend
/// for, a game loop gets some 70 times their share, and they hardly ever take it off: on one core with a loop at 10,000
/// operations a second, niceness 10 made a turn 3.6 ms longer and 19 makes it 1.5 ms. The scheduling class that starves
/// them altogether gains little more, and on a busy machine would starve whoever waits for a lock or an answer.
#[cfg(target_os = "linux")]
const NICER: i32 = 19;

/// Starts a thread of the agent.
pub(crate) fn spawn<T: Send + 'static>(
    name: &str,
    run: impl FnOnce() -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    let builder = std::thread::Builder::new().name(name.to_owned());
    let yielding = behind_this_one();
    deaf(|| {
        builder.spawn(move || {
            yielding();
            run()
        })
    })
}

/// Starts threads that never take a signal, whatever starts them: they inherit that, from their first instruction on.
///
/// A signal sent to a process is taken by any thread that does not block it, and a map server's handlers run the game's
/// code, which is no business of ours to run beside it.
pub(crate) fn deaf<T>(start: impl FnOnce() -> T) -> T {
    #[cfg(unix)]
    let _blocked = Blocked::new();
    start()
}

/// What puts a thread that calls it behind the thread that calls this. Only Linux counts this by threads.
pub(crate) fn behind_this_one() -> impl Fn() + Send + Sync + 'static {
    #[cfg(target_os = "linux")]
    let niceness = rustix::process::getpriority_process(None).map(|here| here + NICER);
    move || {
        #[cfg(target_os = "linux")]
        if let Err(error) = niceness.and_then(|niceness| rustix::process::setpriority_process(None, niceness)) {
            // It runs all the same.
            tracing::debug!(%error, "a thread keeps the priority of the one that started it");
        }
    }
}

/// Every signal is blocked for this thread as long as this lives.
#[cfg(unix)]
struct Blocked(Option<nix::sys::signal::SigSet>);

#[cfg(unix)]
impl Blocked {
    fn new() -> Self {
        use nix::sys::signal::{SigSet, SigmaskHow};
        Self(SigSet::all().thread_swap_mask(SigmaskHow::SIG_SETMASK).ok())
    }
}

#[cfg(unix)]
impl Drop for Blocked {
    fn drop(&mut self) {
        // What was valid before is valid again.
        let _ = self.0.as_ref().map(nix::sys::signal::SigSet::thread_set_mask);
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use std::time::{Duration, Instant};

    use p2p_sync_proto::keys::{KeyId, MasterKey};

    use crate::{Agent, Config};

    /// Of each thread of this process: its name, its blocked signals as a mask, and its niceness.
    fn threads() -> Vec<(String, u64, i32)> {
        let tasks = std::fs::read_dir("/proc/self/task").expect("Linux has it");
        let read = tasks.filter_map(|task| {
            let folder = task.ok()?.path();
            let status = std::fs::read_to_string(folder.join("status")).ok()?;
            let line = |name: &str| status.lines().find_map(|line| line.strip_prefix(name));
            let blocked = u64::from_str_radix(line("SigBlk:")?.trim(), 16).ok()?;
            let stat = std::fs::read_to_string(folder.join("stat")).ok()?;
            // Behind the name, which may hold anything: the state is the 3rd field, the niceness the 19th.
            let nice = stat.rsplit_once(')')?.1.split_whitespace().nth(16)?.parse().ok()?;
            Some((line("Name:")?.trim().to_owned(), blocked, nice))
        });
        read.collect()
    }

    #[test]
    fn the_agents_threads_take_no_signal_and_yield_to_the_one_that_started_them() {
        let folder = tempfile::tempdir().expect("a folder can be made");
        let master = MasterKey::generate(KeyId::parse("k1").expect("valid"));
        let credential = master.credential(uuid::Uuid::from_u128(1), 1).to_text().to_string();
        let text = format!("encryption_key = {credential}\nmain_server_endpoint = http://localhost:9");
        let config = Config::parse(&text, folder.path(), |_| None).expect("valid");
        let before = threads();
        let agent = Agent::start(config).expect("a new outbox");
        // Names are looked up on threads that are made for it.
        agent.wait_for_link(Duration::from_secs(10));
        let started_by = rustix::process::getpriority_process(None).expect("always told");
        let expected = (started_by + super::NICER).min(19);
        let of_the_agent = || -> Vec<_> {
            let named = threads().into_iter().filter(|(name, ..)| name.starts_with("p2p-"));
            named.collect()
        };
        // A thread takes its name and its priority itself, once it runs; its signals are blocked before.
        let began = Instant::now();
        let mut ours = of_the_agent();
        while began.elapsed() < Duration::from_secs(10)
            && (threads().len() > before.len() + ours.len() || ours.iter().any(|(.., nice)| *nice != expected))
        {
            std::thread::yield_now();
            ours = of_the_agent();
        }
        assert!(ours.len() >= 3, "{ours:?}");
        assert!(
            threads().len() <= before.len() + ours.len(),
            "a thread of the agent has no name of its own: {:?}",
            threads()
        );
        // SIGKILL and SIGSTOP cannot be blocked, and the C library keeps 32 and 33 to itself.
        let all = !(1 << (9 - 1) | 1 << (19 - 1) | 1 << (32 - 1) | 1 << (33 - 1));
        for (name, blocked, nice) in ours {
            assert_eq!(blocked & all, all, "{name} takes signals: {blocked:016x}");
            assert_eq!(nice, expected, "{name}");
        }
    }
}

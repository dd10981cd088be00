use std::sync::mpsc;

use p2p_sync_proto::keys::{KeyId, MasterKey};

use super::*;

/// For what happens soon, on a machine that is busy with other things.
const PATIENCE: Duration = Duration::from_secs(60);

/// Settings with an outbox in a folder and nobody where the hub should be.
fn config(folder: &std::path::Path) -> Config {
    let master = MasterKey::generate(KeyId::parse("k1").expect("valid"));
    let credential = master.credential(Uuid::from_u128(1), 1).to_text().to_string();
    let text = format!("encryption_key = {credential}\nmain_server_endpoint = http://127.0.0.1:1\n");
    Config::parse(&text, folder, |_| None).expect("valid settings")
}

fn folder() -> tempfile::TempDir {
    tempfile::tempdir().expect("a folder can be made")
}

/// Runs something on another thread and gives what it gave; panics if it takes forever.
fn ends<T: Send + 'static>(what: &str, run: impl FnOnce() -> T + Send + 'static) -> T {
    let (told, ended) = mpsc::sync_channel(1);
    std::thread::spawn(move || told.send(run()));
    ended
        .recv_timeout(PATIENCE)
        .unwrap_or_else(|error| panic!("{what}: {error}"))
}

#[test]
fn invariant_05_a_shutdown_is_bounded_where_the_outbox_hangs_and_so_is_what_follows() {
    let folder = folder();
    let agent = Agent::start(config(folder.path())).expect("starts");
    let shared = agent.shared.clone();
    // What the spooler needs for each of its rounds: it hangs as it does in a call to a disk that does not answer.
    let held = shared.pending();
    let ended = ends("it is shut down", move || {
        let ended = agent.shutdown_within(Duration::from_millis(50));
        let again = agent.shutdown_within(Duration::ZERO);
        drop(agent);
        [ended, again]
    });
    drop(held);
    for ended in ended {
        assert_eq!(ended.expect_err("it hangs").code, Code::ShutdownIncomplete);
    }
}

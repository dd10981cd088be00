//! Wrong calls, and more calls than a map server ever makes.

use std::process::Command;

use p2p_sync_proto::keys::{KeyId, MasterKey};
use uuid::Uuid;

use crate::{
    compiled::{Link, c_program, cxx_program, library, run_to_end, variable_or},
    world::World,
};

/// Where nobody listens.
const NOWHERE: &str = "http://127.0.0.1:1";
/// The full figure is 1,000,000 and takes minutes: `P2P_SYNC_TEST_CALLS=1000000`.
const CALLS: &str = "20000";
/// The full figure is 10,000 and takes minutes: `P2P_SYNC_TEST_CYCLES=10000`.
const CYCLES: &str = "200";
const THREADS: &str = "16";

/// A host's credential that no hub knows.
fn credential() -> String {
    let master = MasterKey::generate(KeyId::parse("k1").expect("valid"));
    master.credential(Uuid::new_v4(), 1).to_text().to_string()
}

fn folder() -> tempfile::TempDir {
    tempfile::tempdir().expect("a folder can be made")
}

fn stress() -> std::path::PathBuf {
    cxx_program("stress", &["stress.cpp", "cycles.cpp"], Link::Static)
}

#[test]
fn every_misuse_has_a_code_and_none_crashes() {
    let sources = ["abuse.c", "endings.c", "lines.c"];
    let (abuse, folder) = (c_program("abuse", &sources, Link::Shared), folder());
    run_to_end(&abuse, &[&folder.path().display().to_string(), NOWHERE, &credential()]);
}

#[test]
fn after_many_calls_from_many_threads_every_operation_is_on_disk() {
    let (calls, folder) = (variable_or("P2P_SYNC_TEST_CALLS", CALLS), folder());
    let folder = folder.path().display().to_string();
    let told = run_to_end(&stress(), &["calls", &folder, NOWHERE, &credential(), &calls, THREADS]);
    print!("{told}");
}

#[test]
fn after_many_calls_from_many_threads_every_operation_is_settled_by_the_hub() {
    let world = World::new();
    let calls = variable_or("P2P_SYNC_TEST_CALLS", CALLS);
    let folder = world.folder.path().display().to_string();
    let (endpoint, credential) = (world.endpoint(), world.hub.add_host(1));
    let told = run_to_end(
        &stress(),
        &["calls", &folder, &endpoint, &credential, &calls, THREADS, "hub"],
    );
    print!("{told}");
    world.assert_log_is_in_order_without_duplicates();
}

#[test]
fn starts_and_ends_leave_no_thread_no_descriptor_and_no_memory() {
    let (cycles, folder) = (variable_or("P2P_SYNC_TEST_CYCLES", CYCLES), folder());
    let folder = folder.path().display().to_string();
    let told = run_to_end(&stress(), &["cycles", &folder, NOWHERE, &credential(), &cycles]);
    print!("{told}");
}

#[test]
fn the_shared_library_shows_its_calls_and_nothing_else() {
    let library = library().join("lib/libp2p_sync.so");
    let nm = Command::new("nm")
        .args(["--dynamic", "--defined-only"])
        .arg(&library)
        .output();
    let listed = String::from_utf8(nm.expect("nm is installed with the compilers").stdout).expect("text");
    let others: Vec<&str> = listed
        .lines()
        .filter_map(|line| line.split_whitespace().nth(2))
        .filter(|name| !name.starts_with("p2p_sync_"))
        .collect();
    assert!(others.is_empty(), "{others:?}");
    assert!(listed.contains("p2p_sync_submit"));
}

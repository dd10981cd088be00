//! `tests/run map-server`: what the library does to the loop of a busy map server, and whether anything is lost.

use std::process::ExitCode;

#[cfg(target_os = "linux")]
fn main() -> ExitCode {
    use clap::Parser as _;
    use p2p_sync_tests::{map_server, stack};
    stack::run_as_program(std::env::args_os()).unwrap_or_else(|| map_server::run(&map_server::Options::parse()))
}

#[cfg(not(target_os = "linux"))]
fn main() -> ExitCode {
    eprintln!("map_server: the servers that it measures against are started on Linux alone");
    ExitCode::FAILURE
}

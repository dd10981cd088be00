//! `tests/run load`: the recording at many times its speed through one agent and one proxy, and how long it took.

use std::process::ExitCode;

#[cfg(target_os = "linux")]
fn main() -> ExitCode {
    use clap::Parser as _;
    use p2p_sync_tests::{load, stack};
    stack::run_as_program(std::env::args_os()).unwrap_or_else(|| load::run(&load::Options::parse()))
}

#[cfg(not(target_os = "linux"))]
fn main() -> ExitCode {
    eprintln!("load: the servers that it measures are started on Linux alone");
    ExitCode::FAILURE
}

//! `tests/run search`: what a search among 100,000 vectors finds of what an exact one does, and how long it takes.

use std::process::ExitCode;

#[cfg(target_os = "linux")]
fn main() -> ExitCode {
    use clap::Parser as _;
    use p2p_sync_tests::{search, stack};
    stack::run_as_program(std::env::args_os()).unwrap_or_else(|| search::run(&search::Options::parse()))
}

#[cfg(not(target_os = "linux"))]
fn main() -> ExitCode {
    eprintln!("search: the servers that it needs are started on Linux alone");
    ExitCode::FAILURE
}

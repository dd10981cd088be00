//! `tests/run enqueue`: what `Agent::submit` costs the thread that calls it, beside what a call costs that does nothing.

use std::process::ExitCode;

#[cfg(target_os = "linux")]
fn main() -> ExitCode {
    use clap::Parser as _;
    use p2p_sync_tests::{enqueue, stack};
    stack::run_as_program(std::env::args_os()).unwrap_or_else(|| enqueue::run(&enqueue::Options::parse()))
}

#[cfg(not(target_os = "linux"))]
fn main() -> ExitCode {
    eprintln!("enqueue: what the agent adds to a process is read from Linux alone");
    ExitCode::FAILURE
}

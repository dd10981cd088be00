//! `tests/run fanout`: how long a critical operation takes to a hundred subscribers on two proxies.

use std::process::ExitCode;

#[cfg(target_os = "linux")]
fn main() -> ExitCode {
    use clap::Parser as _;
    use p2p_sync_tests::{fanout, stack};
    stack::run_as_program(std::env::args_os()).unwrap_or_else(|| fanout::run(&fanout::Options::parse()))
}

#[cfg(not(target_os = "linux"))]
fn main() -> ExitCode {
    eprintln!("fanout: the servers that it measures are started on Linux alone");
    ExitCode::FAILURE
}

//! `tests/run isolation`: whether one loud host, or a thousand slow connections, make others wait.

use std::process::ExitCode;

#[cfg(target_os = "linux")]
fn main() -> ExitCode {
    use clap::Parser as _;
    use p2p_sync_tests::{isolation, stack};
    stack::run_as_program(std::env::args_os()).unwrap_or_else(|| isolation::run(&isolation::Options::parse()))
}

#[cfg(not(target_os = "linux"))]
fn main() -> ExitCode {
    eprintln!("isolation: the servers that it measures are started on Linux alone");
    ExitCode::FAILURE
}

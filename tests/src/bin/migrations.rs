//! `tests/run migrations`: how long maps are without a writer when they change hands.

use std::process::ExitCode;

#[cfg(target_os = "linux")]
fn main() -> ExitCode {
    use clap::Parser as _;
    use p2p_sync_tests::{migrations, stack};
    stack::run_as_program(std::env::args_os()).unwrap_or_else(|| migrations::run(&migrations::Options::parse()))
}

#[cfg(not(target_os = "linux"))]
fn main() -> ExitCode {
    eprintln!("migrations: the servers that it starts are for Linux alone");
    ExitCode::FAILURE
}

//! `cargo run --release --bin demo`: the whole way of an operation, on real parts, with nothing else installed.

use std::process::ExitCode;

use clap::Parser as _;
use p2p_sync_tests::{demo, stack};

fn main() -> ExitCode {
    stack::run_as_program(std::env::args_os()).unwrap_or_else(|| demo::run(&demo::Options::parse()))
}

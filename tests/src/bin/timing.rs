//! `tests/run timing`: whether the time that a refusal takes tells why.

use std::process::ExitCode;

#[cfg(target_os = "linux")]
fn main() -> ExitCode {
    use clap::Parser as _;
    use p2p_sync_tests::timing;
    timing::run(&timing::Options::parse())
}

#[cfg(not(target_os = "linux"))]
fn main() -> ExitCode {
    eprintln!("timing: the servers that it needs are started on Linux alone");
    ExitCode::FAILURE
}

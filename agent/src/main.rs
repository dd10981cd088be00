//! `p2p-sync-agent`: the standalone agent and its commands.

use std::process::ExitCode;

fn main() -> ExitCode {
    p2p_sync_agent::cli::run(std::env::args_os())
}

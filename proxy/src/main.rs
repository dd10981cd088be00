//! The program; everything it does is in the library.

use std::process::ExitCode;

#[tokio::main]
async fn main() -> ExitCode {
    p2p_sync_proxy::cli::run(std::env::args_os()).await
}

//! `tests/run embeddings`: what each provider of embeddings finds on a labelled set, and what a text costs.

use std::process::ExitCode;

use clap::Parser as _;
use p2p_sync_tests::embeddings;

fn main() -> ExitCode {
    embeddings::run(&embeddings::Options::parse())
}

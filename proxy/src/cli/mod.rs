//! The program `p2p-sync-proxy`.

mod check;
mod embeddings;
mod feed;
mod hosts;
mod keys;
mod limbo;
mod maps;
mod ops;
mod players;
mod schema;
mod serve;

use std::{
    ffi::OsString,
    io::IsTerminal,
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::{Args, Parser, Subcommand};
use p2p_sync_proto::{Problem, settings::Problems};

use crate::config::{Config, DEFAULT_FILE, Log, Overrides};

/// The hub of p2p-sync: takes what hosts send, checks it, and stores it in Postgres.
#[derive(Debug, Parser)]
#[command(name = "p2p-sync-proxy", version)]
struct Cli {
    #[command(flatten)]
    common: Common,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Args)]
struct Common {
    /// The settings; without it `conf/p2p_sync_proxy.conf` if that is there, and otherwise the defaults.
    /// The environment (`P2P_SYNC_<KEY>`) goes before both.
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Use a Postgres inside this process, in a folder of its own.
    #[arg(long, global = true)]
    embedded: bool,
    /// With --embedded: the folder, instead of `embedded_data_dir`.
    #[arg(long, global = true, value_name = "DIR", requires = "embedded")]
    data_dir: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve hosts until SIGTERM or SIGINT.
    Serve,
    /// Say what is right and what is wrong with settings, keys, rules, database and Redis; changes nothing.
    Check,
    /// The master keys.
    #[command(subcommand)]
    Keys(keys::Keys),
    /// The volunteers' machines.
    #[command(subcommand)]
    Hosts(hosts::Hosts),
    /// Who writes which map.
    #[command(subcommand)]
    Maps(maps::Maps),
    /// Which machine has which player.
    #[command(subcommand)]
    Players(players::Players),
    /// What came after the right to write its map, or its player, had passed on.
    #[command(subcommand)]
    Limbo(limbo::Limbo),
    /// Your own edits of states, and what hosts wrote without knowing of them.
    #[command(subcommand)]
    Ops(ops::Ops),
    /// What was embedded of what happens, and what waits for it.
    #[command(subcommand)]
    Embeddings(embeddings::Commands),
    /// Bring what is committed here into other databases.
    #[command(subcommand)]
    Feed(feed::Feed),
    /// The tables.
    #[command(subcommand)]
    Schema(schema::Schema),
}

impl Common {
    fn load(&self) -> Result<Config, Problems> {
        Config::load(self.file(), &self.overrides())
    }

    fn file(&self) -> Option<&Path> {
        let default = Path::new(DEFAULT_FILE);
        self.config.as_deref().or_else(|| default.exists().then_some(default))
    }

    fn overrides(&self) -> Overrides {
        Overrides {
            embedded: self.embedded,
            data_dir: self.data_dir.clone(),
        }
    }
}

/// Runs the program with its arguments, the program's name first, inside a tokio runtime.
///
/// The exit code is 0 when all went well, 1 for a problem (told on stderr), 2 for arguments that cannot be read.
pub async fn run(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let Cli { common, command } = match Cli::try_parse_from(args) {
        Ok(cli) => cli,
        Err(error) => {
            // Where the answer cannot be written there is nowhere left to say so.
            let _ = error.print();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
        }
    };
    let done = match command {
        Command::Serve => serve::serve(&common).await,
        Command::Check => return check::check(&common).await,
        Command::Keys(keys) => keys::run(&keys, &common).await,
        Command::Hosts(hosts) => hosts::run(&hosts, &common).await,
        Command::Maps(maps) => maps::run(&maps, &common).await,
        Command::Players(players) => players::run(&players, &common).await,
        Command::Limbo(limbo) => limbo::run(&limbo, &common).await,
        Command::Ops(ops) => ops::run(&ops, &common).await,
        Command::Embeddings(commands) => embeddings::run(&commands, &common).await,
        Command::Feed(feed) => feed::run(&feed, &common).await,
        Command::Schema(schema) => schema::run(&schema, &common).await,
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(problems) => {
            eprintln!("{problems}");
            ExitCode::FAILURE
        }
    }
}

/// Sends the log to stderr, for stdout is the commands' own. Without effect where the process has a log already.
fn log_to_stderr(log: &Log) {
    let filter = tracing_subscriber::EnvFilter::new(&log.filter);
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal());
    let _already_logging = if log.json {
        subscriber.json().try_init()
    } else {
        subscriber.try_init()
    };
}

/// For commands that answer at once: only what went wrong is logged.
fn log_warnings() {
    log_to_stderr(&Log {
        filter: "warn".to_owned(),
        json: false,
    });
}

fn one(problem: Problem) -> Problems {
    Problems(vec![problem])
}

//! The command line of the standalone agent.

mod check;
mod drain;
mod enrol;
mod events;
mod leave;

use std::{
    ffi::OsString,
    io::{BufReader, IsTerminal as _, Write as _, stdin, stdout},
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    time::Duration,
};

use clap::{Args, Parser, Subcommand};
use p2p_sync_proto::{Code, Problem, policy::parse_type, terminal::shown};
use serde_json::{Value, json, value::RawValue};
use uuid::Uuid;

use self::events::{CHANGES_MAX, Events};
use crate::{
    Agent, Config,
    keys::Keys,
    link::{self, Puller, Watcher},
    local_api::{self, Action, Member, READ_TIMEOUT, Request, answer},
    read::Known,
    results::Observer,
    subscriptions::Subscriptions,
    unsaid::Unsaid,
    watch::Watch,
};

const REQUESTS: &str = r#"A local program writes one JSON object a line and reads one for each:
  {"do":"put","type":"PLAYER_POSITION","map":"prontera","account_id":2000001,
   "data":{"char_id":150001,"x":1,"y":2},"priority":false,"wait_ms":0}     without "data" it deletes
  {"do":"group","members":[{"type":"ITEM_DROP","map":"prontera","entity":"7"},
   {"type":"PLAYER_DATA","account_id":2000001,"data":{"char_id":150001,"zeny":5}}]}       all of them or none
  {"do":"get","path":"prontera/MAP_STATE","at_least_sequence":812,"at_least":{"tenure":3,"incarnation":7,"sequence":5,
   "host_id":"…"}}    never older than that stream_sequence, or version; both may be left out
  {"do":"scan","prefix":"prontera/","limit":100,"cursor":""}
  {"do":"watch","stream":"prontera","types":["ITEM_DROP"],"prefix":""}    a line for each update from then on; takes
                                                                         a connection to agent.sock of its own
  {"do":"result","operation_id":"…"}
  {"do":"status"}
  {"do":"flush","timeout_ms":10000}
  {"do":"dead_letters","limit":100}
  {"do":"cache_set","key":"motd","value":"welcome","expiry_seconds":0}     0: cache_expiry_seconds; not durable
  {"do":"cache_get","key":"motd","timeout_ms":500}     {"value":null} where there is none; 0: critical_timeout_ms
  {"do":"cache_exists","key":"motd","timeout_ms":500}
  {"do":"cache_delete","key":"motd"}
  {"do":"publish","channel":"news","message":"hello"}
  {"do":"list_maps","map":""}                 who holds it, who stands by; empty: all that this host has to do with
  {"do":"assign_map","map":"geffen"}          asks for a map that nobody holds
  {"do":"migrate_map","map":"prontera","to":""}      has it handed over while it goes on; "to": a host's id
  {"do":"release_map","map":"prontera"}       gives it up, when what was made for it is settled
  {"do":"leave"}                              gives all maps away; asked again it tells how far that is
  {"do":"embed","text":"Who has seen the caravan?"}
  {"do":"similar","search":{"text":"the missing caravan","maps":["prontera"],"types":["CHAT_MESSAGE"],
   "since_ms":0,"min_similarity":0.2},"limit":10}        or "embedding":[…] for "text"; only what this host may see
What programs give syncFromMainServer as request_json is in p2p_sync_request.schema.json, beside the headers.
A "tag" is given back with the answer. An answer with "error" has the "code" and its "label" beside it."#;

/// Brings what happens on this host's maps to the main server.
#[derive(Debug, Parser)]
#[command(name = "p2p-sync-agent", version, about)]
struct Cli {
    /// The host's configuration.
    #[arg(long, global = true, default_value = "conf/p2p_data_sync.conf")]
    config: PathBuf,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Runs the agent: drains the outbox, and serves local programs on `agent_socket`.
    #[command(after_long_help = REQUESTS)]
    Run(Run),
    /// Makes this machine a host of the hub that a one-time token is for; keeps the credential in `credential_file`.
    Enrol {
        /// What the hub's operator gave; `-` reads it from standard input, so that it is in no shell's history.
        token: String,
    },
    /// Looks whether the settings, the outbox and the hub are well: one line each, `ok` or what to do.
    Check,
    /// Puts one piece of state and waits until it is settled.
    Put(PutArgs),
    /// Deletes one piece of state and waits until it is settled.
    Delete(DeleteArgs),
    /// Puts and deletes several pieces of state together or not at all, and waits until that is settled.
    Group {
        /// A JSON array of members as `run --help` shows them; `-` reads standard input.
        file: PathBuf,
        /// By the critical lane.
        #[arg(long)]
        priority: bool,
        /// How long to wait for the hub's answer, in seconds.
        #[arg(long, default_value_t = 10)]
        timeout: u64,
    },
    /// Shows the state at a path, from the hub.
    Get {
        /// E.g. `prontera/MAP_STATE`.
        path: String,
        /// Never older than this version; without a host id one that this host wrote.
        #[arg(long, value_name = "TENURE:INCARNATION:SEQUENCE[@HOST_ID]", value_parser = known)]
        at_least: Option<Known>,
        /// Never older than this position of its stream.
        #[arg(long, value_name = "STREAM_SEQUENCE")]
        at_least_sequence: Option<u64>,
    },
    /// Shows the states below a prefix, from the hub, in the order of their paths.
    Scan {
        /// E.g. `prontera/`.
        prefix: String,
        /// States in a page.
        #[arg(long, default_value_t = 100)]
        limit: u32,
        /// Reads on from the last page.
        #[arg(long, default_value = "")]
        cursor: String,
    },
    /// Shows each state of a stream and then each change, one JSON object a line, until it is interrupted.
    ///
    /// A line with `"snapshot":true` begins anew: what was shown before it does not count any more.
    Watch {
        /// A map's name, `@player` or `@host`.
        stream: String,
        /// Only these; may be given several times.
        #[arg(long = "type", value_name = "TYPE")]
        types: Vec<String>,
        /// Only paths that begin so.
        #[arg(long, default_value = "")]
        prefix: String,
    },
    /// Shows the embedding of a text, from the hub.
    Embed {
        /// What to embed.
        text: String,
    },
    /// Shows what lies nearest to a text among what the hub has embedded, and this host may see.
    Similar(SimilarArgs),
    /// Shows the link, the outbox and what would be lost with its disk, and the maps that this host may write.
    Status,
    /// Waits until everything taken is settled.
    Flush {
        /// Seconds.
        #[arg(long, default_value_t = 60)]
        timeout: u64,
    },
    /// Waits until the outbox is empty, running agent or not, and tells how far it is. For before a machine is given up.
    Drain {
        /// Seconds; as long as it takes if not given.
        #[arg(long)]
        timeout: Option<u64>,
    },
    /// Hands this host's maps over, waits until everything taken is settled, and ends the agent that runs. For before a machine
    /// is switched off: others play on.
    Leave {
        /// Seconds; as long as it takes if not given.
        #[arg(long)]
        timeout: Option<u64>,
    },
    /// Asks the hub for maps, and gives them away.
    #[command(subcommand)]
    Maps(Maps),
    /// Shows operations that were refused, newest first.
    DeadLetters {
        /// How many.
        #[arg(long, default_value_t = 100)]
        limit: u32,
    },
}

#[derive(Debug, Subcommand)]
enum Maps {
    /// Shows who holds a map and who stands by for it; or all maps that this host has to do with.
    List {
        /// Its name.
        #[arg(default_value = "")]
        map: String,
    },
    /// Asks for a map that nobody holds.
    Assign {
        /// Its name.
        map: String,
    },
    /// Has a map of this host's handed over while it goes on.
    Migrate {
        /// Its name.
        map: String,
        /// The id of the host that is to have it; the best there is if not given.
        #[arg(long, default_value = "")]
        to: String,
    },
    /// Gives a map up, when what was made for it is settled.
    Release {
        /// Its name.
        map: String,
    },
}

#[derive(Debug, Args)]
struct Run {
    /// Reads requests from standard input as well; at its end, flushes and stops.
    #[arg(long)]
    stdin: bool,
    /// Writes each change of an operation's state to standard output, one JSON object a line; where a slow reader missed
    /// some, `{"left_out":…}` says how many.
    #[arg(long)]
    events: bool,
    /// How long to wait for the outbox to drain when standard input ends, in seconds.
    #[arg(long, default_value_t = 60)]
    drain_timeout: u64,
}

#[derive(Debug, Args)]
struct Target {
    /// By name or number, e.g. `PLAYER_POSITION`.
    #[arg(value_name = "TYPE")]
    data_type: String,
    /// Where it happened.
    #[arg(long, default_value = "")]
    map: String,
    /// Whom it is about.
    #[arg(long, default_value_t = 0)]
    account: u32,
    /// Which one of its owner's, where the JSON does not say.
    #[arg(long)]
    entity: Option<String>,
    /// The owning character, where the JSON does not say.
    #[arg(long)]
    char_id: Option<u64>,
    /// By the critical lane.
    #[arg(long)]
    priority: bool,
    /// How long to wait for the hub's answer, in seconds.
    #[arg(long, default_value_t = 10)]
    timeout: u64,
}

#[derive(Debug, Args)]
struct PutArgs {
    #[command(flatten)]
    target: Target,
    /// JSON.
    data: String,
}

#[derive(Debug, Args)]
struct SimilarArgs {
    /// What to look near to.
    text: String,
    /// Only on these maps; may be given several times.
    #[arg(long = "map", value_name = "MAP")]
    maps: Vec<String>,
    /// Only these; may be given several times.
    #[arg(long = "type", value_name = "TYPE")]
    types: Vec<String>,
    /// Only what the hub received from then on, milliseconds since 1970.
    #[arg(long, default_value_t = 0)]
    since_ms: u64,
    /// Only what is so similar at least, -1 to 1.
    #[arg(long, allow_negative_numbers = true)]
    min_similarity: Option<f32>,
    /// Hits.
    #[arg(long, default_value_t = 10)]
    limit: u32,
}

#[derive(Debug, Args)]
struct DeleteArgs {
    #[command(flatten)]
    target: Target,
}

/// Runs a command; `args` begin with the program's name.
pub fn run(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let cli = match Cli::try_parse_from(args) {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version are no failure; clap knows which stream and status each takes.
            let _ = error.print();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
        }
    };
    match &cli.command {
        Command::Check => return check::check(&cli.config),
        Command::Enrol { token } => {
            return enrol::enrol(&cli.config, token).unwrap_or_else(|problems| fail(&problems));
        }
        _ => {}
    }
    let config = match Config::load(&cli.config) {
        Ok(config) => config,
        Err(problems) => return fail(&problems),
    };
    start_logging(config.debug);
    let done = match cli.command {
        Command::Run(run) => self::serve(config, &run),
        Command::Drain { timeout } => drain::drain(config, timeout.map(Duration::from_secs)),
        Command::Leave { timeout } => leave::leave(config, timeout.map(Duration::from_secs)),
        command => request_of(command).and_then(|request| ask(config, &request)),
    };
    match done {
        Ok(code) => code,
        Err(problem) => fail(&problem),
    }
}

fn start_logging(debug: bool) {
    let fallback = if debug { "debug" } else { "info" };
    let filter = tracing_subscriber::EnvFilter::try_from_env("P2P_SYNC_LOG").unwrap_or_else(|_| fallback.into());
    // Set already where several programs live in one process.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .try_init();
}

fn fail(problem: &dyn std::fmt::Display) -> ExitCode {
    eprintln!("{problem}");
    ExitCode::FAILURE
}

fn request_of(command: Command) -> Result<Request, Problem> {
    Ok(match command {
        Command::Run(_) | Command::Check | Command::Enrol { .. } | Command::Drain { .. } | Command::Leave { .. } => {
            unreachable!("does more than asking")
        }
        Command::Maps(maps) => maps_of(maps),
        Command::Put(PutArgs { target, data }) => {
            p2p_sync_proto::json::check(&data)?;
            put_of(target, Some(RawValue::from_string(data).expect("checked to be JSON")))?
        }
        Command::Delete(DeleteArgs { target }) => put_of(target, None)?,
        Command::Group {
            file,
            priority,
            timeout,
        } => Request {
            action: Action::Group,
            members: read_members(&file)?,
            priority,
            wait_ms: timeout.saturating_mul(1000),
            ..Request::default()
        },
        Command::Get {
            path,
            at_least,
            at_least_sequence,
        } => Request {
            action: Action::Get,
            path,
            at_least,
            at_least_sequence,
            ..Request::default()
        },
        Command::Scan { prefix, limit, cursor } => Request {
            action: Action::Scan,
            prefix,
            limit,
            cursor,
            ..Request::default()
        },
        Command::Watch { stream, types, prefix } => Request {
            action: Action::Watch,
            stream,
            types,
            prefix,
            ..Request::default()
        },
        Command::Embed { text } => Request {
            action: Action::Embed,
            text,
            ..Request::default()
        },
        Command::Similar(asked) => Request {
            action: Action::Similar,
            limit: asked.limit,
            search: Some(search_of(&asked)),
            ..Request::default()
        },
        Command::Status => Request {
            action: Action::Status,
            ..Request::default()
        },
        Command::Flush { timeout } => Request {
            action: Action::Flush,
            timeout_ms: timeout.saturating_mul(1000),
            ..Request::default()
        },
        Command::DeadLetters { limit } => Request {
            action: Action::DeadLetters,
            limit,
            ..Request::default()
        },
    })
}

fn maps_of(maps: Maps) -> Request {
    let (action, map, to) = match maps {
        Maps::List { map } => (Action::ListMaps, map, String::new()),
        Maps::Assign { map } => (Action::AssignMap, map, String::new()),
        Maps::Migrate { map, to } => (Action::MigrateMap, map, to),
        Maps::Release { map } => (Action::ReleaseMap, map, String::new()),
    };
    Request {
        action,
        map,
        to,
        ..Request::default()
    }
}

fn search_of(asked: &SimilarArgs) -> Box<RawValue> {
    let mut search = json!({
        "text": asked.text,
        "maps": asked.maps,
        "types": asked.types,
        "since_ms": asked.since_ms,
    });
    if let Some(least) = asked.min_similarity {
        search["min_similarity"] = json!(least);
    }
    RawValue::from_string(search.to_string()).expect("JSON")
}

/// A version as the command line has it.
fn known(text: &str) -> Result<Known, String> {
    let (version, host_id) = match text.split_once('@') {
        Some((version, host_id)) => (
            version,
            Some(host_id.parse::<Uuid>().map_err(|error| error.to_string())?),
        ),
        None => (text, None),
    };
    let numbers: Result<Vec<u64>, _> = version.split(':').map(str::parse).collect();
    match numbers.as_deref() {
        Ok(&[tenure, incarnation, sequence]) => Ok(Known {
            tenure,
            incarnation,
            sequence,
            host_id,
        }),
        _ => Err("write the three numbers of a version, as 3:7:5".to_owned()),
    }
}

fn read_members(file: &Path) -> Result<Vec<Member>, Problem> {
    let read = if file == Path::new("-") {
        std::io::read_to_string(stdin())
    } else {
        std::fs::read_to_string(file)
    };
    let bad = |error: &dyn std::fmt::Display| {
        let sentence = format!("no group can be read from {}: {error}", file.display());
        Problem::new(Code::BadRequest, sentence)
    };
    let text = read.map_err(|error| bad(&error))?;
    serde_json::from_str(&text).map_err(|error| bad(&error))
}

fn put_of(target: Target, data: Option<Box<RawValue>>) -> Result<Request, Problem> {
    Ok(Request {
        action: Action::Put,
        data_type: parse_type(&target.data_type)?.as_str_name().to_owned(),
        map: target.map,
        account_id: target.account,
        entity: target.entity,
        char_id: target.char_id,
        data,
        priority: target.priority,
        wait_ms: target.timeout.saturating_mul(1000),
        ..Request::default()
    })
}

/// Asks the agent that runs on this outbox, or opens the outbox for the one question.
fn ask(config: Config, request: &Request) -> Result<ExitCode, Problem> {
    if matches!(request.action, Action::Watch) {
        return watch(&config, request);
    }
    let told = match local_api::ask(&config.socket_path(), request) {
        Some(told) => told?,
        None if matches!(request.action, Action::Get | Action::Scan) => read_without_outbox(&config, request)?,
        None => {
            let patience = config.connect_timeout;
            let agent = Agent::start(Config {
                metrics_interval: None,
                ..config
            })?;
            // What is put carries the tenure of its map, which the hub tells at the beginning, as it does who holds what.
            if matches!(
                request.action,
                Action::Status
                    | Action::Put
                    | Action::Group
                    | Action::ListMaps
                    | Action::AssignMap
                    | Action::MigrateMap
                    | Action::ReleaseMap
            ) {
                agent.wait_for_link(patience);
            }
            answer(&agent, request, &Unsaid::default())?
        }
    };
    let settled_badly = matches!(told["state"].as_str(), Some("REJECTED" | "UNKNOWN" | "LIMBO"));
    let not_flushed = told["flushed"] == Value::Bool(false);
    let json = serde_json::to_string_pretty(&told).expect("plain data");
    // Other hosts' words are in it. Who reads no further, such as `head`, is no failure.
    let _ = writeln!(stdout(), "{}", shown(&json));
    Ok(if settled_badly || not_flushed {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}

fn read_without_outbox(config: &Config, request: &Request) -> Result<Value, Problem> {
    let runtime = link::runtime(1)?;
    let keys = Arc::new(Keys::new(config.credential()?));
    let puller = runtime.block_on(async { Puller::new(config, keys, 0, Arc::default()) });
    local_api::ask_hub(request, |question| {
        runtime.block_on(puller.pull(question, READ_TIMEOUT))
    })
}

/// Shows what the agent that runs on this outbox is told, or asks the hub itself.
fn watch(config: &Config, request: &Request) -> Result<ExitCode, Problem> {
    let subscription = local_api::followed(request)?;
    let watched = local_api::watch(&config.socket_path(), request, stdout());
    watched.unwrap_or_else(|| {
        let runtime = link::runtime(1)?;
        let keys = Arc::new(Keys::new(config.credential()?));
        let way = runtime.block_on(async { Watcher::new(config, keys, 0, Arc::default()) });
        let subscriptions = Arc::new(Subscriptions::new(config, Arc::new(way), Arc::default()));
        let watch = Watch::begin(&subscriptions, runtime.handle(), subscription)?;
        let written = watch.write_lines(&mut stdout(), || false);
        written.or_else(|error| local_api::watched(&error))
    })?;
    Ok(ExitCode::SUCCESS)
}

fn serve(config: Config, run: &Run) -> Result<ExitCode, Problem> {
    let outbox_dir = config.outbox_dir.clone();
    let socket = config.socket_path();
    let no_thread = |error| Problem::new(Code::Internal, format!("no thread could be started: {error}"));
    let events = run.events.then(|| Events::to(stdout(), CHANGES_MAX)).transpose();
    let events = events.map_err(no_thread)?.map(Arc::new);
    let observer = events
        .clone()
        .map(|events| -> Observer { Arc::new(move |event| events.tell(event)) });
    let agent = Arc::new(Agent::start_serving(config, observer)?);
    local_api::listen(&agent, &socket)?;
    eprintln!("p2p-sync-agent: running, outbox in {}", outbox_dir.display());
    let (ended, input_ended) = tokio::sync::oneshot::channel();
    if run.stdin {
        let agent = agent.clone();
        std::thread::spawn(move || {
            if let Err(error) = local_api::serve(&agent, BufReader::new(stdin()), stdout(), None) {
                tracing::warn!(%error, "standard input or output failed");
            }
            let _ = ended.send(());
        });
    }
    let by_input = wait_for_end(&agent, run.stdin, input_ended)?;
    let drained = !by_input || agent.flush(Duration::from_secs(run.drain_timeout));
    local_api::close(&socket);
    let ended = agent.shutdown();
    if let Some(events) = events {
        events.end();
    }
    ended?;
    Ok(if drained { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Waits for a signal to stop, to be asked to, or for standard input to end; true for the latter.
fn wait_for_end(
    agent: &Agent,
    reads_input: bool,
    input_ended: tokio::sync::oneshot::Receiver<()>,
) -> Result<bool, Problem> {
    let failed = |error: std::io::Error| Problem::new(Code::Internal, format!("signals cannot be awaited: {error}"));
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(failed)?;
    runtime.block_on(async {
        #[cfg(unix)]
        let mut terminate =
            tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()).map_err(failed)?;
        #[cfg(unix)]
        let terminated = terminate.recv();
        // Elsewhere Ctrl-C alone ends it.
        #[cfg(not(unix))]
        let terminated = std::future::pending::<Option<()>>();
        tokio::select! {
            _ = input_ended, if reads_input => Ok(true),
            _ = tokio::signal::ctrl_c() => Ok(false),
            _ = terminated => Ok(false),
            () = agent.asked_to_end() => Ok(false),
        }
    })
}

//! The proxy's settings: what was asked (a file, the environment, the command line), resolved into what is meant.

use std::{
    net::{IpAddr, SocketAddr},
    num::NonZeroU32,
    path::{Path, PathBuf},
    time::Duration,
};

use p2p_sync_proto::{
    Code, Problem,
    path::check_map,
    settings::{Key, Problems, Settings},
    token::check_endpoint,
};

use crate::{
    admin,
    admission::hosts::Quota,
    embed::{self, LocalSettings, ProviderSettings, RemoteSettings, Service, check_base_url},
    hosts::{self, score::Weights},
    secret::Secret,
    store::{Connection, EligibleMaps, Hnsw, Leases, StoreConfig, parse_url},
    tls,
    verdicts::{LockRule, Locks, movement::Pace},
};

mod redis;

pub use self::redis::{Address, Redis, RedisMode};

/// The file that the program reads where its command names none and this one is there; from the current folder.
pub const DEFAULT_FILE: &str = "conf/p2p_sync_proxy.conf";

/// Where `embedding_provider = openai` asks, and for which model, when the settings do not say.
const OPENAI_BASE_URL: &str = "https://api.openai.com/v1";
const OPENAI_MODEL: &str = "text-embedding-3-small";

/// Every key of the file, with its default.
pub const KEYS: [Key; 69] = [
    Key::new("bind_address", "127.0.0.1"),
    Key::new("port", "50051"),
    Key::new("tls_cert", ""),
    Key::new("tls_key", ""),
    Key::new("allow_insecure", "no"),
    Key::new("max_connections", "1024"),
    Key::new("max_connections_per_address", "auto"),
    Key::new("max_streams_per_connection", "64"),
    Key::new("request_timeout_ms", "30000"),
    Key::new("host_ops_per_second", "50000"),
    Key::new("host_kib_per_second", "32768"),
    Key::new("host_calls_per_second", "1000"),
    Key::new("admin_address", "127.0.0.1"),
    Key::new("admin_port", ""),
    Key::new("admin_token_file", ""),
    Key::new("pg_connection_string", ""),
    Key::new("embedded_data_dir", "p2p-sync-data"),
    Key::new("pg_pool_size_critical", "4"),
    Key::new("pg_pool_size_bulk", "4"),
    Key::new("statement_timeout_critical_ms", "2000"),
    Key::new("statement_timeout_bulk_ms", "30000"),
    Key::new("embedding_dimensions", "1536"),
    Key::new("embedding_provider", "lexical"),
    Key::new("embedding_model", ""),
    Key::new("embedding_model_dir", ""),
    Key::new("embedding_threads", "1"),
    Key::new("embedding_base_url", ""),
    Key::new("embedding_api_key", ""),
    Key::new("embedding_api_version", "2024-10-21"),
    Key::new("embedding_deployment", ""),
    Key::new("embedding_timeout_ms", "10000"),
    Key::new("vector_eligible_maps", ""),
    Key::new("embedding_tokens_per_day", "1000000"),
    Key::new("embedding_host_tokens_per_day", "100000"),
    Key::new("embedding_tool_tokens_per_day", "1000000"),
    Key::new("hnsw_m", "16"),
    Key::new("hnsw_ef_construction", "64"),
    Key::new("hnsw_ef_search", "100"),
    Key::new("log_retention_days", "30"),
    Key::new("tombstone_retention_days", "90"),
    Key::new("leases", "required"),
    Key::new("lease_seconds", "60"),
    Key::new(
        "host_score_weights",
        "cpu 20, memory 10, latency 15, upload 10, stability 25, uptime 5, room 15",
    ),
    Key::new("host_maps_max", "100"),
    Key::new("migration_margin", "20"),
    Key::new("migration_min_seconds", "120"),
    Key::new("catch_up_seconds", "30"),
    Key::new("handover_seconds", "10"),
    Key::new("redis_mode", "standalone"),
    Key::new("redis_host", ""),
    Key::new("redis_port", "6379"),
    Key::new("redis_password", ""),
    Key::new("redis_db", "0"),
    Key::new("redis_sentinel_master", ""),
    Key::new("redis_sentinel_password", ""),
    Key::new("redis_prefix", "p2p_sync"),
    Key::new("cache_expiry_seconds", "60"),
    Key::new("cache_entries_max", "50000"),
    Key::new("keyring_file", ""),
    Key::new("public_endpoint", ""),
    Key::new("public_ca", ""),
    Key::new("types_file", ""),
    Key::new("movement_ms_per_cell", "150"),
    Key::new("movement_ms_per_cell_min", "20"),
    Key::new("forgery_lock_threshold", "100"),
    Key::new("trespass_lock_threshold", "10000"),
    Key::new("lock_window_seconds", "600"),
    Key::new("log_level", "info"),
    Key::new("log_format", "text"),
];

/// What the command line says beyond the file.
#[derive(Clone, Debug, Default)]
pub struct Overrides {
    /// Postgres inside the process.
    pub embedded: bool,
    /// Instead of `embedded_data_dir`; from the current folder.
    pub data_dir: Option<PathBuf>,
}

/// The settings, checked, with defaults in place and paths made whole.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where to listen; port 0 takes any.
    pub listen: SocketAddr,
    /// Absent: plaintext.
    pub tls: Option<tls::Files>,
    /// What is let in.
    pub admission: Admission,
    /// Where tools are served; absent: nowhere.
    pub admin: Option<admin::Settings>,
    /// Which database, and how it is used.
    pub store: StoreConfig,
    /// Absent: cache and publishing live inside the process.
    pub redis: Option<Redis>,
    /// How maps are given and moved.
    pub maps: hosts::Settings,
    /// The cache's bounds.
    pub cache: CacheBounds,
    /// The file of the master keys.
    pub keyring_file: PathBuf,
    /// Where hosts reach the hub; absent: each invitation says it.
    pub public_endpoint: Option<String>,
    /// The file of the hub's own CA, which tokens pin; absent: a public CA has signed what hosts see.
    pub public_ca: Option<PathBuf>,
    /// Absent: the built-in rules.
    pub types_file: Option<PathBuf>,
    /// What a cell takes a character.
    pub pace: Pace,
    /// How many refusals lock a host.
    pub locks: Locks,
    /// How texts become vectors.
    pub embedding: embed::Settings,
    /// Which ones, and how many.
    pub embedding_limits: embed::Limits,
    /// What is logged, and how.
    pub log: Log,
}

/// Bounds on what connects.
#[derive(Clone, Copy, Debug)]
pub struct Admission {
    /// Open connections.
    pub connections_max: usize,
    /// Of one address; absent where all come through an edge.
    pub connections_per_address_max: Option<usize>,
    /// Calls in flight on one of them.
    pub streams_per_connection_max: u32,
    /// How long a call may take.
    pub request_timeout: Duration,
    /// What each host may send.
    pub quota: Quota,
}

/// What the cache may hold.
#[derive(Clone, Copy, Debug)]
pub struct CacheBounds {
    /// How long a state stays after it was written.
    pub expiry: Duration,
    /// States inside the process.
    pub entries_max: usize,
}

/// What is logged, and how.
#[derive(Clone, Debug)]
pub struct Log {
    /// Directives as `tracing_subscriber::EnvFilter` reads them.
    pub filter: String,
    /// JSON, one object a line, instead of text.
    pub json: bool,
}

impl Config {
    /// Reads a file, or the defaults where there is none, with the process' environment over both.
    ///
    /// Errors: `CONFIG_UNREADABLE`, and all mistakes of the file at once.
    pub fn load(file: Option<&Path>, overrides: &Overrides) -> Result<Self, Problems> {
        let (text, folder) = read(file)?;
        Self::resolve(&text, folder, overrides, |name| std::env::var(name).ok())
    }

    /// Where the master keys are, by the same file, which need not say yet where the database is.
    pub fn load_keyring_file(file: Option<&Path>, overrides: &Overrides) -> Result<PathBuf, Problems> {
        let (text, folder) = read(file)?;
        let raw = Settings::read(&text, &KEYS, |name| std::env::var(name).ok());
        let keyring_file = keyring_file(&raw, folder, overrides);
        raw.finish(keyring_file)
    }

    /// Where the admin listener's token is, by the same file.
    pub fn load_admin_token_file(file: Option<&Path>, overrides: &Overrides) -> Result<PathBuf, Problems> {
        let (text, folder) = read(file)?;
        let raw = Settings::read(&text, &KEYS, |name| std::env::var(name).ok());
        let token_file = secret_beside(&raw, folder, overrides, "admin_token_file", "admin_token");
        raw.finish(token_file)
    }

    /// Resolves a file's text; relative paths are meant from `folder`.
    pub fn resolve(
        text: &str,
        folder: &Path,
        overrides: &Overrides,
        environment: impl Fn(&str) -> Option<String>,
    ) -> Result<Self, Problems> {
        let admin_token = environment(admin::TOKEN_VARIABLE).map(Secret::from_string);
        let mut raw = Settings::read(text, &KEYS, environment);
        let tls = tls(&mut raw, folder);
        let speaks_tls = tls.is_some();
        let may_leave_loopback = raw.switch("allow_insecure") || speaks_tls;
        let listen = listen(&mut raw, may_leave_loopback);
        let token_file = secret_beside(&raw, folder, overrides, "admin_token_file", "admin_token");
        let source = admin_token.map_or(admin::Source::File(token_file), admin::Source::Given);
        let admin = admin(&mut raw, may_leave_loopback, source);
        let admission = admission(&mut raw, speaks_tls);
        let store = store(&mut raw, folder, overrides);
        let config = Self {
            listen,
            tls,
            admission,
            admin,
            embedding: embedding(&mut raw, folder, store.embedding_dimensions),
            embedding_limits: embedding_limits(&mut raw),
            maps: maps(&mut raw, store.leases.length),
            store,
            redis: self::redis::redis(&mut raw),
            cache: CacheBounds {
                expiry: Duration::from_secs(raw.number("cache_expiry_seconds", 1..=86_400)),
                entries_max: raw.number("cache_entries_max", 1..=10_000_000),
            },
            keyring_file: keyring_file(&raw, folder, overrides),
            public_endpoint: raw.resolve("public_endpoint", |text| match text {
                "" => Ok(None),
                text => check_endpoint(text)
                    .map(|()| Some(text.to_owned()))
                    .map_err(str::to_owned),
            }),
            public_ca: Some(raw.text("public_ca"))
                .filter(|file| !file.is_empty())
                .map(|file| folder.join(file)),
            types_file: Some(raw.text("types_file"))
                .filter(|file| !file.is_empty())
                .map(|file| folder.join(file)),
            pace: Pace {
                ms_per_cell: raw.number("movement_ms_per_cell", 1..=10_000),
                ms_per_cell_min: raw.number("movement_ms_per_cell_min", 1..=10_000),
            },
            locks: locks(&mut raw),
            log: log(&mut raw),
        };
        raw.finish(config)
    }
}

/// The file's text, and the folder that its relative paths are meant from.
fn read(file: Option<&Path>) -> Result<(String, &Path), Problems> {
    let Some(file) = file else {
        return Ok((String::new(), Path::new("")));
    };
    let text = std::fs::read_to_string(file).map_err(|error| {
        let sentence = format!(
            "{} cannot be read ({error}): check its path and who may read it",
            file.display()
        );
        Problems(vec![Problem::new(Code::ConfigUnreadable, sentence)])
    })?;
    Ok((text, file.parent().unwrap_or(Path::new(""))))
}

fn tls(raw: &mut Settings, folder: &Path) -> Option<tls::Files> {
    let (cert, key) = (raw.text("tls_cert"), raw.text("tls_key"));
    let files = tls::Files {
        cert: folder.join(cert),
        key: folder.join(key),
    };
    match (cert.is_empty(), key.is_empty()) {
        (true, true) => return None,
        (false, false) => {}
        (true, false) => raw.refuse(
            "tls_cert",
            Code::MissingValue,
            "name the certificate's file that tls_key is the key of",
        ),
        (false, true) => raw.refuse(
            "tls_key",
            Code::MissingValue,
            "name the file of the certificate's private key",
        ),
    }
    Some(files)
}

fn listen(raw: &mut Settings, may_leave_loopback: bool) -> SocketAddr {
    let address = address(raw, "bind_address", may_leave_loopback);
    SocketAddr::new(address, raw.number("port", 0..=65_535))
}

/// An address to listen on, off loopback only where the proxy speaks TLS or the operator knows better.
fn address(raw: &mut Settings, key: &str, may_leave_loopback: bool) -> IpAddr {
    let address = raw.resolve(key, |text| match text.parse::<IpAddr>() {
        Ok(address) => Ok(Some(address)),
        Err(_) => Err("expected an IP address, e.g. 127.0.0.1 or ::".to_owned()),
    });
    if address.is_some_and(|address| !address.is_loopback()) && !may_leave_loopback {
        let what_to_do = "the proxy speaks plaintext, which has no place off loopback: set tls_cert and tls_key; or put a load \
                          balancer with TLS before it, and set allow_insecure = yes once nothing else reaches the port";
        raw.refuse(key, Code::BadValue, what_to_do);
    }
    address.unwrap_or(IpAddr::from([127, 0, 0, 1]))
}

fn admin(raw: &mut Settings, may_leave_loopback: bool, source: admin::Source) -> Option<admin::Settings> {
    let address = address(raw, "admin_address", may_leave_loopback);
    let port = raw.resolve("admin_port", |text| match (text, text.parse::<u16>()) {
        ("", _) => Ok(None),
        (_, Ok(port)) => Ok(Some(port)),
        (_, Err(_)) => Err("expected nothing, or a whole number from 0 to 65535".to_owned()),
    })?;
    Some(admin::Settings {
        listen: SocketAddr::new(address, port),
        source,
    })
}

fn admission(raw: &mut Settings, speaks_tls: bool) -> Admission {
    /// Several tables of agents behind one router, each with three or four connections.
    const PER_ADDRESS: usize = 64;
    let per_address = raw.resolve("max_connections_per_address", |text| match text {
        // Without TLS an edge stands before the hub, and all come from its address.
        "auto" => Ok(if speaks_tls { PER_ADDRESS } else { 0 }),
        text => match text.parse() {
            Ok(number @ 0..=65_536) => Ok(number),
            _ => Err("expected auto, 0 for no bound, or 1 to 65536".to_owned()),
        },
    });
    // In each of these ranges a message of the largest kind comes through within the time that one waits.
    let mut per_second = |key: &str, min: u32, max: u32| {
        let number: u32 = raw.number(key, min..=max);
        NonZeroU32::new(number).unwrap_or(NonZeroU32::MIN)
    };
    let quota = Quota {
        operations: per_second("host_ops_per_second", 100, 10_000_000),
        kib: per_second("host_kib_per_second", 256, 4_194_304),
        calls: per_second("host_calls_per_second", 1, 1_000_000),
    };
    Admission {
        connections_max: raw.number("max_connections", 1..=65_536),
        connections_per_address_max: Some(per_address).filter(|max| *max > 0),
        streams_per_connection_max: raw.number("max_streams_per_connection", 8..=1024),
        request_timeout: Duration::from_millis(raw.number("request_timeout_ms", 100..=600_000)),
        quota,
    }
}

fn store(raw: &mut Settings, folder: &Path, overrides: &Overrides) -> StoreConfig {
    StoreConfig {
        connection: connection(raw, folder, overrides),
        critical_connections: raw.number("pg_pool_size_critical", 1..=256),
        bulk_connections: raw.number("pg_pool_size_bulk", 1..=256),
        statement_timeout: Duration::from_millis(raw.number("statement_timeout_critical_ms", 100..=600_000)),
        bulk_statement_timeout: Duration::from_millis(raw.number("statement_timeout_bulk_ms", 100..=600_000)),
        embedding_dimensions: raw.number("embedding_dimensions", 1..=4000),
        hnsw: hnsw(raw),
        log_retention_days: raw.number("log_retention_days", 1..=36_500),
        tombstone_retention_days: raw.number("tombstone_retention_days", 1..=36_500),
        leases: Leases {
            required: raw.resolve("leases", |text| match text {
                "required" => Ok(true),
                "off" => Ok(false),
                _ => Err("expected required or off".to_owned()),
            }),
            length: Duration::from_secs(raw.number("lease_seconds", 1..=86_400)),
        },
    }
}

fn maps(raw: &mut Settings, lease: Duration) -> hosts::Settings {
    hosts::Settings {
        weights: raw.resolve("host_score_weights", weights),
        maps_max: raw.number("host_maps_max", 1..=16_384),
        migration_margin: f64::from(raw.number::<u32>("migration_margin", 1..=100)),
        migration_min: Duration::from_secs(raw.number("migration_min_seconds", 1..=86_400)),
        catch_up: Duration::from_secs(raw.number("catch_up_seconds", 0..=3600)),
        handover: Duration::from_secs(raw.number("handover_seconds", 1..=3600)),
        lease,
    }
}

/// `cpu 20, memory 10`: what is left out weighs nothing.
fn weights(text: &str) -> Result<Weights, String> {
    const NUMBER_MAX: u32 = 1000;
    let names = Weights::NAMES;
    let expected = || {
        let names = names.join(", ");
        format!(
            "expected names with numbers up to {NUMBER_MAX}, such as cpu 20, latency 15, each once, of {names}; not all 0"
        )
    };
    let mut numbers = [None; Weights::NAMES.len()];
    for part in text.split(',') {
        let (name, number) = part.trim().split_once(' ').ok_or_else(expected)?;
        let place = names.iter().position(|known| *known == name).ok_or_else(expected)?;
        let number: u32 = number.trim().parse().map_err(|_| expected())?;
        if number > NUMBER_MAX || numbers[place].replace(f64::from(number)).is_some() {
            return Err(expected());
        }
    }
    let numbers = numbers.map(Option::unwrap_or_default);
    if numbers.iter().sum::<f64>() > 0.0 {
        Ok(Weights::of(numbers))
    } else {
        Err(expected())
    }
}

fn hnsw(raw: &mut Settings) -> Hnsw {
    let hnsw = Hnsw {
        m: raw.number("hnsw_m", 2..=100),
        ef_construction: raw.number("hnsw_ef_construction", 4..=1000),
        ef_search: raw.number("hnsw_ef_search", 1..=1000),
    };
    if hnsw.ef_construction < 2 * hnsw.m {
        let what_to_do = "pgvector wants at least twice hnsw_m";
        raw.refuse("hnsw_ef_construction", Code::BadValue, what_to_do);
    }
    hnsw
}

fn embedding_limits(raw: &mut Settings) -> embed::Limits {
    const TOKENS_MAX: u64 = 1_000_000_000_000;
    let eligible = raw.resolve("vector_eligible_maps", |text| match text {
        "" => Ok(EligibleMaps::None),
        "*" => Ok(EligibleMaps::All),
        text => {
            let mut maps: Vec<String> = text.split(',').map(|map| map.trim().to_owned()).collect();
            maps.sort_unstable();
            maps.dedup();
            let wrong = maps.iter().find_map(|map| check_map(map).err());
            let expected =
                |problem: Problem| format!("expected names of maps with commas between, or *: {}", problem.sentence);
            wrong.map_or(Ok(EligibleMaps::Some(maps)), |problem| Err(expected(problem)))
        }
    });
    let queue_tokens = raw.number("embedding_tokens_per_day", 0..=TOKENS_MAX);
    embed::Limits {
        eligible,
        queue_tokens: Some(queue_tokens).filter(|tokens| *tokens > 0),
        host_tokens: raw.number("embedding_host_tokens_per_day", 0..=TOKENS_MAX),
        tool_tokens: Some(raw.number("embedding_tool_tokens_per_day", 0..=TOKENS_MAX)).filter(|tokens| *tokens > 0),
    }
}

fn embedding(raw: &mut Settings, folder: &Path, dimensions: u32) -> embed::Settings {
    let timeout = Duration::from_millis(raw.number("embedding_timeout_ms", 100..=600_000));
    let threads = raw.number("embedding_threads", 1..=64);
    let provider = match raw.text("embedding_provider") {
        "off" => ProviderSettings::Off,
        "lexical" => ProviderSettings::Lexical,
        "local" => local_model(raw, folder, threads),
        "openai" => remote_model(raw, Service::OpenAi),
        "azure" => {
            let deployment = raw.text("embedding_deployment").to_owned();
            if deployment.is_empty() {
                let what_to_do = "say what the deployment of the model is called in the Azure OpenAI resource";
                raw.refuse("embedding_deployment", Code::MissingValue, what_to_do);
            }
            let part_of_url = |text: &str| {
                let fits = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
                let what_to_do = "expected letters, digits, dots, _ and -";
                let fit = text.bytes().all(fits).then(|| text.to_owned());
                fit.ok_or_else(|| what_to_do.to_owned())
            };
            let service = Service::Azure {
                deployment: raw.resolve("embedding_deployment", part_of_url),
                api_version: raw.resolve("embedding_api_version", part_of_url),
            };
            remote_model(raw, service)
        }
        _ => {
            let what_to_do = "expected off, lexical, local, openai or azure";
            raw.refuse("embedding_provider", Code::BadValue, what_to_do);
            ProviderSettings::Off
        }
    };
    embed::Settings {
        provider,
        dimensions: dimensions as usize,
        timeout,
    }
}

fn local_model(raw: &mut Settings, folder: &Path, threads: usize) -> ProviderSettings {
    if raw.text("embedding_model_dir").is_empty() {
        let what_to_do = "name the folder of the model, with model.safetensors, tokenizer.json and config.json in it";
        raw.refuse("embedding_model_dir", Code::MissingValue, what_to_do);
    }
    ProviderSettings::Local(LocalSettings {
        dir: folder.join(raw.text("embedding_model_dir")),
        name: raw.text("embedding_model").to_owned(),
        threads,
    })
}

fn remote_model(raw: &mut Settings, service: Service) -> ProviderSettings {
    let api_key = Secret::from(raw.text("embedding_api_key"));
    let has_key = !api_key.expose().is_empty();
    if !api_key.expose().bytes().all(|byte| byte.is_ascii_graphic()) {
        let what_to_do = "it holds a space or a letter that no key has: copy it again";
        raw.refuse("embedding_api_key", Code::BadValue, what_to_do);
    }
    let is_openai = service == Service::OpenAi;
    let base_url = match (raw.text("embedding_base_url").trim_end_matches('/'), is_openai) {
        ("", true) => OPENAI_BASE_URL,
        (url, _) => url,
    }
    .to_owned();
    if base_url.is_empty() {
        let what_to_do = "say where the Azure OpenAI resource is, e.g. https://my-resource.openai.azure.com";
        raw.refuse("embedding_base_url", Code::MissingValue, what_to_do);
    } else if let Err(what_to_do) = check_base_url(&base_url, has_key) {
        raw.refuse("embedding_base_url", Code::BadValue, what_to_do);
    }
    // A server of one's own may need none.
    if !has_key && (!is_openai || base_url == OPENAI_BASE_URL) {
        let what_to_do = "the provider wants a key: set it, or P2P_SYNC_EMBEDDING_API_KEY in the environment";
        raw.refuse("embedding_api_key", Code::MissingValue, what_to_do);
    }
    let model = match raw.text("embedding_model") {
        "" => OPENAI_MODEL,
        model => model,
    };
    ProviderSettings::Remote(RemoteSettings {
        model: model.to_owned(),
        service,
        base_url,
        api_key,
    })
}

fn connection(raw: &mut Settings, folder: &Path, overrides: &Overrides) -> Connection {
    if overrides.embedded {
        return Connection::Embedded(data_dir(raw, folder, overrides));
    }
    let url = Secret::from(raw.text("pg_connection_string"));
    if url.expose().is_empty() {
        let what_to_do = "say where Postgres is, e.g. host=/run/postgresql dbname=p2p_sync; \
                          to try without a server, add --embedded to the command";
        raw.refuse("pg_connection_string", Code::MissingValue, what_to_do);
    } else if let Err(what_to_do) = parse_url(&url) {
        raw.refuse("pg_connection_string", Code::BadValue, what_to_do);
    }
    Connection::Url(url)
}

fn data_dir(raw: &Settings, folder: &Path, overrides: &Overrides) -> PathBuf {
    overrides
        .data_dir
        .clone()
        .unwrap_or_else(|| folder.join(raw.text("embedded_data_dir")))
}

fn keyring_file(raw: &Settings, folder: &Path, overrides: &Overrides) -> PathBuf {
    secret_beside(raw, folder, overrides, "keyring_file", "keyring")
}

/// A secret's file: as the key says, or of its name beside the settings or inside an embedded database's folder.
fn secret_beside(raw: &Settings, folder: &Path, overrides: &Overrides, key: &str, name: &str) -> PathBuf {
    match raw.text(key) {
        "" if overrides.embedded => data_dir(raw, folder, overrides).join(name),
        "" => folder.join(format!("p2p_sync.{name}")),
        file => folder.join(file),
    }
}

fn locks(raw: &mut Settings) -> Locks {
    let window = Duration::from_secs(raw.number("lock_window_seconds", 1..=86_400));
    let mut rule = |key| {
        let threshold = raw.number(key, 0..=1_000_000);
        Some(LockRule { threshold, window }).filter(|rule| rule.threshold > 0)
    };
    Locks {
        forgery: rule("forgery_lock_threshold"),
        trespass: rule("trespass_lock_threshold"),
    }
}

fn log(raw: &mut Settings) -> Log {
    let filter = raw.resolve("log_level", |text| match tracing_subscriber::EnvFilter::try_new(text) {
        Ok(_) if !text.is_empty() => Ok(text.to_owned()),
        _ => Err("expected error, warn, info, debug, trace, or directives such as info,redis=warn".to_owned()),
    });
    let json = raw.resolve("log_format", |text| match text {
        "text" => Ok(false),
        "json" => Ok(true),
        _ => Err("expected text or json".to_owned()),
    });
    Log { filter, json }
}

#[cfg(test)]
mod tests;

//! `conf/p2p_data_sync.conf`: what was written, resolved into what the agent is built from.

use std::{
    fmt, io,
    net::IpAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use encoding_rs::Encoding;
use p2p_sync_proto::{
    Code, Problem,
    certificate::PIN_BYTES,
    keys::{Credential, CredentialError},
    policy, secret_file,
    settings::{Key, Problems, Settings},
    token::Token,
    v1::SyncDataType,
};
use tonic::transport::Uri;
use zeroize::Zeroizing;

use crate::{credential_file::CredentialFile, link::connect, text};

/// Every key of the file, with what holds when it is not there.
pub const KEYS: [Key; 26] = [
    Key::new("main_server_endpoint", ""),
    Key::new("tls_ca", ""),
    Key::new("allow_insecure", "no"),
    Key::new("credential_file", "p2p_sync_credential"),
    Key::new("encryption_key", ""),
    Key::new("enabled", "yes"),
    Key::new("critical_timeout_ms", "500"),
    Key::new(
        "critical_data_types",
        "MAP_STATE,MONSTER_DATA,PLAYER_POSITION,CRITICAL_GAME_STATE,SECURITY_VALIDATION,PLAYER_PRESENCE",
    ),
    Key::new("sync_interval_ms", "50"),
    Key::new("batch_size", "256"),
    Key::new("max_queue_size", "10000"),
    Key::new("worker_threads", "2"),
    Key::new("conflation", "yes"),
    Key::new("upload_limit_kbps", "0"),
    Key::new("connect_timeout_ms", "3000"),
    Key::new("retry_delay_ms", "100"),
    Key::new("retry_delay_max_ms", "5000"),
    Key::new("outbox_path", "p2p_sync_outbox"),
    Key::new("outbox_max_mb", "1024"),
    Key::new("agent_socket", ""),
    Key::new("keep_backups", "yes"),
    Key::new("metrics_interval_seconds", "30"),
    Key::new("result_keep_seconds", "300"),
    Key::new("cache_expiry_seconds", "300"),
    Key::new("text_encoding", "UTF-8"),
    Key::new("debug_mode", "no"),
];

/// Where the hub is unless the configuration or the credential file says it.
const DEFAULT_ENDPOINT: &str = "http://127.0.0.1:50051";
/// Of a configuration file.
const FILE_BYTES_MAX: u64 = 1024 * 1024;

/// Keys that belong to the hub. A volunteer's file that has one holds a secret it should not.
const HUB_KEYS: [&str; 10] = [
    "pg_connection_string",
    "redis_host",
    "redis_port",
    "redis_password",
    "embedding_api_key",
    "openai_api_key",
    "azure_openai_api_key",
    "keyring_file",
    "master_key",
    "tls_key",
];

/// What the agent is built from; every value is within its bounds.
#[derive(Clone)]
#[allow(clippy::struct_excessive_bools, reason = "each is a switch of the file")]
pub struct Config {
    /// The hub: `https://host:port`, with an optional path prefix; `http` on this machine.
    pub endpoint: String,
    /// The file of the CAs that may have signed the hub's certificate; absent: the machine's public ones.
    pub tls_ca: Option<PathBuf>,
    /// The public key of the CA that may have signed the hub's certificate, or of that itself, as a token said; unless
    /// `tls_ca` names a file.
    pub ca_pin: Option<[u8; PIN_BYTES]>,
    /// What the hub gave this host. An agent needs it; who attaches to one does not.
    pub credential: Option<Credential>,
    /// Where enrolment and renewals keep it.
    pub credential_file: PathBuf,
    /// Earlier credentials of this host, by which its outbox may still be sealed.
    pub former_credentials: Vec<Credential>,
    /// Off: calls are answered with `UNSUPPORTED`, nothing is taken or sent; what the outbox holds stays there.
    pub enabled: bool,
    /// How long a waiting call waits at most.
    pub critical_timeout: Duration,
    /// Which types travel in the critical lane until the hub says otherwise.
    pub critical_types: Vec<SyncDataType>,
    /// How long a bulk operation waits at most for others to travel with.
    pub linger: Duration,
    /// Operations in one bulk message.
    pub batch_ops: usize,
    /// Operations held in memory at each of two stages: not yet on disk, and not yet sent.
    pub queue_ops_max: usize,
    /// Threads of the link.
    pub worker_threads: usize,
    /// Whether a backlog keeps only the newest of each `latest` path.
    pub conflation: bool,
    /// Of bulk messages, kilobits a second; 0 is no limit.
    pub upload_limit_kbps: u32,
    /// For one attempt to reach the hub.
    pub connect_timeout: Duration,
    /// First and longest delay before trying again.
    pub retry_delay: (Duration, Duration),
    /// The folder of the outbox.
    pub outbox_dir: PathBuf,
    /// Of sealed operations in the outbox, bytes.
    pub outbox_bytes_max: u64,
    /// Where the standalone agent serves local programs; the map server's library attaches to it there.
    pub agent_socket: Option<PathBuf>,
    /// Whether copies are kept of maps that the hub has this host stand by for.
    pub keep_backups: bool,
    /// How often this host tells how it is; never where it is absent.
    pub metrics_interval: Option<Duration>,
    /// How long the result of a settled operation can be asked for, unless 262,144 others have been taken since.
    pub result_keep: Duration,
    /// Of cached values where the call gives no expiry.
    pub cache_expiry: Duration,
    /// The code page of the texts that a map server passes.
    pub text_encoding: &'static Encoding,
    /// Log what becomes of each operation.
    pub debug: bool,
    /// Things the volunteer should know that do not stop the agent.
    pub warnings: Vec<Problem>,
}

impl Config {
    /// Reads a file; relative paths in it are meant from its folder. The environment (`P2P_SYNC_<KEY>`) goes before it.
    ///
    /// `LOOSE_FILE_MODE` where others may read a file that holds `encryption_key`, or the credential file.
    pub fn load(file: &Path) -> Result<Self, Problems> {
        let unreadable = |error: io::Error| {
            let sentence = format!("cannot read {}: {error}; give its path with --config", file.display());
            Problems(vec![Problem::new(Code::ConfigUnreadable, sentence)])
        };
        let (text, metadata) = secret_file::read(file, FILE_BYTES_MAX).map_err(unreadable)?;
        let is_secret = !Settings::read(&text, &KEYS, |_| None).text("encryption_key").is_empty();
        let mode = if is_secret {
            secret_file::check_mode(file, &metadata)
        } else {
            Ok(())
        };
        let parsed = Self::parse(&text, folder_of(file), |name| std::env::var(name).ok());
        match (parsed, mode) {
            (parsed, Ok(())) => parsed,
            (Ok(_), Err(loose)) => Err(Problems(vec![loose])),
            (Err(Problems(mut problems)), Err(loose)) => {
                problems.push(loose);
                Err(Problems(problems))
            }
        }
    }

    /// Reads a file's text; all mistakes are told at once.
    pub fn parse(text: &str, folder: &Path, environment: impl Fn(&str) -> Option<String>) -> Result<Self, Problems> {
        Self::resolve(text, folder, environment, None)
    }

    /// What a token is exchanged by: the settings of a file, which need not be there, with the token's hub and without a
    /// credential.
    pub(crate) fn for_enrolment(file: &Path, token: &Token) -> Result<Self, Problems> {
        let text = match secret_file::read(file, FILE_BYTES_MAX) {
            Ok((text, _)) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Zeroizing::default(),
            Err(error) => {
                let sentence = format!("cannot read {}: {error}; give its path with --config", file.display());
                return Err(Problems(vec![Problem::new(Code::ConfigUnreadable, sentence)]));
            }
        };
        Self::resolve(&text, folder_of(file), |name| std::env::var(name).ok(), Some(token))
    }

    fn resolve(
        text: &str,
        folder: &Path,
        environment: impl Fn(&str) -> Option<String>,
        token: Option<&Token>,
    ) -> Result<Self, Problems> {
        let (text, warnings) = set_hub_keys_aside(text);
        let mut settings = Settings::read(&text, &KEYS, environment);
        let agent_socket = Some(settings.text("agent_socket"))
            .filter(|path| !path.is_empty())
            .map(|path| folder.join(path));
        let credential_file = folder.join(settings.text("credential_file"));
        let held = match token {
            Some(token) => to_be_enrolled(&mut settings, token),
            None => held(&mut settings, &credential_file, agent_socket.is_some()),
        };
        let endpoint = endpoint(&mut settings, &held.endpoint, token.is_some());
        let tls_ca = tls_ca(&mut settings, folder);
        let enabled = settings.switch("enabled");
        let critical_timeout = milliseconds(&mut settings, "critical_timeout_ms", 60_000);
        let critical_types = settings.resolve("critical_data_types", types);
        let linger = milliseconds(&mut settings, "sync_interval_ms", 10_000);
        let batch_ops = settings.number("batch_size", 1..=p2p_sync_proto::limits::BATCH_OPS_MAX);
        let queue_ops_max = settings.number("max_queue_size", 16..=1_000_000);
        let worker_threads = settings.number("worker_threads", 1..=64);
        let conflation = settings.switch("conflation");
        let upload_limit_kbps = settings.number("upload_limit_kbps", 0..=10_000_000);
        let connect_timeout = milliseconds(&mut settings, "connect_timeout_ms", 60_000);
        let first_delay = milliseconds(&mut settings, "retry_delay_ms", 60_000);
        let longest_delay = milliseconds(&mut settings, "retry_delay_max_ms", 600_000);
        let outbox_dir = folder.join(settings.text("outbox_path"));
        let outbox_bytes_max = settings.number("outbox_max_mb", 1..=1_000_000_u64) * 1024 * 1024;
        let keep_backups = settings.switch("keep_backups");
        let metrics_interval = Some(settings.number("metrics_interval_seconds", 0..=86_400))
            .filter(|seconds| *seconds > 0)
            .map(Duration::from_secs);
        let result_keep = Duration::from_secs(settings.number("result_keep_seconds", 1..=86_400));
        let cache_expiry = Duration::from_secs(settings.number(
            "cache_expiry_seconds",
            1..=p2p_sync_proto::limits::CACHE_EXPIRY_SECONDS_MAX.into(),
        ));
        let text_encoding = settings
            .resolve("text_encoding", |label| text::encoding(label).map(Some))
            .unwrap_or(encoding_rs::UTF_8);
        let debug = settings.switch("debug_mode");
        let Held {
            ca_pin,
            credential,
            former_credentials,
            ..
        } = settings.finish(held)?;
        Ok(Self {
            endpoint,
            tls_ca,
            ca_pin,
            credential,
            credential_file,
            former_credentials,
            enabled,
            critical_timeout,
            critical_types,
            linger,
            batch_ops,
            queue_ops_max,
            worker_threads,
            conflation,
            upload_limit_kbps,
            connect_timeout,
            retry_delay: (first_delay, longest_delay.max(first_delay)),
            outbox_dir,
            outbox_bytes_max,
            agent_socket,
            keep_backups,
            metrics_interval,
            result_keep,
            cache_expiry,
            text_encoding,
            debug,
            warnings,
        })
    }

    /// Where a standalone agent of this configuration serves local programs.
    pub fn socket_path(&self) -> PathBuf {
        let beside_outbox = || self.outbox_dir.join("agent.sock");
        self.agent_socket.clone().unwrap_or_else(beside_outbox)
    }

    /// `BAD_CREDENTIAL` where only an agent that runs elsewhere has one.
    pub(crate) fn credential(&self) -> Result<&Credential, Problem> {
        let missing = || {
            let sentence = "this machine is not enrolled: run `p2p-sync-agent enrol` with the token that the hub's operator \
                            gave, or start the agent that agent_socket names and attach to it";
            Problem::new(Code::BadCredential, sentence)
        };
        self.credential.as_ref().ok_or_else(missing)
    }
}

impl fmt::Debug for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Config")
            .field("endpoint", &self.endpoint)
            .field(
                "host_id",
                &self.credential.as_ref().map(|credential| credential.host_id),
            )
            .field("outbox_dir", &self.outbox_dir)
            .finish_non_exhaustive()
    }
}

/// What is known of this host before the hub is asked.
#[derive(Default)]
struct Held {
    endpoint: String,
    ca_pin: Option<[u8; PIN_BYTES]>,
    credential: Option<Credential>,
    former_credentials: Vec<Credential>,
}

/// Of a machine that is about to be enrolled.
fn to_be_enrolled(settings: &mut Settings, token: &Token) -> Held {
    if !settings.text("encryption_key").is_empty() {
        let what_to_do =
            "this machine has a credential already: empty this, once its outbox is drained, to enrol it as a new host";
        settings.refuse("encryption_key", Code::BadValue, what_to_do);
    }
    Held {
        endpoint: token.endpoint.clone(),
        ca_pin: token.ca_pin,
        ..Held::default()
    }
}

/// Of a host: what was pasted and what enrolment wrote, the newer of the two.
fn held(settings: &mut Settings, file: &Path, attaches: bool) -> Held {
    let shown = file.display();
    let pasted = match Credential::parse(settings.text("encryption_key")) {
        Ok(credential) => Some(credential),
        Err(CredentialError::Empty) => None,
        Err(error) => {
            settings.refuse("encryption_key", Code::BadCredential, &error.to_string());
            return Held::default();
        }
    };
    let read = match CredentialFile::read(file) {
        Ok(read) => read,
        Err(problem) => {
            settings.refuse("credential_file", problem.code, &problem.sentence);
            return Held::default();
        }
    };
    let is_there = read.is_some();
    let kept = read.unwrap_or_else(|| CredentialFile::new(file));
    if let (Some(pasted), Some(kept)) = (&pasted, &kept.credential)
        && pasted.host_id != kept.host_id
    {
        let what_to_do = format!(
            "this is the credential of host {}, and {shown} holds the one of host {}: empty encryption_key, or move that file \
             away",
            pasted.host_id, kept.host_id
        );
        settings.refuse("encryption_key", Code::BadCredential, &what_to_do);
        return Held::default();
    }
    // The newest first; of two of one generation the kept one, which may be a renewal of it.
    let mut credentials: Vec<Credential> = [kept.credential, kept.former, pasted].into_iter().flatten().collect();
    credentials.sort_by_key(|credential| std::cmp::Reverse(credential.generation));
    let former_credentials = credentials.split_off(credentials.len().min(1));
    let credential = credentials.pop();
    if credential.is_none() && !attaches {
        let what_to_do = if is_there {
            format!("the enrolment into {shown} is not finished: run `p2p-sync-agent enrol` again with the same token")
        } else {
            format!(
                "this machine is not enrolled, for there is no {shown}: run `p2p-sync-agent enrol` with the token that the \
                 hub's operator gave"
            )
        };
        settings.refuse("credential_file", Code::BadCredential, &what_to_do);
    }
    Held {
        endpoint: kept.endpoint,
        ca_pin: kept.ca_pin,
        credential,
        former_credentials,
    }
}

fn folder_of(file: &Path) -> &Path {
    file.parent().unwrap_or(Path::new(""))
}

/// Blanks the hub's keys out, so that line numbers stay, and tells of them loudly.
fn set_hub_keys_aside(text: &str) -> (Zeroizing<String>, Vec<Problem>) {
    let mut warnings = Vec::new();
    let mut kept = Zeroizing::new(String::with_capacity(text.len() + 1));
    for (line, content) in (1..).zip(text.lines()) {
        let name = content.split(['=', ':']).next().unwrap_or_default().trim();
        if HUB_KEYS.contains(&name) {
            let sentence = format!(
                "line {line}: {name} is the hub's and a volunteer's machine must never hold it: delete the line, and change \
                 the secret if this file came from an operator"
            );
            warnings.push(Problem::new(Code::HubSecretInHostFile, sentence));
        } else {
            kept.push_str(content);
        }
        kept.push('\n');
    }
    (kept, warnings)
}

fn milliseconds(settings: &mut Settings, name: &str, max: u64) -> Duration {
    Duration::from_millis(settings.number(name, 1..=max))
}

/// The file's, unless a token's or none is written there: then where the host was enrolled.
fn endpoint(settings: &mut Settings, enrolled_at: &str, goes_before: bool) -> String {
    let written = settings.text("main_server_endpoint");
    let text = match (written.is_empty() || goes_before, enrolled_at) {
        (false, _) => written,
        (true, "") => DEFAULT_ENDPOINT,
        (true, enrolled_at) => enrolled_at,
    };
    let text = text.trim_end_matches('/').to_owned();
    let uri = uri(&text).map_err(|expected| {
        settings.refuse("main_server_endpoint", Code::BadEndpoint, &expected);
    });
    let insecure_allowed = settings.switch("allow_insecure");
    if uri.is_ok_and(|uri| uri.scheme_str() != Some("https") && !is_this_machine(&uri)) && !insecure_allowed {
        let what_to_do = "http:// is for a hub on this machine: write https://, or set allow_insecure = yes where a tunnel \
                          protects the whole way to the hub";
        settings.refuse("main_server_endpoint", Code::BadEndpoint, what_to_do);
    }
    text
}

fn uri(text: &str) -> Result<Uri, String> {
    let expected = "expected https://host:port, with a path behind it if the edge needs one";
    let rest = text
        .strip_prefix("https://")
        .or_else(|| text.strip_prefix("http://"))
        .ok_or_else(|| {
            let scheme = text.split_once("://").map_or("no scheme", |(scheme, _)| scheme);
            format!("expected https://host:port, found {scheme}")
        })?;
    let authority = rest.split('/').next().unwrap_or_default();
    let uri: Uri = text.parse().map_err(|_| expected.to_owned())?;
    // TLS has a port of its own that everybody knows; gRPC without it has none.
    let has_port = uri.port().is_some() || uri.scheme_str() == Some("https") && !authority.ends_with(':');
    let is_plain = !authority.contains('@') && uri.query().is_none();
    if has_port && is_plain {
        Ok(uri)
    } else {
        Err(expected.to_owned())
    }
}

/// `localhost`, 127.0.0.0/8 and `::1`: what is sent there does not leave the machine.
fn is_this_machine(uri: &Uri) -> bool {
    let host = uri.host().unwrap_or_default().trim_matches(['[', ']']);
    let address: Option<IpAddr> = host.parse().ok();
    address.map_or(host.eq_ignore_ascii_case("localhost"), |address| address.is_loopback())
}

/// Read here as well, so that a mistake in it is told with all the others; each connection reads it again.
fn tls_ca(settings: &mut Settings, folder: &Path) -> Option<PathBuf> {
    settings.resolve("tls_ca", |text| {
        if text.is_empty() {
            return Ok(None);
        }
        let file = folder.join(text);
        connect::ca_roots(&file).map(|_| Some(file))
    })
}

fn types(text: &str) -> Result<Vec<SyncDataType>, String> {
    let names = text.split([',', ' ']).map(str::trim).filter(|name| !name.is_empty());
    names
        .map(|name| policy::parse_type(name).map_err(|problem| problem.sentence))
        .collect()
}

#[cfg(test)]
mod tests {
    use p2p_sync_proto::keys::{KeyId, MasterKey};

    use super::*;

    fn credential() -> String {
        let master = MasterKey::generate(KeyId::parse("k1").expect("valid"));
        master.credential(uuid::Uuid::from_u128(1), 1).to_text().to_string()
    }

    fn parse(text: &str) -> Result<Config, Problems> {
        Config::parse(text, Path::new("/srv/conf"), |_| None)
    }

    #[test]
    fn a_file_with_only_the_credential_has_the_documented_defaults() {
        let config = parse(&format!("encryption_key = {}", credential())).expect("valid");
        assert_eq!(config.critical_timeout, Duration::from_millis(500));
        assert_eq!(config.outbox_dir, Path::new("/srv/conf/p2p_sync_outbox"));
        assert_eq!(config.critical_types.len(), 6);
    }

    #[test]
    fn every_mistake_is_told_at_once_with_its_code_and_line() {
        let text = "main_server_endpoint = ftp://hub\nencryption_key = short\nmax_queue_siz = 3\ncritical_data_types = MAP_STAT\n";
        let Problems(problems) = parse(text).expect_err("four mistakes");
        let told: Vec<_> = problems.iter().map(ToString::to_string).collect();
        assert_eq!(problems.len(), 4, "{told:#?}");
        for part in [
            "E102 UNKNOWN_KEY: line 3: unknown key max_queue_siz; did you mean max_queue_size?",
            "E107 BAD_ENDPOINT: line 1: main_server_endpoint: expected https://host:port, found ftp",
            "E106 BAD_CREDENTIAL: line 2: encryption_key: ",
            "line 4: critical_data_types: \"MAP_STAT\" is not a type; did you mean MAP_STATE?",
        ] {
            assert!(
                told.iter().any(|line| line.contains(part)),
                "{part} is not in {told:#?}"
            );
        }
    }

    #[test]
    fn a_hub_secret_in_a_hosts_file_is_told_loudly_and_not_read() {
        let text = format!(
            "encryption_key = {}\npg_connection_string = postgres://secret\n",
            credential()
        );
        let config = parse(&text).expect("a warning does not stop the agent");
        assert_eq!(config.warnings.len(), 1);
        assert_eq!(config.warnings[0].code, Code::HubSecretInHostFile);
        assert!(config.warnings[0].sentence.starts_with("line 2: pg_connection_string"));
        assert!(!format!("{config:?} {:?}", config.warnings).contains("secret\""));
    }

    #[test]
    fn a_path_behind_the_endpoint_is_honoured() {
        let text = format!(
            "encryption_key = {}\nmain_server_endpoint = https://hub:50051/p2p-sync/\n",
            credential()
        );
        assert_eq!(parse(&text).expect("valid").endpoint, "https://hub:50051/p2p-sync");
    }

    #[test]
    fn plaintext_leaves_the_machine_only_where_that_is_allowed() {
        let told = |endpoint: &str, more: &str| {
            let text = format!(
                "encryption_key = {}\nmain_server_endpoint = {endpoint}\n{more}",
                credential()
            );
            parse(&text)
                .map(|config| config.endpoint)
                .map_err(|problems| problems.to_string())
        };
        let taken = [
            "https://hub.example.org",
            "https://192.0.2.7:50051",
            "https://[2001:db8::1]:50051/p2p-sync",
            "http://localhost:50051",
            "http://LocalHost:50051",
            "http://127.8.9.1:50051",
            "http://[::1]:50051",
        ];
        for endpoint in taken {
            assert_eq!(told(endpoint, "").as_deref(), Ok(endpoint));
        }
        for endpoint in [
            "http://hub.example.org:50051",
            "http://192.0.2.7:50051",
            "http://[::2]:1",
            "http://localhost.example.org:1",
        ] {
            let refused = told(endpoint, "").expect_err(endpoint);
            assert!(
                refused.starts_with(
                    "E107 BAD_ENDPOINT: line 2: main_server_endpoint: http:// is for a hub on this machine"
                ),
                "{refused}"
            );
            assert_eq!(told(endpoint, "allow_insecure = 1\n").as_deref(), Ok(endpoint));
        }
    }

    #[test]
    fn a_file_of_cas_that_holds_none_is_told_with_its_line() {
        let folder = tempfile::tempdir().expect("a folder can be made");
        std::fs::write(folder.path().join("empty.pem"), "nothing").expect("written");
        for (file, part) in [
            ("empty.pem", "empty.pem holds no certificate"),
            ("missing.pem", "missing.pem cannot be read"),
        ] {
            let text = format!("encryption_key = {}\ntls_ca = {file}\n", credential());
            let told = Config::parse(&text, folder.path(), |_| None)
                .expect_err("no CA")
                .to_string();
            assert!(
                told.starts_with("E103 BAD_VALUE: line 2: tls_ca: ") && told.contains(part),
                "{told}"
            );
        }
    }

    #[test]
    fn the_shipped_file_documents_every_key_and_only_those() {
        let shipped = include_str!("../../conf/p2p_data_sync.conf");
        let written: Vec<&str> = shipped
            .lines()
            .filter(|line| !line.starts_with("//"))
            .filter_map(|line| Some(line.split_once('=')?.0.trim().trim_start_matches('#').trim()))
            .collect();
        let known: Vec<&str> = KEYS.iter().map(|key| key.name).collect();
        assert_eq!(written, known);
        let values = shipped.lines().filter_map(|line| line.split_once(" = "));
        for (name, value) in values.filter(|(name, _)| !name.starts_with("//")) {
            let key = KEYS.iter().find(|key| key.name == name.trim()).expect("known");
            assert_eq!(value.trim(), key.default, "{name}");
        }
    }
}

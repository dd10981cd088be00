//! Hubs and agents as processes, to be fed, killed and started again.

use std::{
    collections::HashMap,
    ffi::OsString,
    io::{BufRead as _, BufReader, Write as _},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, ExitCode, Stdio},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use p2p_sync_proto::{Position, keys::Credential, secret_file};
use serde_json::{Value, json, value::RawValue};
use uuid::Uuid;

use crate::recording::Happening;

/// How long a program may take to start or to end.
const PROGRAM_TIMEOUT: Duration = Duration::from_mins(1);

/// Runs `agent …` or `proxy …` as the programs of those names would, or `attached <configuration>` as a program that
/// attaches to a standalone agent, or `map-host <configuration> <milliseconds> <maps>` as one that hosts maps; `None` for other
/// arguments.
///
/// A binary that calls this first is both programs, so that one build serves a whole system.
pub fn run_as_program(args: impl IntoIterator<Item = OsString>) -> Option<ExitCode> {
    let mut args: Vec<OsString> = args.into_iter().skip(1).collect();
    match args.first()?.to_str()? {
        "agent" => Some(p2p_sync_agent::cli::run(args)),
        "attached" => Some(crate::attached_program::run(Path::new(args.get(1)?))),
        "map-host" => {
            let text = |place: usize| args.get(place)?.to_str().map(str::to_owned);
            let every = Duration::from_millis(text(2)?.parse().ok()?);
            let maps: Vec<String> = text(3)?.split(',').map(str::to_owned).collect();
            Some(crate::map_host::run(Path::new(args.get(1)?), every, &maps))
        }
        "proxy" => {
            args[0] = "p2p-sync-proxy".into();
            let runtime = tokio::runtime::Runtime::new().expect("a runtime can be made");
            Some(runtime.block_on(p2p_sync_proxy::cli::run(args)))
        }
        _ => None,
    }
}

/// Where a hub keeps its world.
#[derive(Clone, Debug)]
pub enum HubDatabase {
    /// Inside the hub's process.
    Embedded,
    /// On a server, by its URL.
    Server(String),
}

/// A hub: a folder with its configuration and data, and the process when it runs.
pub struct Hub {
    program: PathBuf,
    config: PathBuf,
    is_embedded: bool,
    child: Option<Child>,
    address: String,
    admin_url: Option<String>,
}

impl Hub {
    /// Writes a hub's configuration into a folder; `settings` are added to it, and unless they say otherwise every host may
    /// write every map. Nothing runs yet.
    pub fn new(program: &Path, folder: &Path, database: &HubDatabase, settings: &[(&str, String)]) -> Self {
        std::fs::create_dir_all(folder).expect("the folder can be made");
        let mut text = String::from("port = 0\n");
        match database {
            HubDatabase::Embedded => text += "embedded_data_dir = database\nkeyring_file = database/keyring\n",
            HubDatabase::Server(url) => {
                text += &format!("pg_connection_string = {url}\nkeyring_file = keyring\n");
            }
        }
        if !settings.iter().any(|(key, _)| *key == "leases") {
            // Who writes which map is the matter of few.
            text += "leases = off\n";
        }
        for (key, value) in settings {
            if *key == "port" {
                text = text.replace("port = 0\n", "");
            }
            text += &format!("{key} = {value}\n");
        }
        let config = folder.join("p2p_sync_proxy.conf");
        std::fs::write(&config, text).expect("the folder can be written");
        let is_embedded = matches!(database, HubDatabase::Embedded);
        let hub = Self {
            program: program.to_owned(),
            config,
            is_embedded,
            child: None,
            address: String::new(),
            admin_url: None,
        };
        if !is_embedded {
            hub.command(&["keys", "new"]);
        }
        hub
    }

    fn arguments(&self, command: &[&str]) -> Command {
        let mut arguments = Command::new(&self.program);
        arguments.arg("proxy").args(command).arg("--config").arg(&self.config);
        if self.is_embedded {
            arguments.arg("--embedded");
        }
        arguments
    }

    /// Runs a command of the hub's program to its end; gives its standard output.
    pub fn command(&self, command: &[&str]) -> String {
        let output = self.arguments(command).output().expect("the program runs");
        let told = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "proxy {command:?} failed: {told}");
        String::from_utf8(output.stdout).expect("text").trim().to_owned()
    }

    /// Runs a command of the hub's program that fails; gives its standard error.
    pub fn fails(&self, command: &[&str]) -> String {
        let output = self.arguments(command).output().expect("the program runs");
        assert!(!output.status.success(), "proxy {command:?} did not fail");
        String::from_utf8_lossy(&output.stderr).into_owned()
    }

    /// Runs `check`; gives whether all is well, and what it says.
    pub fn check(&self) -> (bool, String) {
        let output = self.arguments(&["check"]).output().expect("the program runs");
        (
            output.status.success(),
            String::from_utf8_lossy(&output.stdout).into_owned(),
        )
    }

    /// Gives another proxy on the same database this one's keyring.
    pub fn share_keyring(&self, other: &Self) {
        let keyring = |hub: &Self| hub.config.with_file_name("keyring");
        std::fs::copy(keyring(self), keyring(other)).expect("both have one");
    }

    /// Admits a host; gives its credential.
    pub fn add_host(&self, account: u32) -> String {
        self.command(&["hosts", "add", "--account", &account.to_string()])
    }

    /// Admits a host that may write some maps; gives its credential.
    pub fn add_host_of(&self, account: u32, maps: &[&str]) -> String {
        self.command(&[
            "hosts",
            "add",
            "--account",
            &account.to_string(),
            "--maps",
            &maps.join(","),
        ])
    }

    /// Starts serving; gives the address.
    pub fn start(&mut self) -> String {
        let mut child = self
            .arguments(&["serve"])
            .stdout(Stdio::piped())
            .stderr(log_file(&self.config.with_extension("log")))
            .spawn()
            .expect("the program runs");
        let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
        let line = lines.next().and_then(Result::ok).unwrap_or_default();
        let address = line.strip_prefix("p2p-sync-proxy: serving on ").unwrap_or_else(|| {
            let log = std::fs::read_to_string(self.config.with_extension("log")).unwrap_or_default();
            panic!("the hub did not start, it said {line:?} and:\n{log}")
        });
        self.address = address.to_owned();
        let text = std::fs::read_to_string(&self.config).expect("its settings");
        if text.contains("\nadmin_port =") {
            let line = lines.next().and_then(Result::ok).unwrap_or_default();
            let url = line.strip_prefix("p2p-sync-proxy: tools are served on ");
            self.admin_url = Some(url.unwrap_or_else(|| panic!("{line}")).to_owned());
        }
        self.child = Some(child);
        self.address.clone()
    }

    /// Where it serves, or served last.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Where it serves tools.
    ///
    /// # Panics
    /// Where its settings have no `admin_port`, or it did not run yet.
    pub fn admin_url(&self) -> &str {
        self.admin_url.as_deref().expect("tools are served")
    }

    /// Its configuration file.
    pub fn config(&self) -> &Path {
        &self.config
    }

    /// What it has logged.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.config.with_extension("log")).unwrap_or_default()
    }

    /// Its process.
    ///
    /// # Panics
    /// When it does not run.
    pub fn pid(&self) -> u32 {
        self.child.as_ref().expect("it runs").id()
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        kill(&mut self.child);
    }

    /// SIGTERM, and waits for the end.
    pub fn stop(&mut self) {
        stop(&mut self.child);
    }
}

impl Drop for Hub {
    fn drop(&mut self) {
        self.kill();
    }
}

/// What an agent has said of one operation so far.
#[derive(Clone, Debug, Default)]
pub struct Said {
    /// The last state told; settled ones stay.
    pub state: String,
    /// `incarnation:sequence`.
    pub position: Option<Position>,
    /// Told as spooled at some time.
    pub spooled: bool,
}

/// What an agent has said of all operations.
#[derive(Debug, Default)]
pub struct Ledger {
    /// By the tag it was submitted under.
    pub ids: HashMap<u64, String>,
    /// By operation id.
    pub said: HashMap<String, Said>,
    /// Answers that were refusals, by tag.
    pub refused: HashMap<u64, Value>,
    /// Answers to other requests, by tag.
    pub answers: HashMap<u64, Value>,
}

impl Ledger {
    fn read(&mut self, line: &str) {
        let Ok(told) = serde_json::from_str::<Value>(line) else {
            return;
        };
        let state = told["state"].as_str().unwrap_or_default();
        if let Some(tag) = told["tag"].as_u64() {
            match told["operation_id"].as_str() {
                Some(id) => {
                    self.ids.insert(tag, id.to_owned());
                }
                None if told["error"].is_string() => {
                    self.refused.insert(tag, told);
                }
                None => {
                    self.answers.insert(tag, told);
                }
            }
            return;
        }
        let Some(id) = told["operation_id"].as_str() else {
            return;
        };
        let said = self.said.entry(id.to_owned()).or_default();
        said.spooled |= state == "SPOOLED";
        if !is_settled(&said.state) {
            state.clone_into(&mut said.state);
        }
        said.position = said.position.or_else(|| {
            let (incarnation, sequence) = told["position"].as_str()?.split_once(':')?;
            Some(Position {
                incarnation: incarnation.parse().ok()?,
                sequence: sequence.parse().ok()?,
            })
        });
    }

    /// Operations in a state.
    pub fn count(&self, state: &str) -> usize {
        self.said.values().filter(|said| said.state == state).count()
    }
}

/// Whether a state is final.
pub fn is_settled(state: &str) -> bool {
    matches!(state, "APPLIED" | "SUPERSEDED" | "REJECTED" | "LIMBO")
}

/// An agent, or a program attached to one: a folder with its configuration and outbox, and the process when it runs.
pub struct Agent {
    host_id: Uuid,
    program: PathBuf,
    /// What goes before the configuration's path.
    arguments: &'static [&'static str],
    config: PathBuf,
    child: Option<Child>,
    input: Option<ChildStdin>,
    ledger: Arc<Mutex<Ledger>>,
    reader: Option<JoinHandle<()>>,
    questions: u64,
}

/// What an agent is run by.
const RUN: &[&str] = &["agent", "run", "--stdin", "--events", "--config"];

/// Tags from here on are the stack's own.
const QUESTIONS: u64 = 1 << 52;

impl Agent {
    /// Writes an agent's configuration into a folder. Nothing runs yet.
    pub fn new(program: &Path, folder: &Path, endpoint: &str, credential: &str, settings: &[(&str, String)]) -> Self {
        std::fs::create_dir_all(folder).expect("the folder can be made");
        let config = folder.join("p2p_data_sync.conf");
        let mut text =
            format!("main_server_endpoint = {endpoint}\nencryption_key = {credential}\noutbox_path = outbox\n");
        if !settings.iter().any(|(key, _)| *key == "metrics_interval_seconds") {
            // What the hub holds is what a test made.
            text += "metrics_interval_seconds = 0\n";
        }
        for (key, value) in settings {
            text += &format!("{key} = {value}\n");
        }
        secret_file::replace(&config, text.as_bytes()).expect("the folder can be written");
        let host_id = Credential::parse(credential).expect("a hub's credential").host_id;
        Self::of(program, RUN, config, host_id)
    }

    /// A machine that enrols itself by a token, with a configuration that says neither where the hub is nor who it is.
    /// Nothing runs when this returns.
    pub fn enrolled(program: &Path, folder: &Path, token: &str, settings: &[(&str, String)]) -> Self {
        std::fs::create_dir_all(folder).expect("the folder can be made");
        let config = folder.join("p2p_data_sync.conf");
        let mut text = "outbox_path = outbox\nmetrics_interval_seconds = 0\n".to_owned();
        for (key, value) in settings {
            text += &format!("{key} = {value}\n");
        }
        std::fs::write(&config, text).expect("the folder can be written");
        let mut child = Self::enrol_command(program, &config);
        let input = child.stdin.take().expect("piped");
        std::thread::scope(|scope| {
            // One that refuses at once reads nothing.
            scope.spawn(move || writeln!(&input, "{token}").unwrap_or_default());
        });
        let output = child.wait_with_output().expect("the program ends");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let (out, err) = (text(&output.stdout), text(&output.stderr));
        assert!(output.status.success(), "the machine was not enrolled: {out}{err}");
        let said = out
            .strip_prefix("enrolled as host ")
            .and_then(|rest| rest.split(',').next());
        let host_id = said.and_then(|id| id.parse().ok()).unwrap_or_else(|| panic!("{out}"));
        Self::of(program, RUN, config, host_id)
    }

    /// `enrol -` on a configuration, begun; the token is written to its standard input.
    pub fn enrol_command(program: &Path, config: &Path) -> Child {
        Command::new(program)
            .args(["agent", "enrol", "-", "--config"])
            .arg(config)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the program runs")
    }

    /// A program that attaches to this agent at its socket, with a folder of its own. Nothing runs yet.
    #[must_use]
    pub fn attached(&self, folder: &Path, settings: &[(&str, String)]) -> Self {
        std::fs::create_dir_all(folder).expect("the folder can be made");
        let config = folder.join("p2p_data_sync.conf");
        let mut text = format!("agent_socket = {}\n", self.socket().display());
        for (key, value) in settings {
            text += &format!("{key} = {value}\n");
        }
        std::fs::write(&config, text).expect("the folder can be written");
        Self::of(&self.program, &["attached"], config, self.host_id)
    }

    fn of(program: &Path, arguments: &'static [&'static str], config: PathBuf, host_id: Uuid) -> Self {
        Self {
            host_id,
            program: program.to_owned(),
            arguments,
            config,
            child: None,
            input: None,
            ledger: Arc::default(),
            reader: None,
            questions: QUESTIONS,
        }
    }

    /// Where it serves local programs.
    pub fn socket(&self) -> PathBuf {
        self.config.with_file_name("outbox").join("agent.sock")
    }

    /// Starts it, reading operations and telling events.
    pub fn start(&mut self) {
        let mut child = Command::new(&self.program)
            .args(self.arguments)
            .arg(&self.config)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log_file(&self.config.with_extension("log")))
            .spawn()
            .expect("the program runs");
        self.input = child.stdin.take();
        let output = BufReader::new(child.stdout.take().expect("piped"));
        let ledger = self.ledger.clone();
        self.reader = Some(std::thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                ledger.lock().unwrap_or_else(PoisonError::into_inner).read(&line);
            }
        }));
        self.child = Some(child);
    }

    /// Submits an operation under a tag; false when the agent is gone.
    pub fn submit(&mut self, tag: u64, happening: &Happening) -> bool {
        let data = happening
            .payload
            .clone()
            .map(|json| RawValue::from_string(json).expect("recorded JSON"));
        let mut request = json!({
            "do": "put",
            "tag": tag,
            "type": happening.data_type.as_str_name(),
            "map": happening.map,
            "account_id": happening.account_id,
        });
        if let Some(entity) = &happening.entity {
            request["entity"] = json!(entity);
        }
        let mut line = request.to_string();
        if let Some(data) = data {
            line.truncate(line.len() - 1);
            line += &format!(",\"data\":{data}}}");
        }
        self.write(&line)
    }

    fn write(&mut self, line: &str) -> bool {
        self.input
            .as_mut()
            .is_some_and(|input| writeln!(input, "{line}").is_ok())
    }

    /// Asks something else and waits for the answer.
    pub fn ask(&mut self, mut request: Value) -> Value {
        self.questions += 1;
        let tag = self.questions;
        request["tag"] = json!(tag);
        assert!(self.write(&request.to_string()), "the agent is gone: {}", self.log());
        let deadline = Instant::now() + PROGRAM_TIMEOUT * 5;
        loop {
            let mut ledger = self.ledger();
            if let Some(answer) = ledger.answers.remove(&tag).or_else(|| ledger.refused.remove(&tag)) {
                return answer;
            }
            drop(ledger);
            assert!(
                Instant::now() < deadline,
                "the agent did not answer {request}: {}",
                self.log()
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits until everything taken is settled; gives whether it is.
    pub fn flush(&mut self, timeout: Duration) -> bool {
        let timeout_ms = u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX);
        self.ask(json!({"do": "flush", "timeout_ms": timeout_ms}))["flushed"] == true
    }

    /// What it has said.
    pub fn ledger(&self) -> MutexGuard<'_, Ledger> {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What it has logged.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.config.with_extension("log")).unwrap_or_default()
    }

    /// Its process.
    ///
    /// # Panics
    /// When it does not run.
    pub fn pid(&self) -> u32 {
        self.child.as_ref().expect("it runs").id()
    }

    /// Known to the hub by it.
    pub fn host_id(&self) -> Uuid {
        self.host_id
    }

    /// Its configuration file.
    pub fn config(&self) -> &Path {
        &self.config
    }

    /// SIGKILL; what it had said by then is in the ledger when this returns.
    pub fn kill(&mut self) {
        kill(&mut self.child);
        self.end();
    }

    /// SIGTERM, and waits for the end.
    pub fn stop(&mut self) {
        stop(&mut self.child);
        self.end();
    }

    fn end(&mut self) {
        self.input = None;
        if let Some(reader) = self.reader.take() {
            reader.join().expect("reading does not panic");
        }
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.kill();
    }
}

fn log_file(path: &Path) -> Stdio {
    let file = std::fs::File::options().create(true).append(true).open(path);
    file.expect("the folder can be written").into()
}

fn kill(child: &mut Option<Child>) {
    if let Some(mut child) = child.take() {
        // Gone already is as good as killed.
        let _ = child.kill();
        let _ = child.wait();
    }
}

fn stop(child: &mut Option<Child>) {
    let Some(mut child) = child.take() else { return };
    #[cfg(unix)]
    if let Some(pid) = i32::try_from(child.id()).ok().and_then(rustix::process::Pid::from_raw) {
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
    }
    #[cfg(not(unix))]
    let _ = child.kill();
    let deadline = Instant::now() + PROGRAM_TIMEOUT;
    while child.try_wait().expect("it is our child").is_none() {
        if Instant::now() > deadline {
            let _ = child.kill();
            panic!("the program did not end within {PROGRAM_TIMEOUT:?} of SIGTERM");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

//! A map server on strings, `tests/c/puppet.cpp`: told what to call, line by line, and killed.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    path::PathBuf,
    process::{Child, ChildStdin, Command, Stdio},
    sync::mpsc::{Receiver, sync_channel},
    thread,
};

use p2p_sync_proto::{keys::Credential, secret_file, v1::SyncDataType};
use serde_json::Value;
use uuid::Uuid;

use crate::{
    compiled::{Link, cxx_program, ends_well},
    world::{PATIENCE, World, until},
};

/// Numbers of `p2p_sync_state`, as the header has them.
pub(crate) const ACCEPTED: i64 = 1;
pub(crate) const SPOOLED: i64 = 2;
pub(crate) const APPLIED: i64 = 3;
pub(crate) const REJECTED: i64 = 5;
pub(crate) const LIMBO: i64 = 6;
pub(crate) const UNKNOWN: i64 = 7;

/// A field of a command, in the words of the test.
pub(crate) fn number_of(data_type: SyncDataType) -> String {
    i32::from(data_type).to_string()
}

/// A map server with a configuration and an outbox of its own, and its process when it runs.
pub(crate) struct Puppet {
    program: PathBuf,
    config: PathBuf,
    host_id: Uuid,
    running: Option<Running>,
}

struct Running {
    child: Child,
    input: ChildStdin,
    answers: Receiver<String>,
}

impl Puppet {
    /// One that runs and has started the library.
    pub(crate) fn new(world: &World, settings: &str) -> Self {
        Self::at(world, &world.endpoint(), settings)
    }

    /// As [`Self::new`], through something that stands before the hub.
    pub(crate) fn at(world: &World, endpoint: &str, settings: &str) -> Self {
        let folder = world.folder.path().join(format!("puppet-{}", Uuid::new_v4().simple()));
        std::fs::create_dir(&folder).expect("the folder can be made");
        let config = folder.join("p2p_data_sync.conf");
        let credential = world.hub.add_host(1);
        let text = format!(
            "main_server_endpoint = {endpoint}\nencryption_key = {credential}\noutbox_path = outbox\n\
             retry_delay_max_ms = 500\nmetrics_interval_seconds = 0\n{settings}"
        );
        secret_file::replace(&config, text.as_bytes()).expect("the folder can be written");
        let mut puppet = Self {
            program: cxx_program("puppet", &["puppet.cpp"], Link::Static),
            host_id: Credential::parse(&credential).expect("the hub gave it").host_id,
            config,
            running: None,
        };
        puppet.start();
        puppet
    }

    /// Starts the process and the library in it.
    pub(crate) fn start(&mut self) {
        let log = std::fs::File::options()
            .create(true)
            .append(true)
            .open(self.config.with_extension("log"));
        let mut child = Command::new(&self.program)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log.expect("the folder can be written"))
            .spawn()
            .expect("it was just compiled");
        let (input, output) = (child.stdin.take().expect("piped"), child.stdout.take().expect("piped"));
        // One command is answered before the next is told.
        let (told, answers) = sync_channel(1);
        thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                if told.send(line).is_err() {
                    return;
                }
            }
        });
        self.running = Some(Running { child, input, answers });
        self.init();
    }

    /// Starts the library in a process that runs.
    pub(crate) fn init(&mut self) {
        let config = self.config.display().to_string();
        let answer = self.tell(&["init", &config]);
        assert_eq!(answer["ok"], true, "{answer}");
    }

    /// Tells it to do something and gives its answer.
    pub(crate) fn tell(&mut self, fields: &[&str]) -> Value {
        let fields: Vec<&[u8]> = fields.iter().map(|field| field.as_bytes()).collect();
        self.tell_bytes(&fields)
    }

    /// As [`Self::tell`], in the bytes of whatever code page.
    pub(crate) fn tell_bytes(&mut self, fields: &[&[u8]]) -> Value {
        let log = self.config.with_extension("log");
        let running = self.running.as_mut().expect("it runs");
        let mut line = fields.join(&b'\t');
        line.push(b'\n');
        let written = running.input.write_all(&line).and_then(|()| running.input.flush());
        let answer = running.answers.recv_timeout(PATIENCE * 2);
        let command = String::from_utf8_lossy(&line);
        let Ok(answer) = answer else {
            let log = std::fs::read_to_string(log).unwrap_or_default();
            panic!("no answer to {command} ({written:?}):\n{log}");
        };
        let answer: Value = serde_json::from_str(&answer).unwrap_or_else(|error| panic!("{error} in {answer}"));
        assert!(answer["error"].is_null(), "{command}: {answer}");
        answer
    }

    /// Tells it to do something that gives an id.
    pub(crate) fn id(&mut self, fields: &[&str]) -> String {
        let answer = self.tell(fields);
        let id = answer["id"].as_str().expect("an id or an empty text").to_owned();
        assert!(!id.is_empty(), "{fields:?} was refused: {answer}");
        id
    }

    /// Waits until an operation or a question is settled.
    pub(crate) fn settled(&mut self, id: &str) -> Value {
        let timeout_ms = PATIENCE.as_millis().to_string();
        self.tell(&["wait", id, &timeout_ms])
    }

    /// Puts operations of a type whose `%` is the number of each; gives the ids of those that were taken, and the answer.
    pub(crate) fn put_many(&mut self, count: usize, data_type: SyncDataType, payload: &str) -> (Vec<Uuid>, Value) {
        let (count, data_type) = (count.to_string(), number_of(data_type));
        let answer = self.tell(&["put_many", &count, &data_type, "2000001", "prontera", payload]);
        let ids = answer["ids"].as_array().expect("a list");
        let ids = ids
            .iter()
            .map(|id| id.as_str().and_then(|id| id.parse().ok()).expect("an id"));
        (ids.collect(), answer)
    }

    /// Waits until a waiting call is answered by the hub, so that the link is known to be up.
    pub(crate) fn wait_for_link(&mut self) {
        until("a waiting call is answered", || self.critical()["state"] == APPLIED);
        assert!(self.flush());
    }

    /// A waiting call.
    pub(crate) fn critical(&mut self) -> Value {
        let data_type = number_of(SyncDataType::CriticalGameState);
        self.tell(&["critical", &data_type, "0", "prontera", r#"{"event":"slow"}"#])
    }

    /// Waits until everything is settled.
    pub(crate) fn flush(&mut self) -> bool {
        let timeout_ms = PATIENCE.as_millis().to_string();
        self.tell(&["flush", &timeout_ms])["drained"] == true
    }

    /// How many of these are in a state.
    pub(crate) fn count_in(&mut self, state: i64, ids: &[Uuid]) -> u64 {
        let ids: Vec<String> = ids.iter().map(Uuid::to_string).collect();
        let mut fields = vec!["states"];
        fields.extend(ids.iter().map(String::as_str));
        let state = usize::try_from(state).expect("a state");
        self.tell(&fields)["states"][state].as_u64().expect("a count")
    }

    /// Lets its callbacks run until `wanted` is among what they were told, and gives all of that.
    pub(crate) fn process_until(&mut self, what: &str, wanted: impl Fn(&[Value]) -> bool) -> Vec<Value> {
        let mut told = Vec::new();
        until(what, || {
            let answer = self.tell(&["process", "0"]);
            told.extend(answer["told"].as_array().expect("a list").iter().cloned());
            wanted(&told)
        });
        for one in &told {
            assert_eq!(one["on_the_callers_thread"], true, "{one}");
        }
        told
    }

    /// The lines of its log, each behind the number of its level.
    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.config.with_extension("log")).expect("it has logged")
    }

    /// Known to the hub by it.
    pub(crate) fn host_id(&self) -> Uuid {
        self.host_id
    }

    /// The folder of its outbox.
    pub(crate) fn outbox(&self) -> PathBuf {
        self.config.with_file_name("outbox")
    }

    /// SIGKILL.
    pub(crate) fn kill(&mut self) {
        if let Some(mut running) = self.running.take() {
            // Gone already is as good as killed.
            let _ = (running.child.kill(), running.child.wait());
        }
    }

    /// Ends its input: the process leaves `main` and ends the library as it ends.
    pub(crate) fn leave(&mut self) {
        let Running { mut child, input, .. } = self.running.take().expect("it runs");
        drop(input);
        assert!(ends_well(&mut child, PATIENCE), "the process did not end well");
    }
}

impl Drop for Puppet {
    fn drop(&mut self) {
        self.kill();
    }
}

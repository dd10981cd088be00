//! A machine that hosts maps, to be killed and started again.

use std::{
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Stdio},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread::JoinHandle,
};

use p2p_sync_proto::{keys::Credential, secret_file};
use uuid::Uuid;

/// Its folder, the process while it runs, and what that has said.
pub(super) struct Machine {
    pub(super) host_id: Uuid,
    program: PathBuf,
    config: PathBuf,
    arguments: Vec<String>,
    running: Mutex<Option<Running>>,
    said: Arc<Mutex<Vec<(String, Uuid)>>>,
}

struct Running {
    child: Child,
    /// Its end is the program's.
    input: Option<ChildStdin>,
    reader: JoinHandle<()>,
}

impl Machine {
    pub(super) fn new(program: &Path, folder: &Path, endpoint: &str, credential: &str, arguments: Vec<String>) -> Self {
        std::fs::create_dir_all(folder).expect("the folder can be made");
        let config = folder.join("p2p_data_sync.conf");
        // What hosts report of themselves is not logged, and here every operation is looked for in the log.
        let text = format!(
            "main_server_endpoint = {endpoint}\nencryption_key = {credential}\noutbox_path = outbox\n\
             retry_delay_max_ms = 500\nmetrics_interval_seconds = 0\n"
        );
        secret_file::replace(&config, text.as_bytes()).expect("the folder can be written");
        Self {
            host_id: Credential::parse(credential).expect("the hub gave it").host_id,
            program: program.to_owned(),
            config,
            arguments,
            running: Mutex::default(),
            said: Arc::default(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Option<Running>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn runs(&self) -> bool {
        self.lock().is_some()
    }

    pub(super) fn start(&self) {
        let log = std::fs::File::options()
            .create(true)
            .append(true)
            .open(self.config.with_extension("log"));
        let mut child = Command::new(&self.program)
            .arg("map-host")
            .arg(&self.config)
            .args(&self.arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log.expect("the folder can be written"))
            .spawn()
            .expect("the program runs");
        let input = child.stdin.take();
        let output = BufReader::new(child.stdout.take().expect("piped"));
        let said = self.said.clone();
        let reader = std::thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                let told = line
                    .split_once(' ')
                    .and_then(|(state, id)| Some((state.to_owned(), id.parse().ok()?)));
                said.lock().unwrap_or_else(PoisonError::into_inner).extend(told);
            }
        });
        *self.lock() = Some(Running { child, input, reader });
    }

    /// SIGKILL; all that it had said is known when this returns.
    pub(super) fn kill(&self) {
        if let Some(mut running) = self.lock().take() {
            // Gone already is as good as killed.
            let _ = running.child.kill();
            let _ = running.child.wait();
            running.reader.join().expect("reading does not panic");
        }
    }

    /// Ends it, after what it has made has settled; gives all that it ever said.
    pub(super) fn end(&self) -> Vec<(String, Uuid)> {
        if let Some(mut running) = self.lock().take() {
            drop(running.input.take());
            let _ = running.child.wait();
            running.reader.join().expect("reading does not panic");
        }
        std::mem::take(&mut self.said.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.kill();
    }
}

//! The programs as a person runs them, and what they say when they refuse.

use std::{
    io::Write as _,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use p2p_sync_proto::{
    keys::{KeyId, MasterKey},
    secret_file,
};
use tempfile::TempDir;
use uuid::Uuid;

/// The binary that is both programs.
pub(crate) fn program() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_demo"))
}

/// A credential that no hub knows.
pub(crate) fn credential() -> String {
    let master = MasterKey::generate(KeyId::parse("k1").expect("a key id"));
    master.credential(Uuid::new_v4(), 1).to_text().to_string()
}

/// A folder for one program's files; removed with this value.
pub(crate) struct Folder(TempDir);

impl Folder {
    pub(crate) fn new() -> Self {
        Self(tempfile::tempdir().expect("a folder can be made"))
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub(crate) fn write(&self, name: &str, text: &str) -> PathBuf {
        let file = self.path(name);
        std::fs::write(&file, text).expect("the folder can be written");
        file
    }

    /// As [`Self::write`], for its owner alone.
    pub(crate) fn write_secret(&self, name: &str, text: &str) -> PathBuf {
        let file = self.path(name);
        secret_file::replace(&file, text.as_bytes()).expect("the folder can be written");
        file
    }

    /// Runs the agent on a configuration of this text.
    pub(crate) fn agent(&self, config: &str, args: &[&str]) -> Told {
        let config = self.write_secret("p2p_data_sync.conf", config);
        run("agent", args, &config, "")
    }

    /// Runs the proxy on a configuration of this text.
    pub(crate) fn proxy(&self, config: &str, args: &[&str]) -> Told {
        let config = self.write("p2p_sync_proxy.conf", config);
        run("proxy", args, &config, "")
    }
}

/// What a program said until it ended.
#[derive(Debug)]
pub(crate) struct Told {
    pub(crate) exit_code: Option<i32>,
    pub(crate) out: String,
    pub(crate) err: String,
}

/// Runs one of the programs to its end.
pub(crate) fn run(name: &str, args: &[&str], config: &Path, input: &str) -> Told {
    let mut command = Command::new(program());
    command.arg(name).args(args).arg("--config").arg(config);
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command.spawn().expect("the program runs");
    let mut stdin = child.stdin.take().expect("piped");
    let input = input.to_owned();
    // A program that refuses at once reads nothing, and that is no error here.
    let writer = std::thread::spawn(move || stdin.write_all(input.as_bytes()).unwrap_or_default());
    let Output { status, stdout, stderr } = child.wait_with_output().expect("the program ends");
    writer.join().expect("writing does not panic");
    let text = |bytes| String::from_utf8(bytes).expect("text");
    Told {
        exit_code: status.code(),
        out: text(stdout),
        err: text(stderr),
    }
}

/// A refusal: what its line begins with, and what it tells to do.
pub(crate) type Refusal<'a> = (&'a str, &'a str);

impl Told {
    /// The program failed with these refusals, and no other, on standard error.
    pub(crate) fn is_refused(&self, refusals: &[Refusal<'_>]) {
        assert_eq!(self.exit_code, Some(1), "{self:?}");
        let told = self.err.lines().filter(|line| is_refusal(line)).count();
        assert_eq!(told, refusals.len(), "{}", self.err);
        for refusal in refusals {
            tells(&self.err, *refusal);
        }
    }
}

/// Whether a line begins with a number such as `E102 `.
fn is_refusal(line: &str) -> bool {
    let number = line.strip_prefix('E').and_then(|rest| rest.split_once(' '));
    number.is_some_and(|(number, _)| number.len() == 3 && number.bytes().all(|byte| byte.is_ascii_digit()))
}

/// A text has a line that begins and advises as the refusal does.
pub(crate) fn tells(text: &str, (begins, advice): Refusal<'_>) {
    let is_it = |line: &str| line.strip_prefix(begins).is_some_and(|rest| rest.contains(advice));
    assert!(
        text.lines().any(is_it),
        "no line is {begins:?} … {advice:?} in:\n{text}"
    );
}

//! The master keys: a file on the hub alone, one key a line, the last one current.
//!
//! A line is `key-id 128-hex-digits created-at`, the last in seconds since 1970; `#` begins a comment at the start of a line.

use std::{
    fs::{self, File},
    io::{ErrorKind, Read},
    os::unix::fs::PermissionsExt,
    path::Path,
    time::{SystemTime, UNIX_EPOCH},
};

use p2p_sync_proto::{
    Code, Problem,
    keys::{KeyId, MasterKey, SECRET_BYTES},
    secret_file,
};
use zeroize::{Zeroize, Zeroizing};

/// The environment variable that goes before the file; it holds the same text.
pub const KEYRING_VARIABLE: &str = "P2P_SYNC_MASTER_KEYRING";

/// Longest keyring, bytes: some 400 keys.
const KEYRING_BYTES_MAX: usize = 64 * 1024;

/// All master keys. `Debug` shows their names alone; the secrets are cleared when dropped.
#[derive(Debug)]
pub struct Keyring {
    /// Never empty.
    entries: Vec<Entry>,
}

/// One master key with its age.
#[derive(Debug)]
pub struct Entry {
    /// The key.
    pub key: MasterKey,
    /// When it was made, seconds since 1970.
    pub created_at: u64,
}

impl Keyring {
    /// Reads the environment's keyring where there is one, and the file otherwise.
    ///
    /// Errors: `BAD_KEYRING` (missing, malformed), `LOOSE_FILE_MODE` (others may read it).
    pub fn load(file: &Path) -> Result<Self, Problem> {
        match std::env::var(KEYRING_VARIABLE).map(Zeroizing::new) {
            Ok(text) => Self::parse(&text, KEYRING_VARIABLE),
            Err(_) => Self::read(file),
        }
    }

    /// As [`Self::load`]; makes the file, with a first key, where there is none of both.
    pub fn load_or_create(file: &Path) -> Result<Self, Problem> {
        if std::env::var_os(KEYRING_VARIABLE).is_none() && !file.exists() {
            if let Some(folder) = file.parent().filter(|folder| !folder.as_os_str().is_empty()) {
                fs::create_dir_all(folder).map_err(|error| unusable(file, &error))?;
            }
            add_key(file)?;
        }
        Self::load(file)
    }

    fn read(file: &Path) -> Result<Self, Problem> {
        let opened = File::open(file).map_err(|error| match error.kind() {
            ErrorKind::NotFound => Problem::new(
                Code::BadKeyring,
                format!(
                    "there is no keyring at {}: make one with `p2p-sync-proxy keys new`",
                    file.display()
                ),
            ),
            _ => unusable(file, &error),
        })?;
        let mode = opened
            .metadata()
            .map_err(|error| unusable(file, &error))?
            .permissions()
            .mode()
            & 0o777;
        if mode & 0o077 != 0 {
            let shown = file.display();
            let sentence = format!("{shown} has mode {mode:04o}, so others may read it: run `chmod 600 {shown}`");
            return Err(Problem::new(Code::LooseFileMode, sentence));
        }
        let mut text = Zeroizing::new(String::with_capacity(KEYRING_BYTES_MAX));
        opened
            .take(KEYRING_BYTES_MAX as u64)
            .read_to_string(&mut text)
            .map_err(|error| unusable(file, &error))?;
        Self::parse(&text, &file.display().to_string())
    }

    /// Reads a keyring's text; `origin` says in errors where it stands (`BAD_KEYRING`, with the line).
    pub fn parse(text: &str, origin: &str) -> Result<Self, Problem> {
        let mut entries: Vec<Entry> = Vec::new();
        for (number, line) in (1..).zip(text.lines()) {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let bad = |what: &str| Problem::new(Code::BadKeyring, format!("{origin}, line {number}: {what}"));
            let mut words = line.split_whitespace();
            let (Some(id), Some(secret), Some(created_at), None) =
                (words.next(), words.next(), words.next(), words.next())
            else {
                return Err(bad(
                    "expected `key-id secret created-at`; restore the line from a backup",
                ));
            };
            let id = KeyId::parse(id).map_err(|error| bad(&error.to_string()))?;
            if entries.iter().any(|entry| *entry.key.id() == id) {
                return Err(bad(
                    "this key id stands above already; remove the line that was added by mistake",
                ));
            }
            let secret = decode_hex(secret)
                .ok_or_else(|| bad("the secret is not 128 hexadecimal digits; restore the line from a backup"))?;
            let created_at = created_at
                .parse()
                .map_err(|_| bad("created-at is not in whole seconds since 1970; restore the line from a backup"))?;
            entries.push(Entry {
                key: MasterKey::from_bytes(id, *secret),
                created_at,
            });
        }
        if entries.is_empty() {
            let sentence = format!("{origin} holds no key: make one with `p2p-sync-proxy keys new`");
            return Err(Problem::new(Code::BadKeyring, sentence));
        }
        Ok(Self { entries })
    }

    /// The key of this name.
    pub fn get(&self, id: &KeyId) -> Option<&MasterKey> {
        self.entries
            .iter()
            .find(|entry| entry.key.id() == id)
            .map(|entry| &entry.key)
    }

    /// The key that new credentials are derived from.
    pub fn current(&self) -> &MasterKey {
        &self.entries.last().expect("a keyring without keys is not read").key
    }

    /// All keys, the oldest first.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }
}

/// Adds a new key to the file, which is made (mode 0600) where there is none, and gives the key's name.
///
/// The file is replaced in one step, so that a crash leaves the old one or the new one.
pub fn add_key(file: &Path) -> Result<KeyId, Problem> {
    let keyring = if file.exists() {
        Some(Keyring::read(file)?)
    } else {
        None
    };
    let entries = keyring.as_ref().map_or(&[][..], Keyring::entries);
    let id = free_id(entries);
    let added = Entry {
        key: MasterKey::generate(id.clone()),
        created_at: now_seconds(),
    };

    let line_bytes_max = 256;
    let mut text = Zeroizing::new(String::with_capacity((entries.len() + 2) * line_bytes_max));
    text.push_str("# Master keys of the hub. Whoever reads this file can be any host. The last key is current.\n");
    for entry in entries.iter().chain([&added]) {
        text.push_str(entry.key.id().as_str());
        text.push(' ');
        encode_hex(entry.key.expose_secret(), &mut text);
        text.push(' ');
        text.push(' ');
        text.push_str(&entry.created_at.to_string());
        text.push('\n');
    }
    secret_file::replace(file, text.as_bytes()).map_err(|error| unusable(file, &error))?;
    Ok(id)
}

/// `k` and a number that no key has yet; with n keys one of n + 1 numbers is free.
fn free_id(entries: &[Entry]) -> KeyId {
    let id = |number| KeyId::parse(&format!("k{number}")).expect("a letter and a number name a key");
    let taken = |id: &KeyId| entries.iter().any(|entry| entry.key.id() == id);
    let next = entries.len() + 1;
    (next..=next + entries.len())
        .map(id)
        .find(|id| !taken(id))
        .expect("one more number than keys")
}

fn unusable(file: &Path, error: &std::io::Error) -> Problem {
    let sentence = format!(
        "the keyring {} cannot be used ({error}): check the path and its owner",
        file.display()
    );
    Problem::new(Code::BadKeyring, sentence)
}

fn encode_hex(bytes: &[u8], out: &mut String) {
    for byte in bytes {
        for digit in [byte >> 4, byte & 15] {
            out.push(char::from_digit(u32::from(digit), 16).expect("four bits are one hexadecimal digit"));
        }
    }
}

fn decode_hex(text: &str) -> Option<Zeroizing<[u8; SECRET_BYTES]>> {
    let mut bytes = Zeroizing::new([0; SECRET_BYTES]);
    if text.len() != 2 * SECRET_BYTES {
        return None;
    }
    for (byte, pair) in bytes.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
        let mut digits = [char::from(pair[0]).to_digit(16)?, char::from(pair[1]).to_digit(16)?];
        *byte = u8::try_from(digits[0] * 16 + digits[1]).ok()?;
        digits.zeroize();
    }
    Some(bytes)
}

fn now_seconds() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests;

//! The master keys: a file on the hub alone, one key a line, the oldest first.
//!
//! A line is `key-id 128-hex-digits created-at`, the last in seconds since 1970, and behind it, on one line of all, the word
//! `current`: new credentials are of that key. Keys below it wait, so that every proxy can be given them before one is used;
//! keys above it open what they have sealed until they are retired. `#` begins a comment at the start of a line.

use std::{
    fs,
    io::ErrorKind,
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

/// Marks the key of new credentials.
const CURRENT: &str = "current";
/// Longest keyring, bytes: some 400 keys.
const KEYRING_BYTES_MAX: u64 = 64 * 1024;

/// All master keys. `Debug` shows their names alone; the secrets are cleared when dropped.
#[derive(Clone, Debug)]
pub struct Keyring {
    /// Never empty.
    entries: Vec<Entry>,
    /// Which of them.
    current: usize,
}

/// One master key with its age.
#[derive(Clone, Debug)]
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
        let (text, metadata) = secret_file::read(file, KEYRING_BYTES_MAX).map_err(|error| match error.kind() {
            ErrorKind::NotFound => Problem::new(
                Code::BadKeyring,
                format!(
                    "there is no keyring at {}: make one with `p2p-sync-proxy keys new`",
                    file.display()
                ),
            ),
            _ => unusable(file, &error),
        })?;
        secret_file::check_mode(file, &metadata)?;
        Self::parse(&text, &file.display().to_string())
    }

    /// Reads a keyring's text; `origin` says in errors where it stands (`BAD_KEYRING`, with the line).
    pub fn parse(text: &str, origin: &str) -> Result<Self, Problem> {
        let mut entries: Vec<Entry> = Vec::new();
        let mut current = None;
        for (number, line) in (1..).zip(text.lines()) {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let bad = |what: &str| Problem::new(Code::BadKeyring, format!("{origin}, line {number}: {what}"));
            let mut words = line.split_whitespace();
            let (Some(id), Some(secret), Some(created_at), mark, None) =
                (words.next(), words.next(), words.next(), words.next(), words.next())
            else {
                return Err(bad(
                    "expected `key-id secret created-at`, on one line with `current` behind it; restore the line from a backup",
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
            match mark {
                None => {}
                Some(CURRENT) if current.is_none() => current = Some(entries.len()),
                Some(CURRENT) => return Err(bad("another key is marked current above; remove one of the two words")),
                Some(_) => return Err(bad("the only word behind a key is `current`; remove it")),
            }
            entries.push(Entry {
                key: MasterKey::from_bytes(id, *secret),
                created_at,
            });
        }
        if entries.is_empty() {
            let sentence = format!("{origin} holds no key: make one with `p2p-sync-proxy keys new`");
            return Err(Problem::new(Code::BadKeyring, sentence));
        }
        let current = current.ok_or_else(|| {
            let sentence =
                format!("{origin} marks no key as current: write `current` behind the one that credentials are of");
            Problem::new(Code::BadKeyring, sentence)
        })?;
        Ok(Self { entries, current })
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
        &self.entries[self.current].key
    }

    /// Whether the current key came after this one: hosts that hold a credential of it are to renew it.
    pub fn is_passed(&self, id: &KeyId) -> bool {
        self.place(id).is_some_and(|place| place < self.current)
    }

    /// Keys that can be made current: the others know them already.
    pub fn waiting(&self) -> &[Entry] {
        &self.entries[self.current + 1..]
    }

    /// Whether both have the same keys, secrets included, and the same current one.
    pub fn is_same(&self, other: &Self) -> bool {
        let same = |(one, two): (&Entry, &Entry)| {
            one.key.id() == two.key.id() && one.key.expose_secret() == two.key.expose_secret()
        };
        self.entries.len() == other.entries.len()
            && self.current == other.current
            && self.entries.iter().zip(&other.entries).all(same)
    }

    fn place(&self, id: &KeyId) -> Option<usize> {
        self.entries.iter().position(|entry| entry.key.id() == id)
    }

    /// Adds a key that waits, or a first one; gives its name.
    fn add(&mut self) -> KeyId {
        let id = free_id(&self.entries);
        self.entries.push(Entry {
            key: MasterKey::generate(id.clone()),
            created_at: now_seconds(),
        });
        id
    }

    /// Replaces the file in one step, so that a crash leaves the old one or the new one.
    fn write(&self, file: &Path) -> Result<(), Problem> {
        let line_bytes_max = 256;
        let mut text = Zeroizing::new(String::with_capacity((self.entries.len() + 2) * line_bytes_max));
        text.push_str(
            "# Master keys of the hub. Whoever reads this file can be any host. See `p2p-sync-proxy keys`.\n",
        );
        for (place, entry) in self.entries.iter().enumerate() {
            text.push_str(entry.key.id().as_str());
            text.push(' ');
            encode_hex(entry.key.expose_secret(), &mut text);
            text.push(' ');
            text.push_str(&entry.created_at.to_string());
            if place == self.current {
                text.push(' ');
                text.push_str(CURRENT);
            }
            text.push('\n');
        }
        secret_file::replace(file, text.as_bytes()).map_err(|error| unusable(file, &error))
    }

    /// All keys, the oldest first.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }
}

/// Adds a new key to the file, which is made (mode 0600) where there is none, and gives the key's name. The first one is
/// current, any other waits until [`rotate`].
pub fn add_key(file: &Path) -> Result<KeyId, Problem> {
    let mut keyring = if file.exists() {
        Keyring::read(file)?
    } else {
        Keyring {
            entries: Vec::new(),
            current: 0,
        }
    };
    let id = keyring.add();
    keyring.write(file)?;
    Ok(id)
}

/// Makes a key current: the one named, or the newest that waits, or a new one where none does. Gives its name, and whether
/// it was made just now. Goes forward alone: a key that has passed stays so.
pub fn rotate(file: &Path, id: Option<&KeyId>) -> Result<(KeyId, bool), Problem> {
    let mut keyring = Keyring::read(file)?;
    let place = match id {
        Some(id) => find(&keyring, file, id)?,
        None => keyring.entries.len() - 1,
    };
    if place < keyring.current {
        let sentence = format!(
            "{} came before the current key {}, and hosts have renewed theirs since: make a new one with `keys new`",
            keyring.entries[place].key.id(),
            keyring.current().id()
        );
        return Err(Problem::new(Code::BadValue, sentence));
    }
    let is_new = place == keyring.current && id.is_none();
    keyring.current = if is_new {
        keyring.add();
        keyring.entries.len() - 1
    } else {
        place
    };
    keyring.write(file)?;
    Ok((keyring.current().id().clone(), is_new))
}

/// Removes a key from the file; what it has sealed opens nowhere from then on. Not the current one.
pub fn retire(file: &Path, id: &KeyId) -> Result<(), Problem> {
    let mut keyring = Keyring::read(file)?;
    let place = find(&keyring, file, id)?;
    if place == keyring.current {
        let sentence = format!("{id} is the current key: make another one current first, `p2p-sync-proxy keys rotate`");
        return Err(Problem::new(Code::BadValue, sentence));
    }
    keyring.entries.remove(place);
    keyring.current -= usize::from(place < keyring.current);
    keyring.write(file)
}

fn find(keyring: &Keyring, file: &Path, id: &KeyId) -> Result<usize, Problem> {
    let missing = || {
        let sentence = format!("{} has no key {id}: see `p2p-sync-proxy keys list`", file.display());
        Problem::new(Code::NotFound, sentence)
    };
    keyring.place(id).ok_or_else(missing)
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

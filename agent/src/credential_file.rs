//! The file that holds who this host is: where its hub is, what it seals with, and its private key. Written by enrolment and
//! by each renewal, whole, for its owner alone.

use std::{
    fmt, io,
    path::{Path, PathBuf},
};

use p2p_sync_proto::{
    Code, Problem,
    certificate::PIN_BYTES,
    identity::Identity,
    keys::{Credential, CredentialError},
    secret_file,
    settings::{Key, Problems, Settings},
    token::check_endpoint,
};
use uuid::Uuid;
use zeroize::Zeroizing;

const KEYS: [Key; 6] = [
    Key::new("endpoint", ""),
    Key::new("ca_pin", ""),
    Key::new("credential", ""),
    Key::new("former_credential", ""),
    Key::new("renewal_request", ""),
    Key::new("private_key", ""),
];
/// Of the file, which has some 1 KiB.
const FILE_BYTES_MAX: u64 = 16 * 1024;

/// What a host keeps of itself. `Debug` shows which host it is alone.
#[derive(Clone)]
pub(crate) struct CredentialFile {
    path: PathBuf,
    /// Where the hub is, as the token said.
    pub(crate) endpoint: String,
    /// Whom to trust there, as the token said.
    pub(crate) ca_pin: Option<[u8; PIN_BYTES]>,
    /// Absent while an enrolment is not finished.
    pub(crate) credential: Option<Credential>,
    /// The one before, until the outbox's key is wrapped by the present one.
    pub(crate) former: Option<Credential>,
    /// Under which the next credential is asked for, from before the first request on.
    pub(crate) renewal_request: Option<Uuid>,
    /// Absent where the host was added by hand.
    pub(crate) identity: Option<Identity>,
}

impl CredentialFile {
    /// One with nothing in it, not written yet.
    pub(crate) fn new(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
            endpoint: String::new(),
            ca_pin: None,
            credential: None,
            former: None,
            renewal_request: None,
            identity: None,
        }
    }

    /// Reads a file; `None` where there is none. `LOOSE_FILE_MODE`, or `BAD_CREDENTIAL` where it is damaged.
    pub(crate) fn read(path: &Path) -> Result<Option<Self>, Problem> {
        let shown = path.display();
        let (text, metadata) = match secret_file::read(path, FILE_BYTES_MAX) {
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => {
                let sentence = format!("{shown} cannot be read ({error}): check its path and its owner");
                return Err(Problem::new(Code::BadCredential, sentence));
            }
        };
        secret_file::check_mode(path, &metadata)?;
        let damaged = |problems: Problems| {
            let told = problems.into_one().sentence;
            let sentence = format!("{shown} is damaged ({told}): restore it from a backup, or enrol this machine anew");
            Problem::new(Code::BadCredential, sentence)
        };
        Self::parse(path, &text).map(Some).map_err(damaged)
    }

    fn parse(path: &Path, text: &str) -> Result<Self, Problems> {
        let mut settings = Settings::read(text, &KEYS, |_| None);
        let file = Self {
            path: path.to_owned(),
            endpoint: settings.resolve("endpoint", |text| match text {
                "" => Ok(String::new()),
                text => check_endpoint(text).map(|()| text.to_owned()).map_err(str::to_owned),
            }),
            ca_pin: settings.resolve("ca_pin", |text| match text {
                "" => Ok(None),
                text => pin_of(text)
                    .map(Some)
                    .ok_or_else(|| "expected 64 hexadecimal digits".to_owned()),
            }),
            credential: settings.resolve("credential", credential),
            former: settings.resolve("former_credential", credential),
            renewal_request: settings.resolve("renewal_request", |text| match text {
                "" => Ok(None),
                text => text.parse().map(Some).map_err(|_| "expected a UUID".to_owned()),
            }),
            identity: settings.resolve("private_key", |text| match text {
                "" => Ok(None),
                text => Identity::parse(text).map(Some).ok_or_else(|| "it is cut".to_owned()),
            }),
        };
        settings.finish(file)
    }

    /// Writes all of it in one step; on disk when this returns.
    pub(crate) fn save(&self) -> Result<(), Problem> {
        let failed = |error: io::Error| {
            let sentence = format!(
                "{} cannot be written ({error}): check the disk and who may write its folder",
                self.path.display()
            );
            Problem::new(Code::DiskError, sentence)
        };
        if let Some(folder) = self.path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
            std::fs::create_dir_all(folder).map_err(failed)?;
        }
        secret_file::replace(&self.path, self.text().as_bytes()).map_err(failed)
    }

    fn text(&self) -> Zeroizing<String> {
        // Of its size from the beginning: what grows leaves pieces of the secrets behind.
        let mut text = Zeroizing::new(String::with_capacity(2048));
        text.push_str("# Who this machine is to the hub. Whoever reads this file can be this host: keep it as it is, mode 0600.\n");
        let mut line = |name: &str, value: &str| {
            if !value.is_empty() {
                for part in [name, " = ", value, "\n"] {
                    text.push_str(part);
                }
            }
        };
        line("endpoint", &self.endpoint);
        let mut pin = String::new();
        for byte in self.ca_pin.iter().flatten() {
            pin += &format!("{byte:02x}");
        }
        line("ca_pin", &pin);
        if let Some(credential) = &self.credential {
            line("credential", &credential.to_text());
        }
        if let Some(former) = &self.former {
            line("former_credential", &former.to_text());
        }
        if let Some(request_id) = self.renewal_request {
            line("renewal_request", &request_id.to_string());
        }
        if let Some(identity) = &self.identity {
            line("private_key", &identity.to_text());
        }
        text
    }
}

impl fmt::Debug for CredentialFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CredentialFile")
            .field("path", &self.path)
            .field(
                "host_id",
                &self.credential.as_ref().map(|credential| credential.host_id),
            )
            .finish_non_exhaustive()
    }
}

fn credential(text: &str) -> Result<Option<Credential>, String> {
    match Credential::parse(text) {
        Ok(credential) => Ok(Some(credential)),
        Err(CredentialError::Empty) => Ok(None),
        Err(error) => Err(error.to_string()),
    }
}

fn pin_of(text: &str) -> Option<[u8; PIN_BYTES]> {
    let mut pin = [0; PIN_BYTES];
    let digits = text.as_bytes();
    if digits.len() != 2 * PIN_BYTES || !digits.iter().all(u8::is_ascii_hexdigit) {
        return None;
    }
    for (byte, pair) in pin.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
    }
    Some(pin)
}

#[cfg(test)]
mod tests {
    use p2p_sync_proto::keys::{KeyId, MasterKey};

    use super::*;

    fn full(path: &Path) -> CredentialFile {
        let master = MasterKey::generate(KeyId::parse("k1").expect("valid"));
        CredentialFile {
            endpoint: "https://hub.example.org".to_owned(),
            ca_pin: Some([0xa7; PIN_BYTES]),
            credential: Some(master.credential(Uuid::from_u128(7), 2)),
            former: Some(master.credential(Uuid::from_u128(7), 1)),
            renewal_request: Some(Uuid::new_v4()),
            identity: Some(Identity::generate()),
            ..CredentialFile::new(path)
        }
    }

    #[test]
    fn what_was_written_is_read_and_is_its_owners_alone() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("made/here/credential");
        assert!(CredentialFile::read(&path).expect("nothing wrong").is_none());
        let file = full(&path);
        file.save().expect("written");
        file.save().expect("written over");
        let read = CredentialFile::read(&path).expect("readable").expect("there");
        assert_eq!(read.text(), file.text());
        assert_eq!(
            std::fs::read_dir(path.parent().expect("a folder"))
                .expect("there")
                .count(),
            1
        );
        let shown = format!("{read:?}");
        assert!(shown.contains("00000007") && !shown.contains("p2ps"), "{shown}");
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt as _;
            let mode = std::fs::metadata(&path).expect("there").permissions().mode();
            assert_eq!(mode & 0o777, 0o600);
            for loose in [0o644, 0o660, 0o602] {
                std::fs::set_permissions(&path, std::fs::Permissions::from_mode(loose)).expect("ours");
                let problem = CredentialFile::read(&path).expect_err("loose");
                assert_eq!(problem.code, Code::LooseFileMode);
                assert!(problem.sentence.contains("run `chmod 600 "), "{problem}");
            }
        }
    }

    #[test]
    fn a_damaged_file_is_told_and_none_of_it_is_shown() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("credential");
        full(&path).save().expect("written");
        let whole = std::fs::read_to_string(&path).expect("readable");
        let cut = |name: &str| {
            let lines = whole.lines().map(|line| match line.strip_prefix(name) {
                Some(_) => line[..line.len() - 2].to_owned(),
                None => line.to_owned(),
            });
            lines.collect::<Vec<_>>().join("\n")
        };
        for spoilt in [
            cut("ca_pin"),
            cut("credential"),
            cut("private_key"),
            whole.replace("https", "ftp"),
        ] {
            let told = CredentialFile::parse(&path, &spoilt).expect_err("damaged").to_string();
            assert!(!told.contains("p2ps1_A") && !told.contains("p2psk1_"), "{told}");
        }
    }
}

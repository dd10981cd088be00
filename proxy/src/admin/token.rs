//! The one token that tools show: where it comes from, and who may try how often.

use std::{
    fmt, fs,
    net::IpAddr,
    num::{NonZeroU32, NonZeroUsize},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use arc_swap::ArcSwap;
use lru::LruCache;
use p2p_sync_proto::{Code, Problem, secret_file};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq as _;
use tokio::{task::spawn_blocking, time::interval};
use uuid::Uuid;
use zeroize::Zeroizing;

use crate::{
    admission::{Rate, peers::whose},
    secret::Secret,
};

/// Holds the token, and goes before the file.
pub const TOKEN_VARIABLE: &str = "P2P_SYNC_ADMIN_TOKEN";

/// What a token begins with that `keys admin-token` makes: leak scanners and people know it by that.
const PREFIX: &str = "p2padmin_";
/// Of a token. What is shorter could be guessed.
const LETTERS_MIN: usize = 32;
const LETTERS_MAX: usize = 512;
/// Between two looks whether the file has changed.
const LOOK_INTERVAL: Duration = Duration::from_secs(2);
/// Wrong tokens of an address: a burst, and so many a second after it. Who goes on is not listened to for a while.
const WRONG_BURST: NonZeroU32 = NonZeroU32::new(10).expect("not zero");
const WRONG_PER_SECOND: NonZeroU32 = NonZeroU32::new(1).expect("not zero");
const LOCKED_OUT: Duration = Duration::from_mins(1);
/// Addresses remembered that have shown a wrong one; the one longest ago is forgotten.
const ADDRESSES_MAX: NonZeroUsize = NonZeroUsize::new(1024).expect("not zero");

/// Where the token is.
#[derive(Clone, Debug)]
pub enum Source {
    /// In the environment.
    Given(Secret),
    /// In a file, mode 0600, alone on its first line.
    File(PathBuf),
}

/// What became of a token that was shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It is the token.
    Right,
    /// It is not, or there is none.
    Wrong,
    /// So many were wrong that the next one is looked at only after so long.
    TooMany(Duration),
}

/// Tells the right token from others.
pub(super) struct Guard {
    /// SHA-256 of the token: of one length whatever is shown, and of no use to who reads it.
    digest: ArcSwap<[u8; 32]>,
    wrong: Mutex<LruCache<IpAddr, Wrong>>,
}

struct Wrong {
    rate: Rate,
    /// Until then nothing from there is compared.
    until: Option<Instant>,
}

impl Source {
    /// Reads the token, as what is compared.
    ///
    /// Errors: `MISSING_VALUE` where there is none, `LOOSE_FILE_MODE`, `CONFIG_UNREADABLE`, `BAD_VALUE`.
    pub(super) fn read(&self) -> Result<[u8; 32], Problem> {
        match self {
            Self::Given(token) => digest_of(token.expose(), TOKEN_VARIABLE),
            Self::File(file) => {
                let shown = file.display();
                let read = secret_file::read(file, LETTERS_MAX as u64 + 2);
                let (text, metadata) = read.map_err(|error| match error.kind() {
                    std::io::ErrorKind::NotFound => Problem::new(
                        Code::MissingValue,
                        format!(
                            "admin_port is set, and there is no token at {shown}: run `p2p-sync-proxy keys admin-token`, or set \
                             {TOKEN_VARIABLE}"
                        ),
                    ),
                    _ => Problem::new(
                        Code::ConfigUnreadable,
                        format!("admin_token_file: {shown} cannot be read ({error}): check who may read it"),
                    ),
                })?;
                secret_file::check_mode(file, &metadata)?;
                digest_of(&text, &format!("admin_token_file: {shown}"))
            }
        }
    }
}

/// Makes a token and writes it to the file (mode 0600), in the place of the one that was there.
pub(crate) fn make(file: &Path) -> Result<(), Problem> {
    // Two times 122 bits of the system's randomness.
    let [first, second] = [(); 2].map(|()| Uuid::new_v4());
    let mut token = Zeroizing::new(String::with_capacity(PREFIX.len() + 2 * 32 + 1));
    token.push_str(PREFIX);
    for half in [first, second] {
        let mut letters = Zeroizing::new([0; 32]);
        token.push_str(half.simple().encode_lower(letters.as_mut_slice()));
    }
    token.push('\n');
    // An embedded database's may not be there yet.
    let folder = file.parent().map_or(Ok(()), fs::create_dir_all);
    folder
        .and_then(|()| secret_file::replace(file, token.as_bytes()))
        .map_err(|error| {
            let sentence = format!(
                "{} cannot be written ({error}): check that its folder is there, and who may write to it",
                file.display()
            );
            Problem::new(Code::ConfigUnreadable, sentence)
        })
}

/// Refuses what is no token; `whence` is what to look at.
fn digest_of(text: &str, whence: &str) -> Result<[u8; 32], Problem> {
    let text = text.trim();
    let fits =
        (LETTERS_MIN..=LETTERS_MAX).contains(&text.len()) && text.bytes().all(|letter| letter.is_ascii_graphic());
    if !fits {
        let sentence = format!(
            "{whence} holds no token: expected {LETTERS_MIN} to {LETTERS_MAX} letters, digits and signs without blanks, drawn at \
             random, as `p2p-sync-proxy keys admin-token` makes it"
        );
        return Err(Problem::new(Code::BadValue, sentence));
    }
    Ok(Sha256::digest(text.as_bytes()).into())
}

impl Guard {
    pub(super) fn new(digest: [u8; 32]) -> Self {
        Self {
            digest: ArcSwap::from_pointee(digest),
            wrong: Mutex::new(LruCache::new(ADDRESSES_MAX)),
        }
    }

    /// Compares what was shown, in a time that tells nothing of the token. An address that shows too many wrong ones is not
    /// listened to for a while. This machine's own programs are: one that was set up wrongly would shut the others out, and
    /// they can guess no better than 32 letters are hard to guess.
    pub(super) fn check(&self, address: IpAddr, shown: Option<&str>) -> Verdict {
        let address = whose(address);
        let now = Instant::now();
        if let Some(left) = self.locked_out(address, now) {
            return Verdict::TooMany(left);
        }
        let digest: [u8; 32] = Sha256::digest(shown.unwrap_or_default().as_bytes()).into();
        if digest.ct_eq(&**self.digest.load()).into() {
            return Verdict::Right;
        }
        let mut all = self.wrong.lock().unwrap_or_else(PoisonError::into_inner);
        let wrong = all.get_or_insert_mut(address, || Wrong {
            rate: Rate::new(WRONG_PER_SECOND, WRONG_BURST),
            until: None,
        });
        match wrong.rate.take(1) {
            Ok(_) => Verdict::Wrong,
            Err(wait) if address.is_loopback() => Verdict::TooMany(wait),
            Err(_) => {
                if wrong.until.replace(now + LOCKED_OUT).is_none() {
                    tracing::warn!(%address, "too many wrong tokens come to the admin listener: they are not looked at for a minute");
                }
                Verdict::TooMany(LOCKED_OUT)
            }
        }
    }

    fn locked_out(&self, address: IpAddr, now: Instant) -> Option<Duration> {
        let mut all = self.wrong.lock().unwrap_or_else(PoisonError::into_inner);
        let wrong = all.peek_mut(&address)?;
        let left = wrong.until.map(|until| until.saturating_duration_since(now))?;
        if left.is_zero() {
            wrong.until = None;
            return None;
        }
        Some(left)
    }

    /// Takes a new token over when the file changes; never ends. A bad file is told once, and the token that was stays.
    pub(super) async fn follow(self: Arc<Self>, source: Source) {
        let mut ticks = interval(LOOK_INTERVAL);
        let mut refused = None;
        loop {
            ticks.tick().await;
            let source = source.clone();
            // A panic is a fault of ours, and the token holds on all the same.
            let Ok(read) = spawn_blocking(move || source.read()).await else {
                continue;
            };
            match read {
                Ok(digest) => {
                    refused = None;
                    if !bool::from(digest.ct_eq(&**self.digest.load())) {
                        self.digest.store(Arc::new(digest));
                        tracing::info!("the admin listener takes the new token, and the former one no more");
                    }
                }
                Err(problem) if refused.as_ref() != Some(&problem) => {
                    tracing::error!(%problem, "the admin listener's token is not taken anew, and the one before it holds on");
                    refused = Some(problem);
                }
                Err(_) => {}
            }
        }
    }
}

impl fmt::Debug for Guard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Guard")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RIGHT: &str = "p2padmin_0123456789012345678901234567890123456789";

    fn guard() -> Guard {
        Guard::new(digest_of(RIGHT, "here").expect("a token"))
    }

    #[test]
    fn an_address_that_shows_wrong_tokens_is_not_listened_to_and_others_are() {
        let guard = guard();
        let ip = |text: &str| text.parse::<IpAddr>().expect("an address");
        assert_eq!(guard.check(ip("192.0.2.1"), Some(RIGHT)), Verdict::Right);
        let verdicts: Vec<Verdict> = (0..30).map(|_| guard.check(ip("192.0.2.1"), Some("guess"))).collect();
        assert!(
            verdicts[..10].iter().all(|verdict| *verdict == Verdict::Wrong),
            "{verdicts:?}"
        );
        assert!(matches!(verdicts[29], Verdict::TooMany(_)), "{verdicts:?}");
        assert!(
            matches!(guard.check(ip("192.0.2.1"), Some(RIGHT)), Verdict::TooMany(_)),
            "the right one neither"
        );
        assert_eq!(guard.check(ip("192.0.2.2"), Some(RIGHT)), Verdict::Right);
        // One network of 64 bits is one machine's.
        for last in 0..30 {
            guard.check(ip(&format!("2001:db8::{last}")), None);
        }
        assert!(matches!(
            guard.check(ip("2001:db8::ffff"), Some(RIGHT)),
            Verdict::TooMany(_)
        ));
    }

    #[test]
    fn a_program_of_this_machine_with_a_wrong_token_shuts_no_other_out() {
        let guard = guard();
        let loopback = IpAddr::from([127, 0, 0, 1]);
        let verdicts: Vec<Verdict> = (0..30).map(|_| guard.check(loopback, Some("guess"))).collect();
        assert!(
            matches!(verdicts[29], Verdict::TooMany(wait) if wait <= Duration::from_secs(1)),
            "{verdicts:?}"
        );
        assert_eq!(guard.check(loopback, Some(RIGHT)), Verdict::Right);
    }

    #[test]
    fn addresses_that_come_once_are_forgotten() {
        let guard = guard();
        for number in 0..5000_u32 {
            guard.check(IpAddr::from(number.to_be_bytes()), Some("guess"));
        }
        assert_eq!(guard.wrong.lock().expect("whole").len(), 1024);
    }

    #[test]
    fn what_is_made_is_a_token_and_its_owners_alone() {
        let folder = tempfile::tempdir().expect("a folder can be made");
        let file = folder.path().join("token");
        let source = Source::File(file.clone());
        assert_eq!(source.read().expect_err("none").code, Code::MissingValue);
        make(&file).expect("made");
        let first = source.read().expect("a token");
        make(&file).expect("made");
        assert_ne!(source.read().expect("a token"), first, "another one");
        let permissions = std::os::unix::fs::PermissionsExt::from_mode(0o644);
        std::fs::set_permissions(&file, permissions).expect("ours");
        assert_eq!(source.read().expect_err("loose").code, Code::LooseFileMode);
    }

    #[test]
    fn what_could_be_guessed_is_refused_and_not_repeated() {
        for bad in ["", "hunter2", "hunter2 hunter2 hunter2 hunter2 hunter2"] {
            let problem = Source::Given(Secret::from(bad)).read().expect_err(bad);
            assert_eq!(problem.code, Code::BadValue);
            assert!(!problem.sentence.contains("hunter"), "{problem}");
        }
    }
}

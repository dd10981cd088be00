//! Opening: from a sealed message to one whose sender is known.
//!
//! The seal is verified before anything is looked up, under a key that takes no look-up to derive, so that a forger
//! costs the database nothing and learns nothing from the time it takes. Only then is the host asked for.

use std::{
    num::NonZeroUsize,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use arc_swap::ArcSwap;
use lru::LruCache;
use p2p_sync_proto::{
    Code, Problem,
    envelope::Lane,
    keys::{Direction, KeyId, MasterKey, SealKey},
    message::{self, Label},
    v1,
};
use prost::Message;
use tonic::Status;
use uuid::Uuid;
use zeroize::Zeroizing;

use crate::{
    keyring::Keyring,
    replay::Replays,
    store::{HostStatus, Store},
};

/// How long what the database said of a host is believed: a revoked host is out within this time, open streams included.
const HOST_BELIEVED: Duration = Duration::from_secs(2);
/// Hosts remembered.
const HOSTS_REMEMBERED_MAX: NonZeroUsize = NonZeroUsize::new(4096).expect("not zero");

/// What every message that does not open is answered with, whatever the reason.
const NOT_OPENED: &str = "the hub does not open this message. Check that the credential is the last \
    one you were given and was pasted whole, and that it is for this hub; if both hold, ask the operator whether your \
    host is still admitted";
const HOSTS_UNREADABLE: &str = "the hub cannot look up its hosts now; it is tried again";

/// Who sent a message, and the way to answer it. Made by opening alone.
#[derive(Debug)]
pub struct Sender {
    host_id: Uuid,
    label: Label,
    to_host: SealKey,
}

impl Sender {
    /// The host, as the seal proves.
    pub fn host_id(&self) -> Uuid {
        self.host_id
    }

    /// The outside of the message, as the seal proves.
    pub fn label(&self) -> &Label {
        &self.label
    }

    /// Seals an answer under the request's label.
    pub fn seal(&self, reply: &impl Message) -> v1::Sealed {
        message::seal(&self.to_host, Direction::ToHost, &self.label, reply)
    }
}

/// A message whose sender is known. Made by opening alone.
#[derive(Debug)]
pub struct Authenticated<M> {
    /// Who sent it.
    pub sender: Sender,
    /// What was inside.
    pub body: M,
}

/// A message that opens and was taken before: nothing is done for it but to say so.
#[derive(Debug)]
pub struct Replayed {
    /// Whose message it is, though not who sent it now.
    pub sender: Sender,
    /// `REPLAY`.
    pub problem: Problem,
}

#[cfg(fuzzing)]
impl<M> Authenticated<M> {
    /// What opening would have made, for a fuzzer, which has no database of hosts to ask.
    pub fn unproven(label: Label, body: M) -> Self {
        let sender = Sender {
            host_id: label.host_id,
            label,
            to_host: SealKey::generate(),
        };
        Self { sender, body }
    }
}

/// Who holds an enrolment token, and the way to answer. Made by opening alone.
#[derive(Debug)]
pub struct TokenHolder {
    label: Label,
    to_host: SealKey,
}

impl TokenHolder {
    /// Of the token, as the seal proves.
    pub fn token_id(&self) -> Uuid {
        self.label.host_id
    }

    /// Seals an answer under the request's label.
    pub fn seal(&self, reply: &impl Message) -> v1::Sealed {
        message::seal(&self.to_host, Direction::ToHost, &self.label, reply)
    }
}

/// Opens what hosts send.
#[derive(Debug)]
pub struct Opener {
    keyring: ArcSwap<Keyring>,
    /// Stands in for a key that is not in the keyring, so that an unknown key takes as long as a wrong seal.
    decoy: MasterKey,
    store: Store,
    // A std mutex: held for a look-up, never across an await.
    hosts: Mutex<LruCache<Uuid, Remembered>>,
    replays: Replays,
}

#[derive(Clone, Debug)]
struct Remembered {
    /// Absent where the host is unknown or shut out.
    admitted: Option<Admitted>,
    since: Instant,
}

/// The credential that a host is let in by.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Admitted {
    key_id: String,
    generation: u32,
}

impl Opener {
    /// An opener over the hub's master keys and its hosts.
    pub fn new(keyring: Keyring, store: Store) -> Self {
        let decoy = MasterKey::generate(keyring.current().id().clone());
        Self {
            keyring: ArcSwap::from_pointee(keyring),
            decoy,
            store,
            hosts: Mutex::new(LruCache::new(HOSTS_REMEMBERED_MAX)),
            replays: Replays::default(),
        }
    }

    /// Opens a message that came by `lane`.
    ///
    /// What was taken before is given as that, to be answered by its sender's seal like anything else that is refused.
    /// `UNAUTHENTICATED`, always the same, for every message that is not from an admitted host; `UNAVAILABLE` while the
    /// hosts cannot be looked up.
    pub async fn open<M: Message + Default>(
        &self,
        lane: Lane,
        sealed: &v1::Sealed,
    ) -> Result<Result<Authenticated<M>, Replayed>, Status> {
        let label = Label::read(sealed).map_err(|_| not_opened())?;
        if label.lane != lane {
            return Err(not_opened());
        }
        let Some((to_host, body)) = self.unseal(&label, sealed) else {
            tracing::debug!(host_id = %label.host_id, ?lane, "a message does not open");
            return Err(not_opened());
        };
        let shown = Admitted {
            key_id: label.key_id.as_str().to_owned(),
            generation: label.generation,
        };
        let (admitted, asked_now) = self.admitted(label.host_id).await?;
        if admitted.as_ref() != Some(&shown) {
            // Once for each question to the database: a host that goes on sending does not fill the log.
            if asked_now {
                tracing::warn!(host_id = %label.host_id, ?shown, ?admitted, "a host is turned away");
            }
            return Err(not_opened());
        }
        let noted = self.replays.note(&label);
        let sender = Sender {
            host_id: label.host_id,
            label,
            to_host,
        };
        Ok(match noted {
            Ok(()) => Ok(Authenticated { sender, body }),
            Err(problem) => Err(Replayed { sender, problem }),
        })
    }

    /// Opens a request that is sealed by an enrolment token. Whether the token is still worth something is not asked here.
    ///
    /// `UNAUTHENTICATED`, as for a host's message, where it does not open.
    pub fn open_token(&self, sealed: &v1::Sealed) -> Result<(TokenHolder, v1::EnrolRequest), Status> {
        let label = Label::read(sealed).map_err(|_| not_opened())?;
        let keyring = self.keyring.load();
        let master = keyring.get(&label.key_id);
        let secret = master.unwrap_or(&self.decoy).token_secret(label.host_id);
        let opened = message::open(&secret.seal_key(Direction::ToHub), Direction::ToHub, &label, sealed);
        let request = opened.ok().filter(|_| master.is_some() && label.lane == Lane::Enrol);
        let request = request.ok_or_else(not_opened)?;
        let to_host = secret.seal_key(Direction::ToHost);
        Ok((TokenHolder { label, to_host }, request))
    }

    /// The master key of new credentials.
    pub fn current_key(&self) -> KeyId {
        self.keyring.load().current().id().clone()
    }

    /// The master keys.
    pub fn keyring(&self) -> Arc<Keyring> {
        self.keyring.load_full()
    }

    /// Takes other master keys.
    pub fn set_keyring(&self, keyring: Keyring) {
        self.keyring.store(Arc::new(keyring));
    }

    /// What a host holds, in text form; `HUB_UNAVAILABLE` where this proxy lacks the master key.
    pub fn credential(&self, key_id: &str, host_id: Uuid, generation: u32) -> Result<Zeroizing<String>, Problem> {
        let (key, keyring) = (KeyId::parse(key_id).ok(), self.keyring.load());
        let master = key.as_ref().and_then(|id| keyring.get(id));
        let lacking = || {
            tracing::error!(
                key_id,
                "a master key is missing in this proxy's keyring: give all proxies the same"
            );
            Problem::new(Code::HubUnavailable, "the hub lacks a key now; it is tried again")
        };
        Ok(master.ok_or_else(lacking)?.credential(host_id, generation).to_text())
    }

    /// Asks the database anew for a host, at its next message.
    pub fn forget(&self, host_id: Uuid) {
        self.hosts.lock().unwrap_or_else(PoisonError::into_inner).pop(&host_id);
    }

    /// The key is derived for each message. Were it remembered, a forger could tell by the time whom this hub heard lately.
    fn unseal<M: Message + Default>(&self, label: &Label, sealed: &v1::Sealed) -> Option<(SealKey, M)> {
        let keyring = self.keyring.load();
        let known = keyring.get(&label.key_id);
        let master = known.unwrap_or(&self.decoy);
        let key = |direction| master.host_key(label.host_id, label.generation, direction);
        let opened = message::open(&key(Direction::ToHub), Direction::ToHub, label, sealed).ok();
        let body = opened.filter(|_| known.is_some())?;
        Some((key(Direction::ToHost), body))
    }

    /// The credential a host is let in by, and whether the database was asked for it just now.
    async fn admitted(&self, host_id: Uuid) -> Result<(Option<Admitted>, bool), Status> {
        let remembered = self
            .hosts
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get(&host_id)
            .cloned();
        if let Some(remembered) = remembered.filter(|remembered| remembered.since.elapsed() < HOST_BELIEVED) {
            return Ok((remembered.admitted, false));
        }
        // The clock starts before the question: an answer is never believed longer than it says.
        let since = Instant::now();
        let row = self.store.host(host_id).await.map_err(|problem| {
            tracing::warn!(%problem, "hosts cannot be looked up");
            Status::unavailable(Problem::new(Code::HubUnavailable, HOSTS_UNREADABLE).to_string())
        })?;
        let active = row.filter(|row| row.status == HostStatus::Active);
        let admitted = active.map(|row| Admitted {
            key_id: row.key_id,
            generation: row.generation,
        });
        let remembered = Remembered {
            admitted: admitted.clone(),
            since,
        };
        self.hosts
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .put(host_id, remembered);
        Ok((admitted, true))
    }
}

fn not_opened() -> Status {
    Status::unauthenticated(Problem::new(Code::NotOpened, NOT_OPENED).to_string())
}

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
    ids::read_id,
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
    store::{HostRole, HostStatus, Store},
};

/// How long what the database said of a host is believed: a revoked host is out within this time, open streams included.
const HOST_BELIEVED: Duration = Duration::from_secs(2);
/// And how long at most where a message shows a credential that may have been given out since.
const ASK_AGAIN: Duration = Duration::from_millis(100);
/// Between two looks whether a host's credential was copied: whoever repeats its old messages costs the database little.
const LOOK_FOR_COPY: Duration = Duration::from_secs(1);
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
    role: HostRole,
    label: Label,
    to_host: SealKey,
}

impl Sender {
    /// The host, as the seal proves.
    pub fn host_id(&self) -> Uuid {
        self.host_id
    }

    /// What it may do beyond other hosts, as the database said within the last seconds.
    pub fn role(&self) -> HostRole {
        self.role
    }

    /// The outside of the message, as the seal proves.
    pub fn label(&self) -> &Label {
        &self.label
    }

    /// Seals an answer under the request's label.
    pub fn seal(&self, reply: &impl Message) -> v1::Sealed {
        message::seal(&self.to_host, Direction::ToHost, &self.label, reply)
    }

    /// Seals the message of a number, from 1, of a server stream with an id of its own: in another place, or another stream,
    /// it does not open.
    pub fn seal_numbered(&self, stream_id: Uuid, number: u64, message: &impl Message) -> v1::Sealed {
        let label = Label {
            id: stream_id,
            sequence: number,
            ..self.label.clone()
        };
        message::seal(&self.to_host, Direction::ToHost, &label, message)
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
            role: HostRole::Host,
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
    // Std mutexes: held for a look-up, never across an await.
    hosts: Mutex<LruCache<Uuid, Remembered>>,
    /// When a host was last looked at for a copy of its credential.
    suspected: Mutex<LruCache<Uuid, Instant>>,
    replays: Replays,
}

#[derive(Clone, Debug)]
struct Remembered {
    /// Absent where the host is unknown or shut out.
    admitted: Option<Arc<Admitted>>,
    since: Instant,
}

/// The credentials that a host is let in by: master key of the present one, of the next, which was given out and not used
/// yet, and of the one before, while its messages may be on their way.
#[derive(Debug)]
struct Admitted {
    role: HostRole,
    generation: u32,
    key_id: String,
    next_key_id: Option<String>,
    former_key_id: Option<String>,
}

/// What a credential is to a host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Standing {
    LetIn,
    /// Its first use makes it the present one.
    Next,
    /// It was the host's, and is no more.
    Passed,
    /// As [`Self::Unknown`], but the next in number: given out a moment ago, maybe.
    Ahead,
    Unknown,
}

impl Admitted {
    fn standing(&self, label: &Label) -> Standing {
        let is = |key_id: &Option<String>| key_id.as_deref() == Some(label.key_id.as_str());
        let (shown, held) = (u64::from(label.generation), u64::from(self.generation));
        if shown == held && self.key_id == label.key_id.as_str() || shown + 1 == held && is(&self.former_key_id) {
            Standing::LetIn
        } else if shown == held + 1 && is(&self.next_key_id) {
            Standing::Next
        } else if shown < held {
            Standing::Passed
        } else if shown == held + 1 {
            Standing::Ahead
        } else {
            Standing::Unknown
        }
    }
}

/// A message that opened, and what its credential is to the host.
enum Opened<M> {
    LetIn(Result<Authenticated<M>, Replayed>),
    Passed(Label, M),
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
            suspected: Mutex::new(LruCache::new(HOSTS_REMEMBERED_MAX)),
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
        match self.look(lane, sealed).await? {
            Opened::LetIn(opened) => Ok(opened),
            Opened::Passed(..) => Err(not_opened()),
        }
    }

    /// As [`Self::open`], for the first message of a connection. One of an outbox that is not known, under a credential that
    /// the host has renewed, locks the host: a copy of the credential is in use.
    pub async fn open_hello(
        &self,
        sealed: &v1::Sealed,
    ) -> Result<Result<Authenticated<v1::HelloRequest>, Replayed>, Status> {
        match self.look(Lane::Hello, sealed).await? {
            Opened::LetIn(opened) => Ok(opened),
            Opened::Passed(label, hello) => {
                self.look_for_a_copy(&label, &hello).await;
                Err(not_opened())
            }
        }
    }

    async fn look<M: Message + Default>(&self, lane: Lane, sealed: &v1::Sealed) -> Result<Opened<M>, Status> {
        let label = Label::read(sealed).map_err(|_| not_opened())?;
        if label.lane != lane {
            return Err(not_opened());
        }
        let Some((to_host, body)) = self.unseal(&label, sealed) else {
            tracing::debug!(host_id = %label.host_id, ?lane, "a message does not open");
            return Err(not_opened());
        };
        let host_id = label.host_id;
        let (mut admitted, mut asked_now) = self.admitted(host_id, HOST_BELIEVED).await?;
        let standing_of = |admitted: &Option<Arc<Admitted>>| {
            admitted
                .as_ref()
                .map_or(Standing::Unknown, |admitted| admitted.standing(&label))
        };
        let mut standing = standing_of(&admitted);
        if standing == Standing::Ahead && !asked_now {
            (admitted, asked_now) = self.admitted(host_id, ASK_AGAIN).await?;
            standing = standing_of(&admitted);
        }
        if standing == Standing::Next {
            self.promote(&label).await?;
            (admitted, asked_now) = self.admitted(host_id, Duration::ZERO).await?;
            standing = standing_of(&admitted);
        }
        if standing == Standing::LetIn {
            let noted = self.replays.note(&label);
            let role = admitted.map_or(HostRole::Host, |admitted| admitted.role);
            let sender = Sender {
                host_id,
                role,
                label,
                to_host,
            };
            return Ok(Opened::LetIn(match noted {
                Ok(()) => Ok(Authenticated { sender, body }),
                Err(problem) => Err(Replayed { sender, problem }),
            }));
        }
        // Once for each question to the database: a host that goes on sending does not fill the log.
        if asked_now {
            let (key_id, generation) = (&label.key_id, label.generation);
            tracing::warn!(%host_id, %key_id, generation, ?admitted, "a host is turned away");
        }
        if standing == Standing::Passed {
            return Ok(Opened::Passed(label, body));
        }
        Err(not_opened())
    }

    /// Makes the credential that sealed a message the host's present one.
    async fn promote(&self, label: &Label) -> Result<(), Status> {
        let promoted = self.store.promote_credential(label.host_id, label.generation).await;
        self.forget(label.host_id);
        if promoted.map_err(|problem| Status::unavailable(problem.to_string()))? {
            let (host_id, key_id, generation) = (label.host_id, &label.key_id, label.generation);
            tracing::info!(%host_id, %key_id, generation, "a host has renewed its credential");
        }
        Ok(())
    }

    async fn look_for_a_copy(&self, label: &Label, hello: &v1::HelloRequest) {
        let host_id = label.host_id;
        // Without an outbox nothing tells a copy from a message that somebody repeats.
        let Some(opening_id) = read_id(&hello.opening_id) else {
            return;
        };
        {
            let mut suspected = self.suspected.lock().unwrap_or_else(PoisonError::into_inner);
            if suspected
                .get(&host_id)
                .is_some_and(|looked| looked.elapsed() < LOOK_FOR_COPY)
            {
                return;
            }
            suspected.put(host_id, Instant::now());
        }
        let locked = self
            .store
            .lock_cloned(host_id, label.generation, opening_id, hello.incarnation)
            .await;
        match locked {
            Ok(true) => {
                self.forget(host_id);
                let generation = label.generation;
                tracing::warn!(%host_id, generation, "a host is locked: a copy of its former credential is in use");
            }
            Ok(false) => {}
            Err(problem) => tracing::warn!(%problem, %host_id, "it could not be seen whether a credential was copied"),
        }
    }

    /// Whether a newer master key than the one that sealed a message is current.
    pub fn is_due_for_renewal(&self, sender: &Sender) -> bool {
        self.keyring.load().is_passed(&sender.label.key_id)
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

    /// Whether a host that was let in is so still, as far as the database said within the last seconds; while it says nothing,
    /// it is.
    pub async fn lets_in(&self, host_id: Uuid) -> bool {
        let admitted = self.admitted(host_id, HOST_BELIEVED).await;
        admitted.map_or(true, |(admitted, _)| admitted.is_some())
    }

    /// What a host is let in by, asked of the database unless that was done within `believed`, and whether it was just now.
    async fn admitted(&self, host_id: Uuid, believed: Duration) -> Result<(Option<Arc<Admitted>>, bool), Status> {
        let remembered = self
            .hosts
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get(&host_id)
            .cloned();
        if let Some(remembered) = remembered.filter(|remembered| remembered.since.elapsed() < believed) {
            return Ok((remembered.admitted, false));
        }
        // The clock starts before the question: an answer is never believed longer than it says.
        let since = Instant::now();
        let row = self.store.host(host_id).await.map_err(|problem| {
            tracing::warn!(%problem, "hosts cannot be looked up");
            Status::unavailable(Problem::new(Code::HubUnavailable, HOSTS_UNREADABLE).to_string())
        })?;
        let active = row.filter(|row| row.status == HostStatus::Active);
        let admitted = active.map(|row| {
            Arc::new(Admitted {
                role: row.role,
                generation: row.generation,
                key_id: row.key_id,
                next_key_id: row.next_key_id,
                former_key_id: row.former_key_id,
            })
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

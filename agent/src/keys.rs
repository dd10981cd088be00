//! What this host seals with, also while it is being renewed: the newest credential, and the one before for the answers to
//! what that has sealed.

use std::sync::{
    Arc,
    atomic::{AtomicU32, Ordering},
};

use arc_swap::ArcSwap;
use p2p_sync_proto::{keys::Credential, message::Label};
use tokio::sync::Notify;

/// The credentials of a running agent.
#[derive(Debug)]
pub(crate) struct Keys {
    held: ArcSwap<Held>,
    /// Generation of the credential that wraps the outbox's data key on disk.
    wrapped: AtomicU32,
    wrapped_wake: Notify,
    /// The hub has said that it is time for the next one.
    pub(crate) due: Notify,
}

#[derive(Debug)]
struct Held {
    newest: Arc<Credential>,
    former: Option<Arc<Credential>>,
}

impl Keys {
    /// Of an outbox that was opened with this credential, or of none.
    pub(crate) fn new(credential: &Credential) -> Self {
        let held = Held {
            newest: Arc::new(credential.clone()),
            former: None,
        };
        Self {
            held: ArcSwap::from_pointee(held),
            wrapped: AtomicU32::new(credential.generation),
            wrapped_wake: Notify::new(),
            due: Notify::new(),
        }
    }

    /// What is sealed with from now on.
    pub(crate) fn newest(&self) -> Arc<Credential> {
        self.held.load().newest.clone()
    }

    /// What a message was sealed with.
    pub(crate) fn of(&self, label: &Label) -> Option<Arc<Credential>> {
        let held = self.held.load();
        let is_it = |one: &&Arc<Credential>| (one.generation, &one.key_id) == (label.generation, &label.key_id);
        [Some(&held.newest), held.former.as_ref()]
            .into_iter()
            .flatten()
            .find(is_it)
            .cloned()
    }

    /// Seals with a new credential from now on.
    pub(crate) fn renew(&self, credential: Arc<Credential>) {
        let former = Some(self.newest());
        self.held.store(Arc::new(Held {
            newest: credential,
            former,
        }));
    }

    /// Notes what the hub said of a message's credential.
    pub(crate) fn heard(&self, label: &Label, is_due: bool) {
        if is_due && self.newest().generation == label.generation {
            self.due.notify_one();
        }
    }

    /// The outbox's data key is on disk under this credential.
    pub(crate) fn note_wrapped(&self, generation: u32) {
        self.wrapped.store(generation, Ordering::SeqCst);
        self.wrapped_wake.notify_one();
    }

    /// Whether the newest credential alone opens the outbox.
    pub(crate) fn is_wrapped(&self) -> bool {
        self.wrapped.load(Ordering::SeqCst) == self.newest().generation
    }

    /// Returns when [`Self::is_wrapped`]. For one waiter.
    pub(crate) async fn until_wrapped(&self) {
        while !self.is_wrapped() {
            self.wrapped_wake.notified().await;
        }
    }
}

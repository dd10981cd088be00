//! The rules of types and the master keys, taken anew while the proxy serves: when their files change, and at SIGHUP.
//!
//! Messages that are on their way keep the rules they began with. Agents hear of new policies with their next session;
//! until then what they make by the version before is accepted, and older operations are answered REPOLICY.

use std::{path::PathBuf, sync::Arc, time::Duration};

use p2p_sync_proto::settings::Problems;
use tokio::{
    signal::unix::{SignalKind, signal},
    time::interval,
};

use crate::{
    keyring::Keyring,
    pipeline::Hub,
    validate::types_file::{Rules, Sources},
};

/// Between two looks at the files, a few KiB each.
const LOOK_INTERVAL: Duration = Duration::from_secs(2);

/// Keeps a hub's rules as the file says, which was read as `sources` holds; never ends.
pub async fn follow(hub: Arc<Hub>, file: Option<PathBuf>, mut sources: Sources) {
    let mut hangup = hangups();
    let mut ticks = interval(LOOK_INTERVAL);
    loop {
        let is_asked = tokio::select! {
            _ = ticks.tick() => false,
            () = heard(hangup.as_mut()) => true,
        };
        let Some(file) = file.clone() else {
            if is_asked {
                tracing::info!("the rules are the built-in ones: set types_file to have others");
            }
            continue;
        };
        let before = sources.clone();
        let read = tokio::task::spawn_blocking(move || {
            (is_asked || before.have_changed()).then(|| Rules::load_with_sources(Some(&file)))
        });
        // A panic is a fault of ours, and the rules hold on all the same.
        let Ok(Some((loaded, read))) = read.await else { continue };
        sources = read;
        match loaded.and_then(|rules| rules.after(&hub.rules.load())) {
            Ok(rules) => {
                let version = rules.policies.version;
                hub.rules.store(Arc::new(rules));
                tracing::info!(version, "the rules of types_file hold from now on");
            }
            Err(problems) => told(&problems),
        }
    }
}

/// Keeps a hub's master keys as their file says; never ends. A bad file is told once, and the keys that were there stay.
pub async fn follow_keyring(hub: Arc<Hub>, file: PathBuf) {
    let mut hangup = hangups();
    let mut ticks = interval(LOOK_INTERVAL);
    let mut refused = None;
    loop {
        let is_asked = tokio::select! {
            _ = ticks.tick() => false,
            () = heard(hangup.as_mut()) => true,
        };
        let file = file.clone();
        // A panic is a fault of ours, and the keys hold on all the same.
        let Ok(read) = tokio::task::spawn_blocking(move || Keyring::load(&file)).await else {
            continue;
        };
        match read {
            Ok(keyring) => {
                refused = None;
                let is_new = !keyring.is_same(&hub.opener.keyring());
                if is_new || is_asked {
                    let keys: Vec<_> = keyring.entries().iter().map(|entry| entry.key.id().as_str()).collect();
                    tracing::info!(current = %keyring.current().id(), ?keys, is_new, "the keyring is read");
                }
                if is_new {
                    hub.opener.set_keyring(keyring);
                }
            }
            Err(problem) if is_asked || refused.as_ref() != Some(&problem) => {
                tracing::error!(%problem, "the keyring is not taken, and the keys that were there stay: mend it");
                refused = Some(problem);
            }
            Err(_) => {}
        }
    }
}

fn hangups() -> Option<tokio::signal::unix::Signal> {
    signal(SignalKind::hangup())
        .inspect_err(|error| tracing::warn!(%error, "SIGHUP cannot be heard; files are taken anew when they change"))
        .ok()
}

fn told(problems: &Problems) {
    tracing::error!(%problems, "types_file is not taken, and the rules that held before hold on: mend it");
}

async fn heard(hangup: Option<&mut tokio::signal::unix::Signal>) {
    match hangup {
        Some(hangup) => drop(hangup.recv().await),
        None => std::future::pending().await,
    }
}

//! The rules of types, taken anew while the proxy serves: when their files change, and at SIGHUP.
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
    pipeline::Hub,
    validate::types_file::{Rules, Sources},
};

/// Between two looks at the files, a few KiB each.
const LOOK_INTERVAL: Duration = Duration::from_secs(2);

/// Keeps a hub's rules as the file says, which was read as `sources` holds; never ends.
pub async fn follow(hub: Arc<Hub>, file: Option<PathBuf>, mut sources: Sources) {
    let mut hangup = match signal(SignalKind::hangup()) {
        Ok(hangup) => Some(hangup),
        Err(error) => {
            tracing::warn!(%error, "SIGHUP cannot be heard; rules are taken anew when their files change");
            None
        }
    };
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

fn told(problems: &Problems) {
    tracing::error!(%problems, "types_file is not taken, and the rules that held before hold on: mend it");
}

async fn heard(hangup: Option<&mut tokio::signal::unix::Signal>) {
    match hangup {
        Some(hangup) => drop(hangup.recv().await),
        None => std::future::pending().await,
    }
}

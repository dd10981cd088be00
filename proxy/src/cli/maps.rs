//! `maps list|show|grant|release|force`

use std::time::SystemTime;

use clap::Subcommand;
use p2p_sync_proto::{Code, Problem, path::check_map, settings::Problems};
use uuid::Uuid;

use super::{Common, log_warnings, one};
use crate::store::{Assignment, Store};

/// Who writes which map.
#[derive(Debug, Subcommand)]
pub(super) enum Maps {
    /// Show all maps that are or were held.
    List,
    /// Show who holds a map, and who held it.
    Show {
        /// E.g. prontera.
        map: String,
    },
    /// Let a machine write a map; refused while another one's lease of it runs.
    Grant {
        /// E.g. prontera.
        map: String,
        /// As `hosts list` shows it.
        host_id: Uuid,
    },
    /// Take a map from the machine that has it.
    Release {
        /// E.g. prontera.
        map: String,
    },
    /// Let a machine write a map, whoever has it: what that one still sends goes to limbo.
    Force {
        /// E.g. prontera.
        map: String,
        /// As `hosts list` shows it.
        host_id: Uuid,
    },
}

pub(super) async fn run(maps: &Maps, common: &Common) -> Result<(), Problems> {
    let config = common.load()?;
    log_warnings();
    let store = Store::connect(&config.store).await.map_err(one)?;
    let done = match maps {
        Maps::List => list(&store).await,
        Maps::Show { map } => show(&store, map).await,
        Maps::Grant { map, host_id } => grant(&store, map, *host_id, false).await,
        Maps::Release { map } => release(&store, map).await,
        Maps::Force { map, host_id } => grant(&store, map, *host_id, true).await,
    };
    store.close().await;
    done.map_err(one)
}

async fn list(store: &Store) -> Result<(), Problem> {
    for assignment in store.assignments(None).await? {
        print(&assignment);
    }
    Ok(())
}

async fn show(store: &Store, map: &str) -> Result<(), Problem> {
    let found = store.assignments(Some(map)).await?;
    let assignment = found.first().ok_or_else(|| never_held(map))?;
    print(assignment);
    for tenure in store.tenures(map).await? {
        let since = ago(tenure.granted_at);
        let until = tenure.ended_at.map_or_else(|| "still".to_owned(), ago);
        println!(
            "  tenure={} {} from {since} until {until}",
            tenure.tenure, tenure.host_id
        );
    }
    Ok(())
}

fn print(assignment: &Assignment) {
    let Assignment {
        map,
        host_id,
        host_name,
        tenure,
        expires_in,
    } = assignment;
    match host_id {
        None => println!("{map} released tenure={tenure}"),
        Some(host_id) if expires_in.is_zero() => println!("{map} {host_id} tenure={tenure} run out {host_name}"),
        Some(host_id) => println!(
            "{map} {host_id} tenure={tenure} expires_in={}s {host_name}",
            expires_in.as_secs()
        ),
    }
}

pub(super) fn ago(then: SystemTime) -> String {
    let seconds = then.elapsed().unwrap_or_default().as_secs();
    match seconds {
        0..120 => format!("{seconds} s ago"),
        120..7200 => format!("{} min ago", seconds / 60),
        7200..172_800 => format!("{} h ago", seconds / 3600),
        _ => format!("{} days ago", seconds / 86_400),
    }
}

async fn grant(store: &Store, map: &str, host_id: Uuid, force: bool) -> Result<(), Problem> {
    check_map(map)?;
    let tenure = store.grant_map(map, host_id, force).await?;
    println!("{map} {host_id} tenure={tenure}");
    Ok(())
}

async fn release(store: &Store, map: &str) -> Result<(), Problem> {
    match store.release_map(map).await? {
        Some(holder) => println!("{map} released by {holder}"),
        None if store.assignments(Some(map)).await?.is_empty() => return Err(never_held(map)),
        None => println!("{map} was released before"),
    }
    Ok(())
}

fn never_held(map: &str) -> Problem {
    Problem::new(
        Code::NotFound,
        format!("nobody holds or held {map}: see `p2p-sync-proxy maps list`, or grant it"),
    )
}

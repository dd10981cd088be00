//! `players list|show|release|ticket|account`

use clap::Subcommand;
use p2p_sync_proto::{Problem, settings::Problems};
use uuid::Uuid;

use super::{Common, log_warnings, maps::ago, one};
use crate::store::{Player, Store, never_seen};

/// Which machine has which player.
#[derive(Debug, Subcommand)]
pub(super) enum Players {
    /// Show where characters are, or were last; at most 1000.
    List,
    /// Show where a character is, and who had it.
    Show {
        /// The character.
        char_id: u64,
    },
    /// Take a character from the machine that has it, so that the next one that it comes to has it: what the other still sends
    /// of it goes to limbo.
    Release {
        /// The character.
        char_id: u64,
    },
    /// Let a machine have a character as soon as it comes there, although another one has it. This holds for 10 minutes, and
    /// for the next entry of the account, wherever that is.
    Ticket {
        /// The character.
        char_id: u64,
        /// As `hosts list` shows it.
        host_id: Uuid,
    },
    /// Say whose a character is, where the machine that entered it first said it wrongly. It is taken from the machine that has
    /// it: what machines still send of it goes to limbo, and the next one that it comes to has it.
    Account {
        /// The character.
        char_id: u64,
        /// The account; 0 lets the next machine say it.
        account_id: u32,
    },
}

pub(super) async fn run(players: &Players, common: &Common) -> Result<(), Problems> {
    let config = common.load()?;
    log_warnings();
    let store = Store::connect(&config.store).await.map_err(one)?;
    let done = match players {
        Players::List => list(&store).await,
        Players::Show { char_id } => show(&store, *char_id).await,
        Players::Release { char_id } => release(&store, *char_id).await,
        Players::Ticket { char_id, host_id } => ticket(&store, *char_id, *host_id).await,
        Players::Account { char_id, account_id } => account(&store, *char_id, *account_id).await,
    };
    store.close().await;
    done.map_err(one)
}

async fn list(store: &Store) -> Result<(), Problem> {
    for player in store.players(None).await? {
        print(&player);
    }
    Ok(())
}

async fn show(store: &Store, char_id: u64) -> Result<(), Problem> {
    print(&found(store, char_id).await?);
    for tenure in store.player_tenures(char_id).await? {
        let end = match (tenure.ended_at, tenure.released) {
            (None, _) => "has it still".to_owned(),
            (Some(at), Some((incarnation, sequence))) => {
                format!("released it {} by its operation {incarnation}:{sequence}", ago(at))
            }
            (Some(at), None) => format!("lost it {}", ago(at)),
        };
        println!("  tenure={} {} {end}", tenure.tenure, tenure.host_id);
    }
    Ok(())
}

fn print(player: &Player) {
    let Player {
        char_id,
        account_id,
        map,
        host_id,
        tenure,
        ..
    } = player;
    let since = match player.left_at {
        Some(at) => format!("left {}", ago(at)),
        None => format!("entered {}", ago(player.entered_at)),
    };
    let ticket = player.promised_to.map(|host| format!(" ticket={host}"));
    let ticket = ticket.unwrap_or_default();
    println!("{char_id} account={account_id} {map} {host_id} tenure={tenure} {since}{ticket}");
}

async fn release(store: &Store, char_id: u64) -> Result<(), Problem> {
    if let Some(host) = store.release_player(char_id).await? {
        println!("{char_id} taken from {host}");
    } else {
        found(store, char_id).await?;
        println!("{char_id} is with no host");
    }
    Ok(())
}

async fn ticket(store: &Store, char_id: u64, host_id: Uuid) -> Result<(), Problem> {
    store.promise_player(char_id, host_id).await?;
    println!("{char_id} may come to {host_id} within 10 minutes");
    Ok(())
}

async fn account(store: &Store, char_id: u64, account_id: u32) -> Result<(), Problem> {
    match store.set_player_account(char_id, account_id).await? {
        Some(host) => println!("{char_id} account={account_id} taken from {host}"),
        None => println!("{char_id} account={account_id}"),
    }
    Ok(())
}

async fn found(store: &Store, char_id: u64) -> Result<Player, Problem> {
    let player = store.players(Some(char_id)).await?.pop();
    player.ok_or_else(|| never_seen(char_id))
}

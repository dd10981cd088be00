//! `hosts add|list|show|lock|unlock|status|verdicts`

use clap::Subcommand;
use p2p_sync_proto::{Code, Problem, path::check_map, settings::Problems, terminal::shown};
use uuid::Uuid;

use super::{Common, log_warnings, one};
use crate::{
    app::load_keyring,
    config::Config,
    keyring::Keyring,
    store::{HostRow, HostStatus, Store},
};

/// What to do with the volunteers' machines.
#[derive(Debug, Subcommand)]
pub(super) enum Hosts {
    /// Admit a machine, and print its credential: once, on stdout, alone. It is a secret of that machine.
    Add {
        /// The volunteer's game account; 0 for none.
        #[arg(long, value_name = "N")]
        account: u32,
        /// For people, e.g. the volunteer's name.
        #[arg(long, default_value = "")]
        name: String,
        /// Maps that it may write from now on, with commas between; more by `maps grant`.
        #[arg(long, value_name = "MAP,MAP", value_delimiter = ',')]
        maps: Vec<String>,
    },
    /// Show all machines.
    List,
    /// Show one machine, and how often which rule was found broken.
    Show {
        /// As `hosts list` shows it.
        host_id: Uuid,
    },
    /// Keep a machine out, until `unlock`; what it has to send waits in its outbox. Takes hold within 2 seconds.
    Lock {
        /// As `hosts list` shows it.
        host_id: Uuid,
    },
    /// Let a locked machine in again, with a new start where it was locked for forgery.
    Unlock {
        /// As `hosts list` shows it.
        host_id: Uuid,
    },
    /// Show what was found against a machine, and what it reported of others: the newest first, one a line, the evidence
    /// last.
    Verdicts {
        /// As `hosts list` shows it.
        host_id: Uuid,
        /// At most so many.
        #[arg(long, value_name = "N", default_value = "100")]
        limit: u32,
    },
    /// Say whether a machine may take part; takes hold within 2 seconds. One that is revoked gives its maps up, one that is
    /// locked keeps them until their leases run out.
    Status {
        /// As `hosts list` shows it.
        host_id: Uuid,
        /// active, locked or revoked.
        status: HostStatus,
    },
}

/// Longest name of a host, bytes.
const NAME_BYTES_MAX: usize = 128;

pub(super) async fn run(hosts: &Hosts, common: &Common) -> Result<(), Problems> {
    let config = common.load()?;
    log_warnings();
    let store = Store::connect(&config.store).await.map_err(one)?;
    let done = match hosts {
        Hosts::Add { account, name, maps } => add(&store, &config, *account, name, maps).await,
        Hosts::List => list(&store).await,
        Hosts::Show { host_id } => show(&store, *host_id).await,
        Hosts::Lock { host_id } => change(&store, *host_id, HostStatus::Locked).await,
        Hosts::Unlock { host_id } => change(&store, *host_id, HostStatus::Active).await,
        Hosts::Verdicts { host_id, limit } => verdicts(&store, *host_id, *limit).await,
        Hosts::Status { host_id, status } => set_status(&store, *host_id, *status).await,
    };
    store.close().await;
    done.map_err(one)
}

async fn add(store: &Store, config: &Config, account: u32, name: &str, maps: &[String]) -> Result<(), Problem> {
    if name.len() > NAME_BYTES_MAX || name.contains(char::is_control) {
        let sentence = format!("a host's name has at most {NAME_BYTES_MAX} bytes and no control characters");
        return Err(Problem::new(Code::BadValue, sentence));
    }
    maps.iter().try_for_each(|map| check_map(map))?;
    let keyring: Keyring = load_keyring(&config.store.connection, &config.keyring_file)?;
    let key = keyring.current();
    let host = store.add_host(Uuid::new_v4(), account, name, key.id().as_str()).await?;
    println!("{}", key.credential(host.host_id, host.generation).to_text().as_str());
    for map in maps {
        store.grant_map(map, host.host_id, false).await?;
    }
    Ok(())
}

async fn list(store: &Store) -> Result<(), Problem> {
    for host in store.hosts().await? {
        println!("{}", line(&host));
    }
    Ok(())
}

fn line(host: &HostRow) -> String {
    format!(
        "{} {} account={} key={} generation={} {}",
        host.host_id,
        host.status.as_str(),
        host.account_id,
        host.key_id,
        host.generation,
        host.name
    )
}

async fn show(store: &Store, host_id: Uuid) -> Result<(), Problem> {
    println!("{}", line(&find(store, host_id).await?));
    for sum in store.verdict_sums(host_id).await? {
        println!(
            "{} {} rows={} operations={}",
            sum.verdict, sum.rule, sum.rows, sum.operations
        );
    }
    Ok(())
}

/// Between active and locked; who is revoked stays out.
async fn change(store: &Store, host_id: Uuid, status: HostStatus) -> Result<(), Problem> {
    if find(store, host_id).await?.status == HostStatus::Revoked {
        let sentence =
            format!("host {host_id} is revoked for good: admit the machine anew with `p2p-sync-proxy hosts add`");
        return Err(Problem::new(Code::Revoked, sentence));
    }
    set_status(store, host_id, status).await
}

async fn verdicts(store: &Store, host_id: Uuid, limit: u32) -> Result<(), Problem> {
    find(store, host_id).await?;
    for verdict in store.verdicts(host_id, limit).await? {
        // Paths are the host's own words: nothing of them may steer the terminal.
        let path = verdict.path.unwrap_or_default();
        let operation = verdict.operation_id.map(|id| id.to_string()).unwrap_or_default();
        println!(
            "{} {} {} path={} operation={operation} {}",
            verdict.at,
            verdict.verdict,
            verdict.rule,
            path.escape_debug(),
            shown(&verdict.details)
        );
    }
    Ok(())
}

async fn find(store: &Store, host_id: Uuid) -> Result<HostRow, Problem> {
    store.host(host_id).await?.ok_or_else(|| unknown(host_id))
}

async fn set_status(store: &Store, host_id: Uuid, status: HostStatus) -> Result<(), Problem> {
    if store.set_host_status(host_id, status).await? {
        return Ok(());
    }
    Err(unknown(host_id))
}

fn unknown(host_id: Uuid) -> Problem {
    Problem::new(
        Code::NotFound,
        format!("there is no host {host_id}: see `p2p-sync-proxy hosts list`"),
    )
}

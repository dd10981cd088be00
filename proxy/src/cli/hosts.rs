//! `hosts add|list|status`

use clap::Subcommand;
use p2p_sync_proto::{Code, Problem, settings::Problems};
use uuid::Uuid;

use super::{Common, log_warnings, one};
use crate::{
    app::load_keyring,
    config::Config,
    keyring::Keyring,
    store::{HostStatus, Store},
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
    },
    /// Show all machines.
    List,
    /// Say whether a machine may take part; takes hold within 2 seconds.
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
        Hosts::Add { account, name } => add(&store, &config, *account, name).await,
        Hosts::List => list(&store).await,
        Hosts::Status { host_id, status } => set_status(&store, *host_id, *status).await,
    };
    store.close().await;
    done.map_err(one)
}

async fn add(store: &Store, config: &Config, account: u32, name: &str) -> Result<(), Problem> {
    if name.len() > NAME_BYTES_MAX || name.contains(char::is_control) {
        let sentence = format!("a host's name has at most {NAME_BYTES_MAX} bytes and no control characters");
        return Err(Problem::new(Code::BadValue, sentence));
    }
    let keyring: Keyring = load_keyring(&config.store.connection, &config.keyring_file)?;
    let key = keyring.current();
    let host = store.add_host(Uuid::new_v4(), account, name, key.id().as_str()).await?;
    println!("{}", key.credential(host.host_id, host.generation).to_text().as_str());
    Ok(())
}

async fn list(store: &Store) -> Result<(), Problem> {
    for host in store.hosts().await? {
        println!(
            "{} {} account={} key={} generation={} {}",
            host.host_id,
            host.status.as_str(),
            host.account_id,
            host.key_id,
            host.generation,
            host.name
        );
    }
    Ok(())
}

async fn set_status(store: &Store, host_id: Uuid, status: HostStatus) -> Result<(), Problem> {
    if store.set_host_status(host_id, status).await? {
        return Ok(());
    }
    Err(Problem::new(
        Code::NotFound,
        format!("there is no host {host_id}: see `p2p-sync-proxy hosts list`"),
    ))
}

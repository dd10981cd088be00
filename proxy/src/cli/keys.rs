//! `keys new|list`

use clap::Subcommand;
use p2p_sync_proto::settings::Problems;

use super::{Common, one};
use crate::{
    config::Config,
    keyring::{KEYRING_VARIABLE, Keyring, add_key},
};

/// What to do with the master keys.
#[derive(Debug, Subcommand)]
pub(super) enum Keys {
    /// Make a new key, which becomes current; the ones before go on opening what hosts send. Restart the proxy then.
    New,
    /// Show the keys' names and ages, never the keys.
    List,
}

pub(super) fn run(keys: &Keys, common: &Common) -> Result<(), Problems> {
    let file = Config::load_keyring_file(common.file(), &common.overrides())?;
    match keys {
        Keys::New => {
            let id = add_key(&file).map_err(one)?;
            println!("{id}");
            eprintln!(
                "{id} is current in {}; keep a copy of the file where nobody else reads it",
                file.display()
            );
            if std::env::var_os(KEYRING_VARIABLE).is_some() {
                eprintln!("{KEYRING_VARIABLE} is set and goes before the file: add the new line to it, or unset it");
            }
        }
        Keys::List => {
            let keyring = Keyring::load(&file).map_err(one)?;
            let current = keyring.current().id();
            for entry in keyring.entries() {
                let id = entry.key.id();
                println!(
                    "{id} {}{}",
                    entry.created_at,
                    if id == current { " current" } else { "" }
                );
            }
        }
    }
    Ok(())
}

//! `keys new|rotate|retire|list`

use std::{collections::HashMap, path::Path, time::Duration};

use clap::Subcommand;
use p2p_sync_proto::{Code, Problem, certificate::day, keys::KeyId, settings::Problems};

use super::{Common, check::is_empty, log_warnings, one};
use crate::{
    admin,
    config::Config,
    keyring::{self, KEYRING_VARIABLE, Keyring, add_key},
    store::{Connection, KeyUsers, Store},
};

/// What to do with the master keys.
#[derive(Debug, Subcommand)]
pub(super) enum Keys {
    /// Make a new key. The first one is current; any other waits until `rotate`, so that all proxies can be given it first.
    New,
    /// Make a key current: new credentials are of it, and hosts renew theirs by themselves. Running proxies take it over
    /// within seconds.
    Rotate {
        /// One that waits; without it the newest that does, or a new one where none does.
        #[arg(value_parser = KeyId::parse)]
        id: Option<KeyId>,
    },
    /// Remove a key that no host and no open invitation uses any more.
    Retire {
        /// As `keys list` shows it.
        #[arg(value_parser = KeyId::parse)]
        id: KeyId,
        /// Also one that is in use: its hosts are shut out, and have to be enrolled anew.
        #[arg(long)]
        force: bool,
    },
    /// Make the token that tools show to the admin listener, in `admin_token_file`. Of one that was there nothing is taken any
    /// more, within seconds.
    AdminToken,
    /// Show the keys' names, ages and use, never the keys.
    List,
}

pub(super) async fn run(keys: &Keys, common: &Common) -> Result<(), Problems> {
    if matches!(keys, Keys::AdminToken) {
        return admin_token(common);
    }
    let file = Config::load_keyring_file(common.file(), &common.overrides())?;
    match keys {
        Keys::New => new(&file),
        Keys::Rotate { id } => rotate(&file, id.as_ref()),
        Keys::Retire { id, force: true } => keyring::retire(&file, id),
        Keys::Retire { id, force: false } => retire(&file, id, &common.load()?).await,
        Keys::List => list(&file, common).await,
        Keys::AdminToken => Ok(()),
    }
    .map_err(one)?;
    if !matches!(keys, Keys::List) && std::env::var_os(KEYRING_VARIABLE).is_some() {
        eprintln!("{KEYRING_VARIABLE} is set and goes before the file: change it likewise, or unset it");
    }
    Ok(())
}

fn new(file: &Path) -> Result<(), Problem> {
    let id = add_key(file)?;
    println!("{id}");
    let keyring = Keyring::load(file)?;
    if keyring.entries().len() == 1 {
        eprintln!(
            "{id} is current in {}; keep a copy of the file where nobody else reads it",
            file.display()
        );
    } else {
        eprintln!(
            "{id} waits in {}: give all proxies the file, then run `keys rotate`",
            file.display()
        );
    }
    Ok(())
}

fn rotate(file: &Path, id: Option<&KeyId>) -> Result<(), Problem> {
    let (current, is_new) = keyring::rotate(file, id)?;
    println!("{current}");
    if is_new {
        eprintln!(
            "{current} was made just now: where other proxies have a keyring of their own, give it to them at once, for they \
             open nothing of it until then"
        );
    }
    eprintln!("{current} is current: hosts renew their credentials by themselves; `keys list` tells when all have");
    Ok(())
}

fn admin_token(common: &Common) -> Result<(), Problems> {
    let file = Config::load_admin_token_file(common.file(), &common.overrides())?;
    admin::make_token(&file).map_err(one)?;
    println!("{}", file.display());
    eprintln!(
        "give tools what it holds: curl -H \"Authorization: Bearer $(cat {})\"",
        file.display()
    );
    if std::env::var_os(admin::TOKEN_VARIABLE).is_some() {
        eprintln!(
            "{} is set and goes before the file: change it likewise, or unset it",
            admin::TOKEN_VARIABLE
        );
    }
    Ok(())
}

async fn retire(file: &Path, id: &KeyId, config: &Config) -> Result<(), Problem> {
    if Keyring::load(file)?.current().id() == id {
        // It says why not.
        return keyring::retire(file, id);
    }
    log_warnings();
    let store = Store::connect(&config.store).await?;
    let users = store.key_users().await;
    store.close().await;
    let KeyUsers { hosts, invitations } = users?.remove(id.as_str()).unwrap_or_default();
    if hosts > 0 || invitations > 0 {
        let sentence = format!(
            "{hosts} hosts and {invitations} open invitations use {id}: wait until the hosts have renewed (`hosts list` shows who \
             has not, and when it was last seen), revoke those that will not come back, or give --force"
        );
        return Err(Problem::new(Code::NotAllowed, sentence));
    }
    keyring::retire(file, id)
}

async fn list(file: &Path, common: &Common) -> Result<(), Problem> {
    let keyring = Keyring::load(file)?;
    let users = match users(common).await {
        Ok(users) => Some(users),
        Err(problem) => {
            eprintln!("who uses them is not known: {problem}");
            None
        }
    };
    let mut state = "passed";
    for entry in keyring.entries() {
        let id = entry.key.id();
        let shown = if id == keyring.current().id() {
            state = "waiting";
            "current"
        } else {
            state
        };
        let used = users.as_ref().map_or(String::new(), |users| {
            let KeyUsers { hosts, invitations } = users.get(id.as_str()).copied().unwrap_or_default();
            format!(" hosts={hosts} invitations={invitations}")
        });
        println!(
            "{id} {shown} since={}{used}",
            day(Duration::from_secs(entry.created_at))
        );
    }
    Ok(())
}

/// A database that is not there yet is not made for the question.
async fn users(common: &Common) -> Result<HashMap<String, KeyUsers>, Problem> {
    let config = common.load().map_err(Problems::into_one)?;
    if matches!(&config.store.connection, Connection::Embedded(folder) if is_empty(folder)) {
        return Ok(HashMap::new());
    }
    log_warnings();
    let store = Store::connect(&config.store).await?;
    let users = store.key_users().await;
    store.close().await;
    users
}

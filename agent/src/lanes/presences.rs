//! The last unsettled coming or going of each player: what is made of the player meanwhile has to wait for it.

use std::collections::BTreeMap;

use p2p_sync_proto::{Position, v1::SyncDataType};

use super::tails::Tails;

#[derive(Debug, Default)]
pub(crate) struct Presences {
    /// By whose they are: `@char/7`, `@account/7`.
    owners: Tails,
    /// The accounts of those that are the last of one, which their paths do not say.
    accounts: BTreeMap<Position, u32>,
}

/// Whose a path is; `None` where that is no player.
pub(crate) fn player_of(path: &str) -> Option<&str> {
    if !path.starts_with("@char/") && !path.starts_with("@account/") {
        return None;
    }
    let end = path.match_indices('/').nth(1).map_or(path.len(), |(at, _)| at);
    Some(&path[..end])
}

/// Whose the paths of an account are.
pub(crate) fn owner_of_account(account_id: u32) -> String {
    format!("@account/{account_id}")
}

impl Presences {
    /// The operation that one on a path has to name.
    pub(super) fn before(&mut self, path: &str) -> Option<Position> {
        if !path.starts_with('@') || self.owners.is_empty() {
            return None;
        }
        self.owners.get(player_of(path)?)
    }

    /// Notes that a character comes or goes, and its account with it; gives what that has to name beside the operation
    /// before it on its path: the account may have played another character.
    pub(crate) fn replace(&mut self, path: &str, account_id: u32, position: Position) -> Option<Position> {
        let of_char = self.owners.replace(player_of(path)?, position);
        if account_id == 0 {
            return None;
        }
        let before = self.owners.replace(&owner_of_account(account_id), position);
        if let Some(before) = before {
            self.accounts.remove(&before);
        }
        self.accounts.insert(position, account_id);
        before.filter(|_| before != of_char)
    }

    /// Notes that an operation is settled; what is none of these is let be.
    pub(super) fn settled(&mut self, path: &str, position: Position) {
        if !path.starts_with('@') || self.owners.is_empty() || !is_presence(path) {
            return;
        }
        if let Some(owner) = player_of(path) {
            self.owners.settled(owner, position);
        }
        if let Some(account_id) = self.accounts.remove(&position) {
            self.owners.settled(&owner_of_account(account_id), position);
        }
    }
}

/// Whether a path is the one that a player's coming and going is told on.
pub(crate) fn is_presence(path: &str) -> bool {
    path.split('/').nth(2) == Some(SyncDataType::PlayerPresence.as_str_name())
}

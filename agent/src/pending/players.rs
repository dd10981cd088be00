//! What waits of each player: a coming or going takes it along, so that the host that has the player next reads what this
//! one wrote.

use std::collections::{BTreeSet, HashMap};

use p2p_sync_proto::{Position, v1::Operation};
use prost::Message as _;

use super::Entry;
use crate::lanes::{is_presence, owner_of_account, player_of};

/// Of the operations in memory, by whose they are: `@char/7`, `@account/7`.
#[derive(Debug, Default)]
pub(super) struct Players {
    positions: HashMap<Box<str>, BTreeSet<Position>>,
}

impl Players {
    pub(super) fn insert(&mut self, entry: &Entry) {
        for owner in owners(entry) {
            match self.positions.get_mut(owner) {
                Some(positions) => positions.insert(entry.position),
                None => self
                    .positions
                    .insert(owner.into(), BTreeSet::from([entry.position]))
                    .is_none(),
            };
        }
    }

    pub(super) fn remove(&mut self, entry: &Entry) {
        for owner in owners(entry) {
            if let Some(positions) = self.positions.get_mut(owner) {
                positions.remove(&entry.position);
                if positions.is_empty() {
                    self.positions.remove(owner);
                }
            }
        }
    }

    /// What was made of a player before a coming or going, and is not settled; nothing for other operations.
    pub(super) fn before(&self, entry: &Entry) -> Vec<Position> {
        if !is_presence(&entry.path) {
            return vec![];
        }
        // The path is the character's; what is of the account goes along.
        let account_id = Operation::decode(entry.bytes.clone()).map_or(0, |operation| operation.account_id);
        let account = owner_of_account(account_id);
        let of = |owner: &str| self.positions.get(owner).into_iter().flatten().copied();
        player_of(&entry.path)
            .into_iter()
            .chain([account.as_str()])
            .flat_map(of)
            .filter(|position| *position < entry.position)
            .collect()
    }
}

fn owners(entry: &Entry) -> impl Iterator<Item = &str> {
    let members = entry.group.as_deref().map_or(&[][..], |group| &group.paths);
    members
        .iter()
        .map(String::as_str)
        .chain([&*entry.path])
        .filter_map(player_of)
}

//! Who may write what, as it is promised: who holds a map writes it, and who has a player writes that.

mod moves;

use std::collections::{BTreeMap, BTreeSet};

use p2p_sync_proto::{Code, Position};
use uuid::Uuid;

/// A map, and all who ever held it.
#[derive(Debug, Default)]
pub(super) struct Map {
    pub(super) holder: Option<Uuid>,
    /// Of the last holder.
    pub(super) tenure: u64,
    /// The lease runs: nobody else is given the map without force.
    pub(super) runs: bool,
    held: BTreeSet<(Uuid, u64)>,
}

impl Map {
    /// Gives the map to a host; gives the tenure, none where it is another's.
    pub(super) fn grant(&mut self, host: Uuid, force: bool) -> Option<u64> {
        if self.holder.is_some_and(|holder| holder != host) && self.runs && !force {
            return None;
        }
        if self.holder != Some(host) {
            self.tenure += 1;
            self.holder = Some(host);
            self.held.insert((host, self.tenure));
        }
        self.runs = true;
        Some(self.tenure)
    }

    pub(super) fn release(&mut self) -> Option<Uuid> {
        self.runs = false;
        self.holder.take()
    }

    fn was_held_by(&self, host: Uuid) -> bool {
        self.held.iter().any(|(holder, _)| *holder == host)
    }

    /// What becomes of an operation that a host made under a tenure; 0: before it knew of any.
    fn judge(&self, host: Uuid, tenure: u64) -> Right {
        if self.holder == Some(host) && self.tenure == tenure {
            Right::Write(tenure)
        } else if self.held.contains(&(host, tenure)) || tenure == 0 && self.was_held_by(host) {
            Right::Limbo
        } else {
            Right::Refused(Code::NotLeaseHolder)
        }
    }
}

/// What a host may do with an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Right {
    /// At this tenure.
    Write(u64),
    /// It had the right once, and has it no more.
    Limbo,
    /// It never had.
    Refused(Code),
}

/// Where a character is, or was last.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Seat {
    /// 0: nobody said.
    pub(super) account: u32,
    pub(super) map: String,
    pub(super) host: Uuid,
    pub(super) tenure: u64,
    pub(super) is_here: bool,
    ticket: Option<Uuid>,
}

/// From which of its operations to which a host had a character.
#[derive(Debug)]
struct Stay {
    host: Uuid,
    character: u64,
    account: u32,
    /// 0: it never got the character, and said that it did.
    tenure: u64,
    began: Position,
    end: Option<End>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// The host's own word.
    Released(Position),
    /// Without it.
    Forced,
}

/// What came of a player's coming.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Entry {
    Entered,
    /// Another host keeps the player.
    TooEarly,
    Limbo,
    Refused(Code),
}

/// One who comes or goes, by an operation of a host.
#[derive(Clone, Copy, Debug)]
pub(super) struct Mover {
    pub(super) host: Uuid,
    pub(super) at: Position,
    pub(super) character: u64,
}

/// All rights.
#[derive(Debug, Default)]
pub(super) struct Rights {
    pub(super) maps: BTreeMap<String, Map>,
    pub(super) seats: BTreeMap<u64, Seat>,
    stays: Vec<Stay>,
    /// The greatest tenures that accounts had by characters that are another's now.
    account_tenures: BTreeMap<u32, u64>,
}

impl Rights {
    fn holds(&self, host: Uuid, map: &str) -> bool {
        self.maps.get(map).is_some_and(|map| map.holder == Some(host))
    }

    /// What a host may write on a map.
    pub(super) fn on_map(&self, map: &str, host: Uuid, tenure: u64) -> Right {
        self.maps
            .get(map)
            .map_or(Right::Refused(Code::NotLeaseHolder), |map| map.judge(host, tenure))
    }

    /// What a host may write of a character by an operation at a position.
    pub(super) fn of_character(&self, character: u64, host: Uuid, at: Position) -> Right {
        let now = self.seats.get(&character).map(|seat| seat.tenure);
        self.of_player(host, at, now, |stay| stay.character == character)
    }

    pub(super) fn of_account(&self, account: u32, host: Uuid, at: Position) -> Right {
        self.of_player(host, at, self.account_tenure(account), |stay| {
            account != 0 && stay.account == account
        })
    }

    /// The tenure at which an account's paths are written: the greatest of its characters', those included that were its own by
    /// mistake.
    pub(super) fn account_tenure(&self, account: u32) -> Option<u64> {
        let seats = self
            .seats
            .values()
            .filter(|seat| account != 0 && seat.account == account);
        let own = seats.map(|seat| seat.tenure);
        own.chain(self.account_tenures.get(&account).copied()).max()
    }

    /// By the last stay that the host began before it made the operation.
    fn of_player(&self, host: Uuid, at: Position, now: Option<u64>, is_its: impl Fn(&Stay) -> bool) -> Right {
        let begun = self
            .stays
            .iter()
            .filter(|stay| stay.host == host && stay.began <= at && is_its(stay));
        let Some(stay) = begun.max_by_key(|stay| stay.began) else {
            return Right::Refused(Code::PlayerNotHere);
        };
        let may = if stay.tenure == 0 {
            false
        } else if now.is_some_and(|now| stay.tenure < now) {
            // Another has had the player since: what was made before the release comes late, and is older.
            matches!(stay.end, Some(End::Released(released)) if at <= released)
        } else {
            // Nobody else has: until then it may be saved, by who holds the map where it was.
            let map = self.seats.get(&stay.character).map(|seat| seat.map.as_str());
            stay.end != Some(End::Forced) && map.is_some_and(|map| self.holds(host, map))
        };
        if may { Right::Write(stay.tenure) } else { Right::Limbo }
    }

    /// The characters of an account, and this one.
    fn together(&self, character: u64, account: u32) -> Vec<u64> {
        let seats = self.seats.iter();
        seats
            .filter(|(other, seat)| **other == character || account != 0 && seat.account == account)
            .map(|(other, _)| *other)
            .collect()
    }
}

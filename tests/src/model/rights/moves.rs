//! Players come and go, by their hosts' word and by the operator's.

use p2p_sync_proto::Code;
use uuid::Uuid;

use super::{End, Entry, Mover, Rights, Seat, Stay};

impl Rights {
    /// A character comes to a map of a host. `said` is the account that the host names; 0 for none.
    pub(in crate::model) fn enter(&mut self, mover: Mover, said: u32, map: &str) -> Entry {
        let Mover { host, at, character } = mover;
        let before = self.seats.get(&character).cloned();
        let known = before.as_ref().map_or(0, |seat| seat.account);
        let account = if said == 0 { known } else { said };
        if !self.holds(host, map) {
            if !self.maps.get(map).is_some_and(|map| map.was_held_by(host)) {
                return Entry::Refused(Code::NotLeaseHolder);
            }
            // By the host's own word the player has left where it was.
            self.leave(mover);
            self.begin(mover, account, 0);
            return Entry::Limbo;
        }
        if known != 0 && known != account {
            self.begin(mover, account, 0);
            return Entry::Refused(Code::PlayerNotHere);
        }
        if self.is_kept(character, account, host) {
            return Entry::TooEarly;
        }
        let together = self.together(character, account);
        let seats = together.iter().map(|one| &self.seats[one]);
        let of_account = self.account_tenures.get(&account).copied().unwrap_or(0);
        let greatest = seats.map(|seat| seat.tenure).fold(of_account, u64::max);
        for one in together {
            self.take_from_others(one, host);
        }
        let stays = before.is_some_and(|seat| {
            seat.host == host
                && seat.tenure == greatest
                && seat.account == account
                && self.go_on(mover, account, greatest)
        });
        let tenure = if stays { greatest } else { greatest + 1 };
        if !stays {
            for stay in &mut self.stays {
                if stay.host == host && stay.character == character && stay.end.is_none() {
                    stay.end = Some(End::Released(at));
                }
            }
            self.begin(mover, account, tenure);
        }
        let seat = Seat {
            account,
            map: map.to_owned(),
            host,
            tenure,
            is_here: true,
            ticket: None,
        };
        self.seats.insert(character, seat);
        Entry::Entered
    }

    /// Whether a coming is too early by what holds now.
    pub(in crate::model) fn is_too_early(&self, mover: Mover, said: u32, map: &str) -> bool {
        let known = self.seats.get(&mover.character).map_or(0, |seat| seat.account);
        let account = if said == 0 { known } else { said };
        let is_its = self.holds(mover.host, map) && (known == 0 || known == account);
        is_its && self.is_kept(mover.character, account, mover.host)
    }

    /// Whether another host has the player and holds the map where it is, and this one has no ticket.
    fn is_kept(&self, character: u64, account: u32, host: Uuid) -> bool {
        let together = self.together(character, account);
        let seats = || together.iter().map(|one| &self.seats[one]);
        let is_kept = seats().any(|seat| {
            let map = &self.maps[&seat.map];
            seat.is_here && seat.host != host && map.holder == Some(seat.host) && map.runs
        });
        is_kept && !seats().any(|seat| seat.ticket == Some(host))
    }

    /// Ends another host's stay by force; tickets are used up.
    fn take_from_others(&mut self, character: u64, host: Uuid) {
        let Some(seat) = self.seats.get_mut(&character) else {
            return;
        };
        seat.ticket = None;
        if seat.host == host {
            return;
        }
        seat.is_here = false;
        let (other, tenure) = (seat.host, seat.tenure);
        self.end_by_force(character, other, tenure);
    }

    /// The host has the character already, or has had it last: its stay goes on, unless it was ended by force, or the host
    /// has said that the player is elsewhere since.
    fn go_on(&mut self, mover: Mover, account: u32, tenure: u64) -> bool {
        let Mover { host, character, .. } = mover;
        let of_it = |stay: &Stay| stay.host == host && stay.character == character && stay.tenure == tenure;
        let Some(place) = self.stays.iter().position(of_it) else {
            return false;
        };
        let began = self.stays[place].began;
        let is_passed = self.stays.iter().any(|later| {
            later.host == host
                && later.began > began
                && (later.character == character || account != 0 && later.account == account)
        });
        if is_passed || self.stays[place].end == Some(End::Forced) {
            return false;
        }
        self.stays[place].end = None;
        true
    }

    fn begin(&mut self, mover: Mover, account: u32, tenure: u64) {
        self.stays.push(Stay {
            host: mover.host,
            character: mover.character,
            account,
            tenure,
            began: mover.at,
            end: (tenure == 0).then_some(End::Forced),
        });
    }

    fn end_by_force(&mut self, character: u64, host: Uuid, tenure: u64) {
        for stay in &mut self.stays {
            if (stay.character, stay.host, stay.tenure) == (character, host, tenure) && stay.end.is_none() {
                stay.end = Some(End::Forced);
            }
        }
    }

    /// A host lets a character go. Only who holds the map where it was can say up to which of its operations.
    pub(in crate::model) fn leave(&mut self, mover: Mover) {
        let Mover { host, at, character } = mover;
        let Some(seat) = self.seats.get(&character).filter(|seat| seat.host == host).cloned() else {
            return;
        };
        let end = if self.holds(host, &seat.map) {
            End::Released(at)
        } else {
            End::Forced
        };
        let mut ended = false;
        for stay in &mut self.stays {
            let is_it = (stay.character, stay.host, stay.tenure) == (character, host, seat.tenure) && stay.began < at;
            let is_open = match (stay.end, end) {
                (None, _) => true,
                (Some(End::Released(before)), End::Released(_)) => before < at,
                _ => false,
            };
            if is_it && is_open {
                stay.end = Some(end);
                ended = true;
            }
        }
        if ended && let Some(seat) = self.seats.get_mut(&character) {
            seat.is_here = false;
        }
    }

    /// The operator's word that no host has a character; gives the one that had.
    pub(in crate::model) fn release_player(&mut self, character: u64) -> Option<Uuid> {
        let seat = self.seats.get_mut(&character)?;
        let (account, host, tenure) = (seat.account, seat.host, seat.tenure);
        let was_here = std::mem::take(&mut seat.is_here);
        if was_here {
            self.end_by_force(character, host, tenure);
        }
        for one in self.together(character, account) {
            if let Some(seat) = self.seats.get_mut(&one) {
                seat.ticket = None;
            }
        }
        was_here.then_some(host)
    }

    /// The operator's word whose a character is, 0 for nobody's: no host has it any more, and what was made of it before does
    /// not count, also not up to a release. Gives the host that had it.
    pub(in crate::model) fn set_account(&mut self, character: u64, account: u32) -> Option<Uuid> {
        let before = self.seats.get(&character)?.clone();
        if before.account == account {
            return None;
        }
        let had = self.release_player(character);
        for stay in self.stays.iter_mut().filter(|stay| stay.character == character) {
            stay.end = Some(End::Forced);
        }
        if before.account != 0 {
            let tenure = self.account_tenures.entry(before.account).or_default();
            *tenure = before.tenure.max(*tenure);
        }
        // Who plays the account now goes on, newer than what this character wrote.
        let playing = self
            .seats
            .iter_mut()
            .filter(|(_, seat)| account != 0 && seat.account == account && seat.is_here && seat.tenure < before.tenure);
        for (other, seat) in playing {
            for stay in &mut self.stays {
                if (stay.character, stay.host, stay.tenure) == (*other, seat.host, seat.tenure) && stay.end.is_none() {
                    stay.tenure = before.tenure;
                }
            }
            seat.tenure = before.tenure;
        }
        if let Some(seat) = self.seats.get_mut(&character) {
            seat.account = account;
        }
        had
    }

    /// A ticket; false where the character was never seen.
    pub(in crate::model) fn promise(&mut self, character: u64, host: Uuid) -> bool {
        let Some(seat) = self.seats.get_mut(&character) else {
            return false;
        };
        seat.ticket = Some(host);
        true
    }
}

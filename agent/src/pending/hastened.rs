//! Maps that are handed over: what was made for them goes ahead of all other bulk, from wherever it lies, and it can be told
//! when it is settled. What belongs to players goes with it, for a host gives up players only while it holds their map.

use std::collections::{BTreeMap, BTreeSet};

use super::{Entry, Pending, Position, Slot};

/// What is hastened; empty while no map is handed over.
#[derive(Debug, Default)]
pub(super) struct Hastened {
    /// Operations that were made for each map since it is hastened.
    maps: BTreeMap<Box<str>, u64>,
    /// In memory and not settled, of these maps and of players.
    unsettled: BTreeSet<Position>,
    /// Those among them that wait to be sent by bulk.
    pub(super) waiting: BTreeSet<Position>,
    /// What lies on disk alone is looked through from here on.
    look_from: Option<Position>,
}

impl Hastened {
    /// Whether an operation is among what is hastened.
    pub(super) fn has(&self, entry: &Entry) -> bool {
        !self.maps.is_empty()
            && entry
                .paths()
                .any(|path| is_players(path) || self.maps.contains_key(map_of(path)))
    }

    /// Notes an operation that came into memory.
    pub(super) fn insert(&mut self, entry: &Entry) {
        if self.has(entry) {
            self.unsettled.insert(entry.position);
        }
    }

    /// Notes an operation that was made just now.
    pub(super) fn made(&mut self, entry: &Entry) {
        if !self.maps.is_empty() {
            for path in entry.paths() {
                if let Some(made) = self.maps.get_mut(map_of(path)) {
                    *made += 1;
                }
            }
        }
    }

    pub(super) fn remove(&mut self, position: Position) {
        self.unsettled.remove(&position);
    }

    /// Notes that an operation of these lies on disk alone.
    pub(super) fn left_to_disk(&mut self, position: Position) {
        self.look_from = Some(self.look_from.map_or(position, |from| from.min(position)));
    }
}

impl Pending {
    /// Sends what was and is made for a map ahead of other bulk, until [`Self::hasten_no_more`].
    pub(crate) fn hasten(&mut self, map: &str) {
        if self.hastened.maps.insert(map.into(), 0).is_some() {
            return;
        }
        for (position, Slot { entry, .. }) in &self.slots {
            if self.hastened.has(entry) {
                self.hastened.unsettled.insert(*position);
                if self.live.remove(position) || self.backlog.remove(position) {
                    self.hastened.waiting.insert(*position);
                }
            }
        }
        if let Some((first, _)) = self.on_disk {
            self.hastened.left_to_disk(first);
        }
    }

    /// What is left of a map goes its usual way.
    pub(crate) fn hasten_no_more(&mut self, map: &str) {
        self.hastened.maps.remove(map);
        let usual: Vec<Position> = self
            .hastened
            .unsettled
            .iter()
            .filter(|position| {
                let slot = self.slots.get(position);
                slot.is_none_or(|slot| !self.hastened.has(&slot.entry))
            })
            .copied()
            .collect();
        for position in usual {
            self.hastened.unsettled.remove(&position);
            if self.hastened.waiting.remove(&position) {
                self.backlog.insert(position);
            }
        }
        if self.hastened.maps.is_empty() {
            self.hastened.look_from = None;
        }
    }

    /// How many operations were made for a map since it is hastened.
    pub(crate) fn made_since_hastened(&self, map: &str) -> u64 {
        self.hastened.maps.get(map).copied().unwrap_or_default()
    }

    /// Whether everything that was made for a hastened map, and for players, before a position is settled. What has not come
    /// here from the lanes is not known here: see [`Self::has_passed`].
    pub(crate) fn has_settled_of(&self, map: &str, before: Position) -> bool {
        let hastened = &self.hastened;
        let is_of = |position: &Position| {
            let is_of = |path: &str| is_players(path) || map_of(path) == map;
            self.slots
                .get(position)
                .is_some_and(|slot| slot.entry.paths().any(is_of))
        };
        hastened.look_from.is_none_or(|from| from >= before) && !hastened.unsettled.range(..before).any(is_of)
    }

    /// Notes that everything up to a position has come here from the lanes, or was settled before.
    pub(crate) fn note_passed(&mut self, position: Position) {
        self.passed = self.passed.max(Some(position));
    }

    /// Whether everything before a position has come here from the lanes; not known of one that nothing was made at.
    pub(crate) fn has_passed(&self, before: Position) -> bool {
        let is_there =
            |passed: Position| passed.incarnation == before.incarnation && passed.sequence + 1 >= before.sequence;
        self.passed.is_some_and(is_there)
    }

    /// From where on the disk has to be looked through for what is hastened, up to where, and for how many of them there is
    /// room; what else lies there is passed over.
    pub(crate) fn wants_hastened(&self) -> Option<(Position, Position, usize)> {
        let from = self.hastened.look_from?;
        let (_, to) = self.on_disk?;
        let room = self.ops_max.saturating_sub(self.hastened.unsettled.len());
        (room > 0 && self.bytes < super::BYTES_MAX).then_some((from, to, room))
    }

    /// Whether an operation is among what is hastened.
    pub(crate) fn hastens(&self, entry: &Entry) -> bool {
        self.hastened.has(entry)
    }

    /// Takes of a page that was read from `from` up to `next`, or to the end, what is hastened.
    pub(crate) fn take_hastened(&mut self, from: Position, page: Vec<Entry>, next: Option<Position>) {
        // What was left to the disk meanwhile may lie before.
        if self.hastened.look_from == Some(from) {
            let end = self.on_disk.map(|(_, to)| to);
            self.hastened.look_from = next.filter(|next| end.is_some_and(|end| *next <= end));
        }
        for entry in page {
            if !self.slots.contains_key(&entry.position) && self.hastened.has(&entry) {
                self.hastened.waiting.insert(entry.position);
                self.insert(entry);
            }
        }
        self.shed();
    }
}

/// What travels with players is written by their host, whatever map they are on.
fn is_players(path: &str) -> bool {
    path.starts_with("@char/") || path.starts_with("@account/")
}

fn map_of(path: &str) -> &str {
    path.split_once('/').map_or(path, |(map, _)| map)
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::{super::tests::entry, *};
    use crate::pending::Flight;

    fn at(sequence: u64) -> Position {
        Position {
            incarnation: 1,
            sequence,
        }
    }

    fn sequences(flight: &Flight) -> Vec<u64> {
        flight
            .operations
            .iter()
            .map(|(position, _)| position.sequence)
            .collect()
    }

    #[test]
    fn what_is_of_the_map_and_of_players_goes_first_and_the_rest_is_not_waited_for() {
        let mut pending = Pending::new(100, true);
        let paths = [
            "geffen/ITEM_DROP/1",
            "prontera/ITEM_DROP/1",
            "@char/7/PLAYER_DATA",
            "geffen/ITEM_DROP/2",
        ];
        for (sequence, path) in (1..).zip(paths) {
            pending.push(entry(sequence, path), false);
        }
        pending.hasten("prontera");
        pending.push(entry(5, "prontera/ITEM_DROP/9"), false);
        assert_eq!(pending.made_since_hastened("prontera"), 1);
        assert!(!pending.has_settled_of("prontera", at(5)));
        let flight = pending.take_bulk(2).expect("wait");
        assert_eq!(sequences(&flight), [2, 3]);
        pending.put_back(&flight, Instant::now(), |_| Duration::ZERO);
        pending.retry_now();
        assert_eq!(
            sequences(&pending.take_bulk(3).expect("again")),
            [2, 3, 5],
            "ahead also when it is tried again"
        );
        for sequence in [2, 3] {
            pending.remove(at(sequence));
        }
        assert!(
            pending.has_settled_of("prontera", at(5)),
            "what came later is another matter"
        );
        assert!(!pending.has_settled_of("prontera", at(6)));
        pending.remove(at(5));
        assert!(pending.has_settled_of("prontera", at(100)));
        assert_eq!(sequences(&pending.take_bulk(9).expect("the rest")), [1, 4]);
    }

    #[test]
    fn what_lies_on_disk_alone_is_looked_through_and_what_is_left_there_again_is_looked_for_again() {
        let mut pending = Pending::new(16, true);
        pending.leave_to_disk(at(1), at(100));
        pending.hasten("prontera");
        assert!(!pending.has_settled_of("prontera", at(101)));
        let (from, to, room) = pending.wants_hastened().expect("something lies there");
        assert_eq!((from, to, room), (at(1), at(100), 16));
        let page = vec![entry(3, "geffen/ITEM_DROP/1"), entry(4, "prontera/ITEM_DROP/1")];
        pending.take_hastened(at(1), page, Some(at(50)));
        assert_eq!(pending.wants_hastened().expect("there is more").0, at(50));
        let page = (50..=99).map(|sequence| entry(sequence, &format!("prontera/ITEM_DROP/{sequence}")));
        pending.take_hastened(at(50), page.collect(), None);
        assert!(pending.len() <= 16, "invariant 12: {}", pending.len());
        let mut sent = Vec::new();
        for _ in 0..20 {
            let Some(flight) = pending.take_bulk(8) else { break };
            for (position, _) in &flight.operations {
                pending.remove(*position);
                sent.push(position.sequence);
            }
            if let Some((from, ..)) = pending.wants_hastened() {
                let rest = (from.sequence..=99).filter(|sequence| !sent.contains(sequence));
                let page = rest.map(|sequence| entry(sequence, &format!("prontera/ITEM_DROP/{sequence}")));
                pending.take_hastened(from, page.collect(), None);
            }
        }
        sent.sort_unstable();
        assert_eq!(sent, [4].into_iter().chain(50..=99).collect::<Vec<_>>());
        assert!(pending.has_settled_of("prontera", at(101)));
        assert!(!pending.is_drained(), "others are on disk still");
    }

    #[test]
    fn a_map_that_stays_after_all_takes_its_turn_again() {
        let mut pending = Pending::new(100, true);
        pending.push(entry(1, "geffen/ITEM_DROP/1"), false);
        pending.push(entry(2, "prontera/ITEM_DROP/1"), false);
        pending.hasten("prontera");
        pending.hasten_no_more("prontera");
        assert_eq!(pending.bulk_ready(), 2);
        assert_eq!(sequences(&pending.take_bulk(9).expect("both")), [1, 2]);
        assert!(pending.hastened.unsettled.is_empty());
    }

    #[test]
    fn what_has_not_come_from_the_lanes_is_told_by_the_last_that_has() {
        let mut pending = Pending::new(100, true);
        assert!(!pending.has_passed(at(3)));
        pending.note_passed(at(1));
        assert!(!pending.has_passed(at(3)));
        pending.note_passed(at(2));
        assert!(pending.has_passed(at(3)));
    }
}

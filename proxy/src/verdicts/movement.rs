//! Movement: whether a character's cells fit the time in which they came.
//!
//! Each character has a credit of time. It grows with the hub's clock and is spent by each cell at what a cell takes;
//! where it runs out, the character came further than it can have walked. Only receipt counts, never what a host says
//! of time: what a host holds back and sends together spends the time in which it was held back.
//!
//! The credit has a bound, [`SLACK`], which is what the lines' delays may vary. After a silence of the whole host it is
//! as large as the silence was long, for a while: an outage delays all of its characters.

use std::time::{Duration, Instant};

use lru::LruCache;
use p2p_sync_proto::{Position, json::Facts};
use serde_json::{Value, json};
use uuid::Uuid;

/// Characters remembered of one host: rAthena has no more descriptors for players.
const CHARACTERS_OF_A_HOST_MAX: usize = 1024;
/// Characters remembered of all hosts, about 250 bytes each; what exceeds it forgets the host that was heard least
/// recently, whole.
const CHARACTERS_MAX: usize = 128 * 1024;
/// Walking that may come together without an outage: messages overtake one another and are tried again.
const SLACK: Duration = Duration::from_secs(5);
/// A host that sends no positions for so long has an outage, or nobody who moves.
const SILENCE_MIN: Duration = Duration::from_secs(1);
/// Of an outage no more is made good: nobody walks further than across a map between two positions that are kept.
const SILENCE_MAX: Duration = Duration::from_hours(1);
/// How long after a silence, or after a host was first seen, what was held back may still come.
const CATCH_UP: Duration = Duration::from_secs(10);
/// A step longer than this is a jump: skills and blows move a character less far.
const JUMP_CELLS_MIN: u32 = 20;
/// Jumps that are let pass just after a host was first seen: an outage that this hub does not know of, because it was not
/// running, left of each way what was in flight and the newest position.
const FIRST_JUMPS_MAX: u8 = 16;
/// What a warp costs that the game told of, wherever it leads: wings and portals are not used more often for long.
const WARP: Duration = Duration::from_millis(500);
/// A character's findings by one rule are repetitions for so long.
const REPEATED_WITHIN: Duration = Duration::from_mins(1);

/// Events of a position that are a warp: `pc_setpos`, and coming to a map.
const WARP_EVENTS: [&str; 5] = ["setpos", "enter", "leave", "warp", "teleport"];

/// What a cell takes.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// Where a payload does not say.
    pub ms_per_cell: u32,
    /// Whatever a payload says.
    pub ms_per_cell_min: u32,
}

/// What an operation says of where a character is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// Absent where it is gone, or its payload does not say.
    cell: Option<(u16, u16)>,
    ms_per_cell: Option<u32>,
    /// Not walked, as the game told.
    is_warp: bool,
}

impl Step {
    /// Reads `x`, `y`, `speed` and `event` of a payload.
    pub fn read(facts: &Facts<'_>) -> Self {
        fn number<T: std::str::FromStr>(facts: &Facts<'_>, key: &str) -> Option<T> {
            facts.member(key)?.parse().ok()
        }
        Self {
            cell: number(facts, "x").zip(number(facts, "y")),
            ms_per_cell: number(facts, "speed"),
            is_warp: facts
                .member("event")
                .is_some_and(|event| WARP_EVENTS.contains(&event.as_ref())),
        }
    }

    /// Of a character that is gone from where it was.
    pub fn gone() -> Self {
        Self {
            cell: None,
            ms_per_cell: None,
            is_warp: true,
        }
    }

    /// The same, not walked, as operations of some types are.
    #[must_use]
    pub fn warped(self) -> Self {
        Self { is_warp: true, ..self }
    }
}

/// Which rule a character's movement breaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    /// It walks faster than its speed.
    Speed,
    /// It is far from where it was, and the game told of no warp.
    Teleport,
    /// It is warped more often than the game does.
    Warps,
}

impl Rule {
    /// As the table holds it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Speed => "movement_speed",
            Self::Teleport => "movement_teleport",
            Self::Warps => "movement_warps",
        }
    }
}

/// Movement that the time does not account for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// Which rule it breaks.
    pub rule: Rule,
    /// The same character broke the same rule within the last minute: told once.
    pub is_repeated: bool,
    from: Place,
    to: Place,
    cells: u32,
    elapsed_ms: u128,
    ms_per_cell: u32,
    score_ms: i64,
    unreported: u32,
}

impl Finding {
    /// The evidence, for an operator: `from` and `to`, the `cells` between them, the `ms` since the position before was
    /// received, what a cell takes, the `score`: the milliseconds of walking that the time does not account for, and
    /// how many findings like it were not reported since the last one.
    pub fn details(&self) -> Value {
        let place = |place: &Place| json!({"map": &*place.map, "cell": place.cell});
        json!({
            "from": place(&self.from),
            "to": place(&self.to),
            "cells": self.cells,
            "ms": u64::try_from(self.elapsed_ms).unwrap_or(u64::MAX),
            "ms_per_cell": self.ms_per_cell,
            "score": self.score_ms,
            "unreported_before": self.unreported,
        })
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Place {
    map: Box<str>,
    cell: Option<(u16, u16)>,
}

/// Where characters were last, and what credit they have.
#[derive(Debug)]
pub struct Movement {
    pace: Pace,
    hosts: LruCache<Uuid, Host>,
    characters: usize,
}

#[derive(Debug)]
struct Host {
    heard: Instant,
    silent_from: Option<Instant>,
    caught_up: Instant,
    first_heard: Instant,
    first_jumps: u8,
    characters: LruCache<u64, Character>,
}

#[derive(Debug)]
struct Character {
    place: Place,
    version: Position,
    received: Instant,
    credit_ms: i64,
    told: [Told; 3],
}

#[derive(Clone, Copy, Debug, Default)]
struct Told {
    last: Option<Instant>,
    unreported: u32,
}

/// A step of a character, as one host tells it.
#[derive(Clone, Copy, Debug)]
pub struct Moved<'a> {
    /// Who tells it.
    pub host_id: Uuid,
    /// Who moved.
    pub character: u64,
    /// Where.
    pub map: &'a str,
    /// The steps of one host's outbox are made in this order, however they come.
    pub version: Position,
    /// How.
    pub step: Step,
}

impl Movement {
    /// Nobody has been seen yet.
    pub fn new(pace: Pace) -> Self {
        Self {
            pace,
            hosts: LruCache::unbounded(),
            characters: 0,
        }
    }

    /// Scores a step by when its message was received. Steps that others have overtaken say nothing any more.
    pub fn score(&mut self, moved: &Moved<'_>, received: Instant) -> Option<Finding> {
        let host = self.hosts.get_or_insert_mut(moved.host_id, || Host::new(received));
        host.hear(received);
        let Some(character) = host.characters.get_mut(&moved.character) else {
            host.characters.put(moved.character, Character::new(moved, received));
            self.characters += 1;
            if host.characters.len() > CHARACTERS_OF_A_HOST_MAX {
                host.characters.pop_lru();
                self.characters -= 1;
            }
            self.forget_the_idle();
            return None;
        };
        if moved.version <= character.version {
            return None;
        }
        let elapsed = received.saturating_duration_since(character.received);
        let room = if host.silent_from.is_some_and(|from| character.received <= from) {
            SLACK + elapsed.min(SILENCE_MAX)
        } else if received < host.caught_up {
            SLACK.max(duration(character.credit_ms))
        } else {
            SLACK
        };
        character.credit_ms = (character.credit_ms + ms(elapsed)).min(ms(room));
        let step = character.step(moved, self.pace, received);
        if !step.is_overdrawn() {
            return None;
        }
        if step.rule == Rule::Teleport
            && received.saturating_duration_since(host.first_heard) < CATCH_UP
            && host.first_jumps < FIRST_JUMPS_MAX
        {
            host.first_jumps += 1;
            return None;
        }
        Some(character.find(step, received, elapsed))
    }

    /// Keeps the bound. The host that was heard just now goes last.
    fn forget_the_idle(&mut self) {
        while self.characters > CHARACTERS_MAX {
            match self.hosts.pop_lru() {
                Some((_, host)) => self.characters -= host.characters.len(),
                None => return,
            }
        }
    }
}

impl Host {
    fn new(received: Instant) -> Self {
        Self {
            heard: received,
            silent_from: None,
            caught_up: received,
            first_heard: received,
            first_jumps: 0,
            characters: LruCache::unbounded(),
        }
    }

    fn hear(&mut self, received: Instant) {
        if received.saturating_duration_since(self.heard) >= SILENCE_MIN {
            self.silent_from = Some(self.heard);
            self.caught_up = received + CATCH_UP;
        }
        self.heard = self.heard.max(received);
    }
}

impl Character {
    fn new(moved: &Moved<'_>, received: Instant) -> Self {
        Self {
            place: moved.place(),
            version: moved.version,
            received,
            credit_ms: ms(SLACK),
            told: [Told::default(); 3],
        }
    }

    /// Goes there, and spends what that takes.
    fn step(&mut self, moved: &Moved<'_>, pace: Pace, received: Instant) -> Spent {
        let stays_on_map = *self.place.map == *moved.map;
        let cells = match (self.place.cell, moved.step.cell) {
            (Some(from), Some(to)) if stays_on_map => u32::from(from.0.abs_diff(to.0).max(from.1.abs_diff(to.1))),
            _ => 0,
        };
        let told = moved.step.ms_per_cell.unwrap_or(pace.ms_per_cell);
        let ms_per_cell = told.max(pace.ms_per_cell_min);
        let walked = Duration::from_millis(u64::from(cells) * u64::from(ms_per_cell));
        // Who is gone has paid for coming again.
        let is_elsewhere = !stays_on_map || cells > 0 || self.place.cell.is_some() && moved.step.cell.is_none();
        let (rule, cost) = match moved.step.is_warp || !stays_on_map {
            // A short one is as good as walked.
            true if is_elsewhere => (Rule::Warps, if cells > 0 { WARP.min(walked) } else { WARP }),
            _ if cells > JUMP_CELLS_MIN => (Rule::Teleport, walked),
            _ => (Rule::Speed, walked),
        };
        let mut to = moved.place();
        if stays_on_map && !moved.step.is_warp {
            // It says nothing of where it is: then it is where it was.
            to.cell = to.cell.or(self.place.cell);
        }
        let from = std::mem::replace(&mut self.place, to);
        self.version = moved.version;
        self.received = self.received.max(received);
        self.credit_ms -= ms(cost);
        let left_ms = self.credit_ms;
        if left_ms < 0 {
            // Half of the slack: what follows is judged by itself.
            self.credit_ms = ms(SLACK / 2);
        }
        Spent {
            rule,
            from,
            cells,
            ms_per_cell,
            left_ms,
        }
    }

    fn find(&mut self, spent: Spent, received: Instant, elapsed: Duration) -> Finding {
        let told = &mut self.told[spent.rule as usize];
        let unreported = told.unreported;
        let is_repeated = told
            .last
            .is_some_and(|last| received.saturating_duration_since(last) < REPEATED_WITHIN);
        if is_repeated {
            told.unreported = unreported.saturating_add(1);
        } else {
            *told = Told {
                last: Some(received),
                unreported: 0,
            };
        }
        Finding {
            rule: spent.rule,
            is_repeated,
            from: spent.from,
            to: self.place.clone(),
            cells: spent.cells,
            elapsed_ms: elapsed.as_millis(),
            ms_per_cell: spent.ms_per_cell,
            score_ms: -spent.left_ms,
            unreported,
        }
    }
}

/// What a step took, and what credit it left.
struct Spent {
    rule: Rule,
    from: Place,
    cells: u32,
    ms_per_cell: u32,
    left_ms: i64,
}

impl Spent {
    fn is_overdrawn(&self) -> bool {
        self.left_ms < 0
    }
}

impl Moved<'_> {
    fn place(&self) -> Place {
        Place {
            map: self.map.into(),
            cell: self.step.cell,
        }
    }
}

fn ms(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX / 4)
}

fn duration(ms: i64) -> Duration {
    Duration::from_millis(u64::try_from(ms).unwrap_or_default())
}

#[cfg(test)]
mod tests;

//! Who is to have which map, and who stands by: a decision over plain data. What it gives is tried, each step in a transaction
//! of its own that looks again; what did not come about is decided anew.

use std::{
    cmp::Reverse,
    collections::{HashMap, HashSet},
    time::Duration,
};

use p2p_sync_proto::{Code, Problem};
use uuid::Uuid;

use super::{
    Settings,
    handover::{self, COPY_NEAR, Handover, Next, Successor},
    score::{Facts, Rating},
};
use crate::store::HostRole;

/// Moves of maps that the hub has begun by itself and that are not over; more wait.
const MOVES_MAX: usize = 8;

/// What holds for a map, as its rule says.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Rule {
    /// The hub gives it, and moves it.
    pub automatic: bool,
    /// How many hosts are to keep a copy.
    pub backups: usize,
    /// How many are to help when they are asked.
    pub assistants: usize,
    /// Who may have it; empty: any.
    pub hosts: Vec<Uuid>,
    /// What such a host scores at least.
    pub score_min: f64,
}

/// A map.
#[derive(Clone, Debug, Default)]
pub struct MapFacts {
    /// Its name.
    pub map: String,
    /// Absent: none, and nothing is done by the hub itself.
    pub rule: Option<Rule>,
    /// Who holds it, or held it last and has not released it.
    pub holder: Option<Uuid>,
    /// Of the last holder.
    pub tenure: u64,
    /// What is left of the lease; zero where it has run out, or there is none.
    pub lease_left: Duration,
    /// Since the tenure began.
    pub held_for: Duration,
    /// Who keeps a copy.
    pub backups: Vec<Uuid>,
    /// Who helps.
    pub assistants: Vec<Uuid>,
    /// Where it is being handed over.
    pub handover: Option<Handover>,
    /// How far copies are, as their keepers say.
    pub copies: HashMap<Uuid, u64>,
    /// How far its stream is.
    pub head: u64,
}

/// An active host that was heard within a day.
#[derive(Clone, Debug)]
pub struct HostFacts {
    /// Who.
    pub host_id: Uuid,
    /// Whether it is the operator's own.
    pub role: HostRole,
    /// It listens for what the hub asks of it, and wants maps.
    pub is_attending: bool,
    /// It is to be no backup.
    pub keeps_no_copies: bool,
    /// What its score is made of.
    pub facts: Facts,
}

/// All that is decided over, as it was at one moment.
#[derive(Clone, Debug, Default)]
pub struct World {
    /// All maps that are held, were held, or have a rule.
    pub maps: Vec<MapFacts>,
    /// All hosts that may be given something.
    pub hosts: Vec<HostFacts>,
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq)]
pub enum Step {
    /// Give a map that nobody holds, or whose lease has run out.
    Grant {
        /// Which.
        map: String,
        /// To whom.
        to: Uuid,
    },
    /// Begin to hand a map over.
    Move {
        /// Which.
        map: String,
        /// To whom.
        to: Uuid,
    },
    /// Ask the holder of a map to release it.
    Ask {
        /// Which.
        map: String,
        /// To whom it goes.
        to: Uuid,
    },
    /// Take a map whose holder did not release it in time.
    Take {
        /// Which.
        map: String,
        /// To whom it goes.
        to: Uuid,
    },
    /// Leave a map with its holder after all.
    CallOff {
        /// Which.
        map: String,
        /// To whom it was to go.
        to: Uuid,
    },
    /// Change who stands by.
    Standby {
        /// For which map.
        map: String,
        /// Held under which tenure.
        tenure: u64,
        /// Who keeps a copy.
        backups: Vec<Uuid>,
        /// Who helps.
        assistants: Vec<Uuid>,
    },
}

/// What is to be done now. Not `settled`: the hub serves for too short a time to say who is gone, so that nobody is replaced and
/// nothing is moved that is held.
pub fn decide(world: &World, settings: &Settings, settled: bool) -> Vec<Step> {
    let mut table = Table::new(world, settings);
    let mut steps = Vec::new();
    // What nobody writes goes first: each map that is given changes what the others are measured by.
    steps.extend(world.maps.iter().filter_map(|map| table.grant(map)));
    steps.extend(world.maps.iter().filter_map(|map| table.hand_over(map)));
    if settled {
        let mut moves = world.maps.iter().filter(|map| map.handover.is_some()).count();
        for map in &world.maps {
            if moves < MOVES_MAX
                && let Some(step) = table.relocate(map)
            {
                moves += 1;
                steps.push(step);
            }
        }
    }
    steps.extend(world.maps.iter().filter_map(|map| table.stand_by(map, settled)));
    steps
}

/// When something is due of which nobody will tell: a lease's end, or a hand-over's next step.
pub fn due(world: &World) -> Option<Duration> {
    let lease = |map: &MapFacts| {
        let is_given = map.handover.is_some() || map.rule.as_ref().is_some_and(|rule| rule.automatic);
        (is_given && map.holder.is_some() && !map.lease_left.is_zero()).then_some(map.lease_left)
    };
    let handover = |map: &MapFacts| {
        map.handover
            .map(|handover| handover.left.unwrap_or(handover.catch_up_left))
    };
    let maps = world.maps.iter();
    maps.flat_map(|map| [lease(map), handover(map)]).flatten().min()
}

/// The best host to have a map after its holder, or to be given it: of the backups, else of all who may, else one in the hub's
/// role.
pub fn best(world: &World, settings: &Settings, map: &MapFacts) -> Option<Uuid> {
    Table::new(world, settings).best_of_all(map)
}

/// Whether a host can be handed a map: it listens, and was heard of late. `NOT_FOUND` where it cannot.
pub fn check_listens(world: &World, settings: &Settings, host_id: Uuid) -> Result<(), Problem> {
    let host = world.hosts.iter().find(|host| host.host_id == host_id);
    if host.is_some_and(|host| host.is_attending && host.facts.silence <= settings.gone_after()) {
        return Ok(());
    }
    let heard = host.map_or_else(
        || "not heard within a day".to_owned(),
        |host| format!("heard last {} s ago", host.facts.silence.as_secs()),
    );
    let sentence = format!("host {host_id} does not listen for maps now, and was {heard}: name another one");
    Err(Problem::new(Code::NotFound, sentence))
}

/// A host's score, as it is now.
pub fn score(world: &World, settings: &Settings, host_id: Uuid) -> Option<f64> {
    let table = Table::new(world, settings);
    table.hosts.get(&host_id).map(Standing::score)
}

/// How many maps a host may hold.
pub fn maps_max(settings: &Settings, facts: &Facts) -> usize {
    facts.word.maps_max.unwrap_or(usize::MAX).min(settings.maps_max)
}

/// The hosts, and what they hold when what was decided so far has come about.
struct Table<'w> {
    settings: &'w Settings,
    hosts: HashMap<Uuid, Standing<'w>>,
}

struct Standing<'w> {
    host: &'w HostFacts,
    rating: Rating,
    held: usize,
    maps_max: usize,
}

impl Standing<'_> {
    fn score(&self) -> f64 {
        self.rating.with(self.held, self.maps_max)
    }

    /// With one map more.
    fn score_with_more(&self) -> f64 {
        self.rating.with(self.held + 1, self.maps_max)
    }
}

impl<'w> Table<'w> {
    fn new(world: &'w World, settings: &'w Settings) -> Self {
        let standing = |host: &'w HostFacts| Standing {
            host,
            rating: Rating::of(&settings.weights, &host.facts, settings.silent_after()),
            held: 0,
            maps_max: maps_max(settings, &host.facts),
        };
        let hosts = world.hosts.iter().map(|host| (host.host_id, standing(host))).collect();
        let mut table = Self { settings, hosts };
        for map in &world.maps {
            // A map on its way is its successor's already.
            let to = map.handover.map(|handover| handover.successor);
            table.note(to.or(map.holder));
        }
        table
    }

    fn note(&mut self, holder: Option<Uuid>) {
        if let Some(standing) = holder.and_then(|host| self.hosts.get_mut(&host)) {
            standing.held += 1;
        }
    }

    /// Whether a host is there now.
    fn is_heard(&self, standing: &Standing) -> bool {
        standing.host.facts.silence <= self.settings.silent_after()
    }

    fn is_there(&self, host_id: Uuid) -> bool {
        self.hosts
            .get(&host_id)
            .is_some_and(|standing| standing.host.facts.silence <= self.settings.gone_after())
    }

    /// Whether a map's rule lets a host have it. The operator's own machines have what nobody else fits, unless they are named.
    fn is_meant(rule: &Rule, host: &HostFacts) -> bool {
        match host.role {
            HostRole::Host => rule.hosts.is_empty() || rule.hosts.contains(&host.host_id),
            HostRole::Hub => rule.hosts.contains(&host.host_id),
        }
    }

    /// Who may be given a map now, but its holder.
    fn candidates(&self, map: &MapFacts) -> impl Iterator<Item = &Standing<'w>> {
        let any = Rule::default();
        let rule = map.rule.clone().unwrap_or(any);
        let holder = map.holder;
        self.hosts.values().filter(move |standing| {
            Some(standing.host.host_id) != holder
                && standing.host.is_attending
                && self.is_heard(standing)
                && Self::is_meant(&rule, standing.host)
                && standing.held < standing.maps_max
                && standing.score_with_more() >= rule.score_min
        })
    }

    /// Of several that may have a map the one that comes first: a backup whose copy is near, a backup, the better one. The last
    /// decides where all else is equal, so that the same is decided again.
    fn best(&self, map: &MapFacts) -> Option<&Standing<'w>> {
        let rank = |standing: &&Standing| {
            let id = standing.host.host_id;
            let is_backup = map.backups.contains(&id);
            let copy = map.copies.get(&id).filter(|_| is_backup);
            let is_near = copy.is_some_and(|copy| copy.saturating_add(COPY_NEAR) >= map.head);
            (is_near, is_backup, Score(standing.score_with_more()), Reverse(id))
        };
        self.candidates(map).max_by_key(rank)
    }

    fn best_of_all(&self, map: &MapFacts) -> Option<Uuid> {
        let best = self.best(map).map(|standing| standing.host.host_id);
        best.or_else(|| self.fallback(map))
    }

    /// The operator's own machine that holds the fewest maps; none where one has it already.
    fn fallback(&self, map: &MapFacts) -> Option<Uuid> {
        let is_fallback = |standing: &&Standing| {
            standing.host.role == HostRole::Hub && standing.host.is_attending && self.is_heard(standing)
        };
        let fallbacks = || self.hosts.values().filter(is_fallback);
        if fallbacks().any(|standing| Some(standing.host.host_id) == map.holder) {
            return None;
        }
        let fewest = fallbacks().min_by_key(|standing| (standing.held, standing.host.host_id));
        fewest.map(|standing| standing.host.host_id)
    }

    fn is_free(map: &MapFacts) -> bool {
        map.holder.is_none() || map.lease_left.is_zero()
    }

    fn grant(&mut self, map: &MapFacts) -> Option<Step> {
        if !Self::is_free(map) {
            return None;
        }
        let successor = map.handover.map(|handover| handover.successor);
        let heard = |id: &Uuid| self.hosts.get(id).is_some_and(|standing| self.is_heard(standing));
        let to = match successor.filter(heard) {
            Some(successor) => successor,
            None if map.rule.as_ref().is_some_and(|rule| rule.automatic) => {
                let best = self.best_of_all(map)?;
                self.note(Some(best));
                best
            }
            None => return None,
        };
        let map = map.map.clone();
        Some(Step::Grant { map, to })
    }

    fn hand_over(&self, map: &MapFacts) -> Option<Step> {
        let handover = map.handover.filter(|_| !Self::is_free(map))?;
        let (to, name) = (handover.successor, map.map.clone());
        let standing = self.hosts.get(&to);
        let successor = Successor {
            is_there: self.is_there(to),
            copy: map.copies.get(&to).copied(),
            keeps_no_copies: standing.is_some_and(|standing| standing.host.keeps_no_copies),
            is_ready: standing.is_some_and(|standing| standing.host.is_attending && self.is_heard(standing)),
        };
        match handover::next(&handover, &successor, map.head) {
            Next::Wait(_) => None,
            Next::Ask => Some(Step::Ask { map: name, to }),
            Next::Take => Some(Step::Take { map: name, to }),
            Next::CallOff => Some(Step::CallOff { map: name, to }),
        }
    }

    /// A map that is held goes to a host that is better by the margin, or to anybody who fits where its holder does not.
    fn relocate(&mut self, map: &MapFacts) -> Option<Step> {
        let rule = map.rule.as_ref().filter(|rule| rule.automatic)?;
        let is_due = map.held_for >= self.settings.migration_min;
        if Self::is_free(map) || map.handover.is_some() || !is_due {
            return None;
        }
        // Who is locked, or was never heard, keeps it until its lease has run out.
        let holder = self.hosts.get(&map.holder?)?;
        let best = self.best(map)?;
        let fits = Self::is_meant(rule, holder.host) && holder.score() >= rule.score_min;
        if fits && best.score_with_more() < holder.score() + self.settings.migration_margin {
            return None;
        }
        let (from, to) = (holder.host.host_id, best.host.host_id);
        self.note(Some(to));
        if let Some(holder) = self.hosts.get_mut(&from) {
            holder.held = holder.held.saturating_sub(1);
        }
        let map = map.map.clone();
        Some(Step::Move { map, to })
    }

    fn stand_by(&self, map: &MapFacts, settled: bool) -> Option<Step> {
        let none = Rule::default();
        let rule = map.rule.as_ref().unwrap_or(&none);
        let holder = map.holder.filter(|_| !Self::is_free(map))?;
        let successor = map.handover.map(|handover| handover.successor);
        let mut taken = HashSet::from([holder]);
        let backups = self.chosen(
            map,
            rule,
            &map.backups,
            rule.backups,
            successor,
            true,
            settled,
            &mut taken,
        );
        let assistants = self.chosen(
            map,
            rule,
            &map.assistants,
            rule.assistants,
            None,
            false,
            settled,
            &mut taken,
        );
        let same = |one: &[Uuid], other: &[Uuid]| {
            one.len() == other.len() && one.iter().collect::<HashSet<_>>() == other.iter().collect::<HashSet<_>>()
        };
        if same(&backups, &map.backups) && same(&assistants, &map.assistants) {
            return None;
        }
        let (map, tenure) = (map.map.clone(), map.tenure);
        Some(Step::Standby {
            map,
            tenure,
            backups,
            assistants,
        })
    }

    /// So many hosts that stand by for a map: those that do and still may, and the best of the others for those that lack.
    #[expect(clippy::too_many_arguments, reason = "for backups and assistants alike")]
    fn chosen(
        &self,
        map: &MapFacts,
        rule: &Rule,
        present: &[Uuid],
        wanted: usize,
        always: Option<Uuid>,
        keeps_copies: bool,
        settled: bool,
        taken: &mut HashSet<Uuid>,
    ) -> Vec<Uuid> {
        let may = |standing: &Standing| {
            Self::is_meant(rule, standing.host) && !(keeps_copies && standing.host.keeps_no_copies)
        };
        let mut chosen: Vec<Uuid> = always.into_iter().collect();
        taken.extend(&chosen);
        let stays = |id: &&Uuid| match self.hosts.get(*id) {
            Some(standing) => may(standing) && (!settled || standing.host.is_attending && self.is_there(**id)),
            None => !settled,
        };
        let mut staying: Vec<Uuid> = present.iter().filter(stays).copied().collect();
        staying.sort_by_key(|id| Reverse(self.hosts.get(id).map(|standing| Score(standing.score()))));
        let mut others: Vec<&Standing> = self
            .candidates(map)
            .filter(|standing| may(standing) && !present.contains(&standing.host.host_id))
            .collect();
        others.sort_by_key(|standing| (Reverse(Score(standing.score())), standing.host.host_id));
        let all = staying
            .into_iter()
            .chain(others.iter().map(|standing| standing.host.host_id));
        // A successor stands by whatever the rule says.
        let room = wanted.max(chosen.len());
        for id in all {
            if chosen.len() < room && taken.insert(id) {
                chosen.push(id);
            }
        }
        chosen
    }
}

/// Scores are numbers and compare.
#[derive(Clone, Copy, PartialEq)]
struct Score(f64);

impl Eq for Score {}

impl PartialOrd for Score {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Score {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.0.total_cmp(&other.0)
    }
}

#[cfg(test)]
mod tests;

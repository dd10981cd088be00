//! What happens when, drawn from a seed: each step draws from a generator of its own, so that the others stay as they are
//! where one is left out.

use std::collections::BTreeSet;

use fastrand::Rng;
use p2p_sync_proto::{Position, envelope::Lane};
use p2p_sync_proxy::store::Store;

use super::{
    host::{Draft, Host, Message},
    play::{Difference, Play},
};

/// Steps of a schedule, before all that waits is sent.
pub(super) const STEPS: u64 = 90;
/// Rounds of sending all that waits, before it counts as stuck; an operation that waits for a player takes two.
const DRAIN_ROUNDS_MAX: usize = 400;
/// Operations in a bulk message, at most; there are few at a time.
const BATCH_MAX: usize = 12;

/// What a schedule came to.
pub(super) struct Played {
    pub(super) play: Play,
    pub(super) outcome: Result<(), Difference>,
    /// The step in which it ended, where it failed.
    pub(super) at: u64,
}

/// Plays the steps of a seed that are listed, and sends all that waits then.
pub(super) async fn play(store: &Store, run: u32, seed: u64, steps: &[u64]) -> Played {
    let mut play = Play::new(store.clone(), run, &mut generator(seed, u64::MAX)).await;
    for step in steps {
        let outcome = play.step(*step, &mut generator(seed, *step)).await;
        if outcome.is_err() {
            return Played {
                play,
                outcome,
                at: *step,
            };
        }
    }
    let mut outcome = play.drain(&mut generator(seed, u64::MAX - 1)).await;
    if outcome.is_ok() {
        outcome = play.compare_all().await;
    }
    Played {
        play,
        outcome,
        at: STEPS,
    }
}

fn generator(seed: u64, step: u64) -> Rng {
    Rng::with_seed(Rng::with_seed(seed).u64(..) ^ step.wrapping_mul(0x9e37_79b9_7f4a_7c15))
}

impl Play {
    async fn step(&mut self, step: u64, random: &mut Rng) -> Result<(), Difference> {
        let host = random.usize(..self.hosts.len());
        if step < self.world.maps.len() as u64 {
            // Most maps have a holder from the start.
            let map = self.world.maps[usize::try_from(step).expect("few")].clone();
            return self.grant(&map, host, false, random.u8(..5) > 0).await;
        }
        let character = *random.choice(&self.world.characters).expect("some");
        match random.u8(..112) {
            0..21 => self.make(host, random),
            21..25 => self.make_group(host, random),
            25..35 => self.enter(host, random),
            35..39 => self.leave(host, random),
            39..56 => self.send(host, random),
            56..78 => return self.deliver_one(random).await,
            78..81 => self.lose_one(random),
            81..85 => self.answer_one(random),
            85..88 => self.restart(host, random),
            88..94 => return self.move_map(random).await,
            94..98 => return self.renew(host).await,
            98..101 => return self.repeat_one(random).await,
            101..104 => return self.edit(random).await,
            104 => return self.release_player(character).await,
            105 => return self.promise(character, host).await,
            106 => {
                let accounts = self.world.characters.iter().map(|one| one.account);
                let account = random.choice(accounts.chain([0]).collect::<Vec<u32>>()).expect("some");
                return self.set_account(character, account).await;
            }
            107..110 => return self.decide_limbo(random).await,
            _ => return self.read_one(host, random).await,
        }
        Ok(())
    }

    /// A map that the host has heard that it may write, mostly.
    fn map_of(&self, host: usize, random: &mut Rng) -> usize {
        let known = &self.hosts[host].tenures;
        let known: Vec<usize> = (0..self.world.maps.len())
            .filter(|map| known.contains_key(&self.world.maps[*map]))
            .collect();
        let any = random.usize(..self.world.maps.len());
        random.choice(known).filter(|_| random.u8(..8) > 0).unwrap_or(any)
    }

    fn character_of(&self, host: usize, random: &mut Rng) -> usize {
        let here: Vec<usize> = self.hosts[host].players.iter().copied().collect();
        let any = random.usize(..self.world.characters.len());
        random.choice(here).filter(|_| random.u8(..8) > 0).unwrap_or(any)
    }

    fn draw(&mut self, host: usize, random: &mut Rng) -> Draft {
        let (number, map) = (self.number(), self.map_of(host, random));
        match random.u8(..10) {
            0..6 => self.world.on_map(map, number, random),
            6..9 => self
                .world
                .of_player(self.character_of(host, random), map, number, random),
            _ => self.world.of_host(host, number, random),
        }
    }

    fn take(&mut self, host: usize, drafts: Vec<Draft>, random: &mut Rng) {
        let bad = drafts.len() == 1 && random.u8(..40) == 0;
        let paths: Vec<String> = drafts.iter().map(|draft| draft.path.to_string()).collect();
        let (at, id) = self.hosts[host].make(drafts, random.bool(), bad);
        self.operation_ids.push(id);
        let (incarnation, sequence) = (at.incarnation, at.sequence);
        let bad = if bad { ", which validation refuses" } else { "" };
        if random.u8(..30) == 0 {
            // Not all hosts are honest: the tenure may be another's, or be none yet.
            self.hosts[host].forge(at, random.u64(1..=3));
        }
        self.trace.push(format!(
            "host {host} makes {incarnation}.{sequence} of {}{bad}",
            paths.join(" and ")
        ));
    }

    fn make(&mut self, host: usize, random: &mut Rng) {
        for _ in 0..random.usize(1..=3) {
            let draft = self.draw(host, random);
            self.take(host, vec![draft], random);
        }
    }

    fn make_group(&mut self, host: usize, random: &mut Rng) {
        let mut drafts: Vec<Draft> = Vec::new();
        for _ in 0..random.usize(2..=4) {
            let draft = self.draw(host, random);
            if drafts.iter().all(|other| other.path != draft.path) {
                drafts.push(draft);
            }
        }
        self.take(host, drafts, random);
    }

    fn enter(&mut self, host: usize, random: &mut Rng) {
        let character = random.usize(..self.world.characters.len());
        let others = (0..self.hosts.len()).filter(|other| *other != host);
        for other in others.collect::<Vec<usize>>() {
            if self.hosts[other].players.contains(&character) && random.u8(..3) > 0 {
                self.go(other, character, random);
            }
        }
        // Some map servers do not say.
        let said = if random.u8(..10) == 0 {
            0
        } else {
            self.world.characters[character].account
        };
        let (map, number) = (self.map_of(host, random), self.number());
        let draft = self.world.moved("enter", character, said, map, number);
        self.hosts[host].players.insert(character);
        self.take(host, vec![draft], random);
    }

    fn leave(&mut self, host: usize, random: &mut Rng) {
        let character = self.character_of(host, random);
        self.go(host, character, random);
    }

    fn go(&mut self, host: usize, character: usize, random: &mut Rng) {
        let (number, map) = (self.number(), self.map_of(host, random));
        let account = self.world.characters[character].account;
        let draft = self.world.moved("leave", character, account, map, number);
        self.hosts[host].players.remove(&character);
        self.take(host, vec![draft], random);
    }

    /// Puts a message together: a critical operation with what it follows, the oldest, or any that wait.
    fn send(&mut self, host: usize, random: &mut Rng) {
        let writer = &mut self.hosts[host];
        let waiting = writer.waiting();
        let (lane, positions) = match (random.u8(..10), random.choice(&waiting)) {
            (0..3, Some(one)) => (Lane::Critical, writer.chain(*one)),
            (3..6, _) => {
                let some = random.usize(1..=BATCH_MAX);
                (Lane::Bulk, waiting.iter().copied().take(some).collect())
            }
            _ => {
                let share = random.u8(1..=4);
                (
                    Lane::Bulk,
                    waiting
                        .iter()
                        .copied()
                        .filter(|_| random.u8(..4) < share)
                        .take(BATCH_MAX)
                        .collect(),
                )
            }
        };
        self.put_on_the_way(host, lane, &positions);
    }

    fn put_on_the_way(&mut self, host: usize, lane: Lane, positions: &BTreeSet<Position>) {
        let message = self.hosts[host].message(lane, positions);
        if !message.valid.ops.is_empty() || !message.valid.refused.is_empty() || !message.valid.withdrawn.is_empty() {
            self.sent.push(message.clone());
            self.on_the_way.push(message);
        }
    }

    /// Any message that is on its way comes; it may come again. Its answer may be late, or lost.
    async fn deliver_one(&mut self, random: &mut Rng) -> Result<(), Difference> {
        if self.on_the_way.is_empty() {
            return Ok(());
        }
        let message = self.on_the_way.swap_remove(random.usize(..self.on_the_way.len()));
        if random.u8(..8) == 0 {
            self.on_the_way.push(message.clone());
        }
        self.come(message, random).await
    }

    async fn come(&mut self, message: Message, random: &mut Rng) -> Result<(), Difference> {
        let committed = self.deliver(&message).await?;
        match random.u8(..10) {
            0..2 => {}
            2..4 => self.answers.push((message, committed)),
            _ => self.hosts[message.host].answered(&message, &committed),
        }
        Ok(())
    }

    async fn repeat_one(&mut self, random: &mut Rng) -> Result<(), Difference> {
        match random.choice(&self.sent).cloned() {
            Some(message) => self.come(message, random).await,
            None => Ok(()),
        }
    }

    fn lose_one(&mut self, random: &mut Rng) {
        if !self.on_the_way.is_empty() {
            self.on_the_way.swap_remove(random.usize(..self.on_the_way.len()));
        }
    }

    fn answer_one(&mut self, random: &mut Rng) {
        if !self.answers.is_empty() {
            let (message, committed) = self.answers.swap_remove(random.usize(..self.answers.len()));
            self.hosts[message.host].answered(&message, &committed);
        }
    }

    fn restart(&mut self, host: usize, random: &mut Rng) {
        let lost = self.hosts[host].restart(random.u64(1..=2), random.usize(..=2));
        if random.bool() {
            // So did its map server.
            self.hosts[host].players.clear();
        }
        self.trace
            .push(format!("host {host} starts anew, {lost} operations were not on disk"));
    }

    async fn read_one(&mut self, host: usize, random: &mut Rng) -> Result<(), Difference> {
        let path = random.choice(self.world.paths()).expect("some");
        if let Some(row) = self.read(&path).await?
            && row.hub_edit > 0
        {
            self.trace
                .push(format!("host {host} reads {path}, edit {}", row.hub_edit));
            self.hosts[host].saw(&path, row.hub_edit);
        }
        Ok(())
    }

    /// Sends all that waits until it is settled, and lets some of what was sent come again. Who waits for a player that
    /// another host keeps gets it by the operator's word.
    async fn drain(&mut self, random: &mut Rng) -> Result<(), Difference> {
        for _ in 0..DRAIN_ROUNDS_MAX {
            if self.hosts.iter().all(Host::is_drained) {
                for _ in 0..3 {
                    self.repeat_one(random).await?;
                }
                return Ok(());
            }
            let before = self.waiting();
            for host in 0..self.hosts.len() {
                self.send_all(host, random);
            }
            while !self.on_the_way.is_empty() {
                let message = self.on_the_way.swap_remove(random.usize(..self.on_the_way.len()));
                let committed = self.deliver(&message).await?;
                self.hosts[message.host].answered(&message, &committed);
            }
            if before == self.waiting() {
                for character in self.world.characters.clone() {
                    self.release_player(character).await?;
                }
            }
        }
        let waiting: Vec<_> = self.hosts.iter().map(Host::waiting).collect();
        Err(format!("nothing settles these any more: {waiting:?}"))
    }

    fn waiting(&self) -> usize {
        self.hosts.iter().map(|host| host.waiting().len()).sum()
    }

    fn send_all(&mut self, host: usize, random: &mut Rng) {
        let waiting = self.hosts[host].waiting();
        let mut rest = &waiting[..];
        loop {
            let (some, others) = rest.split_at(random.usize(1..=BATCH_MAX).min(rest.len()));
            self.put_on_the_way(host, Lane::Bulk, &some.iter().copied().collect());
            rest = others;
            if rest.is_empty() {
                return;
            }
        }
    }
}

//! What the hub's operator does between messages: maps and players that move, edits, and what lies in limbo.

use std::collections::BTreeMap;

use fastrand::Rng;
use p2p_sync_proto::{Code, Path, Position, Problem, Scope};
use uuid::Uuid;

use super::{
    hub::Origin,
    play::{Difference, Play, same},
    rights::Map,
    world::Character,
};

fn sentence(Problem { code, sentence }: Problem) -> Difference {
    format!("the store does not serve: {code}: {sentence}")
}

impl Play {
    /// Gives a map to a host, takes it from its holder, or lets the lease run out.
    pub(super) async fn move_map(&mut self, random: &mut Rng) -> Result<(), Difference> {
        let name = random.choice(&self.world.maps).expect("some").clone();
        let host = random.usize(..self.hosts.len());
        match random.u8(..10) {
            0..5 => self.grant(&name, host, false, random.u8(..3) > 0).await,
            5..7 => self.grant(&name, host, true, random.u8(..3) > 0).await,
            7..9 => self.release_map(&name).await,
            _ => self.let_run_out(&name).await,
        }
    }

    /// `hears`: the host is told at once.
    pub(super) async fn grant(&mut self, name: &str, place: usize, force: bool, hears: bool) -> Result<(), Difference> {
        let host = self.hosts[place].id;
        let granted = match self.store.grant_map(name, host, force).await {
            Ok(tenure) => Some(tenure),
            Err(problem) if problem.code == Code::NotLeaseHolder => None,
            Err(problem) => return Err(sentence(problem)),
        };
        let due = self
            .hub
            .rights
            .maps
            .entry(name.to_owned())
            .or_default()
            .grant(host, force);
        self.trace.push(format!(
            "{name} is granted to host {place} (force {force}): {granted:?}"
        ));
        if granted != due {
            return Err(format!(
                "{name} is granted to {host} as {granted:?}, and has to be as {due:?}"
            ));
        }
        if let Some(tenure) = granted.filter(|_| hears) {
            self.hosts[place].tenures.insert(name.to_owned(), tenure);
        }
        Ok(())
    }

    async fn release_map(&mut self, name: &str) -> Result<(), Difference> {
        let from = self.store.release_map(name).await.map_err(sentence)?;
        self.trace.push(format!("{name} is released"));
        let due = self.hub.rights.maps.get_mut(name).and_then(Map::release);
        same("the host that a map is taken from", &from, &due)
    }

    /// The lease's time passes.
    async fn let_run_out(&mut self, name: &str) -> Result<(), Difference> {
        const RUN_OUT: &str =
            "UPDATE p2p_sync.host_assignments SET expires_at = alive_at FROM p2p_sync.hub WHERE map = $1";
        let client = self.store.reads().await.map_err(sentence)?;
        client
            .execute(RUN_OUT, &[&name])
            .await
            .map_err(|error| error.to_string())?;
        self.trace.push(format!("the lease of {name} runs out"));
        if let Some(map) = self.hub.rights.maps.get_mut(name) {
            map.runs = false;
        }
        Ok(())
    }

    /// A host renews its leases, and hears of them.
    pub(super) async fn renew(&mut self, place: usize) -> Result<(), Difference> {
        let host = &mut self.hosts[place];
        let (incarnation, counter) = host.next_renewal();
        let renewed = self
            .store
            .renew_leases(host.id, incarnation, counter)
            .await
            .map_err(sentence)?;
        let renewed: BTreeMap<String, u64> = renewed
            .leases
            .into_iter()
            .map(|lease| (lease.map, lease.tenure))
            .collect();
        let mut due = BTreeMap::new();
        for (name, map) in &mut self.hub.rights.maps {
            if map.holder == Some(host.id) {
                map.runs = true;
                due.insert(name.clone(), map.tenure);
            }
        }
        self.trace.push(format!("host {place} renews {renewed:?}"));
        host.tenures.extend(renewed.clone());
        same("what is renewed", &renewed, &due)
    }

    /// The operator writes a path, or deletes it.
    pub(super) async fn edit(&mut self, random: &mut Rng) -> Result<(), Difference> {
        let number = self.number();
        let map = random.usize(..self.world.maps.len());
        let draft = if random.bool() {
            self.world.on_map(map, number, random)
        } else {
            let character = random.usize(..self.world.characters.len());
            self.world.of_player(character, map, number, random)
        };
        let payload = draft.payload.as_deref();
        let edited = self.store.edit(&draft.path, draft.keep, payload, None).await;
        let edit = edited.map_err(sentence)?;
        let path = draft.path.as_str();
        self.trace.push(format!("{path} is edited ({edit}): {payload:?}"));
        self.is_new_edit(path, edit)?;
        let at = Position {
            incarnation: 0,
            sequence: edit,
        };
        self.hub.edit((Uuid::nil(), at), &draft.path, 0, payload, edit);
        self.took_one(&draft.path).await
    }

    fn is_new_edit(&self, path: &str, edit: u64) -> Result<(), Difference> {
        match self.hub.states.values().map(|state| state.edit).max() {
            Some(last) if last >= edit => Err(format!("{path} is edit {edit}, after {last}")),
            _ => Ok(()),
        }
    }

    /// An edit of a path takes one position of its stream, which is its state's.
    async fn took_one(&mut self, path: &Path) -> Result<(), Difference> {
        let row = self.read(path.as_str()).await?;
        let Scope::Map(map) = path.parts().scope else {
            return Ok(());
        };
        let head = self.heads.entry(map.to_owned()).or_default();
        *head += 1;
        same(
            "the position of an edit",
            &row.map(|row| row.stream_sequence),
            &Some(*head),
        )
    }

    /// Merges or discards something that lies in limbo.
    pub(super) async fn decide_limbo(&mut self, random: &mut Rng) -> Result<(), Difference> {
        let Some(origin) = random.choice(self.hub.limbo.keys().copied().collect::<Vec<Origin>>()) else {
            return Ok(());
        };
        let limbo_id = self.limbo_id(origin).await?;
        if random.bool() {
            self.trace.push(format!("{origin:?} is discarded from limbo"));
            self.hub.discard(origin);
            return self.store.discard_limbo(limbo_id).await.map_err(sentence);
        }
        self.trace.push(format!("{origin:?} is merged from limbo"));
        self.store.merge_limbo(limbo_id).await.map_err(sentence)?;
        let mut paths: Vec<Path> = self.hub.limbo[&origin].iter().map(|op| op.path.clone()).collect();
        paths.sort_by_key(|path| (path.parts().scope.stream().to_owned(), path.clone()));
        let mut edits = BTreeMap::new();
        for path in &paths {
            let row = self.store.get(path).await.map_err(sentence)?;
            let edit = row.map_or(0, |row| row.hub_edit);
            self.is_new_edit(path.as_str(), edit)?;
            if edits.values().any(|before| *before >= edit) {
                return Err(format!("{path} is edit {edit}, after {edits:?}"));
            }
            edits.insert(path.as_str().to_owned(), edit);
        }
        self.hub.merge(origin, &edits);
        for path in &paths {
            // Each of a stream's members took one: the last is where the stream is.
            let own = paths
                .iter()
                .filter(|other| other.parts().scope == path.parts().scope)
                .count();
            if own == 1 {
                self.took_one(path).await?;
            } else {
                self.read(path.as_str()).await?;
                if let Scope::Map(map) = path.parts().scope {
                    *self.heads.entry(map.to_owned()).or_default() += 1;
                }
            }
        }
        Ok(())
    }

    async fn limbo_id(&self, (host, at): Origin) -> Result<i64, Difference> {
        const ID: &str =
            "SELECT limbo_id FROM p2p_sync.limbo_operations WHERE host_id = $1 AND incarnation = $2 AND sequence = $3";
        let client = self.store.reads().await.map_err(sentence)?;
        let (incarnation, sequence) = (at.incarnation.cast_signed(), at.sequence.cast_signed());
        let row = client.query_one(ID, &[&host, &incarnation, &sequence]).await;
        Ok(row
            .map_err(|error| format!("{at:?} of {host} does not lie in limbo: {error}"))?
            .get(0))
    }

    /// The operator takes a character from whoever has it.
    pub(super) async fn release_player(&mut self, character: Character) -> Result<(), Difference> {
        let from = self.store.release_player(character.id).await.map_err(sentence)?;
        self.trace
            .push(format!("character {} is released from {from:?}", character.id));
        let due = self.hub.rights.release_player(character.id);
        same("the host that a character is taken from", &from, &due)
    }

    /// The operator says whose a character is.
    pub(super) async fn set_account(&mut self, character: Character, account: u32) -> Result<(), Difference> {
        let from = match self.store.set_player_account(character.id, account).await {
            Ok(from) => Some(from),
            Err(problem) if problem.code == Code::NotFound => None,
            Err(problem) => return Err(sentence(problem)),
        };
        self.trace.push(format!(
            "character {} is account {account}'s, was with {from:?}",
            character.id
        ));
        let is_known = self.hub.rights.seats.contains_key(&character.id);
        let due = is_known.then(|| self.hub.rights.set_account(character.id, account));
        same("the host that a character is taken from", &from, &due)
    }

    /// The operator writes a ticket for a host.
    pub(super) async fn promise(&mut self, character: Character, place: usize) -> Result<(), Difference> {
        let host = self.hosts[place].id;
        let promised = match self.store.promise_player(character.id, host).await {
            Ok(()) => true,
            Err(problem) if problem.code == Code::NotFound => false,
            Err(problem) => return Err(sentence(problem)),
        };
        self.trace.push(format!(
            "host {place} gets a ticket for character {}: {promised}",
            character.id
        ));
        let due = self.hub.rights.promise(character.id, host);
        same("whether a ticket is written", &promised, &due)
    }
}

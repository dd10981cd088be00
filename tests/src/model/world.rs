//! The little world of one schedule: its names are its own, so that many schedules share a database.

use fastrand::Rng;
use p2p_sync_proto::{Path, Scope, policy::Keep, v1::SyncDataType};
use p2p_sync_proxy::operation::{ConflictRule, History};
use uuid::Uuid;

use super::host::Draft;

/// A character, and whose it is.
#[derive(Clone, Copy, Debug)]
pub(super) struct Character {
    pub(super) id: u64,
    pub(super) account: u32,
}

/// All names. Few of each, so that hosts meet.
#[derive(Debug)]
pub(super) struct World {
    pub(super) hosts: Vec<Uuid>,
    pub(super) maps: Vec<String>,
    pub(super) characters: Vec<Character>,
}

type Kind = (SyncDataType, Option<&'static str>, Keep, History, ConflictRule);

/// What happens on a map: every way of keeping, logging and settling conflicts.
const ON_MAPS: [Kind; 5] = [
    (
        SyncDataType::MonsterData,
        Some("1"),
        Keep::Latest,
        History::Off,
        ConflictRule::Newest,
    ),
    (
        SyncDataType::MapState,
        None,
        Keep::Latest,
        History::All,
        ConflictRule::Hub,
    ),
    (
        SyncDataType::NpcState,
        Some("1"),
        Keep::Latest,
        History::Off,
        ConflictRule::Host,
    ),
    (
        SyncDataType::ChatMessage,
        None,
        Keep::Every,
        History::All,
        ConflictRule::Host,
    ),
    (
        SyncDataType::CriticalGameState,
        None,
        Keep::Every,
        History::All,
        ConflictRule::Both,
    ),
];
const OF_CHARACTERS: [Kind; 2] = [
    (
        SyncDataType::PlayerData,
        None,
        Keep::Latest,
        History::All,
        ConflictRule::Hub,
    ),
    (
        SyncDataType::QuestProgress,
        Some("1"),
        Keep::Every,
        History::All,
        ConflictRule::Hub,
    ),
];
const OF_ACCOUNTS: [Kind; 2] = [
    (
        SyncDataType::PlayerData,
        None,
        Keep::Latest,
        History::Off,
        ConflictRule::Both,
    ),
    (
        SyncDataType::QuestProgress,
        Some("2"),
        Keep::Every,
        History::All,
        ConflictRule::Newest,
    ),
];
const OF_HOSTS: Kind = (
    SyncDataType::HostMetrics,
    None,
    Keep::Latest,
    History::Off,
    ConflictRule::Host,
);

impl World {
    /// The world of one run of a schedule; `run` is of this one alone.
    pub(super) fn new(run: u32, random: &mut Rng) -> Self {
        let hosts = 1..=random.u128(2..=3);
        let maps = ["a", "b", "c"][..random.usize(2..=3)].iter();
        let account = |n: u32| 4 * run + n;
        let character = |n: u32, account| Character {
            id: u64::from(8 * run + n),
            account,
        };
        Self {
            hosts: hosts.map(|host| Uuid::from_u128(u128::from(run) << 8 | host)).collect(),
            maps: maps.map(|map| format!("m{run}{map}")).collect(),
            characters: vec![
                character(1, account(1)),
                character(2, account(1)),
                character(3, account(2)),
            ],
        }
    }

    /// Something that happens on a map; a payload of this number, or a deletion.
    pub(super) fn on_map(&self, map: usize, number: i64, random: &mut Rng) -> Draft {
        let map = &self.maps[map];
        draft(
            Scope::Map(map),
            random.choice(ON_MAPS).expect("some"),
            map,
            0,
            number,
            random,
        )
    }

    /// Something that happens to a character, or to its account.
    pub(super) fn of_player(&self, character: usize, map: usize, number: i64, random: &mut Rng) -> Draft {
        let Character { id, account } = self.characters[character];
        let (scope, kind) = if random.u8(..3) == 0 {
            (Scope::Account(account), random.choice(OF_ACCOUNTS))
        } else {
            (Scope::Char(id), random.choice(OF_CHARACTERS))
        };
        draft(scope, kind.expect("some"), &self.maps[map], account, number, random)
    }

    /// What a host tells of itself.
    pub(super) fn of_host(&self, host: usize, number: i64, random: &mut Rng) -> Draft {
        draft(Scope::Host(self.hosts[host]), OF_HOSTS, "", 0, number, random)
    }

    /// A character comes to a map, or leaves it (`enter`, `leave`), as one of an account; 0: of whichever it is.
    pub(super) fn moved(&self, event: &str, character: usize, account: u32, map: usize, number: i64) -> Draft {
        let scope = Scope::Char(self.characters[character].id);
        Draft {
            path: Path::new(scope, SyncDataType::PlayerPresence, None).expect("valid"),
            keep: Keep::Every,
            history: History::All,
            conflict_rule: ConflictRule::Hub,
            account_id: account,
            map: self.maps[map].clone(),
            payload: Some(format!("{{\"event\": \"{event}\", \"n\": {number}}}")),
        }
    }

    /// All paths of maps, players and hosts that something is ever written to.
    pub(super) fn paths(&self) -> Vec<String> {
        let mut paths = Vec::new();
        let mut add = |scope: Scope<'_>, kinds: &[Kind]| {
            let of_kind = |kind: &Kind| Path::new(scope, kind.0, kind.1).expect("valid").as_str().to_owned();
            paths.extend(kinds.iter().map(of_kind));
        };
        for map in &self.maps {
            add(Scope::Map(map), &ON_MAPS);
        }
        for Character { id, account } in &self.characters {
            add(Scope::Char(*id), &OF_CHARACTERS);
            let presence = (
                SyncDataType::PlayerPresence,
                None,
                Keep::Every,
                History::All,
                ConflictRule::Hub,
            );
            add(Scope::Char(*id), &[presence]);
            add(Scope::Account(*account), &OF_ACCOUNTS);
        }
        for host in &self.hosts {
            add(Scope::Host(*host), &[OF_HOSTS]);
        }
        paths.sort_unstable();
        paths.dedup();
        paths
    }
}

fn draft(scope: Scope<'_>, kind: Kind, map: &str, account_id: u32, number: i64, random: &mut Rng) -> Draft {
    let (data_type, entity, keep, history, conflict_rule) = kind;
    Draft {
        path: Path::new(scope, data_type, entity).expect("valid"),
        keep,
        history,
        conflict_rule,
        account_id,
        map: map.to_owned(),
        payload: (random.u8(..8) > 0).then(|| format!("{{\"n\": {number}}}")),
    }
}

/// Whether each operation of a path counts.
pub(super) fn keeps_every(path: &str) -> bool {
    let path = Path::parse(path).expect("the world's paths are valid");
    let data_type = path.parts().data_type;
    let kinds = ON_MAPS.iter().chain(&OF_CHARACTERS).chain(&OF_ACCOUNTS);
    let mut kept = kinds.filter(|kind| kind.0 == data_type).map(|kind| kind.2);
    data_type == SyncDataType::PlayerPresence || kept.any(|keep| keep == Keep::Every)
}

//! What the hub lays down for each type: whose it is, what is kept of it, how it travels.

use std::borrow::Cow;

use crate::{
    json::Facts,
    limits::PAYLOAD_BYTES_MAX,
    path::{Path, Scope, check_map},
    reject_code::{Code, Problem},
    v1::{self, SyncDataType, type_policy},
};

pub use type_policy::{Keep, Owner};

/// Every type, in the order of its number.
pub const TYPES: [SyncDataType; 13] = [
    SyncDataType::MapState,
    SyncDataType::MonsterData,
    SyncDataType::PlayerPosition,
    SyncDataType::ItemDrop,
    SyncDataType::NpcState,
    SyncDataType::QuestProgress,
    SyncDataType::CriticalGameState,
    SyncDataType::ChatMessage,
    SyncDataType::VectorEmbedding,
    SyncDataType::HostMetrics,
    SyncDataType::SecurityValidation,
    SyncDataType::PlayerData,
    SyncDataType::PlayerPresence,
];

/// The policy of one type.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// Which type.
    pub data_type: SyncDataType,
    /// Decides the scope of its paths.
    pub owner: Owner,
    /// Whether the newest version of a path is the truth, or each operation counts.
    pub keep: Keep,
    /// Travels in the critical lane unless the call says otherwise.
    pub critical: bool,
    /// The JSON member that names the owning character.
    pub owner_key: Option<String>,
    /// The JSON member that names the entity.
    pub entity_key: Option<String>,
    /// Of the JSON payload.
    pub payload_bytes_max: usize,
}

impl Policy {
    /// The path of an operation of this type.
    ///
    /// `entity` given by the call goes before the one read from the payload; a DELETE without payload has to give what
    /// the payload would have said (`ENTITY_MISSING`). A map that is given has to be one also where the owner is none
    /// (`BAD_MAP`): it travels with the operation.
    pub fn path(&self, place: &Place<'_>, facts: Option<&Facts<'_>>) -> Result<Path, Problem> {
        let member = |key: &Option<String>| key.as_deref().and_then(|key| facts?.member(key));
        if !place.map.is_empty() {
            check_map(place.map)?;
        }
        let scope = match self.owner {
            Owner::Map | Owner::Unspecified => Scope::Map(place.map),
            Owner::Account => Scope::Account(place.account_id),
            Owner::Host => Scope::Host(place.host_id),
            Owner::Char => {
                let id = place.char_id.or_else(|| member(&self.owner_key)?.parse().ok());
                Scope::Char(id.ok_or_else(|| self.missing(self.owner_key.as_deref(), "character"))?)
            }
        };
        let entity = place.entity.map(Cow::Borrowed).or_else(|| member(&self.entity_key));
        if let (Some(key), None) = (&self.entity_key, &entity) {
            return Err(self.missing(Some(key), "entity"));
        }
        Path::new(scope, self.data_type, entity.as_deref())
    }

    fn missing(&self, key: Option<&str>, what: &str) -> Problem {
        Problem::new(
            Code::EntityMissing,
            format!(
                "a {} needs its {what}: put {:?} into the JSON object, or give it with the call",
                self.data_type.as_str_name(),
                key.unwrap_or("char_id"),
            ),
        )
    }
}

/// Where an operation happened and whom it is about, as the call gives it.
#[derive(Clone, Copy, Debug)]
pub struct Place<'a> {
    /// The host that makes the operation.
    pub host_id: uuid::Uuid,
    /// The map's name; may be empty where the owner is not a map.
    pub map: &'a str,
    /// Whom it is about; 0 for nobody.
    pub account_id: u32,
    /// The character, where the call names one.
    pub char_id: Option<u64>,
    /// The entity, where the call names one.
    pub entity: Option<&'a str>,
}

/// The policies of all types, with the version that the hub counts them by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policies {
    /// Grows with each change; 0 for the built-in ones.
    pub version: u32,
    by_type: Vec<Policy>,
}

impl Policies {
    /// One policy for each type, in any order; types left out keep their built-in policy.
    pub fn new(version: u32, given: impl IntoIterator<Item = Policy>) -> Self {
        let mut policies = Self {
            version,
            ..Self::builtin()
        };
        for policy in given {
            let slot = policy.data_type as usize;
            policies.by_type[slot] = policy;
        }
        policies
    }

    /// What serves until a hub says otherwise.
    pub fn builtin() -> Self {
        use Keep::{Every, Latest};
        use Owner::{Char, Host, Map};
        let policy = |data_type, owner, keep, critical, owner_key: &str, entity_key: &str| Policy {
            data_type,
            owner,
            keep,
            critical,
            owner_key: Some(owner_key.to_owned()).filter(|key| !key.is_empty()),
            entity_key: Some(entity_key.to_owned()).filter(|key| !key.is_empty()),
            payload_bytes_max: PAYLOAD_BYTES_MAX,
        };
        Self {
            version: 0,
            by_type: vec![
                policy(SyncDataType::MapState, Map, Latest, true, "", ""),
                policy(SyncDataType::MonsterData, Map, Latest, true, "", "monster_id"),
                policy(SyncDataType::PlayerPosition, Map, Latest, true, "", "char_id"),
                policy(SyncDataType::ItemDrop, Map, Latest, false, "", "drop_id"),
                policy(SyncDataType::NpcState, Map, Latest, false, "", "npc_id"),
                policy(SyncDataType::QuestProgress, Char, Latest, false, "char_id", "quest_id"),
                policy(SyncDataType::CriticalGameState, Map, Every, true, "", ""),
                policy(SyncDataType::ChatMessage, Map, Every, false, "", "char_id"),
                policy(SyncDataType::VectorEmbedding, Map, Latest, false, "", "id"),
                policy(SyncDataType::HostMetrics, Host, Latest, false, "", ""),
                policy(SyncDataType::SecurityValidation, Host, Every, true, "", ""),
                policy(SyncDataType::PlayerData, Char, Latest, false, "char_id", ""),
                policy(SyncDataType::PlayerPresence, Char, Every, true, "char_id", ""),
            ],
        }
    }

    /// The policy of a type.
    pub fn of(&self, data_type: SyncDataType) -> &Policy {
        &self.by_type[data_type as usize]
    }

    /// All policies, in the order of their types.
    pub fn iter(&self) -> impl Iterator<Item = &Policy> {
        self.by_type.iter()
    }

    /// The same policies with other types in the critical lane.
    #[must_use]
    pub fn with_critical(mut self, critical: &[SyncDataType]) -> Self {
        for policy in &mut self.by_type {
            policy.critical = critical.contains(&policy.data_type);
        }
        self
    }

    /// As the hub sends them.
    pub fn to_wire(&self) -> v1::Policies {
        v1::Policies {
            version: self.version,
            types: self
                .iter()
                .map(|policy| v1::TypePolicy {
                    r#type: policy.data_type.into(),
                    owner: policy.owner.into(),
                    keep: policy.keep.into(),
                    critical: policy.critical,
                    owner_key: policy.owner_key.clone().unwrap_or_default(),
                    entity_key: policy.entity_key.clone().unwrap_or_default(),
                    bytes_max: u32::try_from(policy.payload_bytes_max).expect("bounded by PAYLOAD_BYTES_MAX"),
                })
                .collect(),
        }
    }

    /// Reads what a hub sent; a type this build does not know is left out, so that a newer hub can add types.
    pub fn from_wire(wire: v1::Policies) -> Self {
        let known = wire.types.into_iter().filter_map(|policy| {
            Some(Policy {
                data_type: SyncDataType::try_from(policy.r#type).ok()?,
                owner: Owner::try_from(policy.owner)
                    .ok()
                    .filter(|&owner| owner != Owner::Unspecified)?,
                keep: Keep::try_from(policy.keep)
                    .ok()
                    .filter(|&keep| keep != Keep::Unspecified)?,
                critical: policy.critical,
                owner_key: Some(policy.owner_key).filter(|key| !key.is_empty()),
                entity_key: Some(policy.entity_key).filter(|key| !key.is_empty()),
                payload_bytes_max: (policy.bytes_max as usize).min(PAYLOAD_BYTES_MAX),
            })
        });
        Self::new(wire.version, known)
    }
}

/// Reads a type by its name (`MAP_STATE`) or number (`UNKNOWN_TYPE`).
pub fn parse_type(text: &str) -> Result<SyncDataType, Problem> {
    let by_number = || SyncDataType::try_from(text.parse::<i32>().ok()?).ok();
    SyncDataType::from_str_name(text).or_else(by_number).ok_or_else(|| {
        let names = TYPES.map(|known| known.as_str_name());
        let shown: String = text.chars().take(64).collect();
        let nearest = crate::settings::nearest(text, names.iter().copied());
        Problem::new(
            Code::UnknownType,
            match nearest {
                Some(name) => format!("{shown:?} is not a type; did you mean {name}?"),
                None => format!("{shown:?} is not a type; the types are {}", names.join(", ")),
            },
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::json;

    fn place() -> Place<'static> {
        Place {
            host_id: uuid::Uuid::nil(),
            map: "prontera",
            account_id: 2_000_001,
            char_id: None,
            entity: None,
        }
    }

    #[test]
    fn the_table_is_in_the_order_of_the_numbers() {
        let builtin = Policies::builtin();
        for (number, data_type) in TYPES.into_iter().enumerate() {
            assert_eq!(data_type as usize, number);
            assert_eq!(builtin.of(data_type).data_type, data_type);
        }
    }

    #[test]
    fn policies_survive_the_wire() {
        let policies = Policies {
            version: 3,
            ..Policies::builtin()
        };
        assert_eq!(Policies::from_wire(policies.to_wire()), policies);
    }

    #[test]
    fn the_owner_decides_the_scope_and_the_payload_names_the_entity() {
        let policies = Policies::builtin();
        let facts = json::check(r#"{"char_id":150001,"monster_id":"m7","quest_id":9}"#).expect("valid");
        for (data_type, path) in [
            (SyncDataType::MapState, "prontera/MAP_STATE"),
            (SyncDataType::MonsterData, "prontera/MONSTER_DATA/m7"),
            (SyncDataType::QuestProgress, "@char/150001/QUEST_PROGRESS/9"),
            (
                SyncDataType::HostMetrics,
                "@host/00000000-0000-0000-0000-000000000000/HOST_METRICS",
            ),
        ] {
            assert_eq!(
                policies
                    .of(data_type)
                    .path(&place(), Some(&facts))
                    .expect("valid")
                    .as_str(),
                path
            );
        }
    }

    #[test]
    fn a_missing_entity_is_told_with_the_member_to_add() {
        let problem = Policies::builtin()
            .of(SyncDataType::MonsterData)
            .path(&place(), None)
            .expect_err("no entity");
        assert_eq!(problem.code, Code::EntityMissing);
        assert!(problem.sentence.contains("\"monster_id\""), "{problem}");
    }

    #[test]
    fn invariant_12_a_map_that_is_given_is_checked_whatever_the_owner() {
        let facts = json::check(r#"{"char_id":1,"id":2,"monster_id":3,"npc_id":4,"drop_id":5,"quest_id":6}"#);
        let facts = facts.expect("valid");
        let long = "m".repeat(3 << 20);
        for data_type in TYPES {
            let policies = Policies::builtin();
            let policy = policies.of(data_type);
            for map in [long.as_str(), "no map", "@char"] {
                let refused = policy.path(&Place { map, ..place() }, Some(&facts)).expect_err(map);
                assert_eq!(refused.code, Code::BadMap, "{data_type:?}");
            }
            let nowhere = policy.path(&Place { map: "", ..place() }, Some(&facts));
            assert_eq!(nowhere.is_ok(), policy.owner != Owner::Map, "{data_type:?}");
        }
    }

    #[test]
    fn an_unknown_type_is_told_with_the_nearest_known() {
        let problem = parse_type("MAP_STAT").expect_err("unknown");
        assert_eq!(problem.code, Code::UnknownType);
        assert!(problem.sentence.contains("MAP_STATE"), "{problem}");
        assert_eq!(parse_type("11"), Ok(SyncDataType::PlayerData));
    }
}

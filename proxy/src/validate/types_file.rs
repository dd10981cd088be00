//! `types.toml`: what holds for each type of data.

mod section;

use std::{
    cell::RefCell,
    collections::BTreeMap,
    hash::{BuildHasher, BuildHasherDefault, DefaultHasher},
    num::NonZeroU32,
    path::{Path, PathBuf},
};

use p2p_sync_proto::{
    Code, Policies, Policy, Problem, Scope,
    json::Facts,
    path::Parts,
    policy::{TYPES, parse_type},
    settings::Problems,
    v1::SyncDataType,
};
use toml::{Table, Value};

use self::section::Section;
use super::{game_rule::GameRule, schema::Schema};
use crate::{
    operation::{ConflictRule, History},
    verdicts::movement::Step,
};

const BUILTIN: &str = include_str!("../../../conf/types.toml");
const BUILTIN_SCHEMAS: [(&str, &str); 10] = [
    (
        "schemas/map_state.json",
        include_str!("../../../conf/schemas/map_state.json"),
    ),
    (
        "schemas/monster_data.json",
        include_str!("../../../conf/schemas/monster_data.json"),
    ),
    (
        "schemas/player_position.json",
        include_str!("../../../conf/schemas/player_position.json"),
    ),
    (
        "schemas/item_drop.json",
        include_str!("../../../conf/schemas/item_drop.json"),
    ),
    (
        "schemas/npc_state.json",
        include_str!("../../../conf/schemas/npc_state.json"),
    ),
    (
        "schemas/quest_progress.json",
        include_str!("../../../conf/schemas/quest_progress.json"),
    ),
    (
        "schemas/chat_message.json",
        include_str!("../../../conf/schemas/chat_message.json"),
    ),
    (
        "schemas/player_data.json",
        include_str!("../../../conf/schemas/player_data.json"),
    ),
    (
        "schemas/player_presence.json",
        include_str!("../../../conf/schemas/player_presence.json"),
    ),
    (
        "schemas/host_metrics.json",
        include_str!("../../../conf/schemas/host_metrics.json"),
    ),
];

/// What holds for one type on the hub, beyond the policy that agents get too.
#[derive(Clone, Debug)]
pub struct TypeRules {
    /// What the log keeps.
    pub history: History,
    /// Who is right where a host writes over an edit of the operator's that it had not seen.
    pub conflict: ConflictRule,
    /// What the payload has to look like.
    pub schema: Option<Schema>,
    /// What holds between its members; none without a schema.
    pub game_rules: Vec<GameRule>,
    /// Whether its operations say where a character is, and how it moves is scored.
    pub movement: bool,
    /// JSON pointers to the texts that are embedded, on maps where that is done; none: nothing is.
    pub embedded: Vec<String>,
    /// How many of them a host may send a second; more wait, and hold up no other type.
    pub ops_per_second: Option<NonZeroU32>,
}

impl TypeRules {
    /// Checks a payload that is JSON within its bounds (`SCHEMA_VIOLATION`, `IMPOSSIBLE_VALUE`).
    pub fn check(&self, payload: &str) -> Result<(), Problem> {
        let Some(schema) = &self.schema else { return Ok(()) };
        let payload = serde_json::from_str(payload)
            .map_err(|error| Problem::new(Code::InvalidJson, format!("the payload is not valid JSON: {error}")))?;
        schema.check(&payload)?;
        self.game_rules.iter().try_for_each(|rule| rule.check(&payload))
    }
}

/// What holds for every type.
#[derive(Clone, Debug)]
pub struct Rules {
    /// What agents get too.
    pub policies: Policies,
    by_type: Vec<TypeRules>,
    /// Whether a type's path and order are those of the built-in policies, which agents hold that never connected.
    as_builtin: Vec<bool>,
}

/// What was read to make rules: each file's text, or that it could not be read.
#[derive(Clone, Debug, Default)]
pub struct Sources(BTreeMap<PathBuf, Option<String>>);

impl Sources {
    /// Whether any of the files would be read otherwise now.
    pub fn have_changed(&self) -> bool {
        self.0
            .iter()
            .any(|(file, text)| std::fs::read_to_string(file).ok() != *text)
    }
}

impl Rules {
    /// Reads a types file, or the built-in rules where there is none (`BAD_TYPES_FILE`, all problems at once).
    pub fn load(file: Option<&Path>) -> Result<Self, Problems> {
        Self::load_with_sources(file).0
    }

    /// As [`Self::load`]; gives also what was read, be it good or bad.
    pub fn load_with_sources(file: Option<&Path>) -> (Result<Self, Problems>, Sources) {
        let sources = RefCell::default();
        let rules = match file {
            None => Ok(Self::builtin()),
            Some(file) => Self::read(file, &sources),
        };
        (rules, sources.into_inner())
    }

    fn read(file: &Path, sources: &RefCell<Sources>) -> Result<Self, Problems> {
        let read = |file: PathBuf| {
            let text = std::fs::read_to_string(&file);
            let seen = text.as_ref().ok().cloned();
            sources.borrow_mut().0.insert(file, seen);
            text
        };
        let text = read(file.to_owned()).map_err(|error| {
            let sentence = format!("{} cannot be read ({error}): check types_file", file.display());
            Problems(vec![Problem::new(Code::BadTypesFile, sentence)])
        })?;
        let folder = file.parent().unwrap_or(Path::new(""));
        Self::builtin().overlaid(&text, |name| read(folder.join(name)).map_err(|error| error.to_string()))
    }

    /// These rules with a types file's text over them and one schema for every name, for a fuzzer, which reads no files.
    #[cfg(fuzzing)]
    pub fn overlaid_by(self, text: &str, schema: &str) -> Result<Self, Problems> {
        self.overlaid(text, |_| Ok(schema.to_owned()))
    }

    /// These rules, to hold after others. What agents get is told apart by its version (`BAD_TYPES_FILE`): they would
    /// not hear of a change without one, and one that goes back would be taken for an older one of theirs.
    pub fn after(self, before: &Self) -> Result<Self, Problems> {
        let (new, old) = (&self.policies, &before.policies);
        if new.version > old.version || new.iter().eq(old.iter()) {
            return Ok(self);
        }
        let sentence = format!(
            "version: is {}, and what agents get has changed since version {}: raise it",
            new.version, old.version
        );
        Err(Problems(vec![bad(sentence)]))
    }

    /// The rules this program was built with.
    pub fn builtin() -> Self {
        let schema = |name: &str| match BUILTIN_SCHEMAS.iter().find(|(known, _)| *known == name) {
            Some((_, text)) => Ok((*text).to_owned()),
            None => Err("no such schema was built in".to_owned()),
        };
        let bare = Self {
            policies: Policies::builtin(),
            by_type: vec![TypeRules::default(); TYPES.len()],
            as_builtin: vec![true; TYPES.len()],
        };
        bare.overlaid(BUILTIN, schema)
            .expect("the built-in file is read by a test")
    }

    /// What holds for a type on the hub.
    pub fn of(&self, data_type: SyncDataType) -> &TypeRules {
        &self.by_type[data_type as usize]
    }

    /// Which character is where by an operation, for types whose movement is scored; `facts` of its payload, if any.
    pub fn step(&self, parts: &Parts<'_>, facts: Option<&Facts<'_>>) -> Option<(u64, Step)> {
        if !self.of(parts.data_type).movement {
            return None;
        }
        let step = facts.map_or_else(Step::gone, Step::read);
        match parts.scope {
            // Coming and going is never walked.
            Scope::Char(id) => Some((id, step.warped())),
            // A character that is named by no number is one all the same.
            _ => parts.entity.map(|entity| {
                let by_name = || BuildHasherDefault::<DefaultHasher>::default().hash_one(entity);
                (entity.parse().unwrap_or_else(|_| by_name()), step)
            }),
        }
    }

    /// Whether an operation of this type that was made by the built-in policies has the path it should have.
    pub fn agrees_with_builtin(&self, data_type: SyncDataType) -> bool {
        self.as_builtin[data_type as usize]
    }

    #[cfg(test)]
    pub(super) fn with_policy(mut self, version: u32, changed: Policy) -> Self {
        self.policies = Policies::new(version, merged(&self.policies, vec![changed]));
        self.as_builtin = compare_with_builtin(&self.policies);
        self
    }

    fn overlaid(mut self, text: &str, schema: impl Fn(&str) -> Result<String, String>) -> Result<Self, Problems> {
        let table: Table = text.parse().map_err(|error: toml::de::Error| {
            Problems(vec![Problem::new(
                Code::BadTypesFile,
                format!("the types file is not TOML: {}", error.to_string().trim_end()),
            )])
        })?;
        let mut problems = Vec::new();
        let mut policies = Vec::new();
        let mut version = None;
        for (name, value) in &table {
            match value {
                Value::Integer(number) if name == "version" => {
                    version = u32::try_from(*number).ok().filter(|&version| version > 0);
                }
                Value::Table(members) => match parse_type(name) {
                    Ok(data_type) if data_type.as_str_name() == name => {
                        let mut section = Section {
                            name,
                            members,
                            problems: &mut problems,
                        };
                        let (policy, rules) = section.read(data_type, &schema);
                        self.by_type[data_type as usize] = rules;
                        policies.push(policy);
                    }
                    Ok(data_type) => problems.push(bad(format!("[{name}]: write [{}]", data_type.as_str_name()))),
                    Err(problem) => problems.push(bad(format!("[{name}]: {}", problem.sentence))),
                },
                _ if name == "version" => {}
                _ => problems.push(bad(format!("{name}: expected `version` or a [TYPE]; remove it"))),
            }
        }
        if version.is_none() {
            problems.push(bad(
                "version: expected a whole number from 1, raised with each change".to_owned()
            ));
        }
        self.policies = Policies::new(version.unwrap_or_default(), merged(&self.policies, policies));
        self.as_builtin = compare_with_builtin(&self.policies);
        if problems.is_empty() {
            Ok(self)
        } else {
            Err(Problems(problems))
        }
    }
}

fn compare_with_builtin(policies: &Policies) -> Vec<bool> {
    let decides = |policy: &Policy| {
        (
            policy.owner,
            policy.keep,
            policy.owner_key.clone(),
            policy.entity_key.clone(),
        )
    };
    policies
        .iter()
        .zip(Policies::builtin().iter())
        .map(|(ours, builtin)| decides(ours) == decides(builtin))
        .collect()
}

fn merged(before: &Policies, given: Vec<Policy>) -> impl Iterator<Item = Policy> {
    before.iter().cloned().collect::<Vec<_>>().into_iter().chain(given)
}

impl Default for TypeRules {
    fn default() -> Self {
        Self {
            history: History::All,
            conflict: ConflictRule::default(),
            schema: None,
            game_rules: Vec::new(),
            movement: false,
            embedded: Vec::new(),
            ops_per_second: None,
        }
    }
}

fn bad(sentence: String) -> Problem {
    Problem::new(Code::BadTypesFile, sentence)
}

#[cfg(test)]
mod tests;

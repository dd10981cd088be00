//! One `[TYPE]` of a types file.

use std::num::NonZeroU32;

use p2p_sync_proto::{
    Policy, Problem,
    limits::PAYLOAD_BYTES_MAX,
    policy::{Keep, Owner},
    settings::nearest,
    v1::SyncDataType,
};
use toml::{Table, Value};

use super::{TypeRules, bad};
use crate::{
    embed::text::{POINTERS_MAX, is_pointer},
    operation::{ConflictRule, History},
    validate::{game_rule::GameRule, schema::Schema},
};

const MEMBERS: [&str; 13] = [
    "owner",
    "keep",
    "critical",
    "owner_key",
    "entity_key",
    "history",
    "payload_bytes_max",
    "schema",
    "rules",
    "movement",
    "ops_per_second",
    "conflict",
    "embed",
];

/// One `[TYPE]` of the file, noting each mistake and going on.
pub(super) struct Section<'a> {
    pub(super) name: &'a str,
    pub(super) members: &'a Table,
    pub(super) problems: &'a mut Vec<Problem>,
}

impl Section<'_> {
    pub(super) fn read(
        &mut self,
        data_type: SyncDataType,
        schema: impl Fn(&str) -> Result<String, String>,
    ) -> (Policy, TypeRules) {
        self.refuse_unknown();
        let owners = [
            ("map", Owner::Map),
            ("char", Owner::Char),
            ("account", Owner::Account),
            ("host", Owner::Host),
        ];
        let owner = self.choice("owner", &owners);
        let keep = self.choice("keep", &[("latest", Keep::Latest), ("every", Keep::Every)]);
        let policy = Policy {
            data_type,
            owner,
            keep,
            critical: self.switch("critical"),
            owner_key: self.text("owner_key"),
            entity_key: self.text("entity_key"),
            payload_bytes_max: self.payload_bytes_max(),
        };
        if (policy.owner == Owner::Char) != policy.owner_key.is_some() {
            self.refuse(
                "owner_key",
                "belongs to types whose owner is \"char\", and only to those",
            );
        }
        if data_type == SyncDataType::PlayerPresence && (owner, keep) != (Owner::Char, Keep::Every) {
            self.refuse(
                "owner, keep",
                "are \"char\" and \"every\": by each of these a player is moved",
            );
        }
        let schema = self.schema(schema);
        let rules = TypeRules {
            history: self.history(keep),
            conflict: self.conflict(),
            game_rules: self.game_rules(schema.as_ref()),
            schema,
            movement: self.switch("movement"),
            embedded: self.embedded(owner),
            ops_per_second: self.ops_per_second(),
        };
        (policy, rules)
    }

    fn refuse(&mut self, member: &str, what_to_do: &str) {
        self.problems
            .push(bad(format!("[{}] {member}: {what_to_do}", self.name)));
    }

    fn refuse_unknown(&mut self) {
        for member in self.members.keys().filter(|member| !MEMBERS.contains(&member.as_str())) {
            let hint = match nearest(member, MEMBERS.into_iter()) {
                Some(known) => format!("is unknown; did you mean {known}?"),
                None => "is unknown; remove it".to_owned(),
            };
            self.problems.push(bad(format!("[{}] {member}: {hint}", self.name)));
        }
    }

    /// One of several words; it has to be given.
    fn choice<T: Copy>(&mut self, member: &str, choices: &[(&str, T)]) -> T {
        let written = self.members.get(member).and_then(Value::as_str);
        if let Some((_, value)) = choices.iter().find(|(word, _)| written == Some(*word)) {
            return *value;
        }
        let words: Vec<_> = choices.iter().map(|(word, _)| format!("{word:?}")).collect();
        self.refuse(member, &format!("expected one of {}", words.join(", ")));
        choices[0].1
    }

    fn text(&mut self, member: &str) -> Option<String> {
        let value = self.members.get(member)?;
        let text = value.as_str().filter(|text| (1..=64).contains(&text.len()));
        if text.is_none() {
            self.refuse(member, "expected a text of 1 to 64 bytes; leave it out for none");
        }
        text.map(str::to_owned)
    }

    fn switch(&mut self, member: &str) -> bool {
        match self.members.get(member) {
            None => false,
            Some(Value::Boolean(on)) => *on,
            Some(_) => {
                self.refuse(member, "expected true or false");
                false
            }
        }
    }

    fn payload_bytes_max(&mut self) -> usize {
        let Some(value) = self.members.get("payload_bytes_max") else {
            return PAYLOAD_BYTES_MAX;
        };
        let bytes = value.as_integer().and_then(|bytes| usize::try_from(bytes).ok());
        bytes
            .filter(|bytes| (1..=PAYLOAD_BYTES_MAX).contains(bytes))
            .unwrap_or_else(|| {
                self.refuse(
                    "payload_bytes_max",
                    &format!("expected a whole number from 1 to {PAYLOAD_BYTES_MAX}"),
                );
                PAYLOAD_BYTES_MAX
            })
    }

    /// What hosts say of themselves is for the operator, and no text of the game.
    fn embedded(&mut self, owner: Owner) -> Vec<String> {
        let Some(value) = self.members.get("embed") else {
            return Vec::new();
        };
        let texts = value.as_array().into_iter().flatten();
        let pointers: Option<Vec<String>> = texts.map(|text| text.as_str().map(str::to_owned)).collect();
        let fit = pointers.filter(|pointers| {
            (1..=POINTERS_MAX).contains(&pointers.len()) && pointers.iter().all(|pointer| is_pointer(pointer))
        });
        if owner == Owner::Host {
            self.refuse("embed", "is for types whose owner is \"map\", \"char\" or \"account\"");
        } else if fit.is_none() {
            let expected = format!(
                "expected a list of 1 to {POINTERS_MAX} JSON pointers of at most 64 bytes, e.g. [\"/text\"]; leave it out for \
                 none"
            );
            self.refuse("embed", &expected);
        }
        fit.unwrap_or_default()
    }

    fn ops_per_second(&mut self) -> Option<NonZeroU32> {
        let number = self.members.get("ops_per_second")?;
        let number = number.as_integer().and_then(|number| u32::try_from(number).ok());
        let per_second = number.and_then(NonZeroU32::new);
        if per_second.is_none() {
            self.refuse(
                "ops_per_second",
                "expected a whole number from 1; leave it out for no bound",
            );
        }
        per_second
    }

    fn history(&mut self, keep: Keep) -> History {
        let Some(value) = self.members.get("history") else {
            return History::All;
        };
        let history = match value.as_str() {
            Some("all") => Some(History::All),
            Some("off") => Some(History::Off),
            Some(text) => sampled(text),
            None => None,
        };
        match history {
            Some(history) if keep == Keep::Latest || matches!(history, History::All) => history,
            Some(_) => {
                self.refuse(
                    "history",
                    "types kept as \"every\" are always logged whole; leave it out",
                );
                History::All
            }
            None => {
                self.refuse(
                    "history",
                    "expected \"all\", \"off\" or \"sampled:<seconds>s\" with 1 to 86400 seconds",
                );
                History::All
            }
        }
    }

    fn conflict(&mut self) -> ConflictRule {
        if !self.members.contains_key("conflict") {
            return ConflictRule::default();
        }
        let rules = [
            ("hub", ConflictRule::Hub),
            ("host", ConflictRule::Host),
            ("newest", ConflictRule::Newest),
            ("both", ConflictRule::Both),
        ];
        self.choice("conflict", &rules)
    }

    fn schema(&mut self, read: impl Fn(&str) -> Result<String, String>) -> Option<Schema> {
        let value = self.members.get("schema")?;
        let Some(name) = value.as_str() else {
            self.refuse("schema", "expected the path of a JSON Schema");
            return None;
        };
        let compiled = read(name)
            .map_err(|error| format!("cannot be read ({error})"))
            .and_then(|text| Schema::compile(&text));
        compiled
            .map_err(|error| self.refuse("schema", &format!("{name} {error}")))
            .ok()
    }

    /// A rule names members of the schema, so that a misspelt one does not hold for ever.
    fn game_rules(&mut self, schema: Option<&Schema>) -> Vec<GameRule> {
        let Some(value) = self.members.get("rules") else {
            return Vec::new();
        };
        let texts: Option<Vec<&str>> = value
            .as_array()
            .and_then(|rules| rules.iter().map(Value::as_str).collect());
        let Some(texts) = texts else {
            self.refuse("rules", "expected a list of texts, e.g. [\"hp <= max_hp\"]");
            return Vec::new();
        };
        let mut rules = Vec::new();
        for text in texts {
            match GameRule::parse(text) {
                Ok(rule) => rules.push(rule),
                Err(expected) => self.refuse("rules", &format!("{text:?}: {expected}")),
            }
        }
        let Some(schema) = schema else {
            // A schema that was given and does not compile has been told already.
            if !rules.is_empty() && !self.members.contains_key("schema") {
                self.refuse("rules", "compare members of the type's schema: give it one");
            }
            return Vec::new();
        };
        for member in rules.iter().flat_map(GameRule::members) {
            if !schema.members().any(|known| known == member) {
                let hint = match nearest(member, schema.members()) {
                    Some(known) => format!("{member} is no member of the schema; did you mean {known}?"),
                    None => format!("{member} is no member of the schema; describe it there"),
                };
                self.refuse("rules", &hint);
            }
        }
        rules
    }
}

/// `sampled:10s`
fn sampled(text: &str) -> Option<History> {
    let seconds = text.strip_prefix("sampled:")?.strip_suffix('s')?.parse().ok()?;
    (1..=86_400).contains(&seconds).then_some(History::Sampled { seconds })
}

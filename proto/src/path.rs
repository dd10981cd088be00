//! Paths: the address of one piece of state.
//!
//! `<map>/<TYPE>[/<entity>]` belongs to a map, `@char/<id>/<TYPE>[/<entity>]` and `@account/<id>/<TYPE>[/<entity>]`
//! travel with a player, `@host/<id>/<TYPE>[/<entity>]` is the host's own.

use std::fmt::{self, Write as _};

use uuid::Uuid;

use crate::{
    limits::{ENTITY_BYTES_MAX, MAP_BYTES_MAX, PATH_BYTES_MAX},
    reject_code::{Code, Problem},
    v1::SyncDataType,
};

/// The stream that numbers the commits of everything that travels with players.
pub const PLAYER_STREAM: &str = "@player";
/// The stream that numbers the commits of what is the hosts' own.
pub const HOST_STREAM: &str = "@host";

/// What the paths of a hub's own embeddings begin with: of what a tool keeps there under an id, which stands behind it. No
/// operation has such a path.
pub const HUB_EMBEDDINGS: &str = "@hub/VECTOR_EMBEDDING/";

/// Characters' ids are numbers that a database counts with.
const CHAR_MAX: u64 = i64::MAX.unsigned_abs();

/// Whose state it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Scope<'a> {
    /// A map's, by its name; an instance of a map is a map of its own.
    Map(&'a str),
    /// A character's.
    Char(u64),
    /// An account's.
    Account(u32),
    /// The host's own.
    Host(Uuid),
}

impl<'a> Scope<'a> {
    /// The stream that numbers this scope's commits.
    pub fn stream(&self) -> &'a str {
        match self {
            Self::Map(map) => map,
            Self::Char(_) | Self::Account(_) => PLAYER_STREAM,
            Self::Host(_) => HOST_STREAM,
        }
    }
}

impl fmt::Display for Scope<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Map(map) => f.write_str(map),
            Self::Char(id) => write!(f, "@char/{id}"),
            Self::Account(id) => write!(f, "@account/{id}"),
            Self::Host(id) => write!(f, "@host/{id}"),
        }
    }
}

/// A path that is known to be one.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Path(String);

/// A path taken apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parts<'a> {
    /// Whose state it is.
    pub scope: Scope<'a>,
    /// What it tells of.
    pub data_type: SyncDataType,
    /// Which one of its owner's, where there are several.
    pub entity: Option<&'a str>,
}

impl Path {
    /// Builds a path; refuses names and entities that are not valid in one (`BAD_MAP`, `BAD_PATH`).
    pub fn new(scope: Scope<'_>, data_type: SyncDataType, entity: Option<&str>) -> Result<Self, Problem> {
        match scope {
            Scope::Map(map) => check_map(map)?,
            Scope::Char(id) => check_char(id)?,
            Scope::Account(_) | Scope::Host(_) => {}
        }
        if let Some(entity) = entity {
            check_entity(entity)?;
        }
        let mut text = String::with_capacity(PATH_BYTES_MAX);
        match scope {
            // By far the most, and written for each operation: formatting would cost more than all the rest.
            Scope::Map(map) => text.push_str(map),
            scope => write!(text, "{scope}").expect("a String takes everything"),
        }
        text.push('/');
        text.push_str(data_type.as_str_name());
        if let Some(entity) = entity {
            text.push('/');
            text.push_str(entity);
        }
        Ok(Self(text))
    }

    /// Reads a path as it is written (`BAD_PATH`, `BAD_MAP`, `UNKNOWN_TYPE`).
    pub fn parse(text: &str) -> Result<Self, Problem> {
        split(text)?;
        Ok(Self(text.to_owned()))
    }

    /// The path as it is written.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Takes the path apart.
    pub fn parts(&self) -> Parts<'_> {
        split(&self.0).expect("only a checked text becomes a Path")
    }
}

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Checks a map's name: 1 to [`MAP_BYTES_MAX`] bytes of ASCII letters, digits and `_ - . @ #`, not beginning with `@`.
pub fn check_map(map: &str) -> Result<(), Problem> {
    let fits = (1..=MAP_BYTES_MAX).contains(&map.len())
        && !map.starts_with('@')
        && map.bytes().all(|b| b.is_ascii_alphanumeric() || b"_-.@#".contains(&b));
    if fits {
        return Ok(());
    }
    if map.is_empty() {
        return Err(Problem::new(
            Code::BadMap,
            "the map's name is missing: say on which map it happened",
        ));
    }
    let shown: String = map.chars().take(MAP_BYTES_MAX).collect();
    Err(Problem::new(
        Code::BadMap,
        format!(
            "map name {shown:?} is not one: give 1 to {MAP_BYTES_MAX} letters, digits or _-.@#, not beginning with @"
        ),
    ))
}

fn check_char(id: u64) -> Result<(), Problem> {
    if id <= CHAR_MAX {
        return Ok(());
    }
    Err(bad(format!("{id} is no character's id: the largest is {CHAR_MAX}")))
}

/// Checks an entity, or an id of a tool's own: 1 to [`ENTITY_BYTES_MAX`] bytes without `/` and control characters.
pub fn check_entity(entity: &str) -> Result<(), Problem> {
    let fits = (1..=ENTITY_BYTES_MAX).contains(&entity.len()) && !entity.chars().any(|c| c == '/' || c.is_control());
    if fits {
        return Ok(());
    }
    Err(Problem::new(
        Code::BadPath,
        format!("an entity has 1 to {ENTITY_BYTES_MAX} bytes, without / and control characters: choose another key"),
    ))
}

fn split(text: &str) -> Result<Parts<'_>, Problem> {
    if text.len() > PATH_BYTES_MAX {
        return Err(bad(format!(
            "the path has {} bytes; at most {PATH_BYTES_MAX} are allowed",
            text.len()
        )));
    }
    let mut segments = text.split('/');
    let first = segments.next().unwrap_or_default();
    let scope = match first {
        "@char" => {
            let id = number(segments.next(), text)?;
            check_char(id)?;
            Scope::Char(id)
        }
        "@account" => Scope::Account(number(segments.next(), text)?),
        "@host" => Scope::Host(
            segments
                .next()
                .and_then(|id| {
                    Uuid::parse_str(id)
                        .ok()
                        .filter(|uuid| uuid.hyphenated().to_string() == id)
                })
                .ok_or_else(|| {
                    bad(format!(
                        "in path {text:?} a host id is a UUID in lower case with hyphens"
                    ))
                })?,
        ),
        map => {
            check_map(map)?;
            Scope::Map(map)
        }
    };
    let name = segments
        .next()
        .ok_or_else(|| bad(format!("path {text:?} names no type; write <owner>/<TYPE>")))?;
    let data_type = SyncDataType::from_str_name(name).ok_or_else(|| {
        Problem::new(
            Code::UnknownType,
            format!("path {text:?} names the unknown type {name:?}: write <owner>/<TYPE>, e.g. prontera/MAP_STATE"),
        )
    })?;
    let entity = segments.next();
    if let Some(entity) = entity {
        check_entity(entity)?;
    }
    if segments.next().is_some() {
        return Err(bad(format!(
            "path {text:?} has too many segments; write <owner>/<TYPE>/<entity>"
        )));
    }
    Ok(Parts {
        scope,
        data_type,
        entity,
    })
}

/// Reads an id in the one form it is written in, so that one piece of state has one address.
fn number<N: std::str::FromStr + ToString>(segment: Option<&str>, path: &str) -> Result<N, Problem> {
    segment
        .and_then(|text| text.parse::<N>().ok().filter(|number| number.to_string() == text))
        .ok_or_else(|| {
            bad(format!(
                "in path {path:?} the owner's id is a whole number without sign or leading zeros"
            ))
        })
}

fn bad(sentence: String) -> Problem {
    Problem::new(Code::BadPath, sentence)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_built_and_taken_apart() {
        let host = Uuid::from_u128(7);
        let cases = [
            (
                Scope::Map("prontera"),
                SyncDataType::MapState,
                None,
                "prontera/MAP_STATE",
            ),
            (
                Scope::Map("1@cata"),
                SyncDataType::MonsterData,
                Some("110"),
                "1@cata/MONSTER_DATA/110",
            ),
            (
                Scope::Char(150_001),
                SyncDataType::PlayerData,
                None,
                "@char/150001/PLAYER_DATA",
            ),
            (
                Scope::Account(2),
                SyncDataType::QuestProgress,
                Some("7"),
                "@account/2/QUEST_PROGRESS/7",
            ),
            (
                Scope::Host(host),
                SyncDataType::HostMetrics,
                None,
                "@host/00000000-0000-0000-0000-000000000007/HOST_METRICS",
            ),
        ];
        for (scope, data_type, entity, text) in cases {
            let path = Path::new(scope, data_type, entity).expect("valid");
            assert_eq!(path.as_str(), text);
            assert_eq!(Path::parse(text).as_ref(), Ok(&path));
            assert_eq!(
                path.parts(),
                Parts {
                    scope,
                    data_type,
                    entity
                }
            );
        }
    }

    #[test]
    fn each_malformed_path_has_its_code() {
        let long = format!("prontera/MAP_STATE/{}", "e".repeat(300));
        let cases = [
            ("", Code::BadMap),
            ("prontera", Code::BadPath),
            ("pront era/MAP_STATE", Code::BadMap),
            ("@nobody/1/MAP_STATE", Code::BadMap),
            ("@hub/VECTOR_EMBEDDING/1", Code::BadMap),
            ("prontera/NO_SUCH_TYPE", Code::UnknownType),
            ("prontera/MAP_STATE/", Code::BadPath),
            ("prontera/MAP_STATE/a/b", Code::BadPath),
            ("prontera/MAP_STATE/a\0b", Code::BadPath),
            ("@char/01/PLAYER_DATA", Code::BadPath),
            ("@char/+1/PLAYER_DATA", Code::BadPath),
            ("@char/9223372036854775808/PLAYER_DATA", Code::BadPath),
            ("@account/4294967296/PLAYER_DATA", Code::BadPath),
            ("@host/00000000000000000000000000000007/HOST_METRICS", Code::BadPath),
            (long.as_str(), Code::BadPath),
        ];
        for (text, code) in cases {
            assert_eq!(Path::parse(text).expect_err(text).code, code, "{text:?}");
        }
        let too_large = Path::new(Scope::Char(1 << 63), SyncDataType::PlayerData, None);
        assert_eq!(too_large.expect_err("no bigint").code, Code::BadPath);
    }
}

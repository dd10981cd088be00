//! Consumers: who brings what is committed here into other databases, and how far each of them is. What they read is the
//! matter of `consuming`.

use std::time::SystemTime;

use p2p_sync_proto::{
    Code, Path, Problem,
    path::{HOST_STREAM, PLAYER_STREAM, check_map},
    v1::SyncDataType,
};
use tokio_postgres::Row;

use super::{Store, unsigned};

/// Each asks for its streams twice a second.
const CONSUMERS_MAX: i64 = 64;
/// Streams and types that one consumer may name.
const NAMED_MAX: usize = 1024;

/// What a consumer is told.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ConsumerFilter {
    /// Of which streams: maps, `@player`, `@host`; `*` stands for any letters. Empty: of all.
    pub maps: Vec<String>,
    /// Of which types, by their names. Empty: of all.
    pub types: Vec<String>,
}

/// A consumer, and how far behind it is.
#[derive(Clone, Debug)]
pub struct Consumer {
    /// What it is called.
    pub name: String,
    /// What it is told.
    pub filter: ConsumerFilter,
    /// Positions that it has not acknowledged; not every one is a change that it is told.
    pub behind: u64,
    /// Streams that it is behind in.
    pub streams_behind: u64,
    /// Of these, the ones that begin anew with a snapshot, having been read before.
    pub streams_anew: u64,
    /// It has yet to begin, or to begin anew with all streams: the hub's database went back, or it was rewound.
    pub begins: bool,
    /// When it acknowledged something last.
    pub moved_at: Option<SystemTime>,
    /// Who reads it now, for people.
    pub reader: Option<String>,
}

/// How far a consumer is in a stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConsumerStream {
    /// A map, `@player` or `@host`.
    pub stream: String,
    /// Up to where everything is acknowledged; none where it has yet to begin.
    pub acknowledged: Option<u64>,
    /// The last position that was given out.
    pub head: u64,
    /// Positions from there to the head, all where it begins anew.
    pub behind: u64,
    /// Why it begins anew with a snapshot, if it does.
    pub anew: Option<Anew>,
    /// When something of it was acknowledged last.
    pub moved_at: Option<SystemTime>,
}

/// Why a stream that was read before begins anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Anew {
    /// The operator wanted it.
    Rewound,
    /// It is shorter than it was.
    WentBack,
    /// Deletions or logged operations that were not told are not kept any more.
    Forgotten,
}

impl Anew {
    pub(super) fn of(reason: Option<&str>) -> Option<Self> {
        match reason? {
            "rewound" => Some(Self::Rewound),
            "went back" => Some(Self::WentBack),
            _ => Some(Self::Forgotten),
        }
    }

    /// For people.
    pub fn sentence(self) -> &'static str {
        match self {
            Self::Rewound => "the operator rewound it",
            Self::WentBack => "the stream is shorter than it was: the hub's database went back",
            Self::Forgotten => "what was not acknowledged is older than what the hub keeps",
        }
    }
}

impl ConsumerFilter {
    /// Refuses what matches nothing that could ever be (`BAD_MAP`), and more than a consumer may name (`BAD_VALUE`). Types
    /// are taken as they are.
    pub fn check(&self) -> Result<(), Problem> {
        if self.maps.len().max(self.types.len()) > NAMED_MAX {
            let sentence = format!("a consumer names at most {NAMED_MAX} maps and types: use *, or leave --map out");
            return Err(Problem::new(Code::BadValue, sentence));
        }
        for map in &self.maps {
            // As if the * stood for a letter.
            let name = map.replace('*', "x");
            if ![PLAYER_STREAM, HOST_STREAM].contains(&map.as_str()) {
                check_map(&name).map_err(|problem| {
                    let streams = format!(
                        "{}; beside maps there are {PLAYER_STREAM} and {HOST_STREAM}",
                        problem.sentence
                    );
                    Problem::new(problem.code, streams)
                })?;
            }
        }
        Ok(())
    }

    /// Whether a change at a path is told, of a stream that is.
    pub(super) fn shows(&self, path: &str) -> bool {
        self.types.is_empty()
            || type_of(path).is_some_and(|name| self.types.iter().any(|wanted| wanted == name.as_str_name()))
    }
}

/// The type of a path; none of one that this build cannot read.
pub(crate) fn type_of(path: &str) -> Option<SyncDataType> {
    Some(Path::parse(path).ok()?.parts().data_type)
}

impl Store {
    /// Makes a consumer, which begins with everything that is there.
    ///
    /// `BAD_VALUE` for a name that is none or has one already, or one consumer too many; see [`ConsumerFilter::check`].
    pub async fn add_consumer(&self, name: &str, filter: &ConsumerFilter) -> Result<(), Problem> {
        const ADD: &str = "INSERT INTO p2p_sync.consumers (name, maps, types) \
            SELECT $1, $2::text[], $3::text[] WHERE (SELECT count(*) FROM p2p_sync.consumers) < $4 ON CONFLICT DO NOTHING";
        check_name(name)?;
        filter.check()?;
        let bad = |sentence: String| Err(Problem::new(Code::BadValue, sentence));
        if !self.consumers(Some(name)).await?.is_empty() {
            return bad(format!(
                "there is a consumer {name}: choose another name, or remove that one first (`feed remove {name}`)"
            ));
        }
        let added = self
            .write(ADD, &[&name, &filter.maps, &filter.types, &CONSUMERS_MAX])
            .await?;
        if added == 0 {
            return bad(format!(
                "there are {CONSUMERS_MAX} consumers: remove one that nobody needs (`feed list`, `feed remove`)"
            ));
        }
        Ok(())
    }

    /// All consumers, or one.
    pub async fn consumers(&self, name: Option<&str>) -> Result<Vec<Consumer>, Problem> {
        const LIST: &str = "SELECT k.name, k.maps, k.types, coalesce(s.behind, 0)::bigint, s.streams, s.anew, \
                k.timeline IS DISTINCT FROM h.timeline, \
                (SELECT max(moved_at) FROM p2p_sync.consumer_cursors WHERE consumer = k.name), \
                p2p_sync.consumer_reader(k.name) \
            FROM p2p_sync.consumers AS k CROSS JOIN p2p_sync.hub AS h CROSS JOIN LATERAL ( \
                SELECT sum(behind) AS behind, count(*) AS streams, count(begins_anew) AS anew \
                FROM p2p_sync.consumer_streams WHERE consumer = k.name AND behind > 0) AS s \
            WHERE k.name = coalesce($1, k.name) ORDER BY k.name";
        let rows = self.rows(LIST, &[&name]).await?;
        let of = |row: &Row| Consumer {
            name: row.get(0),
            filter: ConsumerFilter {
                maps: row.get(1),
                types: row.get(2),
            },
            behind: unsigned(row.get(3)),
            streams_behind: unsigned(row.get(4)),
            streams_anew: unsigned(row.get(5)),
            begins: row.get(6),
            moved_at: row.get(7),
            reader: row.get(8),
        };
        Ok(rows.iter().map(of).collect())
    }

    /// One consumer, and how far it is in each stream that it reads, those that it is furthest behind in first.
    pub async fn consumer(&self, name: &str) -> Result<(Consumer, Vec<ConsumerStream>), Problem> {
        const STREAMS: &str = "SELECT stream, sequence, head, behind, begins_anew, moved_at \
            FROM p2p_sync.consumer_streams WHERE consumer = $1 ORDER BY behind DESC, stream";
        let consumer = self
            .consumers(Some(name))
            .await?
            .pop()
            .ok_or_else(|| no_consumer(name))?;
        let rows = self.rows(STREAMS, &[&name]).await?;
        let of = |row: &Row| ConsumerStream {
            stream: row.get(0),
            acknowledged: row.get::<_, Option<i64>>(1).map(unsigned),
            head: unsigned(row.get(2)),
            behind: unsigned(row.get(3)),
            anew: Anew::of(row.get(4)),
            moved_at: row.get(5),
        };
        Ok((consumer, rows.iter().map(of).collect()))
    }

    /// Who reads a consumer, as it is refused to a second one.
    pub(super) async fn is_read(&self, name: &str) -> Problem {
        const READER: &str = "SELECT p2p_sync.consumer_reader($1)";
        let reader: Option<String> = match self.rows(READER, &[&name]).await {
            Ok(rows) => rows.first().and_then(|row| row.get(0)),
            Err(problem) => return problem,
        };
        let reader = reader.unwrap_or_else(|| "another program".to_owned());
        let sentence = format!("{name} is read by {reader}, and one at a time does: stop that one first");
        Problem::new(Code::NotAllowed, sentence)
    }
}

/// That there is no such consumer.
pub(super) fn no_consumer(name: &str) -> Problem {
    let sentence = format!("there is no consumer {name:?}: see `p2p-sync-proxy feed list`, make one by `feed add`");
    Problem::new(Code::NotFound, sentence)
}

/// A name that does for a shell, a file and a log.
fn check_name(name: &str) -> Result<(), Problem> {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte);
    let is_name = (1..=64).contains(&name.len()) && name.bytes().all(is_plain) && !name.starts_with(['.', '-']);
    if is_name {
        return Ok(());
    }
    let sentence = format!(
        "{:?} is no name for a consumer: use 1 to 64 letters, digits and _ . -, a letter, a digit or _ first",
        name.chars().take(64).collect::<String>()
    );
    Err(Problem::new(Code::BadValue, sentence))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(maps: &[&str], types: &[&str]) -> ConsumerFilter {
        let owned = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        ConsumerFilter {
            maps: owned(maps),
            types: owned(types),
        }
    }

    #[test]
    fn a_filter_names_maps_patterns_and_the_two_other_streams() {
        assert_eq!(of(&["prontera", "1@*", "*", "@player", "@host"], &[]).check(), Ok(()));
        for wrong in ["", "@char", "@*", "a/b", "prontera%"] {
            let problem = of(&[wrong], &[]).check().expect_err(wrong);
            assert_eq!(problem.code, Code::BadMap);
            assert!(problem.sentence.contains("@player"), "{problem}");
        }
        let many = vec!["prontera"; NAMED_MAX + 1];
        assert_eq!(of(&many, &[]).check().expect_err("too many").code, Code::BadValue);
    }

    #[test]
    fn a_filter_shows_its_types_and_without_any_all() {
        let chat = of(&[], &["CHAT_MESSAGE"]);
        assert!(chat.shows("prontera/CHAT_MESSAGE/1") && !chat.shows("prontera/NPC_STATE/1"));
        assert!(
            !chat.shows("prontera/OF_A_NEWER_HUB"),
            "and nothing that it cannot read"
        );
        assert!(of(&[], &[]).shows("prontera/OF_A_NEWER_HUB"));
    }

    #[test]
    fn a_consumers_name_does_for_a_shell_and_a_log() {
        for name in ["mariadb", "a", "_x.y-2", &"n".repeat(64)] {
            assert_eq!(check_name(name), Ok(()));
        }
        for name in ["", "-x", ".x", "a b", "a/b", "ä", "a\n", &"n".repeat(65)] {
            assert_eq!(check_name(name).expect_err(name).code, Code::BadValue);
        }
    }
}

//! What a subscriber asks for, checked; and what of a stream it is told.

use std::collections::HashSet;

use p2p_sync_proto::{
    Code, Problem,
    limits::{PATH_BYTES_MAX, UPDATE_BYTES_MAX, UPDATE_STATES_MAX, WATCH_STREAMS_MAX},
    path::{HOST_STREAM, PLAYER_STREAM, check_map},
    v1,
};
use prost::length_delimiter_len;
use uuid::Uuid;

use super::ring::Entry;
use crate::operation::COUNTER_MAX;

/// Which changes a subscriber is told.
#[derive(Debug)]
pub struct Filter {
    host_id: Uuid,
    /// Empty: all.
    types: Vec<v1::SyncDataType>,
    /// Empty: all paths.
    prefixes: Vec<String>,
}

impl Filter {
    /// All that a host may read.
    pub fn of_host(host_id: Uuid) -> Self {
        Self {
            host_id,
            types: Vec::new(),
            prefixes: Vec::new(),
        }
    }

    /// Reads a host's request; gives its streams and positions with it. `BAD_REQUEST`, `BAD_MAP` or `BAD_PATH`.
    pub fn read(host_id: Uuid, request: v1::SubscribeRequest) -> Result<(Self, Vec<v1::StreamPosition>), Problem> {
        let bad = |sentence: String| Err(Problem::new(Code::BadRequest, sentence));
        let streams = request.from.len();
        if streams == 0 || streams > WATCH_STREAMS_MAX || request.path_prefixes.len() > WATCH_STREAMS_MAX {
            return bad(format!(
                "a watch follows 1 to {WATCH_STREAMS_MAX} streams by at most {WATCH_STREAMS_MAX} prefixes: open several"
            ));
        }
        let mut seen = HashSet::new();
        for position in &request.from {
            let stream = position.stream.as_str();
            if stream != PLAYER_STREAM && stream != HOST_STREAM {
                check_map(stream)?;
            }
            if !seen.insert(stream) {
                return bad(format!("{stream} is named twice: name each stream once"));
            }
            if position.sequence > COUNTER_MAX {
                return bad("the position is larger than the hub counts: give the one that was told".to_owned());
            }
        }
        for prefix in &request.path_prefixes {
            if prefix.len() > PATH_BYTES_MAX || prefix.contains('\0') {
                let sentence = format!("a prefix has at most {PATH_BYTES_MAX} bytes and no NUL: follow a shorter one");
                return Err(Problem::new(Code::BadPath, sentence));
            }
        }
        let read = |number: &i32| v1::SyncDataType::try_from(*number);
        let Ok(types) = request.types.iter().map(read).collect::<Result<Vec<_>, _>>() else {
            return bad(
                "the request names a type that this hub does not know: leave it out, or update the hub".to_owned(),
            );
        };
        let filter = Self {
            host_id,
            types,
            prefixes: request.path_prefixes,
        };
        Ok((filter, request.from))
    }

    /// What a host says of itself, and of others, is for it and the operator; the rest as it was asked for.
    fn shows(&self, entry: &Entry) -> bool {
        let is_of_types = || entry.data_type.is_some_and(|data_type| self.types.contains(&data_type));
        let is_below = || self.prefixes.iter().any(|prefix| entry.state.path.starts_with(prefix));
        entry.owner.is_none_or(|owner| owner == self.host_id)
            && (self.types.is_empty() || is_of_types())
            && (self.prefixes.is_empty() || is_below())
    }

    /// The states of a message in the making.
    pub fn page(&self) -> Page<'_> {
        Page {
            filter: self,
            states: Vec::new(),
            bytes: 0,
        }
    }
}

/// See [`Filter::page`].
#[derive(Debug)]
pub struct Page<'a> {
    filter: &'a Filter,
    /// What is told.
    pub states: Vec<v1::State>,
    bytes: usize,
}

impl Page<'_> {
    /// Adds a change if it is told; false where the page is full, and what comes from there on is for the next.
    pub fn add(&mut self, entry: &Entry) -> bool {
        if !self.filter.shows(entry) {
            return true;
        }
        let bytes = 1 + length_delimiter_len(entry.bytes) + entry.bytes;
        let fits = self.bytes + bytes <= UPDATE_BYTES_MAX && self.states.len() < UPDATE_STATES_MAX;
        if !fits && !self.states.is_empty() {
            return false;
        }
        self.bytes += bytes;
        self.states.push(entry.state.clone());
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(streams: &[&str]) -> v1::SubscribeRequest {
        let from = streams.iter().map(|stream| v1::StreamPosition {
            stream: (*stream).to_owned(),
            sequence: 0,
        });
        v1::SubscribeRequest {
            from: from.collect(),
            ..Default::default()
        }
    }

    fn entry(path: &str) -> Entry {
        Entry::of_state(v1::State {
            path: path.to_owned(),
            ..Default::default()
        })
    }

    fn told(request: v1::SubscribeRequest, host: u128, path: &str) -> bool {
        let (filter, _) = Filter::read(Uuid::from_u128(host), request).expect("nothing is wrong with it");
        let mut page = filter.page();
        page.add(&entry(path)) && !page.states.is_empty()
    }

    #[test]
    fn types_and_prefixes_both_have_to_fit_and_of_each_one() {
        let chosen = || v1::SubscribeRequest {
            types: vec![v1::SyncDataType::ItemDrop.into(), v1::SyncDataType::MapState.into()],
            path_prefixes: vec!["prontera/ITEM".to_owned(), "geffen/".to_owned()],
            ..request(&["prontera", "geffen"])
        };
        assert!(told(chosen(), 1, "prontera/ITEM_DROP/7") && told(chosen(), 1, "geffen/MAP_STATE"));
        assert!(!told(chosen(), 1, "prontera/MAP_STATE") && !told(chosen(), 1, "geffen/CHAT_MESSAGE/1"));
        assert!(told(request(&["prontera"]), 1, "prontera/CHAT_MESSAGE/1"));
    }

    #[test]
    fn what_another_host_says_of_itself_is_not_told() {
        let path = format!("@host/{}/HOST_METRICS", Uuid::from_u128(1));
        assert!(told(request(&["@host"]), 1, &path));
        assert!(!told(request(&["@host"]), 2, &path));
    }

    #[test]
    fn what_is_no_request_is_refused() {
        let code = |request| Filter::read(Uuid::nil(), request).expect_err("refused").code;
        let many: Vec<String> = (0..=WATCH_STREAMS_MAX).map(|number| format!("map{number}")).collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        assert_eq!(code(request(&[])), Code::BadRequest);
        assert_eq!(code(request(&many)), Code::BadRequest);
        assert_eq!(code(request(&["prontera", "prontera"])), Code::BadRequest);
        assert_eq!(code(request(&["@nobody"])), Code::BadMap);
        let mut far = request(&["prontera"]);
        far.from[0].sequence = u64::MAX;
        assert_eq!(code(far), Code::BadRequest);
        let odd = |types, prefix: &str| v1::SubscribeRequest {
            types,
            path_prefixes: vec![prefix.to_owned()],
            ..request(&["prontera"])
        };
        assert_eq!(code(odd(vec![99], "")), Code::BadRequest);
        assert_eq!(code(odd(vec![], "\0")), Code::BadPath);
        assert_eq!(code(odd(vec![], &"x".repeat(PATH_BYTES_MAX + 1))), Code::BadPath);
    }
}

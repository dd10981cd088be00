//! Where a scan begins: the positions of the streams that its prefix covers, from which changes make it whole.

use p2p_sync_proto::{
    Problem,
    limits::WATCH_STREAMS_MAX,
    path::{HOST_STREAM, PLAYER_STREAM},
    v1,
};

use crate::{
    cursor::{Kind, Request},
    pipeline::Hub,
};

/// What the paths of these scopes begin with, and the stream that numbers them.
const SCOPES: [(&str, &str); 3] = [
    ("@account/", PLAYER_STREAM),
    ("@char/", PLAYER_STREAM),
    ("@host/", HOST_STREAM),
];

/// How far the streams are that hold paths below a prefix, as far as anything was ever written to them; `None` where they are
/// more than one subscriber follows at once.
pub(super) async fn read(hub: &Hub, prefix: &str, timeline: u64) -> Result<Option<Vec<v1::ScanStart>>, Problem> {
    let covered = Covered::by(prefix);
    let heads = hub
        .store
        .heads_below(&covered.streams, covered.maps, WATCH_STREAMS_MAX + 1)
        .await?;
    if heads.len() > WATCH_STREAMS_MAX {
        return Ok(None);
    }
    let start = |(stream, sequence): (String, u64)| {
        let request = Request {
            kind: Kind::Changes,
            subject: &stream,
            timeline,
        };
        let cursor = request.cursor(&sequence.to_be_bytes()).into();
        v1::ScanStart {
            stream,
            sequence,
            cursor,
        }
    };
    Ok(Some(heads.into_iter().map(start).collect()))
}

/// Streams that may hold paths below a prefix.
#[derive(Debug, PartialEq, Eq)]
struct Covered<'a> {
    /// By their names.
    streams: Vec<&'a str>,
    /// Of all maps whose names begin so.
    maps: Option<&'a str>,
}

impl<'a> Covered<'a> {
    fn by(prefix: &'a str) -> Self {
        let mut streams = Vec::new();
        for (beginning, stream) in SCOPES {
            let may_hold = prefix.starts_with(beginning) || beginning.starts_with(prefix);
            if may_hold && !streams.contains(&stream) {
                streams.push(stream);
            }
        }
        let mut maps = None;
        match prefix.split_once('/') {
            _ if prefix.starts_with('@') => {}
            Some((map, _)) => streams.push(map),
            None => maps = Some(prefix),
        }
        Self { streams, maps }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_covers_the_streams_of_all_paths_that_may_begin_so() {
        let covered = |prefix| {
            let Covered { streams, maps } = Covered::by(prefix);
            (streams, maps)
        };
        for (prefix, streams, maps) in [
            ("prontera/", vec!["prontera"], None),
            ("prontera/ITEM_DROP/7", vec!["prontera"], None),
            ("pront", vec![], Some("pront")),
            ("", vec![PLAYER_STREAM, HOST_STREAM], Some("")),
            ("@", vec![PLAYER_STREAM, HOST_STREAM], None),
            ("@char/15", vec![PLAYER_STREAM], None),
            ("@acc", vec![PLAYER_STREAM], None),
            ("@host/0", vec![HOST_STREAM], None),
            ("@nobody/", vec![], None),
        ] {
            assert_eq!(covered(prefix), (streams, maps), "{prefix:?}");
        }
    }
}

//! Names: paths, maps, keys of the cache, key ids, types; and cursors, which readers may make up.

use p2p_sync_proto::{
    Path,
    cache::{check_channel, check_key, check_own_key},
    keys::KeyId,
    limits::PATH_BYTES_MAX,
    path::check_map,
    policy::parse_type,
};
use p2p_sync_proxy::cursor::{Kind, Request};

use crate::way;

/// See the module.
pub fn read(input: &[u8]) {
    let Some((way, rest)) = way(input) else { return };
    if way.is_multiple_of(4) {
        return cursor(way, rest);
    }
    let Ok(text) = std::str::from_utf8(rest) else { return };
    if let Ok(path) = Path::parse(text) {
        assert_eq!(path.as_str(), text);
        assert!(text.len() <= PATH_BYTES_MAX && !text.chars().any(char::is_control));
        let parts = path.parts();
        let again = Path::new(parts.scope, parts.data_type, parts.entity);
        assert_eq!(again.as_ref(), Ok(&path), "one address has one spelling");
        assert!(!parts.scope.stream().is_empty());
    }
    if check_map(text).is_ok() {
        let path = format!("{text}/MAP_STATE");
        assert!(Path::parse(&path).is_ok(), "a map has a state");
    }
    if let Ok(id) = KeyId::parse(text) {
        assert_eq!(id.as_str(), text);
    }
    assert!(check_own_key(text).is_err() || check_key(text).is_ok());
    let _named = (check_channel(text), parse_type(text));
}

fn cursor(way: u8, rest: &[u8]) {
    let request = Request {
        kind: if way.is_multiple_of(8) {
            Kind::Scan
        } else {
            Kind::Changes
        },
        subject: "prontera",
        timeline: 1,
    };
    if let Ok(Some(position)) = request.position(rest) {
        assert_eq!(request.cursor(position), rest);
    }
    let made = request.cursor(&rest[..rest.len().min(PATH_BYTES_MAX)]);
    assert!(request.position(&made).is_ok_and(|position| position.is_some()));
}

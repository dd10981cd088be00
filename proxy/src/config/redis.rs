//! Which Redis, in which form.

use std::fmt;

use p2p_sync_proto::{Code, settings::Settings};

use crate::secret::Secret;

/// Servers that one setting names.
const ADDRESSES_MAX: usize = 64;

/// Where Redis is.
#[derive(Clone, Debug)]
pub struct Redis {
    /// How its servers belong together.
    pub mode: RedisMode,
    /// The server; the Sentinels; some nodes of the cluster. At least one.
    pub addresses: Vec<Address>,
    /// Empty: none is sent.
    pub password: Secret,
    /// The number of its database.
    pub db: u16,
    /// What all names begin with.
    pub prefix: String,
}

/// See `redis_mode`.
#[derive(Clone, Debug)]
pub enum RedisMode {
    /// One server.
    Standalone,
    /// A master that Sentinels name.
    Sentinel {
        /// What they call it.
        master: String,
        /// Theirs, not the master's. Empty: none is sent.
        password: Secret,
    },
    /// A cluster.
    Cluster,
}

/// A name or IP address, and a port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address {
    /// Without the brackets of an IPv6 address.
    pub host: String,
    /// Its port.
    pub port: u16,
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { host, port } = self;
        if host.contains(':') {
            write!(f, "[{host}]:{port}")
        } else {
            write!(f, "{host}:{port}")
        }
    }
}

impl Address {
    /// `host`, `host:port`, `[v6]:port` or a bare IPv6 address.
    fn parse(text: &str, default_port: u16) -> Result<Self, String> {
        let expected = || "expected a host or host:port, with commas between several".to_owned();
        let (host, port) = match text.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
            Some((host, "")) => (host, None),
            Some((host, rest)) => (host, Some(rest.strip_prefix(':').ok_or_else(expected)?)),
            None if text.matches(':').count() > 1 => (text, None),
            None => text
                .split_once(':')
                .map_or((text, None), |(host, port)| (host, Some(port))),
        };
        let port = match port {
            None => default_port,
            Some(port) => port.parse().ok().filter(|port| *port > 0).ok_or_else(expected)?,
        };
        let is_name = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_' | b':' | b'%');
        if host.is_empty() || !host.bytes().all(is_name) {
            return Err(expected());
        }
        Ok(Self {
            host: host.to_owned(),
            port,
        })
    }
}

/// Absent where `redis_host` names nothing.
pub(super) fn redis(raw: &mut Settings) -> Option<Redis> {
    let prefix = raw.resolve("redis_prefix", |text| {
        let fits = (1..=64).contains(&text.len())
            && text
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-');
        if fits {
            Ok(text.to_owned())
        } else {
            Err("expected 1 to 64 of a-z, A-Z, 0-9, _ and -".to_owned())
        }
    });
    let port = raw.number("redis_port", 1..=65_535);
    let addresses = raw.resolve("redis_host", |text| match text {
        "" => Ok(Vec::new()),
        text => text.split(',').map(|part| Address::parse(part.trim(), port)).collect(),
    });
    let db = raw.number("redis_db", 0..=65_535);
    let mode = mode(raw);
    refuse_what_does_not_fit(raw, mode.as_ref(), &addresses, db);
    let redis = Redis {
        mode: mode.unwrap_or(RedisMode::Standalone),
        addresses,
        password: Secret::from(raw.text("redis_password")),
        db,
        prefix,
    };
    Some(redis).filter(|redis| !redis.addresses.is_empty())
}

/// Absent where it is told as a mistake.
fn mode(raw: &mut Settings) -> Option<RedisMode> {
    let master = raw.text("redis_sentinel_master").to_owned();
    let password = Secret::from(raw.text("redis_sentinel_password"));
    raw.resolve("redis_mode", |text| match text {
        "standalone" => Ok(Some(RedisMode::Standalone)),
        "sentinel" => Ok(Some(RedisMode::Sentinel { master, password })),
        "cluster" => Ok(Some(RedisMode::Cluster)),
        _ => Err("expected standalone, sentinel or cluster".to_owned()),
    })
}

fn refuse_what_does_not_fit(raw: &mut Settings, mode: Option<&RedisMode>, addresses: &[Address], db: u16) {
    let Some(mode) = mode else { return };
    if addresses.len() > ADDRESSES_MAX {
        let what_to_do = "name at most 64: some of them are enough to find the others";
        raw.refuse("redis_host", Code::BadValue, what_to_do);
    }
    match mode {
        RedisMode::Standalone => {
            if addresses.len() > 1 {
                let what_to_do =
                    "redis_mode = standalone is one server: name that one, or set redis_mode to sentinel or cluster";
                raw.refuse("redis_host", Code::BadValue, what_to_do);
            }
        }
        RedisMode::Sentinel { master, .. } => {
            if addresses.is_empty() {
                let what_to_do = "name the Sentinels, e.g. 10.0.0.1:26379, 10.0.0.2:26379, 10.0.0.3:26379";
                raw.refuse("redis_host", Code::MissingValue, what_to_do);
            }
            if master.is_empty() {
                let what_to_do =
                    "say what the Sentinels call the master: the first word behind `sentinel monitor` in their file";
                raw.refuse("redis_sentinel_master", Code::MissingValue, what_to_do);
            }
        }
        RedisMode::Cluster => {
            if addresses.is_empty() {
                let what_to_do = "name some nodes of the cluster, e.g. 10.0.0.1, 10.0.0.2, 10.0.0.3";
                raw.refuse("redis_host", Code::MissingValue, what_to_do);
            }
            if db > 0 {
                let what_to_do = "a cluster has no database but 0: leave redis_db out, redis_prefix keeps hubs apart";
                raw.refuse("redis_db", Code::BadValue, what_to_do);
            }
        }
    }
    if !matches!(mode, RedisMode::Sentinel { .. }) {
        for key in ["redis_sentinel_master", "redis_sentinel_password"] {
            if !raw.text(key).is_empty() {
                raw.refuse(
                    key,
                    Code::BadValue,
                    "this is for redis_mode = sentinel alone: set that, or leave this out",
                );
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_a_host_with_or_without_a_port() {
        let parsed = |text: &str| Address::parse(text, 6379).map(|address| address.to_string());
        for (text, meant) in [
            ("redis", "redis:6379"),
            ("10.0.0.1:7000", "10.0.0.1:7000"),
            ("::1", "[::1]:6379"),
            ("[::1]", "[::1]:6379"),
            ("[fe80::1%eth0]:7", "[fe80::1%eth0]:7"),
        ] {
            assert_eq!(parsed(text).as_deref(), Ok(meant), "{text}");
        }
        for text in ["", ":1", "a:", "a:0", "a:65536", "a b", "[::1]7", "redis://a", "a/0"] {
            assert!(parsed(text).is_err(), "{text}");
        }
    }
}

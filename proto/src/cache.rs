//! What a key, a value and a channel of the hosts' cache may be: the agent asks before it queues, the hub before it keeps.

use crate::{
    Code, Problem,
    limits::{CACHE_KEY_BYTES_MAX, CACHE_VALUE_BYTES_MAX, CHANNEL_BYTES_MAX},
};

/// What the keys of the operator's shared space begin with: hosts read them and never write them.
pub const SHARED_PREFIX: &str = "shared:";

/// A key that may be read. `BAD_TEXT` where it is empty, `TOO_LARGE`.
pub fn check_key(key: &str) -> Result<(), Problem> {
    check_name("a cache key", key, CACHE_KEY_BYTES_MAX)
}

/// A key that a host may write. As [`check_key`], and `NOT_ALLOWED` for the shared space.
pub fn check_own_key(key: &str) -> Result<(), Problem> {
    check_key(key)?;
    if key.starts_with(SHARED_PREFIX) {
        let sentence =
            "keys that begin with `shared:` are the operator's, and hosts only read them: choose another key";
        return Err(Problem::new(Code::NotAllowed, sentence));
    }
    Ok(())
}

/// A value to keep, or a message to publish. `TOO_LARGE`.
pub fn check_value(value: &str) -> Result<(), Problem> {
    let bytes = value.len();
    if bytes <= CACHE_VALUE_BYTES_MAX {
        return Ok(());
    }
    let sentence =
        format!("the text has {bytes} bytes, more than the {CACHE_VALUE_BYTES_MAX} that a cache value may have");
    Err(Problem::new(Code::TooLarge, sentence))
}

/// A channel to publish on. `BAD_TEXT` where it is empty, `TOO_LARGE`.
pub fn check_channel(channel: &str) -> Result<(), Problem> {
    check_name("a channel", channel, CHANNEL_BYTES_MAX)
}

/// The name itself is the host's and is not repeated.
fn check_name(what: &str, name: &str, bytes_max: usize) -> Result<(), Problem> {
    match name.len() {
        0 => Err(Problem::new(Code::BadText, format!("{what} is empty: give it a name"))),
        bytes if bytes > bytes_max => {
            let sentence = format!("{what} has at most {bytes_max} bytes, this one has {bytes}: shorten it");
            Err(Problem::new(Code::TooLarge, sentence))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_values_are_bounded_to_the_byte() {
        let code = |checked: Result<(), Problem>| checked.err().map(|problem| problem.code);
        assert_eq!(code(check_key("")), Some(Code::BadText));
        assert_eq!(code(check_key(&"k".repeat(CACHE_KEY_BYTES_MAX))), None);
        assert_eq!(
            code(check_key(&"k".repeat(CACHE_KEY_BYTES_MAX + 1))),
            Some(Code::TooLarge)
        );
        assert_eq!(code(check_value(&"v".repeat(CACHE_VALUE_BYTES_MAX))), None);
        assert_eq!(
            code(check_value(&"v".repeat(CACHE_VALUE_BYTES_MAX + 1))),
            Some(Code::TooLarge)
        );
        assert_eq!(code(check_channel("")), Some(Code::BadText));
        assert_eq!(
            code(check_channel(&"c".repeat(CHANNEL_BYTES_MAX + 1))),
            Some(Code::TooLarge)
        );
    }

    #[test]
    fn the_shared_space_is_read_and_not_written() {
        assert!(check_key("shared:motd").is_ok() && check_own_key("sharing").is_ok());
        assert_eq!(
            check_own_key("shared:motd").expect_err("the operator's").code,
            Code::NotAllowed
        );
    }
}

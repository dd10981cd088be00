//! The bounds of a JSON payload, checked in one pass, the same way on both sides.
//!
//! This parses as RFC 8259 says, without building anything, and refuses what a parser would let through and a database
//! column or another parser would not: too deep, too many values, a key twice, NUL, a number no column holds. A caller's
//! thread runs it for every operation, so what is small is kept on the stack and what is read is borrowed.

mod keys;
mod refusal;

use std::borrow::Cow;

use crate::{
    limits::{JSON_DEPTH_MAX, JSON_NODES_MAX, JSON_NUMBER_BYTES_MAX},
    reject_code::{Code, Problem},
};

use keys::{Keys, Span};
use refusal::{Refusal, Why};

/// An exponent up to this is harmless behind a zero, which stays one.
const ZERO_EXPONENT_MAX: usize = 999;

/// What a payload says at its top level that paths are made of.
#[derive(Clone, Debug, Default)]
pub struct Facts<'t> {
    text: &'t str,
    /// The members of the outermost object.
    members: Keys,
}

impl<'t> Facts<'t> {
    /// The string or whole number under `key` of the outermost object.
    pub fn member(&self, key: &str) -> Option<Cow<'t, str>> {
        let value = self.members.find(self.text, key)?.of(self.text);
        if value.starts_with('"') {
            return Some(keys::unescaped(value));
        }
        let is_whole = value.parse::<u64>().is_ok() || value.parse::<i64>().is_ok();
        // Minus zero is no whole number to a parser.
        (is_whole && value != "-0").then_some(Cow::Borrowed(value))
    }
}

/// Checks a payload and reads its top-level members.
///
/// Refuses with `INVALID_JSON` (line and column), `TOO_DEEP`, `TOO_MANY_NODES`, `DUPLICATE_KEY`, `BAD_TEXT` (NUL,
/// unpaired surrogates) or `NUMBER_OUT_OF_RANGE`. Size is the caller's to bound.
pub fn check(text: &str) -> Result<Facts<'_>, Problem> {
    let mut facts = Facts {
        text,
        members: Keys::default(),
    };
    let mut walk = Walk {
        text,
        bytes: text.as_bytes(),
        nodes: 0,
        escapes: 0,
        keys: &mut facts.members,
    };
    match walk.document() {
        Ok(()) => Ok(facts),
        Err(refusal) => Err(refusal.describe(text)),
    }
}

/// Checks bytes that should be a payload; `BAD_TEXT` where they are not UTF-8, otherwise as [`check`].
pub fn check_bytes(bytes: &[u8]) -> Result<(&str, Facts<'_>), Problem> {
    let text = std::str::from_utf8(bytes).map_err(|error| {
        Problem::new(
            Code::BadText,
            format!(
                "the payload is not UTF-8 from byte {}: convert it before sending",
                error.valid_up_to()
            ),
        )
    })?;
    check(text).map(|facts| (text, facts))
}

/// Where a step ended, or why there is none. The place goes from step to step by value, in a register.
type Step = Result<usize, Box<Refusal>>;

/// What is known of the text so far.
struct Walk<'t> {
    text: &'t str,
    bytes: &'t [u8],
    nodes: usize,
    /// Escaped characters seen.
    escapes: usize,
    /// Of the objects that are open; of the outermost also when it is closed.
    keys: &'t mut Keys,
}

impl Walk<'_> {
    fn document(&mut self) -> Result<(), Box<Refusal>> {
        let at = self.skip_whitespace(0);
        let at = self.value(at, 1)?;
        let at = self.skip_whitespace(at);
        match self.peek(at) {
            None => Ok(()),
            Some(_) => Err(self.broken(at, "trailing characters")),
        }
    }

    fn value(&mut self, at: usize, depth: usize) -> Step {
        self.nodes += 1;
        if self.nodes > JSON_NODES_MAX {
            return Err(Refusal::new(at, Why::TooManyNodes));
        }
        match self.peek(at) {
            Some(b'"') => self.string(at),
            Some(b'-' | b'0'..=b'9') => self.number(at),
            Some(b'{') => self.object(at, depth),
            Some(b'[') => self.array(at, depth),
            Some(b't') => self.literal(at, "true"),
            Some(b'f') => self.literal(at, "false"),
            Some(b'n') => self.literal(at, "null"),
            _ => Err(self.broken(at, "expected value")),
        }
    }

    fn object(&mut self, at: usize, depth: usize) -> Step {
        let mut at = Self::enter(at, depth)?;
        let mut names = self.keys.open();
        at = self.skip_whitespace(at);
        if self.peek(at) == Some(b'}') {
            return Ok(at + 1);
        }
        loop {
            let key = at;
            if self.peek(at) != Some(b'"') {
                return Err(self.broken(at, "key must be a string"));
            }
            let escapes = self.escapes;
            at = self.string(at)?;
            let name = Span::new(key, at);
            if !self.keys.push_new(self.text, &mut names, name, self.escapes > escapes) {
                return Err(Refusal::new(key, Why::Duplicate(name)));
            }
            at = self.skip_whitespace(at);
            if self.peek(at) != Some(b':') {
                return Err(self.broken(at, "expected `:`"));
            }
            at = self.skip_whitespace(at + 1);
            let (value, number) = (at, self.keys.len() - 1);
            at = self.value(at, depth + 1)?;
            if depth == 1 {
                self.keys.set_value(number, Span::new(value, at));
            }
            at = self.skip_whitespace(at);
            match self.peek(at) {
                Some(b',') => at = self.skip_whitespace(at + 1),
                Some(b'}') => break,
                _ => return Err(self.broken(at, "expected `,` or `}`")),
            }
        }
        if depth > 1 {
            self.keys.truncate(names.first);
        }
        Ok(at + 1)
    }

    fn array(&mut self, at: usize, depth: usize) -> Step {
        let mut at = Self::enter(at, depth)?;
        at = self.skip_whitespace(at);
        if self.peek(at) == Some(b']') {
            return Ok(at + 1);
        }
        loop {
            at = self.value(at, depth + 1)?;
            at = self.skip_whitespace(at);
            match self.peek(at) {
                Some(b',') => at = self.skip_whitespace(at + 1),
                Some(b']') => return Ok(at + 1),
                _ => return Err(self.broken(at, "expected `,` or `]`")),
            }
        }
    }

    /// Steps over an opening bracket.
    fn enter(at: usize, depth: usize) -> Step {
        if depth > JSON_DEPTH_MAX {
            return Err(Refusal::new(at, Why::TooDeep));
        }
        Ok(at + 1)
    }

    /// Steps over a string from its opening quote.
    fn string(&mut self, at: usize) -> Step {
        let mut at = at + 1;
        loop {
            at = self.skip_plain(at);
            match self.peek(at) {
                Some(b'"') => return Ok(at + 1),
                Some(b'\\') => at = self.escape(at + 1)?,
                _ => return Err(self.broken(at, "control character while parsing a string")),
            }
        }
    }

    /// Steps to the next byte of a string that is not plain text: eight at a time.
    fn skip_plain(&self, mut at: usize) -> usize {
        const ONES: u64 = 0x0101_0101_0101_0101;
        const HIGHS: u64 = 0x8080_8080_8080_8080;
        let has_zero = |word: u64| word.wrapping_sub(ONES) & !word & HIGHS;
        while let Some(chunk) = self.bytes.get(at..).and_then(<[u8]>::first_chunk::<8>) {
            let word = u64::from_le_bytes(*chunk);
            let quotes = has_zero(word ^ (ONES * u64::from(b'"')));
            let backslashes = has_zero(word ^ (ONES * u64::from(b'\\')));
            let controls = word.wrapping_sub(ONES * 0x20) & !word & HIGHS;
            let special = quotes | backslashes | controls;
            if special != 0 {
                // The lowest mark is exact; what borrows from it lies above.
                return at + special.trailing_zeros() as usize / 8;
            }
            at += 8;
        }
        let is_plain = |byte| byte >= 0x20 && byte != b'"' && byte != b'\\';
        while self.peek(at).is_some_and(is_plain) {
            at += 1;
        }
        at
    }

    /// Steps over what follows a backslash.
    #[cold]
    fn escape(&mut self, at: usize) -> Step {
        self.escapes += 1;
        match self.peek(at) {
            Some(b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't') => Ok(at + 1),
            Some(b'u') => {
                let (first, at) = self.hex(at + 1)?;
                match first {
                    0 => Err(Refusal::new(at, Why::Nul)),
                    0xdc00..=0xdfff => Err(Refusal::new(at, Why::Surrogate)),
                    0xd800..=0xdbff => self.second_half(at),
                    _ => Ok(at),
                }
            }
            _ => Err(self.broken(at, "invalid escape")),
        }
    }

    /// The half of a character that has to follow its first.
    fn second_half(&self, at: usize) -> Step {
        if self.peek(at) == Some(b'\\') && self.peek(at + 1) == Some(b'u') {
            let (second, at) = self.hex(at + 2)?;
            if (0xdc00..=0xdfff).contains(&second) {
                return Ok(at);
            }
        }
        Err(Refusal::new(at, Why::Surrogate))
    }

    /// Four digits behind a `u`.
    fn hex(&self, at: usize) -> Result<(u32, usize), Box<Refusal>> {
        let mut number = 0;
        for at in at..at + 4 {
            let digit = self.peek(at).and_then(|byte| char::from(byte).to_digit(16));
            number = number * 16 + digit.ok_or_else(|| self.broken(at, "invalid escape"))?;
        }
        Ok((number, at + 4))
    }

    /// A number is bounded as it is written, and as a decimal column writes it out: what parses to the same float may
    /// still be a megabyte of digits, and four bytes with an exponent hundreds of them when they are read back.
    fn number(&self, from: usize) -> Step {
        let mut at = from + usize::from(self.peek(from) == Some(b'-'));
        at = if self.peek(at) == Some(b'0') {
            at + 1
        } else {
            self.digits(at)?
        };
        if self.peek(at) == Some(b'.') {
            at = self.digits(at + 1)?;
        }
        let has_exponent = matches!(self.peek(at), Some(b'e' | b'E'));
        if has_exponent {
            at += 1 + usize::from(matches!(self.peek(at + 1), Some(b'+' | b'-')));
            at = self.digits(at)?;
        }
        let is_long = has_exponent || at - from >= JSON_NUMBER_BYTES_MAX;
        if is_long && plain_bytes(&self.text[from..at]) > JSON_NUMBER_BYTES_MAX {
            return Err(Refusal::new(from, Why::Number));
        }
        Ok(at)
    }

    /// One digit at least.
    fn digits(&self, from: usize) -> Step {
        let mut at = from;
        while self.peek(at).is_some_and(|byte| byte.is_ascii_digit()) {
            at += 1;
        }
        if at == from {
            return Err(self.broken(at, "invalid number"));
        }
        Ok(at)
    }

    fn literal(&self, at: usize, word: &str) -> Step {
        if !self.bytes[at..].starts_with(word.as_bytes()) {
            return Err(self.broken(at, "expected value"));
        }
        Ok(at + word.len())
    }

    fn skip_whitespace(&self, mut at: usize) -> usize {
        while let Some(b' ' | b'\n' | b'\t' | b'\r') = self.peek(at) {
            at += 1;
        }
        at
    }

    fn peek(&self, at: usize) -> Option<u8> {
        self.bytes.get(at).copied()
    }

    /// Not JSON from here on; where the text ends too early, that is what is told.
    #[cold]
    #[allow(clippy::unnecessary_box_returns)]
    fn broken(&self, at: usize, what: &'static str) -> Box<Refusal> {
        let what = if at < self.bytes.len() {
            what
        } else {
            "it ends too early"
        };
        Refusal::new(at, Why::Broken(what))
    }
}

/// Bytes of a number as it is written or without its exponent, whichever is more.
#[cold]
fn plain_bytes(number: &str) -> usize {
    let (mantissa, exponent) = number.split_once(['e', 'E']).unwrap_or((number, "0"));
    let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    // Only an exponent of many digits is out of range here.
    let exponent: i64 = exponent.parse().unwrap_or(i64::MAX);
    let shift = usize::try_from(exponent.unsigned_abs()).unwrap_or(usize::MAX);
    let is_zero = mantissa.bytes().all(|byte| b"-0.".contains(&byte));
    let (whole, fraction) = if exponent < 0 {
        (whole.len(), fraction.len().saturating_add(shift))
    } else if is_zero && shift <= ZERO_EXPONENT_MAX {
        (whole.len(), fraction.len())
    } else {
        (whole.len().saturating_add(shift), fraction.len().saturating_sub(shift))
    };
    number.len().max(whole.saturating_add(fraction).saturating_add(1))
}

#[cfg(test)]
mod tests;

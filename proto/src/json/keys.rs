//! The keys of one object: where they lie in the text, and whether one was there before.

use std::{borrow::Cow, collections::HashSet};

/// Keys that lie on the stack; an object rarely has more.
const INLINE: usize = 16;
/// Up to so many keys are compared one by one; more are hashed.
const COMPARED: usize = 64;

/// A piece of the text, by its bytes.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Span(u32, u32);

impl Span {
    /// What lies beyond 4 GiB is nowhere: no payload comes near.
    pub(super) fn new(from: usize, to: usize) -> Self {
        match (u32::try_from(from), u32::try_from(to)) {
            (Ok(from), Ok(to)) => Self(from, to),
            _ => Self::default(),
        }
    }

    pub(super) fn of(self, text: &str) -> &str {
        text.get(self.0 as usize..self.1 as usize).unwrap_or_default()
    }
}

/// One member of an object.
#[derive(Clone, Copy, Debug, Default)]
struct Member {
    /// With its quotes.
    key: Span,
    value: Span,
}

impl Member {
    fn name(self, text: &str) -> Cow<'_, str> {
        unescaped(self.key.of(text))
    }
}

/// The members of the objects that are open, each object's behind those of the one it lies in.
#[derive(Clone, Debug, Default)]
pub(super) struct Keys {
    count: usize,
    inline: [Member; INLINE],
    more: Vec<Member>,
}

/// What one object's keys are told apart by.
pub(super) struct Names {
    /// Where its members begin.
    pub(super) first: usize,
    /// A bit for the mark of each: a key whose bit is not here is new, and most are.
    seen: [u64; 4],
    /// The names of an object that has many.
    many: Option<HashSet<String>>,
}

impl Keys {
    /// An object opens.
    pub(super) fn open(&self) -> Names {
        Names {
            first: self.count,
            seen: [0; 4],
            many: None,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.count
    }

    /// Adds a key to the object that was opened last; false when it was there before.
    pub(super) fn push_new(&mut self, text: &str, names: &mut Names, key: Span, is_escaped: bool) -> bool {
        let member = Member {
            key,
            value: Span::default(),
        };
        let mark = if is_escaped {
            mark(member.name(text).as_bytes())
        } else {
            mark_within(text.as_bytes(), key)
        };
        let (word, bit) = (usize::from(mark >> 6), 1 << (mark & 63));
        let is_marked = names.seen[word] & bit != 0;
        names.seen[word] |= bit;
        let is_new = (!is_marked && self.count - names.first < COMPARED) || self.is_new(text, names, member);
        match self.inline.get_mut(self.count) {
            Some(slot) => *slot = member,
            None => self.more.push(member),
        }
        self.count += 1;
        is_new
    }

    #[cold]
    fn is_new(&self, text: &str, names: &mut Names, member: Member) -> bool {
        let name = member.name(text);
        if self.count - names.first < COMPARED {
            return self.from(names.first).all(|other| other.name(text) != name);
        }
        let all = || self.from(names.first).map(|member| member.name(text).into_owned());
        names
            .many
            .get_or_insert_with(|| all().collect())
            .insert(name.into_owned())
    }

    pub(super) fn set_value(&mut self, number: usize, value: Span) {
        let member = match self.inline.get_mut(number) {
            Some(member) => Some(member),
            None => self.more.get_mut(number - INLINE),
        };
        if let Some(member) = member {
            member.value = value;
        }
    }

    pub(super) fn truncate(&mut self, count: usize) {
        self.count = count;
        self.more.truncate(count.saturating_sub(INLINE));
    }

    /// What stands under a name.
    pub(super) fn find(&self, text: &str, name: &str) -> Option<Span> {
        self.from(0)
            .find(|member| member.name(text) == name)
            .map(|member| member.value)
    }

    fn from(&self, first: usize) -> impl Iterator<Item = &Member> {
        let inline = self.inline.get(first..self.count.min(INLINE)).unwrap_or_default();
        inline.iter().chain(self.more.iter().skip(first.saturating_sub(INLINE)))
    }
}

/// The string that a checked literal, quotes included, stands for.
pub(super) fn unescaped(literal: &str) -> Cow<'_, str> {
    if literal.contains('\\') {
        Cow::Owned(serde_json::from_str(literal).unwrap_or_default())
    } else {
        Cow::Borrowed(inner(literal))
    }
}

fn inner(literal: &str) -> &str {
    literal.get(1..literal.len().saturating_sub(1)).unwrap_or_default()
}

/// Tells most names apart: their first bytes and their length.
fn mark(name: &[u8]) -> u8 {
    let mut first = [0; 8];
    for (to, byte) in first.iter_mut().zip(name) {
        *to = *byte;
    }
    folded(u64::from_le_bytes(first), name.len())
}

/// The mark of a key as it lies in the text: its first bytes are read at once where the text goes on.
fn mark_within(text: &[u8], key: Span) -> u8 {
    let (from, to) = (key.0 as usize + 1, (key.1 as usize).saturating_sub(1));
    let length = to.saturating_sub(from);
    match text.get(from..).and_then(<[u8]>::first_chunk::<8>) {
        Some(first) => {
            let kept = (1_u64 << (8 * length.min(7))).wrapping_sub(1);
            let kept = if length < 8 { kept } else { u64::MAX };
            folded(u64::from_le_bytes(*first) & kept, length)
        }
        None => mark(text.get(from..to).unwrap_or_default()),
    }
}

fn folded(first: u64, length: usize) -> u8 {
    let mixed = (first ^ (length as u64) << 56).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    // The uppermost bits: every byte has its part in them.
    u8::try_from(mixed >> 56).expect("8 bits")
}

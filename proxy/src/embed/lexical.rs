//! Vectors by letters and words alone: no model, no key, no meaning.
//!
//! A text becomes the set of its words and of the runs of 3 to 5 letters in them, each hashed to a place of the vector and a
//! sign. So texts with words in common lie near to each other, also where a word is inflected or misspelt; texts that say the
//! same in other words do not.

use std::collections::BTreeMap;

use super::Bounds;

/// Changes when any text's vector does.
pub(super) const NAME: &str = "lexical-1";

pub(super) const BOUNDS: Bounds = Bounds {
    texts_max: 64,
    text_bytes_max: 32 * 1024,
    batch_bytes_max: 256 * 1024,
    tokens_max: None,
};

/// Letters in a row that are looked at inside a word, its two ends counted as letters.
const RUN_LETTERS: std::ops::RangeInclusive<usize> = 3..=5;
/// From this length on a word counts fully: short words are mostly those that every text has.
const FULL_LETTERS: usize = 7;
/// Of a word are looked at no more letters than this: a text without spaces is one word.
const WORD_LETTERS_MAX: usize = 4096;

/// The embedder by feature hashing.
#[derive(Debug)]
pub(super) struct Lexical {
    dimensions: usize,
}

/// One thing that a text has, and how often.
#[derive(Default)]
struct Feature {
    times: f64,
    weight: f64,
}

impl Lexical {
    pub(super) fn new(dimensions: usize) -> Self {
        Self { dimensions }
    }

    pub(super) fn dimensions(&self) -> usize {
        self.dimensions
    }

    /// The vector of a text that is not empty; not yet of length 1.
    pub(super) fn embed(&self, text: &str) -> Vec<f32> {
        let lowered = text.to_lowercase();
        let mut features = BTreeMap::new();
        for word in words(&lowered) {
            add(&mut features, &word);
        }
        if features.is_empty() {
            // Nothing but signs: they are all there is to compare.
            add(&mut features, &lowered.trim().chars().collect::<Vec<_>>());
        }
        // Summed in the order of the hashes, so that the same text gives the same bits everywhere.
        let mut vector = vec![0.0_f64; self.dimensions];
        for (hash, Feature { times, weight }) in features {
            let place = usize::try_from(hash % self.dimensions as u64).unwrap_or_default();
            let sign = if hash >> 63 == 0 { 1.0 } else { -1.0 };
            vector[place] += sign * weight * (1.0 + times.ln());
        }
        if vector.iter().all(|x| *x == 0.0) {
            // Features that cancel each other out, which takes very few of them.
            vector[0] = 1.0;
        }
        #[expect(clippy::cast_possible_truncation, reason = "a few digits less")]
        vector.into_iter().map(|x| x as f32).collect()
    }
}

/// The words of a lower-case text, as letters; apostrophes inside a word are left out.
fn words(text: &str) -> impl Iterator<Item = Vec<char>> {
    text.split(|letter: char| !letter.is_alphanumeric() && letter != '\'' && letter != '\u{2019}')
        .map(|word| {
            let letters = word.chars().filter(|letter| letter.is_alphanumeric());
            letters.take(WORD_LETTERS_MAX).collect()
        })
        .filter(|word: &Vec<char>| !word.is_empty())
}

/// Adds a word, and its runs of letters, which together weigh as much as the word.
#[expect(clippy::cast_precision_loss, reason = "lengths of words")]
fn add(features: &mut BTreeMap<u64, Feature>, word: &[char]) {
    let share = (word.len().min(FULL_LETTERS) as f64 / FULL_LETTERS as f64).powi(2);
    let mut note = |kind, letters: &[char], weight| {
        let feature = features.entry(hash(kind, letters)).or_default();
        feature.times += 1.0;
        feature.weight = weight;
    };
    note(0, word, share);
    let ended: Vec<char> = ['<'].into_iter().chain(word.iter().copied()).chain(['>']).collect();
    let runs = RUN_LETTERS.flat_map(|length| ended.windows(length).map(move |run| (length, run)));
    let weight = share / (runs.clone().count().max(1) as f64).sqrt();
    for (length, run) in runs {
        note(u8::try_from(length).unwrap_or_default(), run, weight);
    }
}

/// FNV-1a, its bits mixed once more, for the place is taken from the low ones and the sign from the highest.
fn hash(kind: u8, letters: &[char]) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    let mut take = |byte: u8| hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    take(kind);
    let mut utf8 = [0; 4];
    for letter in letters {
        letter.encode_utf8(&mut utf8).bytes().for_each(&mut take);
    }
    hash = (hash ^ hash >> 33).wrapping_mul(0xff51_afd7_ed55_8ccd);
    hash = (hash ^ hash >> 33).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    hash ^ hash >> 33
}

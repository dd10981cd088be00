//! The payload check against `serde_json`: the same texts are taken and refused, with the same codes and members.

use std::{collections::HashSet, fmt};

use p2p_sync_proto::{
    Code, json,
    limits::{JSON_DEPTH_MAX, JSON_NODES_MAX, JSON_NUMBER_BYTES_MAX},
};
use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};

const TEXTS: usize = 30_000;

#[test]
fn generated_and_mutated_texts_are_judged_as_serde_json_judges_them() {
    let seed =
        std::env::var("P2P_SYNC_TEST_SEED").map_or_else(|_| fastrand::u64(..), |text| text.parse().expect("a number"));
    let mut random = fastrand::Rng::with_seed(seed);
    let (mut taken, mut refused) = (0, 0);
    for number in 0..TEXTS {
        let mut text = String::new();
        generate(&mut random, 0, &mut text);
        let mut bytes = text.into_bytes();
        for _ in 0..random.usize(0..4) {
            mutate(&mut random, &mut bytes);
        }
        let shown = String::from_utf8_lossy(&bytes);
        let judged = std::str::from_utf8(&bytes).map_err(|_| ()).and_then(judge);
        match (json::check_bytes(&bytes), judged) {
            (Ok((_, facts)), Ok(members)) => {
                taken += 1;
                for (key, value) in members {
                    let told = facts.member(&key);
                    assert_eq!(
                        told.as_deref(),
                        value.as_deref(),
                        "{key:?} of {shown}, text {number} of seed {seed}"
                    );
                }
            }
            (Err(_), Err(())) => refused += 1,
            (Ok(_), Err(())) => panic!("taken, and serde_json refuses: {shown}, text {number} of seed {seed}"),
            (Err(problem), Ok(_)) => panic!("{problem}, and serde_json takes: {shown}, text {number} of seed {seed}"),
        }
    }
    assert!(
        taken > TEXTS / 10 && refused > TEXTS / 10,
        "{taken} taken, {refused} refused: neither is tried enough"
    );
}

#[test]
fn every_position_a_text_can_end_at_or_break_at_is_judged_as_serde_json_judges_it() {
    let text = "{\"a\\u00e9\\ud83d\\ude00\":[-0.5e+3,true,false,null,\"x\\n\u{e9}y\"],\"bb\":{\"a\":10}}";
    let bytes = text.as_bytes();
    for at in 0..bytes.len() {
        for byte in 0..=255 {
            let mut broken = bytes.to_vec();
            broken[at] = byte;
            let judged = std::str::from_utf8(&broken).map_err(|_| ()).and_then(judge);
            let shown = String::from_utf8_lossy(&broken);
            assert_eq!(json::check_bytes(&broken).is_ok(), judged.is_ok(), "{shown}");
        }
        assert!(json::check_bytes(&bytes[..at]).is_err(), "cut at {at}");
    }
}

#[test]
fn a_key_twice_is_found_among_few_and_among_many() {
    for keys in [2, 15, 16, 17, 63, 64, 65, 66, 500] {
        let mut members: Vec<String> = (0..keys).map(|key| format!("\"long_name_{key}\":{key}")).collect();
        let text = format!("{{{}}}", members.join(","));
        let facts = json::check(&text).expect("all are different");
        for key in 0..keys {
            let value = key.to_string();
            assert_eq!(
                facts.member(&format!("long_name_{key}")).as_deref(),
                Some(value.as_str())
            );
        }
        for twice in [0, keys / 2, keys - 1] {
            members.push(format!("\"\\u006cong_name_{twice}\":0"));
            let text = format!("[{{{}}}]", members.join(","));
            assert_eq!(
                json::check(&text).expect_err("twice").code,
                Code::DuplicateKey,
                "{keys} keys"
            );
            members.pop();
        }
    }
}

fn generate(random: &mut fastrand::Rng, depth: usize, text: &mut String) {
    let space = |random: &mut fastrand::Rng, text: &mut String| {
        if random.u8(..8) == 0 {
            text.push_str([" ", "\n", "\t", "\r\n "][random.usize(..4)]);
        }
    };
    space(random, text);
    match random.usize(if depth > 5 { 3..8 } else { 0..8 }) {
        0 | 1 => {
            text.push('{');
            let members_max = if random.u8(..20) == 0 { 90 } else { 8 };
            for member in 0..random.usize(..members_max) {
                if member > 0 {
                    text.push(',');
                }
                space(random, text);
                string(random, text);
                space(random, text);
                text.push(':');
                generate(random, depth + 1, text);
            }
            text.push('}');
        }
        2 => {
            text.push('[');
            for item in 0..random.usize(..6) {
                if item > 0 {
                    text.push(',');
                }
                generate(random, depth + 1, text);
            }
            text.push(']');
        }
        3 | 4 => string(random, text),
        5 => text.push_str(["true", "false", "null"][random.usize(..3)]),
        _ => number(random, text),
    }
    space(random, text);
}

fn string(random: &mut fastrand::Rng, text: &mut String) {
    const PIECES: [&str; 20] = [
        "a",
        "id",
        "name",
        "monster_id",
        "\u{e9}",
        "\u{1f600}",
        "\\n",
        "\\\"",
        "\\\\",
        "\\/",
        "\\u0061",
        "\\u00E9",
        "\\ud83d\\ude00",
        "\u{7f}",
        " ",
        "0123456789",
        "x",
        "y",
        "\\t",
        "\\b",
    ];
    const RARE: [&str; 9] = [
        "\\u0000",
        "\\ud800",
        "\\udc00",
        "\\ud800\\u0061",
        "\\x",
        "\\u12g4",
        "\n",
        "\0",
        "\\ud800\\n",
    ];
    text.push('"');
    for _ in 0..random.usize(..5) {
        text.push_str(PIECES[random.usize(..PIECES.len())]);
    }
    if random.u8(..100) == 0 {
        text.push_str(RARE[random.usize(..RARE.len())]);
    }
    // Most keys of an object should differ.
    if random.u8(..4) > 0 {
        text.push_str(&random.u32(..1000).to_string());
    }
    text.push('"');
}

fn number(random: &mut fastrand::Rng, text: &mut String) {
    const EDGES: [&str; 18] = [
        "0",
        "-0",
        "0.0",
        "1e5",
        "0e100",
        "0e-100",
        "0e9999",
        "-0.00E+7",
        "1e-50",
        "1E63",
        "1e64",
        "01",
        "-",
        "1.",
        ".5",
        "1e",
        "18446744073709551616",
        "-9223372036854775809",
    ];
    match random.u8(..4) {
        0 => text.push_str(EDGES[random.usize(..EDGES.len())]),
        1 => text.push_str(&"9".repeat(random.usize(1..70))),
        2 => text.push_str(&format!("{}", random.i64(..))),
        _ => text.push_str(&format!("{}", random.f64())),
    }
}

fn mutate(random: &mut fastrand::Rng, bytes: &mut Vec<u8>) {
    const LIKELY: &[u8] = b"{}[]:,\"\\0123456789.eE+-tfn u\n\0\xff\xc3";
    if bytes.is_empty() {
        return;
    }
    let at = random.usize(..bytes.len());
    match random.u8(..5) {
        0 => bytes[at] = LIKELY[random.usize(..LIKELY.len())],
        1 => bytes.insert(at, LIKELY[random.usize(..LIKELY.len())]),
        2 => {
            bytes.remove(at);
        }
        3 => bytes.truncate(at),
        _ => {
            let end = random.usize(at..=bytes.len().min(at + 12));
            let piece = bytes[at..end].to_vec();
            let to = random.usize(..=bytes.len());
            bytes.splice(to..to, piece);
        }
    }
}

type Members = Vec<(String, Option<String>)>;

/// What `serde_json` and a slow look at each bound say.
fn judge(text: &str) -> Result<Members, ()> {
    if !numbers_fit(text) {
        return Err(());
    }
    let mut judge = Judge::default();
    let mut parser = serde_json::Deserializer::from_str(text);
    let value = Value {
        judge: &mut judge,
        depth: 1,
        key: None,
    };
    value
        .deserialize(&mut parser)
        .and_then(|()| parser.end())
        .map_err(|_| ())?;
    Ok(judge.members)
}

fn numbers_fit(text: &str) -> bool {
    let mut outside = String::new();
    let (mut in_string, mut escaped) = (false, false);
    for character in text.chars() {
        match character {
            _ if in_string && escaped => escaped = false,
            '\\' if in_string => escaped = true,
            '"' => in_string = !in_string,
            _ if in_string => {}
            character => outside.push(character),
        }
        if in_string {
            outside.push(' ');
        }
    }
    let is_of_a_number = |character: char| character.is_ascii_digit() || "+-.eE".contains(character);
    outside
        .split(|character| !is_of_a_number(character))
        .all(|number| written_out(number) <= JSON_NUMBER_BYTES_MAX)
}

/// Bytes of a number without its exponent, or as it is, whichever is more.
fn written_out(number: &str) -> usize {
    let (mantissa, exponent) = number.split_once(['e', 'E']).unwrap_or((number, "0"));
    let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    let exponent: i64 = exponent
        .parse()
        .unwrap_or(if exponent.len() > 18 { 1 << 40 } else { 0 });
    let size = |text: &str| i64::try_from(text.len()).expect("short");
    let is_zero = !mantissa.contains(|digit| ('1'..='9').contains(&digit));
    let plain = match exponent {
        0..=999 if is_zero => size(whole) + size(fraction),
        0.. => size(whole) + exponent + (size(fraction) - exponent).max(0),
        _ => size(whole) + size(fraction) - exponent,
    };
    number.len().max(usize::try_from(plain + 1).expect("not negative"))
}

#[derive(Default)]
struct Judge {
    nodes: usize,
    members: Members,
}

struct Value<'j> {
    judge: &'j mut Judge,
    depth: usize,
    key: Option<String>,
}

impl Value<'_> {
    fn record(self, value: Option<String>) {
        if let Some(key) = self.key {
            self.judge.members.push((key, value));
        }
    }
}

impl<'de> DeserializeSeed<'de> for Value<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        self.judge.nodes += 1;
        if self.judge.nodes > JSON_NODES_MAX {
            return Err(D::Error::custom("too many"));
        }
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Value<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<(), E> {
        self.record(None);
        Ok(())
    }

    fn visit_bool<E>(self, _: bool) -> Result<(), E> {
        self.record(None);
        Ok(())
    }

    fn visit_i64<E>(self, number: i64) -> Result<(), E> {
        self.record(Some(number.to_string()));
        Ok(())
    }

    fn visit_u64<E>(self, number: u64) -> Result<(), E> {
        self.record(Some(number.to_string()));
        Ok(())
    }

    fn visit_f64<E>(self, _: f64) -> Result<(), E> {
        self.record(None);
        Ok(())
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<(), E> {
        if text.contains('\0') {
            return Err(E::custom("NUL"));
        }
        self.record(Some(text.to_owned()));
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<(), A::Error> {
        let depth = deeper(self.depth)?;
        loop {
            let item = Value {
                judge: self.judge,
                depth,
                key: None,
            };
            if items.next_element_seed(item)?.is_none() {
                break;
            }
        }
        self.record(None);
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut members: A) -> Result<(), A::Error> {
        let depth = deeper(self.depth)?;
        let mut seen = HashSet::new();
        while let Some(key) = members.next_key::<String>()? {
            if key.contains('\0') || !seen.insert(key.clone()) {
                return Err(A::Error::custom("NUL, or twice"));
            }
            let value = Value {
                judge: self.judge,
                depth,
                key: (self.depth == 1).then_some(key),
            };
            members.next_value_seed(value)?;
        }
        self.record(None);
        Ok(())
    }
}

fn deeper<E: Error>(depth: usize) -> Result<usize, E> {
    if depth > JSON_DEPTH_MAX {
        return Err(E::custom("too deep"));
    }
    Ok(depth + 1)
}

//! The `key = value` form that both configuration files share: read once, raw, with every mistake told at once.
//!
//! A line is `key = value`, `key: value` is accepted for files of the map server's habit, `//` and `#` begin a comment
//! at the start of a line. An environment variable `P2P_SYNC_<KEY>` goes before the file's value.

use std::{collections::BTreeMap, fmt, str::FromStr};

use zeroize::Zeroizing;

use crate::reject_code::{Code, Problem};

/// What the environment's names begin with.
pub const ENVIRONMENT_PREFIX: &str = "P2P_SYNC_";

/// Of an unknown key; the longest known one has 29.
const NAME_BYTES_SHOWN_MAX: usize = 40;

/// One key a file may have.
#[derive(Clone, Copy, Debug)]
pub struct Key {
    /// As it is written.
    pub name: &'static str,
    /// What holds when the file does not say.
    pub default: &'static str,
}

impl Key {
    /// A key with its default.
    pub const fn new(name: &'static str, default: &'static str) -> Self {
        Self { name, default }
    }
}

/// Values as they were written, with where they came from, and the mistakes found so far.
#[derive(Debug)]
pub struct Settings {
    values: BTreeMap<&'static str, Value>,
    problems: Vec<Problem>,
}

struct Value {
    /// Cleared when dropped, for some are secrets.
    text: Zeroizing<String>,
    source: Source,
}

impl fmt::Debug for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.source.fmt(f)
    }
}

#[derive(Clone, Copy, Debug)]
enum Source {
    Default,
    Line(usize),
    Environment,
}

impl Settings {
    /// Reads a file's text over the defaults, then the environment over both.
    ///
    /// `environment` gives the value of a variable by its full name, so that tests need no process-wide state.
    pub fn read(text: &str, keys: &[Key], environment: impl Fn(&str) -> Option<String>) -> Self {
        let default = |key: &Key| {
            (
                key.name,
                Value {
                    text: key.default.to_owned().into(),
                    source: Source::Default,
                },
            )
        };
        let mut settings = Self {
            values: keys.iter().map(default).collect(),
            problems: Vec::new(),
        };
        for (line, content) in (1..).zip(text.trim_start_matches('\u{feff}').lines()) {
            settings.read_line(line, content.trim(), keys);
        }
        for key in keys {
            if let Some(text) = environment(&variable(key.name)) {
                settings.values.insert(
                    key.name,
                    Value {
                        text: text.into(),
                        source: Source::Environment,
                    },
                );
            }
        }
        settings
    }

    fn read_line(&mut self, line: usize, content: &str, keys: &[Key]) {
        if content.is_empty() || content.starts_with('#') || content.starts_with("//") {
            return;
        }
        let Some((name, value)) = content.split_once(['=', ':']) else {
            let sentence = format!("line {line}: expected `key = value`; begin a comment with #");
            return self.problems.push(Problem::new(Code::BadValue, sentence));
        };
        let (name, value) = (name.trim(), value.trim());
        let Some(key) = keys.iter().find(|key| key.name == name) else {
            // A long text is no mistyped key but may be a pasted secret: it is not shown.
            let shown = if name.len() <= NAME_BYTES_SHOWN_MAX {
                name
            } else {
                "(a long text)"
            };
            let hint = match nearest(name, keys.iter().map(|key| key.name)) {
                Some(known) => format!("did you mean {known}?"),
                None => "remove it".to_owned(),
            };
            let sentence = format!("line {line}: unknown key {shown}; {hint}");
            return self.problems.push(Problem::new(Code::UnknownKey, sentence));
        };
        let value = Value {
            text: value.to_owned().into(),
            source: Source::Line(line),
        };
        if let Some(Value {
            source: Source::Line(first),
            ..
        }) = self.values.insert(key.name, value)
        {
            let sentence = format!("line {line}: {name} stands on line {first} already; keep one");
            self.problems.push(Problem::new(Code::BadValue, sentence));
        }
    }

    /// The text of a key; it must be one of those that were read.
    pub fn text(&self, name: &str) -> &str {
        &self
            .values
            .get(name)
            .unwrap_or_else(|| panic!("{name} is not a key of this file"))
            .text
    }

    /// Parses a whole number within bounds.
    pub fn number<T>(&mut self, name: &str, bounds: std::ops::RangeInclusive<T>) -> T
    where
        T: FromStr + PartialOrd + fmt::Display + Copy + Default,
    {
        self.resolve(name, |text| {
            text.parse()
                .ok()
                .filter(|number| bounds.contains(number))
                .ok_or_else(|| format!("expected a whole number from {} to {}", bounds.start(), bounds.end()))
        })
    }

    /// Parses a switch: `1`, `yes`, `on`, `true` and their opposites.
    pub fn switch(&mut self, name: &str) -> bool {
        self.resolve(name, |text| match text.to_ascii_lowercase().as_str() {
            "1" | "yes" | "on" | "true" => Ok(true),
            "0" | "no" | "off" | "false" => Ok(false),
            _ => Err("expected yes or no".to_owned()),
        })
    }

    /// Parses a value by a function whose error completes the sentence; a mistake is noted and `T::default()` stands in
    /// for it until [`Self::finish`].
    pub fn resolve<T: Default>(&mut self, name: &str, parse: impl FnOnce(&str) -> Result<T, String>) -> T {
        match parse(self.text(name)) {
            Ok(value) => value,
            Err(expected) => {
                self.refuse(name, Code::BadValue, &expected);
                T::default()
            }
        }
    }

    /// Notes a mistake in a key's value. Values never stand in the sentence: some are secrets.
    pub fn refuse(&mut self, name: &str, code: Code, what_to_do: &str) {
        let place = match self.values.get(name).map(|value| value.source) {
            Some(Source::Line(line)) => format!("line {line}: {name}"),
            Some(Source::Environment) => format!("environment variable {}", variable(name)),
            Some(Source::Default) | None => name.to_owned(),
        };
        self.problems.push(Problem::new(code, format!("{place}: {what_to_do}")));
    }

    /// Gives what was built if there was no mistake, and otherwise all mistakes.
    pub fn finish<T>(self, built: T) -> Result<T, Problems> {
        if self.problems.is_empty() {
            Ok(built)
        } else {
            Err(Problems(self.problems))
        }
    }
}

/// All mistakes of a file, one a line.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub struct Problems(pub Vec<Problem>);

impl Problems {
    /// One for all of them, for where only one can be told: the first one's code, every one's sentence.
    pub fn into_one(self) -> Problem {
        match <[Problem; 1]>::try_from(self.0) {
            Ok([problem]) => problem,
            Err(problems) => {
                let code = problems.first().map_or(crate::Code::Internal, |first| first.code);
                Problem::new(code, Self(problems).to_string())
            }
        }
    }
}

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, problem) in self.0.iter().enumerate() {
            let separator = if index == 0 { "" } else { "\n" };
            write!(f, "{separator}{problem}")?;
        }
        Ok(())
    }
}

fn variable(key: &str) -> String {
    ENVIRONMENT_PREFIX.to_owned() + &key.to_ascii_uppercase()
}

/// The known name nearest to what was written, if one is near.
pub fn nearest<'a>(written: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let similarity = |name: &str| strsim::jaro_winkler(written, name);
    known
        .map(|name| (similarity(name), name))
        .filter(|(score, _)| *score > 0.8)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, name)| name)
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEYS: [Key; 3] = [
        Key::new("max_queue_size", "10000"),
        Key::new("debug_mode", "no"),
        Key::new("endpoint", ""),
    ];

    fn read(text: &str) -> Settings {
        Settings::read(text, &KEYS, |_| None)
    }

    #[test]
    fn the_file_goes_before_the_default_and_the_environment_before_both() {
        let text = "// a comment\nmax_queue_size = 5\nendpoint: http://[::1]:50051\n";
        let environment = |name: &str| (name == "P2P_SYNC_MAX_QUEUE_SIZE").then(|| "7".to_owned());
        let mut settings = Settings::read(text, &KEYS, environment);
        assert_eq!(settings.number("max_queue_size", 1..=10), 7);
        assert_eq!(settings.text("endpoint"), "http://[::1]:50051");
        assert!(!settings.switch("debug_mode"));
        assert!(settings.finish(()).is_ok());
    }

    #[test]
    fn all_mistakes_are_told_at_once_with_their_lines() {
        let mut settings = read("max_queue_siz = 5\nnonsense\ndebug_mode = perhaps\nendpoint = a\nendpoint = b\n");
        settings.number("max_queue_size", 1..=10_u32);
        settings.switch("debug_mode");
        let told = settings.finish(()).expect_err("five mistakes").to_string();
        assert_eq!(
            told.lines().collect::<Vec<_>>(),
            [
                "E102 UNKNOWN_KEY: line 1: unknown key max_queue_siz; did you mean max_queue_size?",
                "E103 BAD_VALUE: line 2: expected `key = value`; begin a comment with #",
                "E103 BAD_VALUE: line 5: endpoint stands on line 4 already; keep one",
                "E103 BAD_VALUE: max_queue_size: expected a whole number from 1 to 10",
                "E103 BAD_VALUE: line 3: debug_mode: expected yes or no",
            ]
        );
    }
}

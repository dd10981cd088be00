//! JSON that a terminal shows as it is: nothing in it steers the terminal or turns the text around.

use std::{borrow::Cow, fmt::Write};

/// Writes as `\uXXXX` what JSON allows inside its strings and a terminal obeys: DEL, the C1 controls of ECMA-48 (U+009B
/// begins a sequence as ESC [ does), line separators, and the marks that change the direction of text (UAX #9).
///
/// For JSON alone, where none of these stands outside a string; line feeds between members stay.
pub fn shown(json: &str) -> Cow<'_, str> {
    if !json.contains(steers) {
        return Cow::Borrowed(json);
    }
    let mut shown = String::with_capacity(json.len() + 16);
    for character in json.chars() {
        if steers(character) {
            write!(shown, "\\u{:04x}", u32::from(character)).expect("a String takes everything");
        } else {
            shown.push(character);
        }
    }
    Cow::Owned(shown)
}

/// All of these have four hexadecimal digits.
fn steers(character: char) -> bool {
    character.is_control() && character != '\n'
        || matches!(character, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_steers_a_terminal_is_escaped_and_the_json_says_the_same() {
        let hostile = "{\n  \"text\": \"a\u{9b}31mb\u{7f}c\u{202e}d\u{2028}é漢\"\n}";
        let told = shown(hostile);
        assert_eq!(told, "{\n  \"text\": \"a\\u009b31mb\\u007fc\\u202ed\\u2028é漢\"\n}");
        let value = |text: &str| serde_json::from_str::<serde_json::Value>(text).expect("JSON");
        assert_eq!(value(hostile), value(&told));
        assert!(matches!(shown("{\"text\": \"é\"}"), Cow::Borrowed(_)));
    }
}

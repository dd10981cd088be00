//! Texts of the map server, which passes raw bytes of its code page: decoded, and what does not decode escaped, so that
//! no operation is lost by a player's name.

use std::borrow::Cow;

use encoding_rs::{DecoderResult, Encoding, UTF_8};

/// A text as UTF-8.
pub(crate) struct Decoded<'a> {
    pub(crate) text: Cow<'a, str>,
    /// Some bytes are no text of the code page and stand as `\\xNN`, an escaped backslash in JSON.
    pub(crate) escaped: bool,
}

/// The code page of a label, as the Encoding Standard (WHATWG) knows it, or of Windows' number for it (`cp949`).
pub(crate) fn encoding(label: &str) -> Result<&'static Encoding, String> {
    let by_number = || Encoding::for_label(format!("windows-{}", label.strip_prefix("cp")?).as_bytes());
    let found = Encoding::for_label(label.as_bytes()).or_else(by_number);
    // UTF-16 is no code page of a server: a NUL would end its texts.
    found.filter(|found| found.is_ascii_compatible()).ok_or_else(|| {
        format!("{label:?} is no code page known here; try UTF-8, windows-1252, EUC-KR, Big5, GBK or Shift_JIS")
    })
}

/// Decodes JSON in bytes of a code page. ASCII costs one look at each byte.
pub(crate) fn decode<'a>(bytes: &'a [u8], encoding: &'static Encoding) -> Decoded<'a> {
    decode_escaping(bytes, encoding, r"\\x")
}

/// A JSON string of bytes of a code page, quotes included, in ASCII alone: such strings and raw bytes may stand in one
/// payload without being taken for one another.
pub(crate) fn json_string(bytes: &[u8], encoding: &'static Encoding) -> Decoded<'static> {
    let decoded = decode_escaping(bytes, encoding, r"\x");
    let mut json = String::with_capacity(decoded.text.len() + 2);
    json.push('"');
    for character in decoded.text.chars() {
        match character {
            '"' => json.push_str("\\\""),
            '\\' => json.push_str("\\\\"),
            // No text column stores it.
            '\0' => json.push_str("\\ufffd"),
            ' '..='~' => json.push(character),
            _ => {
                for unit in character.encode_utf16(&mut [0; 2]) {
                    json.push_str(&format!("\\u{unit:04x}"));
                }
            }
        }
    }
    json.push('"');
    Decoded {
        text: Cow::Owned(json),
        escaped: decoded.escaped,
    }
}

fn decode_escaping<'a>(bytes: &'a [u8], encoding: &'static Encoding, escape: &str) -> Decoded<'a> {
    let valid = if encoding == UTF_8 || bytes.is_ascii() {
        std::str::from_utf8(bytes).ok()
    } else {
        // No guessing: some Korean names would pass for UTF-8.
        None
    };
    if let Some(text) = valid {
        return Decoded {
            text: Cow::Borrowed(text),
            escaped: false,
        };
    }
    let mut text = String::with_capacity(bytes.len() * 2);
    let mut decoder = encoding.new_decoder_without_bom_handling();
    let mut escaped = false;
    let mut at = 0;
    loop {
        let (result, read) = decoder.decode_to_string_without_replacement(&bytes[at..], &mut text, true);
        at += read;
        match result {
            DecoderResult::InputEmpty => break,
            DecoderResult::OutputFull => text.reserve(bytes.len() - at + 16),
            DecoderResult::Malformed(length, beyond) => {
                escaped = true;
                let end = at - usize::from(beyond);
                for byte in &bytes[end - usize::from(length)..end] {
                    text.push_str(&format!("{escape}{byte:02x}"));
                }
            }
        }
    }
    Decoded {
        text: Cow::Owned(text),
        escaped,
    }
}

#[cfg(test)]
mod tests {
    use encoding_rs::{BIG5, EUC_KR, SHIFT_JIS, WINDOWS_1252};
    use serde_json::Value;

    use super::*;

    fn read(bytes: &[u8], encoding: &'static Encoding) -> (Value, bool) {
        let decoded = decode(bytes, encoding);
        (serde_json::from_str(&decoded.text).expect("JSON"), decoded.escaped)
    }

    #[test]
    fn a_code_page_has_its_standard_labels_and_windows_number() {
        assert_eq!(encoding("utf-8"), Ok(UTF_8));
        assert_eq!(encoding("cp949"), Ok(EUC_KR));
        assert_eq!(encoding("cp1252"), Ok(WINDOWS_1252));
        assert!(encoding("klingon").is_err() && encoding("utf-16le").is_err());
    }

    #[test]
    fn a_payload_is_read_in_the_servers_code_page() {
        let korean = b"{\"name\":\"\xc7\xc1\xb7\xd0\xc5\xd7\xb6\xf3\"}";
        assert_eq!(read(korean, EUC_KR), (serde_json::json!({ "name": "프론테라" }), false));
        assert_eq!(
            read(b"{\"name\":\"Fa\xe7ade\"}", WINDOWS_1252),
            (serde_json::json!({ "name": "Façade" }), false)
        );
        assert_eq!(
            read("{\"name\":\"Façade\"}".as_bytes(), UTF_8),
            (serde_json::json!({ "name": "Façade" }), false)
        );
    }

    #[test]
    fn two_bytes_that_would_pass_for_utf8_are_read_in_the_code_page() {
        // C2 A1 is ¡ in UTF-8 and one syllable in EUC-KR.
        let (value, escaped) = read(b"\"\xc2\xa1\"", EUC_KR);
        assert_eq!((value, escaped), (serde_json::json!("징"), false));
    }

    #[test]
    fn a_trailing_byte_that_looks_like_a_backslash_or_quote_stays_part_of_its_character() {
        assert_eq!(read(b"\"\x95\x5c\"", SHIFT_JIS), (serde_json::json!("表"), false));
        assert_eq!(json_string(b"\x95\x5c", SHIFT_JIS).text, r#""\u8868""#);
        assert_eq!(read(b"\"\xa5\x5c\"", BIG5), (serde_json::json!("功"), false));
    }

    #[test]
    fn bytes_that_do_not_decode_are_escaped_and_flagged() {
        let (value, escaped) = read(b"{\"name\":\"x\xff\xfey\"}", UTF_8);
        assert_eq!((value, escaped), (serde_json::json!({ "name": r"x\xff\xfey" }), true));
        let (value, escaped) = read(b"{\"name\":\"\xc7\"}", EUC_KR);
        assert_eq!((value, escaped), (serde_json::json!({ "name": r"\xc7" }), true));
    }

    #[test]
    fn a_json_string_is_ascii_and_reads_back_as_the_text() {
        let text = "say \"hi\" \\ tab\t 프 😀";
        let json = json_string(text.as_bytes(), UTF_8);
        assert!(json.text.is_ascii() && !json.escaped);
        assert_eq!(serde_json::from_str::<String>(&json.text).expect("JSON"), text);
        let json = json_string(b"a\xffb\0", UTF_8);
        assert!(json.escaped);
        let broken: String = serde_json::from_str(&json.text).expect("JSON");
        assert_eq!(broken, "a\\xffb\u{fffd}");
    }
}

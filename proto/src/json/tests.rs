use super::*;

fn code(text: &str) -> Code {
    check(text).expect_err(&text.chars().take(60).collect::<String>()).code
}

#[test]
fn top_level_members_are_read() {
    let facts = check(r#"{"id":7,"name":"Poring","nested":{"id":8},"n":-1,"f":1.5,"list":[{"id":9}]}"#).expect("valid");
    assert_eq!(facts.member("id").as_deref(), Some("7"));
    assert_eq!(facts.member("name").as_deref(), Some("Poring"));
    assert_eq!(facts.member("n").as_deref(), Some("-1"));
    assert_eq!(facts.member("f").as_deref(), None);
    assert_eq!(facts.member("nested").as_deref(), None);
}

#[test]
fn broken_json_is_told_with_its_position() {
    let problem = check("{\"a\":\n 1,}").expect_err("trailing comma");
    assert_eq!(problem.code, Code::InvalidJson);
    assert!(problem.sentence.contains("line 2 column"), "{problem}");
    assert_eq!(code(""), Code::InvalidJson);
    assert_eq!(code("{} {}"), Code::InvalidJson);
    assert_eq!(code("NaN"), Code::InvalidJson);
}

#[test]
fn depth_is_bounded() {
    let nested = |depth: usize| "[".repeat(depth) + &"]".repeat(depth);
    assert!(check(&nested(JSON_DEPTH_MAX)).is_ok());
    assert_eq!(code(&nested(JSON_DEPTH_MAX + 1)), Code::TooDeep);
    assert_eq!(code(&nested(100_000)), Code::TooDeep);
}

#[test]
fn the_number_of_values_is_bounded() {
    let list = |items: usize| format!("[{}]", vec!["0"; items].join(","));
    assert!(check(&list(JSON_NODES_MAX - 1)).is_ok());
    assert_eq!(code(&list(JSON_NODES_MAX)), Code::TooManyNodes);
}

#[test]
fn a_key_twice_is_refused_also_when_it_is_escaped() {
    assert_eq!(code(r#"{"a":1,"a":2}"#), Code::DuplicateKey);
    assert_eq!(code(r#"{"a":1,"\u0061":2}"#), Code::DuplicateKey);
    assert_eq!(code(r#"{"x":[{"a":1,"a":2}]}"#), Code::DuplicateKey);
    assert!(check(r#"{"a":{"a":1}}"#).is_ok());
}

#[test]
fn text_that_no_column_stores_is_refused() {
    assert_eq!(code(r#"{"a":"x\u0000y"}"#), Code::BadText);
    assert_eq!(code(r#"{"a\u0000":1}"#), Code::BadText);
    assert_eq!(code(r#"["\ud800"]"#), Code::BadText);
    assert_eq!(check_bytes(b"[\"\xff\"]").expect_err("not UTF-8").code, Code::BadText);
    assert!(check(r#"["\ud83d\ude00"]"#).is_ok());
}

#[test]
fn numbers_are_bounded() {
    assert_eq!(code("[1e999]"), Code::NumberOutOfRange);
    assert_eq!(code(&format!("[{}]", "9".repeat(65))), Code::NumberOutOfRange);
    assert!(check(&format!("[\"{}\"]", "9".repeat(1000))).is_ok());
    for long in [
        "1e308",
        "1e999",
        "-1.5e300",
        "1e-308",
        "1E+64",
        "1e-99999999999999999999",
    ] {
        assert_eq!(code(&format!("{{\"n\":{long}}}")), Code::NumberOutOfRange, "{long}");
        assert_eq!(code(long), Code::NumberOutOfRange, "{long}");
    }
    assert!(check("[-1.5e30, 1e-7, 1E+60, 0.5, 1e0, 18446744073709551615, true, \"1e308\"]").is_ok());
    assert_eq!(code("[1e]"), Code::InvalidJson);
}

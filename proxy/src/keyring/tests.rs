use super::*;

#[test]
fn a_new_key_joins_the_ones_before_and_becomes_current() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("keyring");
    add_key(&file).expect("made");
    let first = *Keyring::read(&file).expect("readable").current().expose_secret();
    let id = add_key(&file).expect("added");
    let keyring = Keyring::read(&file).expect("readable");
    assert_eq!(keyring.current().id(), &id);
    assert_eq!(keyring.entries()[0].key.expose_secret(), &first);
    assert_eq!(fs::metadata(&file).expect("there").permissions().mode() & 0o777, 0o600);
    assert_eq!(
        fs::read_dir(folder.path()).expect("readable").count(),
        1,
        "nothing temporary is left"
    );
}

#[test]
fn a_file_that_others_may_read_is_refused() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("keyring");
    add_key(&file).expect("made");
    for mode in [0o640, 0o604, 0o620] {
        fs::set_permissions(&file, fs::Permissions::from_mode(mode)).expect("set");
        assert_eq!(Keyring::read(&file).expect_err("loose").code, Code::LooseFileMode);
    }
}

#[test]
fn a_missing_file_says_how_to_make_one() {
    let problem = Keyring::read(Path::new("/nowhere/keyring")).expect_err("missing");
    assert_eq!(problem.code, Code::BadKeyring);
    assert!(problem.sentence.contains("keys new"), "{problem}");
}

#[test]
fn a_malformed_line_is_told_by_its_number_and_never_shown() {
    let secret = "ab".repeat(64);
    let cases = [
        format!("k1 {secret}"),
        format!("K1 {secret} 1770000000"),
        format!("k1 {secret} 2026-01-01"),
        format!("k1 {} 1770000000", &secret[1..]),
        format!("k1 {}zz 1770000000", &secret[2..]),
        format!("k1 {secret} 1770000000\nk1 {secret} 1770000000"),
        String::new(),
    ];
    for text in cases {
        let problem = Keyring::parse(&text, "the keyring").expect_err(&text);
        assert_eq!(problem.code, Code::BadKeyring);
        assert!(!problem.sentence.contains("abab"), "{problem}");
    }
}

#[test]
fn secrets_do_not_show() {
    let keyring = Keyring::parse(&format!("k1 {} 1770000000", "ab".repeat(64)), "test").expect("valid");
    let shown = format!("{keyring:?}");
    assert!(!shown.contains("abab") && !shown.contains("171"), "{shown}");
}

use std::os::unix::fs::PermissionsExt as _;

use super::*;

fn ids(keyring: &Keyring) -> String {
    let all: Vec<_> = keyring.entries().iter().map(|entry| entry.key.id().as_str()).collect();
    format!("{}, current {}", all.join(" "), keyring.current().id())
}

#[test]
fn a_new_key_waits_until_it_is_made_current_and_one_that_passed_can_be_retired() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("keyring");
    let (k1, k2) = (add_key(&file).expect("made"), add_key(&file).expect("added"));
    let before = Keyring::read(&file).expect("readable");
    assert_eq!(ids(&before), "k1 k2, current k1");
    assert_eq!(before.waiting().len(), 1);
    assert!(!before.is_passed(&k1) && !before.is_passed(&k2));
    assert_eq!(fs::metadata(&file).expect("there").permissions().mode() & 0o777, 0o600);
    assert_eq!(
        fs::read_dir(folder.path()).expect("readable").count(),
        1,
        "nothing temporary is left"
    );

    assert_eq!(rotate(&file, None).expect("rotated"), (k2.clone(), false));
    let after = Keyring::read(&file).expect("readable");
    assert_eq!(ids(&after), "k1 k2, current k2");
    assert!(after.is_passed(&k1) && !after.is_passed(&k2));
    assert!(!after.is_same(&before) && after.is_same(&after.clone()));
    let secret = |keyring: &Keyring, id| *keyring.get(id).expect("there").expose_secret();
    assert_eq!(secret(&after, &k1), secret(&before, &k1));
    assert_eq!(rotate(&file, Some(&k1)).expect_err("it passed").code, Code::BadValue);

    // None waits: one is made.
    let (k3, is_new) = rotate(&file, None).expect("rotated");
    assert!(is_new);
    assert_eq!(ids(&Keyring::read(&file).expect("readable")), "k1 k2 k3, current k3");
    assert_eq!(retire(&file, &k3).expect_err("current").code, Code::BadValue);
    retire(&file, &k1).expect("retired");
    assert_eq!(ids(&Keyring::read(&file).expect("readable")), "k2 k3, current k3");
    assert_eq!(retire(&file, &k1).expect_err("gone").code, Code::NotFound);
    // One that never was current goes as well.
    let k4 = add_key(&file).expect("added");
    retire(&file, &k4).expect("retired");
    assert_eq!(ids(&Keyring::read(&file).expect("readable")), "k2 k3, current k3");
}

#[test]
fn a_file_that_others_may_read_is_refused() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("keyring");
    add_key(&file).expect("made");
    for mode in [0o604, 0o620, 0o660] {
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
        format!("k1 {} 1770000000 current", &secret[1..]),
        format!("k1 {}zz 1770000000 current", &secret[2..]),
        format!("k1 {secret} 1770000000 current\nk1 {secret} 1770000000"),
        format!("k1 {secret} 1770000000 current\nk2 {secret} 1770000000 current"),
        format!("k1 {secret} 1770000000 last"),
        format!("k1 {secret} 1770000000 current more"),
        format!("k1 {secret} 1770000000"),
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
    let keyring = Keyring::parse(&format!("k1 {} 1770000000 current", "ab".repeat(64)), "test").expect("valid");
    let shown = format!("{keyring:?}");
    assert!(!shown.contains("abab") && !shown.contains("171"), "{shown}");
}

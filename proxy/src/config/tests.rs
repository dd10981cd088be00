use super::*;

const SHIPPED: &str = include_str!("../../../conf/p2p_sync_proxy.conf");
const EMBEDDED: Overrides = Overrides {
    embedded: true,
    data_dir: None,
};

fn resolve(text: &str, overrides: &Overrides) -> Result<Config, Problems> {
    Config::resolve(text, Path::new("/etc/p2p"), overrides, |_| None)
}

#[test]
fn the_shipped_file_has_every_key_at_its_default_and_no_other() {
    Settings::read(SHIPPED, &KEYS, |_| None)
        .finish(())
        .expect("every key of the file is known");
    for key in &KEYS {
        let line = format!("{} = {}", key.name, key.default);
        assert!(
            SHIPPED.lines().any(|written| written.trim_end() == line.trim_end()),
            "the file lacks `{line}`"
        );
    }
}

#[test]
fn every_key_of_the_shipped_file_is_documented_above_it() {
    let mut documented = false;
    for line in SHIPPED.lines() {
        assert!(
            line.is_empty() || line.starts_with('#') || documented,
            "no comment above `{line}`"
        );
        documented = line.starts_with("# ") && !line.starts_with("# ---") || !line.is_empty() && documented;
    }
}

#[test]
fn relative_paths_are_meant_from_the_folder_of_the_file() {
    let text = "pg_connection_string = host=db\ntypes_file = my.toml\n";
    let config = resolve(text, &Overrides::default()).expect("valid");
    assert_eq!(config.types_file.as_deref(), Some(Path::new("/etc/p2p/my.toml")));
    assert_eq!(config.keyring_file, Path::new("/etc/p2p/p2p_sync.keyring"));
    assert_eq!(
        resolve("", &EMBEDDED).expect("valid").keyring_file,
        Path::new("/etc/p2p/p2p-sync-data/keyring")
    );
}

#[test]
fn plaintext_off_loopback_is_refused_unless_it_is_allowed() {
    let problems = resolve("bind_address = 0.0.0.0", &EMBEDDED)
        .expect_err("plaintext")
        .to_string();
    assert!(problems.contains("allow_insecure = yes"), "{problems}");
    resolve("bind_address = 0.0.0.0\nallow_insecure = yes", &EMBEDDED).expect("allowed");
    resolve("bind_address = ::1", &EMBEDDED).expect("loopback");
}

#[test]
fn all_mistakes_are_told_at_once() {
    let text = "port = 70000\nredis_prefix = a b\nlog_format = xml\ncache_expiry_second = 5\n";
    let problems = resolve(text, &Overrides::default()).expect_err("five mistakes");
    let codes: Vec<Code> = problems.0.iter().map(|problem| problem.code).collect();
    assert_eq!(
        codes,
        [
            Code::UnknownKey,
            Code::BadValue,
            Code::MissingValue,
            Code::BadValue,
            Code::BadValue
        ]
    );
}

#[test]
fn secrets_do_not_show() {
    let text = "pg_connection_string = password=hunter2\nredis_host = r\nredis_password = hunter3";
    let config = resolve(text, &Overrides::default()).expect("valid");
    assert!(!format!("{config:?}").contains("hunter"));
}

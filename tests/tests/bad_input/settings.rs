//! Files that people write: both configurations, the keyring, the types.

use std::{net::TcpListener, os::unix::fs::PermissionsExt as _};

use crate::door::{Folder, Refusal, credential, tells};

/// A closed port, so that nothing is reached.
const NOWHERE: &str = "http://127.0.0.1:1";

#[test]
fn a_hosts_file_is_refused_with_every_mistake_and_its_line() {
    let credential = credential();
    let with_key = |line: &str| format!("encryption_key = {credential}\n{line}\n");
    let all_at_once = "main_server_endpoint = ftp://hub:443\nencryption_key =\nenabled = perhaps\nbatch_size = 0\n\
                       nonsense\nbatch_size = 5\n";
    let cases: Vec<(String, &[Refusal<'_>])> = vec![
        (
            with_key("sync_intervall_ms = 5"),
            &[(
                "E102 UNKNOWN_KEY: line 2: unknown key sync_intervall_ms",
                "did you mean sync_interval_ms?",
            )],
        ),
        (
            with_key("zzz = 5"),
            &[("E102 UNKNOWN_KEY: line 2: unknown key zzz", "remove it")],
        ),
        (
            all_at_once.to_owned(),
            &[
                (
                    "E107 BAD_ENDPOINT: line 1: main_server_endpoint: expected https://host:port",
                    "found ftp",
                ),
                (
                    "E106 BAD_CREDENTIAL: credential_file: this machine is not enrolled",
                    "run `p2p-sync-agent enrol` with the token",
                ),
                ("E103 BAD_VALUE: line 3: enabled: ", "expected yes or no"),
                (
                    "E103 BAD_VALUE: line 5: expected `key = value`",
                    "begin a comment with #",
                ),
                (
                    "E103 BAD_VALUE: line 6: batch_size stands on line 4 already",
                    "keep one",
                ),
            ],
        ),
        (
            with_key("batch_size = 0\nmax_queue_size = many\ncritical_data_types = MAP_STAT"),
            &[
                (
                    "E103 BAD_VALUE: line 2: batch_size: ",
                    "expected a whole number from 1 to 512",
                ),
                (
                    "E103 BAD_VALUE: line 3: max_queue_size: ",
                    "expected a whole number from 16 to 1000000",
                ),
                (
                    "E103 BAD_VALUE: line 4: critical_data_types: ",
                    "did you mean MAP_STATE?",
                ),
            ],
        ),
        (
            with_key("main_server_endpoint = hub:50051"),
            &[(
                "E107 BAD_ENDPOINT: line 2: main_server_endpoint: ",
                "expected https://host:port, found no scheme",
            )],
        ),
        (
            with_key("main_server_endpoint = http://hub"),
            &[(
                "E107 BAD_ENDPOINT: line 2: main_server_endpoint: expected https://host:port",
                "with a path behind it",
            )],
        ),
    ];
    for (text, refusals) in cases {
        let told = Folder::new().agent(&text, &["status"]);
        told.is_refused(refusals);
        assert!(!told.err.contains(&credential), "the credential is shown: {}", told.err);
    }
}

#[test]
fn a_credential_that_is_missing_cut_damaged_or_something_else_is_refused_and_not_shown() {
    let credential = credential();
    let cut = &credential[..60];
    let (head, tail) = credential.split_at(40);
    let damaged = format!("{head}{}{}", if tail.starts_with('A') { 'B' } else { 'A' }, &tail[1..]);
    let cases: Vec<(String, &[Refusal<'_>])> = vec![
        (
            String::new(),
            &[(
                "E106 BAD_CREDENTIAL: credential_file: this machine is not enrolled, for there is no ",
                "run `p2p-sync-agent enrol` with the token",
            )],
        ),
        (
            "encryption_key = secret".to_owned(),
            &[(
                "E106 BAD_CREDENTIAL: line 1: encryption_key: this is not a credential",
                "copy it again",
            )],
        ),
        (
            "encryption_key = p2ps9_AAAA".to_owned(),
            &[("E106 BAD_CREDENTIAL: line 1: encryption_key: ", "update the program")],
        ),
        (
            format!("encryption_key = {cut}"),
            &[(
                "E106 BAD_CREDENTIAL: line 1: encryption_key: this credential is damaged or cut",
                "copy it again whole",
            )],
        ),
        (
            format!("encryption_key = {damaged}"),
            &[(
                "E106 BAD_CREDENTIAL: line 1: encryption_key: this credential is damaged or cut",
                "copy it again whole",
            )],
        ),
    ];
    for (text, refusals) in cases {
        let told = Folder::new().agent(&text, &["status"]);
        told.is_refused(refusals);
        for secret in [credential.as_str(), cut, damaged.as_str()] {
            assert!(!told.err.contains(&secret[20..]), "a credential is shown: {}", told.err);
        }
    }
}

#[test]
fn a_file_with_a_credential_that_others_may_read_is_refused_and_one_without_is_not() {
    let folder = Folder::new();
    let with_mode = |mode: u32, text: &str| {
        let config = folder.write("p2p_data_sync.conf", text);
        let permissions = std::fs::Permissions::from_mode(mode);
        std::fs::set_permissions(&config, permissions).expect("it is ours");
        crate::door::run("agent", &["status"], &config, "")
    };
    let secret = format!("encryption_key = {}\nmain_server_endpoint = {NOWHERE}\n", credential());
    for mode in [0o644, 0o604, 0o620, 0o660] {
        let told = with_mode(mode, &secret);
        let name = folder.path("p2p_data_sync.conf");
        let begins = format!(
            "E110 LOOSE_FILE_MODE: {} holds a secret and has mode {mode:04o}",
            name.display()
        );
        told.is_refused(&[(&begins, &format!("run `chmod 600 {}`", name.display()))]);
    }
    assert_eq!(with_mode(0o600, &secret).exit_code, Some(0));
    // What is wrong besides is told with it.
    let told = with_mode(0o644, &(secret.clone() + "batch_size = 0\n"));
    told.is_refused(&[
        ("E110 LOOSE_FILE_MODE: ", "chmod"),
        ("E103 BAD_VALUE: line 3: ", "1 to 512"),
    ]);
    // Without a secret in it, it is anybody's; the credential's own file is not.
    std::fs::remove_dir_all(folder.path("p2p_sync_outbox")).expect("made by status");
    let kept = folder.path("p2p_sync_credential");
    folder.write_secret("p2p_sync_credential", &format!("credential = {}\n", credential()));
    let plain = format!("main_server_endpoint = {NOWHERE}\n");
    assert_eq!(with_mode(0o644, &plain).exit_code, Some(0));
    let permissions = std::fs::Permissions::from_mode(0o640);
    let is_roots = {
        use std::os::unix::fs::MetadataExt as _;
        std::fs::metadata(&kept).expect("there").uid() == 0
    };
    std::fs::set_permissions(&kept, permissions).expect("it is ours");
    // As systemd hands over what is root's.
    assert_eq!(with_mode(0o644, &plain).exit_code == Some(0), is_roots);
    std::fs::set_permissions(&kept, std::fs::Permissions::from_mode(0o644)).expect("it is ours");
    let begins = format!(
        "E110 LOOSE_FILE_MODE: credential_file: {} holds a secret",
        kept.display()
    );
    with_mode(0o644, &plain).is_refused(&[(&begins, "run `chmod 600 ")]);
}

#[test]
fn a_pasted_credential_and_the_kept_one_are_of_one_host() {
    let folder = Folder::new();
    let kept = format!("credential = {}\n", credential());
    folder.write_secret("p2p_sync_credential", &kept);
    let told = folder.agent(&format!("encryption_key = {}\n", credential()), &["status"]);
    told.is_refused(&[(
        "E106 BAD_CREDENTIAL: line 1: encryption_key: this is the credential of host ",
        "move that file away",
    )]);
    let damaged = kept.replace("credential = p2ps1_", "credential = p2ps1_A");
    folder.write_secret("p2p_sync_credential", &damaged);
    folder.agent("", &["status"]).is_refused(&[(
        "E106 BAD_CREDENTIAL: credential_file: ",
        "restore it from a backup, or enrol this machine anew",
    )]);
}

#[test]
fn a_file_that_is_not_there_is_told_by_both_programs() {
    let folder = Folder::new();
    let missing = folder.path("missing.conf");
    let cases = [
        ("agent", "status", "give its path with --config"),
        ("proxy", "serve", "check its path"),
    ];
    for (program, command, advice) in cases {
        let told = crate::door::run(program, &[command], &missing, "");
        told.is_refused(&[("E101 CONFIG_UNREADABLE: ", advice)]);
        assert!(told.err.contains(&missing.display().to_string()), "{told:?}");
    }
}

#[test]
fn a_hub_secret_in_a_hosts_file_is_told_loudly_and_the_agent_runs_without_it() {
    let secrets = [
        "pg_connection_string",
        "redis_password",
        "embedding_api_key",
        "keyring_file",
        "tls_key",
    ];
    for key in secrets {
        assert!(
            p2p_sync_proxy::config::KEYS.iter().any(|known| known.name == key),
            "{key} is the hub's"
        );
        let text = format!(
            "encryption_key = {}\n{key} = hubs-own-secret\nmain_server_endpoint = {NOWHERE}\n",
            credential()
        );
        let told = Folder::new().agent(&text, &["status"]);
        assert_eq!(told.exit_code, Some(0), "{told:?}");
        let warning = format!("E105 HUB_SECRET_IN_HOST_FILE: line 2: {key} is the hub's");
        let line = told
            .err
            .lines()
            .find(|line| line.contains(&warning))
            .unwrap_or_else(|| panic!("{told:?}"));
        assert!(line.contains("WARN") && line.contains("delete the line"), "{line}");
        assert!(!format!("{told:?}").contains("hubs-own-secret"), "{told:?}");
    }
}

#[test]
fn a_hubs_file_is_refused_with_every_mistake_and_its_line() {
    let database = "pg_connection_string = host=127.0.0.1";
    let cases: Vec<(String, &[Refusal<'_>])> = vec![
        (
            "prot = 5".to_owned(),
            &[
                ("E102 UNKNOWN_KEY: line 1: unknown key prot", "did you mean port?"),
                (
                    "E104 MISSING_VALUE: pg_connection_string: say where Postgres is",
                    "add --embedded",
                ),
            ],
        ),
        (
            format!("{database}\nport = 70000\nbind_address = everywhere\nlog_format = xml\nredis_prefix = a b\n"),
            &[
                (
                    "E103 BAD_VALUE: line 2: port: ",
                    "expected a whole number from 0 to 65535",
                ),
                ("E103 BAD_VALUE: line 3: bind_address: ", "expected an IP address"),
                ("E103 BAD_VALUE: line 4: log_format: ", "expected text or json"),
                ("E103 BAD_VALUE: line 5: redis_prefix: ", "expected 1 to 64 of"),
            ],
        ),
        (
            format!("{database}\nbind_address = 0.0.0.0"),
            &[(
                "E103 BAD_VALUE: line 2: bind_address: the proxy speaks plaintext",
                "set tls_cert and tls_key; or put a load balancer with TLS before it",
            )],
        ),
    ];
    for (text, refusals) in cases {
        let folder = Folder::new();
        folder.proxy(&text, &["serve"]).is_refused(refusals);
        let checked = folder.proxy(&text, &["check"]);
        assert_eq!(checked.exit_code, Some(1), "{checked:?}");
        let problems = checked
            .out
            .strip_prefix("settings: ")
            .unwrap_or_else(|| panic!("{checked:?}"));
        for refusal in refusals {
            tells(problems, *refusal);
        }
    }
}

#[test]
fn a_port_in_use_and_a_database_that_does_not_answer_are_told() {
    let taken = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = taken.local_addr().expect("bound");
    let nowhere = "pg_connection_string = host=127.0.0.1 port=1";
    let told = Folder::new().proxy(&format!("port = {}\n{nowhere}", address.port()), &["serve"]);
    told.is_refused(&[(
        &format!("E109 PORT_IN_USE: another program listens on {address}"),
        "set another port",
    )]);

    let unreachable = (
        "E111 DATABASE_UNREACHABLE: Postgres cannot be reached (",
        "check pg_connection_string",
    );
    let folder = Folder::new();
    let text = format!("port = 0\n{nowhere}");
    folder.proxy(&text, &["serve"]).is_refused(&[unreachable]);
    folder.proxy(&text, &["hosts", "list"]).is_refused(&[unreachable]);
    let checked = folder.proxy(&text, &["check"]);
    assert_eq!(checked.exit_code, Some(1), "{checked:?}");
    tells(&checked.out, (&format!("database: {}", unreachable.0), unreachable.1));
}

#[test]
fn a_keyring_that_is_missing_open_to_others_or_damaged_is_refused() {
    let folder = Folder::new();
    let config = "keyring_file = keys";
    let list = || folder.proxy(config, &["keys", "list"]);
    list().is_refused(&[("E116 BAD_KEYRING: there is no keyring at ", "`p2p-sync-proxy keys new`")]);

    let made = folder.proxy(config, &["keys", "new"]);
    assert_eq!(made.exit_code, Some(0), "{made:?}");
    let keyring = folder.path("keys");
    let set_mode = |mode| {
        let permissions = std::fs::Permissions::from_mode(mode);
        std::fs::set_permissions(&keyring, permissions).expect("it is ours");
    };
    set_mode(0o644);
    list().is_refused(&[(
        "E110 LOOSE_FILE_MODE: ",
        "has mode 0644, so others may read or change it: run `chmod 600 ",
    )]);
    set_mode(0o600);
    assert_eq!(list().exit_code, Some(0));

    let whole = std::fs::read_to_string(&keyring).expect("it is ours");
    let secret = whole
        .split_whitespace()
        .find(|word| word.len() == 128)
        .expect("a key is in it");
    let damages: [(String, Refusal<'_>); 4] = [
        (
            whole.replacen(secret, &secret[1..], 1),
            (", line 2: the secret is not 128 hexadecimal digits", "from a backup"),
        ),
        (
            whole.replacen("k1 ", "K1 ", 1),
            (", line 2: a key id is ", "a-z, 0-9 and -"),
        ),
        (
            whole.clone() + "k2\n",
            (", line 3: expected `key-id secret created-at`", "from a backup"),
        ),
        ("# nothing\n".to_owned(), (" holds no key", "`p2p-sync-proxy keys new`")),
    ];
    for (text, (place, advice)) in damages {
        folder.write("keys", &text);
        list().is_refused(&[(&format!("E116 BAD_KEYRING: {}{place}", keyring.display()), advice)]);
    }
}

#[test]
fn a_types_file_is_refused_with_every_mistake() {
    let folder = Folder::new();
    let config = "pg_connection_string = host=127.0.0.1\ntypes_file = types.toml\n";
    let types = "version = 0\n[MAP_STAT]\nowner = \"map\"\nkeep = \"latest\"\n[CHAT_MESSAGE]\nowner = \"maps\"\n\
                 keep = \"every\"\nhistory = \"off\"\npayload_bytes_max = 0\nschema = \"missing.json\"\nhystory = \"all\"\n";
    folder.write("types.toml", types);
    let refusals = [
        (
            "E115 BAD_TYPES_FILE: version: ",
            "expected a whole number from 1, raised with each change",
        ),
        ("E115 BAD_TYPES_FILE: [MAP_STAT]: ", "did you mean MAP_STATE?"),
        (
            "E115 BAD_TYPES_FILE: [CHAT_MESSAGE] hystory: is unknown",
            "did you mean history?",
        ),
        (
            "E115 BAD_TYPES_FILE: [CHAT_MESSAGE] owner: ",
            "expected one of \"map\", \"char\", \"account\", \"host\"",
        ),
        (
            "E115 BAD_TYPES_FILE: [CHAT_MESSAGE] history: types kept as \"every\" are always logged",
            "leave it out",
        ),
        (
            "E115 BAD_TYPES_FILE: [CHAT_MESSAGE] payload_bytes_max: ",
            "expected a whole number from 1 to 262144",
        ),
        (
            "E115 BAD_TYPES_FILE: [CHAT_MESSAGE] schema: missing.json cannot be read",
            "",
        ),
    ];
    folder.proxy(config, &["serve"]).is_refused(&refusals);

    folder.write("types.toml", "version = \n");
    folder
        .proxy(config, &["serve"])
        .is_refused(&[("E115 BAD_TYPES_FILE: the types file is not TOML: ", "line 1")]);
}

//! Plaintext that must not leave the agent, and secrets that must stay where they belong.

use std::{
    path::{Path, PathBuf},
    process::{Command, Output},
};

use base64::{
    Engine as _,
    engine::general_purpose::{STANDARD_NO_PAD, URL_SAFE_NO_PAD},
};
use p2p_sync_agent::{Agent, Config, OperationState, Submission};
use p2p_sync_proto::{
    keys::{Credential, SECRET_BYTES},
    path,
    v1::SyncDataType,
};
use p2p_sync_proxy::{
    config::{Config as HubConfig, Overrides},
    keyring::Keyring,
};
use p2p_sync_tests::{
    faulty_link::FaultyLink,
    recording::Happening,
    services::{OwnPostgres, OwnRedis},
    stack,
};

use crate::world::{PATIENCE, PROGRAM, World, drop_of, run, until};

/// Every file below a folder, whole.
fn files_below(folder: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).expect("the folder is there").flatten() {
        let kind = entry.file_type().expect("it is there");
        if kind.is_dir() {
            found.extend(files_below(&entry.path()));
        } else if kind.is_file() {
            found.push((entry.path(), std::fs::read(entry.path()).expect("readable")));
        }
    }
    found
}

fn contains(bytes: &[u8], needle: &str) -> bool {
    bytes.windows(needle.len()).any(|window| window == needle.as_bytes())
}

fn random_word() -> String {
    (0..16).map(|_| fastrand::lowercase()).collect()
}

#[test]
fn invariant_09_no_plaintext_rests_in_the_outbox_or_travels_to_the_hub() {
    let mut world = World::not_started();
    let link = FaultyLink::to(&world.endpoint());
    link.record();
    let config = world.config_at(&link.endpoint(), "");
    let (outbox_dir, host_id) = (
        config.outbox_dir.clone(),
        config.credential.as_ref().expect("given").host_id,
    );
    let [text, map, entity] = [random_word(), random_word(), random_word()];
    let agent = Agent::start(config).expect("starts");
    // Each travels alone: so small a message is not compressed, which would hide the words as sealing does.
    let submit = |payload: &str| {
        let submission = Submission {
            map: &map,
            entity: Some(&entity),
            ..drop_of(payload)
        };
        agent.submit(&submission).expect("taken")
    };
    let assert_sealed = |where_: &str, bytes: &[u8]| {
        for word in [&text, &map, &entity] {
            assert!(!contains(bytes, word), "plaintext in {where_}");
        }
    };

    let spooled = submit(&format!(r#"{{"event":"{text}"}}"#));
    until("it is on disk", || {
        agent.result(spooled).state == OperationState::Spooled
    });
    let files = files_below(&outbox_dir);
    assert!(
        files.iter().any(|(_, bytes)| bytes.len() > 4096),
        "the outbox holds something"
    );
    for (file, bytes) in &files {
        assert_sealed(&file.display().to_string(), bytes);
    }

    world.hub.start();
    assert_eq!(agent.wait(spooled, Some(PATIENCE)).state, OperationState::Applied);
    let rejected = submit(&format!(r#"{{"event":"{text}","amount":-1}}"#));
    assert_eq!(agent.wait(rejected, Some(PATIENCE)).state, OperationState::Rejected);
    let stored = path::Path::parse(&format!("{map}/ITEM_DROP/{entity}")).expect("a path");
    let state = agent.get(&stored, Some(PATIENCE)).expect("answered").expect("there");
    assert!(contains(&state.payload, &text), "the hub holds what was sent");
    until("the dead letter is on disk", || {
        agent.dead_letters(1).is_ok_and(|letters| letters.len() == 1)
    });

    let wire = link.recorded();
    let names_the_host = wire.windows(16).any(|window| window == host_id.as_bytes());
    assert!(names_the_host, "the messages are in the recording");
    assert_sealed("the bytes between agent and hub", &wire);
    for (file, bytes) in files_below(&outbox_dir) {
        assert_sealed(&file.display().to_string(), &bytes);
    }
}

/// A secret in each form that a careless line of code would show it in.
fn forms(secret: &[u8]) -> Vec<String> {
    [&secret[..24], &secret[secret.len() - 24..]]
        .into_iter()
        .flat_map(|part| {
            let hex = part
                .iter()
                .map(|byte| format!("{byte:02x}"))
                .collect::<Vec<_>>()
                .concat();
            let decimals: Vec<String> = part.iter().map(u8::to_string).collect();
            [
                hex.to_uppercase(),
                hex,
                STANDARD_NO_PAD.encode(part),
                URL_SAFE_NO_PAD.encode(part),
                decimals.join(", "),
            ]
        })
        .collect()
}

/// The texts that show one of the two keys of a credential.
fn forms_of_credential(text: &str) -> Vec<String> {
    let encoded = text.split_once('_').expect("a prefix").1;
    let decoded = URL_SAFE_NO_PAD.decode(encoded).expect("base64url");
    let keys = &decoded[decoded.len() - 4 - 2 * SECRET_BYTES..decoded.len() - 4];
    let (to_hub, to_host) = keys.split_at(SECRET_BYTES);
    let mut all: Vec<String> = [to_hub, to_host].into_iter().flat_map(forms).collect();
    let first_character = (decoded.len() - 4 - 2 * SECRET_BYTES) * 4 / 3 + 1;
    all.extend([first_character, encoded.len() - 60].map(|at| encoded[at..at + 20].to_owned()));
    all
}

/// A hub over a Postgres and a Redis with passwords, and every secret there is.
struct Guarded {
    world: World,
    postgres: OwnPostgres,
    redis: OwnRedis,
    /// On the hub alone.
    hub_secrets: Vec<String>,
}

impl Guarded {
    fn new() -> Self {
        let (postgres, redis) = run(async { (OwnPostgres::new().await, OwnRedis::new().await) });
        let redis_password = random_word();
        run(async {
            let client = redis::Client::open(redis.url()).expect("a URL");
            let mut connection = client.get_multiplexed_async_connection().await.expect("Redis serves");
            let mut set = redis::cmd("CONFIG");
            set.arg("SET").arg("requirepass").arg(&redis_password);
            set.query_async::<()>(&mut connection).await.expect("taken");
        });
        let settings = [
            ("redis_password", redis_password.clone()),
            ("log_level", "debug".to_owned()),
        ];
        let world = World::on(postgres.url(), &redis.url(), &settings);
        let postgres_password = postgres
            .url()
            .split([':', '@'])
            .nth(2)
            .expect("user, password, host")
            .to_owned();
        let keyring = Keyring::load(&keyring_file(&world)).expect("made by the hub");
        let mut hub_secrets = forms(keyring.current().expose_secret());
        hub_secrets.extend([redis_password, postgres_password]);
        Self {
            world,
            postgres,
            redis,
            hub_secrets,
        }
    }
}

fn keyring_file(world: &World) -> PathBuf {
    world.hub.config().with_file_name("keyring")
}

fn assert_shows_none(what: &str, text: &str, secrets: &[String]) {
    for secret in secrets {
        assert!(!text.contains(secret.as_str()), "a secret stands in {what}");
    }
}

#[test]
fn invariant_09_and_11_through_every_trouble_logs_show_no_secret_and_the_agent_holds_none_of_the_hubs() {
    let Guarded {
        mut world,
        mut postgres,
        mut redis,
        hub_secrets,
    } = Guarded::new();
    world.hub.start();
    let credential = world.hub.add_host(1);
    let folder = world.folder.path().join("agent");
    let debug = [
        ("debug_mode", "yes".to_owned()),
        ("retry_delay_max_ms", "200".to_owned()),
    ];
    let mut agent = stack::Agent::new(Path::new(PROGRAM), &folder, &world.endpoint(), &credential, &debug);
    // One that the hub does not admit, and that therefore asks again and again.
    let foreign = World::not_started().hub.add_host(2);
    let stranger_folder = world.folder.path().join("stranger");
    let mut stranger = stack::Agent::new(
        Path::new(PROGRAM),
        &stranger_folder,
        &world.endpoint(),
        &foreign,
        &debug,
    );
    agent.start();
    stranger.start();

    let mut tag = 0;
    let mut put = |agent: &mut stack::Agent, amount: i32| {
        tag += 1;
        let happening = Happening {
            at_ms: 0,
            data_type: SyncDataType::ItemDrop,
            map: "prontera".to_owned(),
            account_id: 1,
            entity: None,
            payload: Some(format!(r#"{{"drop_id":1,"amount":{amount}}}"#)),
        };
        assert!(agent.submit(tag, &happening), "the agent is gone");
        let mut state = String::new();
        until("it is settled", || {
            let ledger = agent.ledger();
            let said = ledger.ids.get(&tag).and_then(|id| ledger.said.get(id));
            state = said.map_or(String::new(), |said| said.state.clone());
            stack::is_settled(&state)
        });
        state
    };
    assert_eq!(put(&mut agent, 1), "APPLIED");
    assert_eq!(put(&mut agent, -1), "REJECTED");
    redis.kill();
    assert_eq!(put(&mut agent, 2), "APPLIED");
    run(postgres.restart());
    assert_eq!(put(&mut agent, 3), "APPLIED");
    until("the stranger is turned away", || {
        stranger.log().contains("E301 NOT_OPENED")
    });
    world.hub.kill();
    world.hub.start();
    assert!(agent.flush(PATIENCE));
    agent.stop();
    stranger.stop();
    world.hub.stop();

    let mut secrets = hub_secrets.clone();
    secrets.extend(
        forms_of_credential(&credential)
            .into_iter()
            .chain(forms_of_credential(&foreign)),
    );
    for (what, log) in [
        ("the hub's log", world.hub.log()),
        ("the agent's log", agent.log()),
        ("the stranger's", stranger.log()),
    ] {
        assert!(log.contains("DEBUG"), "{what} is at debug level");
        assert_shows_none(what, &log, &secrets);
    }
    let master = Keyring::load(&keyring_file(&world)).expect("there");
    for (file, bytes) in files_below(&folder) {
        let what = file.display().to_string();
        assert!(
            !hub_secrets.iter().any(|secret| contains(&bytes, secret)),
            "a secret of the hub in {what}"
        );
        let raw = &master.current().expose_secret()[..24];
        assert!(
            !bytes.windows(raw.len()).any(|window| window == raw),
            "the master key in {what}"
        );
    }
}

#[test]
fn invariant_11_nothing_that_holds_a_secret_shows_it_when_it_is_printed() {
    let guarded = Guarded::new();
    let (world, mut secrets) = (&guarded.world, guarded.hub_secrets.clone());
    let conf = std::fs::read_to_string(world.hub.config()).expect("written");
    let hub = HubConfig::resolve(&conf, Path::new(""), &Overrides::default(), |_| None).expect("valid");
    let keyring = Keyring::load(&keyring_file(world)).expect("there");
    let credential: Credential = keyring.current().credential(uuid::Uuid::from_u128(1), 1);
    let text = credential.to_text().to_string();
    secrets.extend(forms_of_credential(&text));
    let agent = Config::parse(&format!("encryption_key = {text}"), Path::new(""), |_| None).expect("valid");
    let shown = format!(
        "{hub:?} {hub:#?} {keyring:?} {keyring:#?} {:?} {credential:?} {credential:#?}",
        keyring.current()
    );
    assert_shows_none("Debug of the hub's parts", &shown, &secrets);
    let shown = format!(
        "{agent:?} {agent:#?} {:?} {:?}",
        agent.credential,
        agent.credential.as_ref().expect("given").to_hub
    );
    assert_shows_none("Debug of the agent's parts", &shown, &secrets);
}

#[test]
fn invariant_11_no_error_text_shows_a_secret_that_was_mistyped() {
    let guarded = Guarded::new();
    let (world, redis, mut secrets) = (&guarded.world, &guarded.redis, guarded.hub_secrets.clone());
    let text = world.hub.add_host(1);
    secrets.extend(forms_of_credential(&text));
    let cut = &text[..text.len() - 1];
    let mistakes = [
        format!("encryption_key = {cut}"),
        format!("encryption_key {text}"),
        format!("encryption_kee = {text}"),
        format!("encryption_key = {text}\nmain_server_endpoint = {text}"),
        text.clone(),
        format!("{text} = encryption_key"),
        format!("encryption_key = {text}\nencryption_key = {text}"),
    ];
    for mistake in mistakes {
        if let Err(problems) = Config::parse(&mistake, Path::new(""), |_| None) {
            assert_shows_none("an error of the agent", &format!("{problems} {problems:?}"), &secrets);
        }
    }

    let conf = std::fs::read_to_string(world.hub.config()).expect("written");
    let check = |conf: String| -> Output {
        let file = world.hub.config().with_file_name("mistaken.conf");
        std::fs::write(&file, conf).expect("writable");
        Command::new(PROGRAM)
            .args(["proxy", "check", "--config"])
            .arg(file)
            .output()
            .expect("it runs")
    };
    let redis_url = redis.url();
    let redis_port = redis_url.rsplit(':').next().expect("a port").trim_end_matches('/');
    for (from, to) in [
        ("/postgres\n", "/nowhere\n"),
        ("postgres://postgres:", "postgres://nobody:"),
        ("postgres://", "postgres:/"),
        ("pg_connection_string = ", "pg_connection_strin = "),
        ("redis_password = ", "redis_pasword "),
        (&format!("redis_port = {redis_port}"), "redis_port = 1"),
    ] {
        assert!(conf.contains(from), "{from:?} is in the configuration");
        let output = check(conf.replace(from, to));
        assert!(!output.status.success(), "{to:?} is told");
        let told = format!(
            "{}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        assert!(told.contains('E'), "a code is told: {told}");
        assert_shows_none("an error of the hub", &told, &secrets);
    }
}

/// Types whose `Debug` shows nothing of what they hold, and which clear it.
const REDACTED: [&str; 6] = ["Secret", "SealKey", "MasterKey", "Credential", "Keyring", "Zeroizing"];

/// The members of each struct of a source file: whether it derives `Debug`, the struct's name, the member's and its type.
fn members(source: &str) -> Vec<(bool, String, String, String)> {
    let mut found = Vec::new();
    let (mut derives_debug, mut within) = (false, None::<(bool, String)>);
    for line in source.lines().map(str::trim) {
        let line = line.trim_start_matches("pub(crate) ").trim_start_matches("pub(super) ");
        let line = line.trim_start_matches("pub ");
        if line.starts_with("#[derive(") {
            derives_debug = line.contains("Debug");
        } else if let Some(rest) = line.strip_prefix("struct ").filter(|rest| rest.ends_with('{')) {
            let name = rest.split(|c: char| !c.is_alphanumeric()).next().unwrap_or_default();
            within = Some((derives_debug, name.to_owned()));
        } else if line == "}" {
            (derives_debug, within) = (false, None);
        } else if let (Some((debug, name)), Some((member, its_type))) = (&within, line.split_once(": ")) {
            let is_member = member
                .chars()
                .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_');
            if is_member && !its_type.contains('"') {
                let its_type = its_type.trim_end_matches(',').to_owned();
                found.push((*debug, name.clone(), member.to_owned(), its_type));
            }
        } else if !line.starts_with("#[") && !line.starts_with("//") {
            derives_debug = false;
        }
    }
    found
}

/// What is wrong with a member that is named like a secret, or holds a key's octets.
fn shows_a_secret(debug: bool, member: &str, its_type: &str) -> Option<&'static str> {
    let is_redacted = REDACTED.iter().any(|redacted| its_type.contains(redacted));
    // Where it lies and what it is called is no secret, nor are a number, a switch or the tokens of a language model.
    let bare = its_type.trim_start_matches("Option<").trim_end_matches('>');
    let is_none = ["bool", "u32", "u64", "usize", "Tokenizer"].contains(&bare)
        || ["PathBuf", "KeyId", "Uuid"].iter().any(|name| its_type.contains(name));
    let is_secret = ["password", "secret", "token", "credential", "private"]
        .iter()
        .any(|word| member.contains(word));
    let is_octets = ["[u8", "Vec<u8>", "Bytes"]
        .iter()
        .any(|octets| its_type.contains(octets));
    if is_secret && !is_redacted && !is_none {
        return Some("is named like a secret and is of a type that neither hides nor clears it");
    }
    if member.ends_with("key") && is_octets && (debug || !is_redacted) {
        return Some("holds the octets of a key where `Debug` shows them, or they are not cleared");
    }
    None
}

#[test]
fn invariant_11_no_struct_holds_a_secret_in_a_type_that_shows_it() {
    assert!(shows_a_secret(true, "redis_password", "String").is_some());
    assert!(shows_a_secret(true, "token", "Option<String>").is_some());
    assert!(shows_a_secret(true, "tokens_max", "Option<usize>").is_none());
    assert!(shows_a_secret(true, "key", "Zeroizing<Vec<u8>>").is_some());
    assert!(shows_a_secret(false, "key", "Zeroizing<Vec<u8>>").is_none());
    assert_eq!(
        members("#[derive(Clone, Debug)]\npub struct A {\n    /// B: c\n    pub b_c: Vec<u8>,\n}\n"),
        [(true, "A".to_owned(), "b_c".to_owned(), "Vec<u8>".to_owned())]
    );
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace");
    let mut seen = 0;
    for package in ["proto", "agent", "proxy"] {
        for (file, source) in files_below(&root.join(package).join("src")) {
            let source = String::from_utf8_lossy(&source).into_owned();
            for (debug, owner, member, its_type) in members(&source) {
                seen += 1;
                let problem = shows_a_secret(debug, &member, &its_type);
                assert_eq!(problem, None, "{}: {owner}.{member}: {its_type}", file.display());
            }
        }
    }
    assert!(seen > 500, "{seen} members were looked at");
}

/// A line of a credential file, decoded.
fn decoded_line(file: &str, name: &str) -> Vec<u8> {
    let line = file.lines().find_map(|line| line.strip_prefix(name));
    let text = line.unwrap_or_else(|| panic!("{name} is not in the file"));
    URL_SAFE_NO_PAD
        .decode(text.split_once('_').expect("a prefix").1)
        .expect("base64url")
}

#[test]
fn invariant_11_tokens_private_keys_and_renewed_credentials_show_in_no_log_error_or_row() {
    let mut guarded = Guarded::new();
    let world = &mut guarded.world;
    world.hub.start();
    let endpoint = world.endpoint();
    let invite = ["hosts", "invite", "--account", "7", "--endpoint", endpoint.as_str()];
    let tokens = [world.hub.command(&invite), world.hub.command(&invite)];
    let folder = world.folder.path().join("enrolled");
    let debug = [
        ("debug_mode", "yes".to_owned()),
        ("connect_timeout_ms", "1000".to_owned()),
    ];
    let mut agent = stack::Agent::enrolled(Path::new(PROGRAM), &folder, &tokens[0], &debug);
    let file = folder.join("p2p_sync_credential");
    let kept = || std::fs::read_to_string(&file).expect("kept");
    let first = kept();
    world.hub.command(&["keys", "rotate"]);
    agent.start();
    until("the credential is renewed", || {
        let now = kept();
        !now.contains("former_credential")
            && !now.contains("renewal_request")
            && now.len() == first.len()
            && now != first
    });
    agent.stop();

    // Everything that can go wrong with a token, as its holder is told of it.
    let mut told = String::new();
    let mut enrol = |token: &str, name: &str| {
        let config = world.folder.path().join(name).join("p2p_data_sync.conf");
        std::fs::create_dir_all(config.parent().expect("a folder")).expect("made");
        std::fs::write(&config, "debug_mode = yes\nconnect_timeout_ms = 1000\n").expect("written");
        let output = Command::new(PROGRAM)
            .args(["agent", "enrol", token, "--config"])
            .arg(&config)
            .output()
            .expect("it runs");
        assert!(!output.status.success(), "{name}");
        told += &String::from_utf8_lossy(&[output.stdout, output.stderr].concat());
    };
    let (used, open) = (&tokens[0], &tokens[1]);
    enrol(used, "used");
    enrol(&used[..used.len() - 1], "cut");
    world.hub.command(&["hosts", "uninvite", "2"]);
    enrol(open, "withdrawn");
    world.hub.stop();
    enrol(open, "away");
    assert!(
        told.contains("E315 ") && told.contains("E120 ") && told.contains("E303 ") && told.contains("E405 "),
        "{told}"
    );

    let mut secrets = guarded.hub_secrets.clone();
    for token in &tokens {
        let decoded = URL_SAFE_NO_PAD
            .decode(token.split_once('_').expect("a prefix").1)
            .expect("base64url");
        // Behind the key id k1 with its length, and the token's id.
        let secret = &decoded[1 + 2 + 16..][..SECRET_BYTES];
        secrets.extend(forms(secret));
        secrets.push(token[120..].to_owned());
        let id = &decoded[1 + 2..][..16];
        secrets.extend([uuid::Uuid::from_slice(id).expect("16 octets").to_string()]);
    }
    let identity = decoded_line(&first, "private_key = ");
    secrets.extend(forms(&identity[..32]));
    for file in [&first, &kept()] {
        let line = file.lines().find_map(|line| line.strip_prefix("credential = "));
        secrets.extend(forms_of_credential(line.expect("enrolled")));
    }
    let keyring = Keyring::load(&keyring_file(world)).expect("there");
    secrets.extend(forms(keyring.current().expose_secret()));

    let mut rows = String::new();
    for table in ["hosts", "invitations"] {
        for row in world.rows(&format!("SELECT t::text FROM p2p_sync.{table} AS t"), &[]) {
            rows += row.get(0);
        }
    }
    assert!(rows.contains("k2"), "{rows}");
    for (what, text) in [
        ("what a token's holder is told", &told),
        ("the hub's log", &world.hub.log()),
        ("the agent's log", &agent.log()),
        ("the database", &rows),
    ] {
        assert_shows_none(what, text, &secrets);
    }
    let read = p2p_sync_proto::token::Token::parse(open).expect("whole");
    let shown = format!(
        "{read:?} {read:#?} {:?} {:?}",
        read.secret,
        Config::load(agent.config())
    );
    assert_shows_none("Debug of what holds them", &shown, &secrets);
}

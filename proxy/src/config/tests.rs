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
    resolve(
        "bind_address = 0.0.0.0\ntls_cert = hub.pem\ntls_key = hub.key",
        &EMBEDDED,
    )
    .expect("TLS");
}

#[test]
fn tools_are_served_where_a_port_says_so_and_off_loopback_only_over_tls() {
    assert!(
        resolve("", &EMBEDDED).expect("valid").admin.is_none(),
        "nothing listens unless asked"
    );
    let admin = |text: &str| resolve(text, &EMBEDDED).expect(text).admin.expect("a port");
    let found = admin("admin_port = 0");
    assert_eq!(found.listen.to_string(), "127.0.0.1:0");
    assert!(
        matches!(found.source, admin::Source::File(file) if file == Path::new("/etc/p2p/p2p-sync-data/admin_token"))
    );
    let text = "pg_connection_string = host=db\nadmin_port = 50052";
    let found = resolve(text, &Overrides::default())
        .expect("valid")
        .admin
        .expect("a port");
    assert!(matches!(found.source, admin::Source::File(file) if file == Path::new("/etc/p2p/p2p_sync.admin_token")));

    let open = "admin_port = 50052\nadmin_address = ::";
    let problems = resolve(open, &EMBEDDED).expect_err("plaintext").to_string();
    assert!(
        problems.starts_with("E103 BAD_VALUE: line 2: admin_address: "),
        "{problems}"
    );
    admin(&format!("{open}\nallow_insecure = yes"));
    admin(&format!("{open}\ntls_cert = hub.pem\ntls_key = hub.key"));
    resolve("admin_port = http", &EMBEDDED).expect_err("no number");

    let environment = |name: &str| (name == admin::TOKEN_VARIABLE).then(|| "hunter2".to_owned());
    let text = "admin_port = 50052\nadmin_token_file = elsewhere";
    let config = Config::resolve(text, Path::new(""), &EMBEDDED, environment).expect("valid");
    assert!(!format!("{config:?}").contains("hunter"), "{config:?}");
    let source = config.admin.expect("a port").source;
    assert!(
        matches!(source, admin::Source::Given(token) if token.expose() == "hunter2"),
        "the environment goes first"
    );
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
fn a_connection_string_that_cannot_be_used_is_refused_with_what_to_do_and_never_shown() {
    for (written, what_to_do) in [
        ("host=db sslmode=require", "without TLS"),
        ("host=db sslmode=verify-full", "leave sslmode out"),
        ("host=db password=hunter2 hunter3=4", "expected key=value pairs"),
    ] {
        let text = format!("port = 1\npg_connection_string = {written}\n");
        let told = resolve(&text, &Overrides::default()).expect_err(written).to_string();
        assert!(
            told.starts_with("E103 BAD_VALUE: line 2: pg_connection_string: "),
            "{told}"
        );
        assert!(told.contains(what_to_do) && !told.contains("hunter"), "{told}");
    }
    resolve("pg_connection_string = host=db sslmode=disable", &Overrides::default()).expect("as it is anyway");
}

#[test]
fn secrets_do_not_show() {
    let text = "pg_connection_string = password=hunter2\nredis_host = r\nredis_password = hunter3";
    let config = resolve(text, &Overrides::default()).expect("valid");
    assert!(!format!("{config:?}").contains("hunter"));
}

#[test]
fn addresses_are_bounded_where_hosts_reach_the_proxy_itself() {
    let of = |text: &str| {
        resolve(text, &EMBEDDED)
            .expect("valid")
            .admission
            .connections_per_address_max
    };
    let tls = "tls_cert = hub.pem\ntls_key = hub.key\n";
    assert_eq!(of(""), None);
    assert_eq!(of(tls), Some(64));
    assert_eq!(of(&format!("{tls}max_connections_per_address = 0")), None);
    assert_eq!(of("max_connections_per_address = 7"), Some(7));
    let problems = resolve("max_connections_per_address = some", &EMBEDDED).expect_err("no number");
    assert!(problems.to_string().contains("auto"), "{problems}");
}

#[test]
fn embeddings_are_lexical_unless_the_settings_say_otherwise() {
    let provider = |text: &str| resolve(text, &EMBEDDED).expect(text).embedding.provider;
    assert!(matches!(provider(""), ProviderSettings::Lexical));
    assert!(matches!(provider("embedding_provider = off"), ProviderSettings::Off));
    let ProviderSettings::Local(model) = provider("embedding_provider = local\nembedding_model_dir = minilm") else {
        panic!("local");
    };
    assert_eq!((model.dir, model.threads), (PathBuf::from("/etc/p2p/minilm"), 1));
    let ProviderSettings::Remote(openai) = provider("embedding_provider = openai\nembedding_api_key = sk-x") else {
        panic!("remote");
    };
    assert_eq!(
        (openai.base_url.as_str(), openai.model.as_str()),
        ("https://api.openai.com/v1", "text-embedding-3-small")
    );
    let own = "embedding_provider = openai\nembedding_base_url = http://10.0.0.7:8000/v1/\nembedding_model = m";
    let ProviderSettings::Remote(own) = provider(own) else {
        panic!("remote");
    };
    assert_eq!(
        (own.base_url.as_str(), own.api_key.expose()),
        ("http://10.0.0.7:8000/v1", "")
    );
}

#[test]
fn mistakes_in_the_settings_of_embeddings_are_told_with_what_to_do_and_the_key_never() {
    let azure = "embedding_provider = azure\nembedding_api_key = hunter2\n";
    for (written, what_to_do) in [
        (
            "embedding_provider = gpt",
            "expected off, lexical, local, openai or azure",
        ),
        ("embedding_provider = local", "name the folder of the model"),
        ("embedding_provider = openai", "the provider wants a key"),
        (
            "embedding_provider = openai\nembedding_api_key = hunter 2",
            "copy it again",
        ),
        (
            "embedding_provider = openai\nembedding_api_key = hunter2\nembedding_base_url = http://example.org",
            "use https://",
        ),
        (
            "embedding_provider = openai\nembedding_base_url = https://u:hunter2@example.org",
            "leave out user, password",
        ),
        (
            "embedding_provider = openai\nembedding_base_url = ftp://x",
            "begins with https://",
        ),
        (azure, "what the deployment of the model is called"),
        (azure, "say where the Azure OpenAI resource is"),
        (
            &format!("{azure}embedding_base_url = https://x.openai.azure.com\nembedding_deployment = a/b"),
            "expected letters, digits",
        ),
    ] {
        let told = resolve(written, &EMBEDDED).expect_err(written).to_string();
        assert!(
            told.contains(what_to_do) && !told.contains("hunter"),
            "{written}: {told}"
        );
    }
    let ours = format!("{azure}embedding_base_url = http://localhost:1\nembedding_deployment = d");
    let config = resolve(&ours, &EMBEDDED).expect("loopback");
    assert!(!format!("{config:?}").contains("hunter"));
}

#[test]
fn mistakes_in_the_settings_of_redis_are_told_with_what_to_do_and_passwords_never() {
    let sentinel = "redis_mode = sentinel\nredis_host = a:26379, b:26379\n";
    for (written, what_to_do) in [
        (
            "redis_mode = ring\nredis_host = a",
            "expected standalone, sentinel or cluster",
        ),
        ("redis_host = a, b", "is one server"),
        ("redis_host = redis://a", "expected a host or host:port"),
        ("redis_mode = cluster", "name some nodes of the cluster"),
        (
            "redis_mode = cluster\nredis_host = a\nredis_db = 1",
            "leave redis_db out",
        ),
        (sentinel, "say what the Sentinels call the master"),
        ("redis_mode = sentinel\nredis_sentinel_master = m", "name the Sentinels"),
        (
            "redis_host = a\nredis_sentinel_master = m",
            "redis_mode = sentinel alone",
        ),
        (
            "redis_host = a\nredis_sentinel_password = hunter2",
            "redis_mode = sentinel alone",
        ),
    ] {
        let told = resolve(written, &EMBEDDED).expect_err(written).to_string();
        assert!(
            told.contains(what_to_do) && !told.contains("hunter"),
            "{written}: {told}"
        );
    }
    let good = format!("{sentinel}redis_sentinel_master = m\nredis_sentinel_password = hunter2\nredis_db = 3\n");
    let config = resolve(&good, &EMBEDDED).expect("valid");
    assert!(!format!("{config:?}").contains("hunter"));
    let redis = config.redis.expect("named");
    let addresses: Vec<String> = redis.addresses.iter().map(ToString::to_string).collect();
    assert_eq!((addresses.join(" ").as_str(), redis.db), ("a:26379 b:26379", 3));
    assert!(matches!(redis.mode, RedisMode::Sentinel { master, .. } if master == "m"));
}

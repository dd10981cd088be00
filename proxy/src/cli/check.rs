//! `check`: one line for each thing, `ok` or what to do; nothing is changed.

use std::{path::Path, process::ExitCode, time::Duration};

use p2p_sync_proto::{Code, Problem};
use tokio::time::timeout;
use tokio_postgres::NoTls;

use super::{Common, log_warnings};
use crate::{
    admin,
    config::{Config, Redis},
    embed::{Embedder, ProviderSettings, Settings},
    keyring::{KEYRING_VARIABLE, Keyring},
    redis_client::RedisClient,
    secret::Secret,
    store::{Connection, Store, parse_url},
    tls::{self, Tls},
    validate::types_file::Rules,
};

/// How long Postgres or Redis may take for an answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

pub(super) async fn check(common: &Common) -> ExitCode {
    log_warnings();
    let config = match common.load() {
        Ok(config) => config,
        Err(problems) => {
            println!("settings: {problems}");
            return ExitCode::FAILURE;
        }
    };
    println!("settings: ok");
    let of = config
        .types_file
        .as_ref()
        .map_or("built in".into(), |file| file.display().to_string());
    let rules =
        Rules::load(config.types_file.as_deref()).map(|rules| format!("ok ({of}, version {})", rules.policies.version));
    let all_well = [
        told("tls", &certificate(&config)),
        told("admin", &admin(&config)),
        told("rules", &rules),
        told("keyring", &keyring(&config)),
        told("database", &database(&config).await),
        told("redis", &redis(config.redis.as_ref()).await),
        told("embeddings", &embeddings(&config.embedding).await),
    ];
    if all_well.iter().all(|well| *well) {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

fn told<E: std::fmt::Display>(what: &str, found: &Result<String, E>) -> bool {
    match found {
        Ok(found) => println!("{what}: {found}"),
        Err(problem) => println!("{what}: {problem}"),
    }
    found.is_ok()
}

fn certificate(config: &Config) -> Result<String, Problem> {
    let Some(files) = &config.tls else {
        let reach = if config.listen.ip().is_loopback() {
            "this machine alone reaches the port"
        } else {
            "allow_insecure is set"
        };
        if let Some(ca) = &config.public_ca {
            tls::pin_of(ca)?;
        }
        return Ok(format!("ok (not used: {reach})"));
    };
    let found = tls::describe(Tls::load(files.clone())?.validity())?;
    if let Some(ca) = &config.public_ca {
        tls::check_pin(files, ca)?;
    }
    Ok(format!("ok ({found})"))
}

fn admin(config: &Config) -> Result<String, Problem> {
    let Some(settings) = &config.admin else {
        return Ok("ok (off)".to_owned());
    };
    admin::check(settings)?;
    Ok(format!("ok ({})", settings.listen))
}

fn keyring(config: &Config) -> Result<String, Problem> {
    let made_by_serve =
        matches!(config.store.connection, Connection::Embedded(_)) && std::env::var_os(KEYRING_VARIABLE).is_none();
    if made_by_serve && !config.keyring_file.exists() {
        return Ok(format!("ok (serve makes {})", config.keyring_file.display()));
    }
    Keyring::load(&config.keyring_file).map(|keyring| {
        let waiting: Vec<_> = keyring.waiting().iter().map(|entry| entry.key.id().as_str()).collect();
        let waiting = match waiting.as_slice() {
            [] => String::new(),
            waiting => format!("; waiting: {}", waiting.join(", ")),
        };
        format!("ok (current: {}{waiting})", keyring.current().id())
    })
}

/// The store makes the schema in an empty database; so it is asked only where there is one.
async fn database(config: &Config) -> Result<String, Problem> {
    match &config.store.connection {
        Connection::Embedded(folder) if is_empty(folder) => {
            return Ok(format!("ok (serve makes {})", folder.display()));
        }
        Connection::Embedded(_) => {}
        Connection::Url(url) => {
            if !has_schema(url).await? {
                let sentence = "Postgres answers, but the database has no schema p2p_sync: run `p2p-sync-proxy schema upgrade`, \
                                or load it with psql -f sql-files/p2p_data_sync.sql";
                return Err(Problem::new(Code::SchemaMissing, sentence));
            }
        }
    }
    let store = Store::connect(&config.store).await?;
    let found = async {
        Ok::<_, Problem>((
            store.schema_version().await?,
            store.embedding_space().await?,
            store.durability().await?,
        ))
    };
    let found = found.await;
    store.close().await;
    let (version, space, durability) = found?;
    let is_off = matches!(config.embedding.provider, ProviderSettings::Off);
    if !is_off && space.dimensions != config.store.embedding_dimensions {
        return Err(space.other_dimensions(config.embedding.dimensions));
    }
    Ok(format!("ok (schema version {version}; {durability})"))
}

pub(super) fn is_empty(folder: &Path) -> bool {
    std::fs::read_dir(folder).map_or(true, |mut entries| {
        entries.all(|entry| entry.is_ok_and(|e| e.file_name() == "keyring" || e.file_name() == "admin_token"))
    })
}

async fn has_schema(url: &Secret) -> Result<bool, Problem> {
    let server = parse_url(url).map_err(|what_to_do| Problem::new(Code::BadValue, what_to_do))?;
    let question = async {
        let (client, connection) = server.connect(NoTls).await?;
        let asked = async move {
            client
                .query_one("SELECT to_regclass('p2p_sync.schema_version') IS NOT NULL", &[])
                .await
        };
        // The connection has to be driven beside the question; it ends when the client is dropped.
        let (row, _closed) = tokio::join!(asked, connection);
        row.map(|row| row.get(0))
    };
    let unreachable = |reason: &str| {
        let sentence =
            format!("Postgres cannot be reached ({reason}): check pg_connection_string and that the server runs");
        Problem::new(Code::DatabaseUnreachable, sentence)
    };
    match timeout(ANSWER_TIMEOUT, question).await {
        Ok(Ok(has_schema)) => Ok(has_schema),
        Ok(Err(error)) => Err(unreachable(&error.to_string())),
        Err(_) => Err(unreachable("it does not answer")),
    }
}

async fn redis(settings: Option<&Redis>) -> Result<String, Problem> {
    let Some(settings) = settings else {
        return Ok("ok (not used: cache and publishing live inside the process)".to_owned());
    };
    let of = |reason: String| {
        let addresses: Vec<String> = settings.addresses.iter().map(ToString::to_string).collect();
        let sentence = format!(
            "Redis at {} {reason}; the proxy serves without it, reading from Postgres",
            addresses.join(", ")
        );
        Problem::new(Code::RedisUnreachable, sentence)
    };
    let mut client = RedisClient::open(settings).map_err(|error| of(format!("cannot be used ({error})")))?;
    client.check().await.map_err(of)
}

/// Asks the provider for one vector.
async fn embeddings(settings: &Settings) -> Result<String, Problem> {
    let Some(embedder) = Embedder::open(settings).await? else {
        return Ok("ok (off)".to_owned());
    };
    let took = embedder.probe().await?;
    let (model, dimensions) = (embedder.model(), embedder.dimensions());
    Ok(format!(
        "ok ({model}, {dimensions} dimensions, {} ms for a sentence)",
        took.as_millis()
    ))
}

//! The schema: made on an empty database, checked on any other, upgraded on request.

use p2p_sync_proto::{Code, Problem};
use tokio_postgres::Client;

use super::{Hnsw, StoreConfig};

/// The file that operators load with psql, as `schema print` gives it.
pub const SQL: &str = include_str!("../../../sql-files/p2p_data_sync.sql");
/// What [`SQL`] makes.
pub const VERSION: i32 = 1;

/// What leads from each version to the next: (the version it makes, the file).
const UPGRADES: &[(i32, &str)] = &[];

const _: () = assert!(
    UPGRADES.len() + 1 == VERSION.unsigned_abs() as usize,
    "one upgrade for each version after the first"
);

/// How the vectors are when the schema is made.
#[derive(Clone, Copy)]
pub(super) struct Vectors {
    dimensions: u32,
    hnsw: Hnsw,
}

impl Vectors {
    pub(super) fn of(config: &StoreConfig) -> Self {
        Self {
            dimensions: config.embedding_dimensions,
            hnsw: config.hnsw,
        }
    }
}

/// The version of the schema that is there; none where there is no schema.
pub(super) async fn version(client: &Client) -> Result<Option<i32>, Problem> {
    let there = client
        .query_one("SELECT to_regclass('p2p_sync.schema_version') IS NOT NULL", &[])
        .await
        .map_err(|error| super::unavailable(&error))?;
    if !there.get::<_, bool>(0) {
        return Ok(None);
    }
    let row = client
        .query_one("SELECT max(version) FROM p2p_sync.schema_version", &[])
        .await
        .map_err(|error| super::unavailable(&error))?;
    Ok(row.get(0))
}

/// Makes the schema if the database is empty, and refuses any version but this build's.
pub(super) async fn prepare(client: &Client, vectors: Vectors) -> Result<(), Problem> {
    match version(client).await? {
        Some(VERSION) => Ok(()),
        Some(found) => Err(Problem::new(
            Code::SchemaOutdated,
            if found < VERSION {
                format!(
                    "the schema is of version {found}, this build needs {VERSION}: run p2p-sync-proxy schema upgrade"
                )
            } else {
                format!("the schema is of version {found}, this build knows {VERSION}: install the newer release")
            },
        )),
        None if is_empty(client).await? => create(client, vectors).await,
        None => Err(missing()),
    }
}

/// Brings the schema up to [`VERSION`], step by step, each step in a transaction of its own.
pub(super) async fn upgrade(client: &Client, vectors: Vectors) -> Result<i32, Problem> {
    let Some(found) = version(client).await? else {
        prepare(client, vectors).await?;
        return Ok(VERSION);
    };
    for (version, sql) in pending(found, UPGRADES) {
        let step = format!(
            "BEGIN; SET LOCAL statement_timeout = 0; {sql}; \
             INSERT INTO p2p_sync.schema_version (version) VALUES ({version}); COMMIT"
        );
        run(client, &step).await.map_err(|reason| {
            let sentence = format!(
                "the upgrade to version {version} failed ({reason}), and the schema is as it was before this step: \
                 put right what Postgres says, and run p2p-sync-proxy schema upgrade again"
            );
            Problem::new(Code::SchemaOutdated, sentence)
        })?;
    }
    prepare(client, vectors).await?;
    Ok(VERSION)
}

pub(super) fn missing() -> Problem {
    Problem::new(
        Code::SchemaMissing,
        "the database holds tables but not the schema p2p_sync: check pg_connection_string, \
         or load it with psql -f sql-files/p2p_data_sync.sql",
    )
}

/// Whether nobody has made anything in the database; extensions do not count.
async fn is_empty(client: &Client) -> Result<bool, Problem> {
    const ANY: &str = "SELECT NOT EXISTS (
        SELECT FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace
        WHERE nspname !~ '^pg_' AND nspname <> 'information_schema'
            AND NOT EXISTS (SELECT FROM pg_depend WHERE classid = 'pg_class'::regclass AND objid = pg_class.oid AND deptype = 'e'))";
    let row = client
        .query_one(ANY, &[])
        .await
        .map_err(|error| super::unavailable(&error))?;
    Ok(row.get(0))
}

async fn create(client: &Client, vectors: Vectors) -> Result<(), Problem> {
    run(client, &without_psql(SQL, vectors)).await.map_err(|reason| {
        let sentence = format!(
            "the schema cannot be made ({reason}): use Postgres 16 to 18 with pgvector installed, and a user that may \
                 create schemas and extensions"
        );
        Problem::new(Code::SchemaMissing, sentence)
    })?;
    tracing::info!(
        version = VERSION,
        embedding_dimensions = vectors.dimensions,
        "made the schema p2p_sync"
    );
    Ok(())
}

/// Runs a transaction; of one that fails nothing stays, and the error is Postgres' own sentence.
async fn run(client: &Client, sql: &str) -> Result<(), String> {
    let Err(error) = client.batch_execute(sql).await else {
        return Ok(());
    };
    if let Err(error) = client.batch_execute("ROLLBACK").await {
        tracing::warn!(%error, "no rollback");
    }
    Err(super::told(&error))
}

/// Does what psql does with the file's head: its own commands go, its variables are put in.
fn without_psql(sql: &str, vectors: Vectors) -> String {
    let lines: Vec<&str> = sql.lines().filter(|line| !line.starts_with('\\')).collect();
    lines
        .join("\n")
        .replace(":embedding_dimensions", &vectors.dimensions.to_string())
        .replace(":hnsw_m", &vectors.hnsw.m.to_string())
        .replace(":hnsw_ef_construction", &vectors.hnsw.ef_construction.to_string())
}

fn pending<'a>(found: i32, upgrades: &'a [(i32, &'a str)]) -> impl Iterator<Item = (i32, &'a str)> {
    upgrades.iter().copied().filter(move |(version, _)| *version > found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_makes_the_version_that_the_build_knows() {
        assert!(SQL.contains(&format!(
            "INSERT INTO p2p_sync.schema_version (version) VALUES ({VERSION})"
        )));
        assert!(SQL.contains(&format!("IF v_found <> {VERSION} THEN")));
    }

    #[test]
    fn nothing_of_psql_is_left_for_postgres() {
        let hnsw = Hnsw {
            m: 24,
            ef_construction: 100,
            ef_search: 40,
        };
        let sql = without_psql(SQL, Vectors { dimensions: 384, hnsw });
        assert!(!sql.contains('\\'), "a psql command is left");
        assert!(sql.contains("halfvec(384)") && sql.contains("(m = 24, ef_construction = 100)"));
        assert!(!sql.contains(":embedding_dimensions") && !sql.contains(":hnsw"));
    }

    #[test]
    fn upgrades_run_in_order_from_the_version_that_is_there() {
        let upgrades = [(2, "two"), (3, "three"), (4, "four")];
        assert_eq!(pending(2, &upgrades).collect::<Vec<_>>(), [(3, "three"), (4, "four")]);
        assert_eq!(pending(4, &upgrades).count(), 0);
    }
}

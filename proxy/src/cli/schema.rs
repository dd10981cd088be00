//! `schema print|upgrade`

use clap::Subcommand;
use p2p_sync_proto::settings::Problems;

use super::{Common, log_warnings, one};
use crate::store::{Store, schema::SQL};

/// What to do with the tables.
#[derive(Debug, Subcommand)]
pub(super) enum Schema {
    /// Print what makes them, for psql.
    Print,
    /// Bring them up to this version, making them in an empty database.
    Upgrade,
}

pub(super) async fn run(schema: &Schema, common: &Common) -> Result<(), Problems> {
    match schema {
        Schema::Print => print!("{SQL}"),
        Schema::Upgrade => {
            let config = common.load()?;
            log_warnings();
            let version = Store::upgrade(&config.store).await.map_err(one)?;
            println!("the schema is of version {version}");
        }
    }
    Ok(())
}

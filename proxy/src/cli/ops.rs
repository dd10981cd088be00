//! `ops put|delete|conflicts`

use clap::{Args, Subcommand, ValueEnum};
use p2p_sync_proto::{Code, Path, Problem, settings::Problems, terminal::shown};
use serde_json::value::RawValue;
use uuid::Uuid;

use super::{Common, log_warnings, one};
use crate::{
    config::Config,
    store::{ConflictFilter, ConflictRow, Store, Take},
    validate::{check_edit, types_file::Rules},
    version_vector::Compared,
};

/// The operator's own writing.
#[derive(Debug, Subcommand)]
pub(super) enum Ops {
    /// Write a state, as an edit of yours: it counts as newer than what the path has, and what hosts write without knowing
    /// of it is a conflict. It is checked as what hosts write is.
    Put {
        /// E.g. `prontera/NPC_STATE/7` or `@char/150001/PLAYER_DATA`.
        path: String,
        /// JSON.
        #[arg(long, value_name = "JSON")]
        data: String,
        /// Whom it is about; as it was, if left out.
        #[arg(long, value_name = "ID")]
        account_id: Option<u32>,
    },
    /// Delete a state, as an edit of yours.
    Delete {
        /// E.g. `prontera/NPC_STATE/7`.
        path: String,
    },
    /// Show and resolve what hosts wrote without knowing of an edit of yours.
    Conflicts(Conflicts),
}

#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(super) struct Conflicts {
    /// Only those that wait for you: of types with conflict = "both".
    #[arg(long)]
    open: bool,
    /// Only with operations of this host.
    #[arg(long, value_name = "HOST")]
    host: Option<Uuid>,
    /// Only those older than the line of this number.
    #[arg(long, value_name = "ID")]
    before: Option<i64>,
    /// At most so many, 1 to 1000.
    #[arg(long, value_name = "N", default_value = "100", value_parser = clap::value_parser!(u32).range(1..=1000))]
    limit: u32,
    #[command(subcommand)]
    one: Option<One>,
}

#[derive(Debug, Subcommand)]
enum One {
    /// Show one with both values, and what the path is now.
    Show {
        /// The number that the list begins the line with.
        id: i64,
    },
    /// Write what you decide as an edit of yours, whatever was made of the conflict before.
    Resolve {
        /// The number that the list begins the line with.
        id: i64,
        #[command(flatten)]
        decision: Decision,
    },
}

#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct Decision {
    /// What the hub had, or what the host wrote; of a group all of it.
    #[arg(long, value_name = "SIDE")]
    take: Option<Side>,
    /// Something else, JSON; not for a group.
    #[arg(long, value_name = "JSON")]
    data: Option<String>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Side {
    Hub,
    Host,
}

pub(super) async fn run(ops: &Ops, common: &Common) -> Result<(), Problems> {
    let config = common.load()?;
    log_warnings();
    let rules = Rules::load(config.types_file.as_deref())?;
    let store = connect(&config).await?;
    let done = match ops {
        Ops::Put { path, data, account_id } => edit(&store, &rules, path, Some(data), *account_id).await,
        Ops::Delete { path } => edit(&store, &rules, path, None, None).await,
        Ops::Conflicts(wanted) => match &wanted.one {
            None => list(&store, wanted).await,
            Some(One::Show { id }) => show(&store, *id).await,
            Some(One::Resolve { id, decision }) => resolve(&store, &rules, *id, decision).await,
        },
    };
    store.close().await;
    done.map_err(one)
}

async fn connect(config: &Config) -> Result<Store, Problems> {
    Store::connect(&config.store).await.map_err(one)
}

async fn edit(
    store: &Store,
    rules: &Rules,
    path: &str,
    data: Option<&str>,
    account_id: Option<u32>,
) -> Result<(), Problem> {
    let path = Path::parse(path)?;
    check_edit(rules, &path, data)?;
    if data.is_none() && store.get(&path).await?.is_none_or(|there| there.deleted) {
        return Err(Problem::new(Code::NotFound, format!("there is no state at {path}")));
    }
    let keep = rules.policies.of(path.parts().data_type).keep;
    let number = store.edit(&path, keep, data, account_id).await?;
    println!("{path} edit={number}");
    Ok(())
}

async fn list(store: &Store, wanted: &Conflicts) -> Result<(), Problem> {
    let filter = ConflictFilter {
        open: wanted.open,
        host_id: wanted.host,
        before: wanted.before,
        limit: Some(wanted.limit),
        ..ConflictFilter::default()
    };
    let rows = store.conflicts(&filter).await?;
    for row in &rows {
        println!("{}", summary(row));
    }
    if let Some(last) = rows.last().filter(|_| rows.len() >= wanted.limit as usize) {
        eprintln!("there may be more: --before {}", last.conflict_id);
    }
    Ok(())
}

fn summary(row: &ConflictRow) -> String {
    let paths: Vec<&str> = row.members.iter().map(|member| member.path.as_str()).collect();
    let state = match &row.resolution {
        Some(taken) => format!("resolved={taken}"),
        None if row.is_open() => "open".to_owned(),
        None => "settled".to_owned(),
    };
    format!(
        "{} {} host={} edit={} rule={} {state} operations={} operation={} {}",
        row.conflict_id,
        row.recorded_at,
        row.host_id,
        row.hub_edit,
        row.rule,
        row.operations,
        row.operation_id,
        paths.join(" ").escape_debug(),
    )
}

async fn show(store: &Store, id: i64) -> Result<(), Problem> {
    let row = store.conflict(id).await?;
    println!("{}", summary(&row));
    for member in &row.members {
        let sees = if member.conflicts {
            ""
        } else {
            " (had seen the last edit)"
        };
        println!("{}{sees}", member.path.escape_debug());
        let hub = member.hub.as_ref();
        let of_hub = hub.map_or("nothing".to_owned(), |hub| {
            value(hub.data.as_deref().map(RawValue::get))
        });
        println!("  hub:  {of_hub}");
        println!("  host: {}", value(member.host.data.as_deref().map(RawValue::get)));
        let now = store.present(&member.path).await?;
        let since = match (&now, hub) {
            (Some(now), Some(hub)) => match now.vector.compared_with(&hub.vector) {
                Compared::Equal if now.stream_sequence == hub.stream_sequence => "unchanged since",
                Compared::Equal => "written by a host since",
                _ => "edited since",
            },
            (None, None) => "unchanged since",
            (Some(_), None) => "written since",
            (None, Some(_)) => "deleted and forgotten since",
        };
        let present = now.map_or("nothing".to_owned(), |now| value(now.payload.as_deref()));
        println!("  now:  {present} ({since})");
    }
    Ok(())
}

/// A host's words too: nothing of them may steer the terminal.
fn value(json: Option<&str>) -> String {
    json.map_or("deleted".to_owned(), |json| shown(json).to_string())
}

async fn resolve(store: &Store, rules: &Rules, id: i64, decision: &Decision) -> Result<(), Problem> {
    let row = store.conflict(id).await?;
    let take = match (&decision.take, &decision.data) {
        (Some(Side::Hub), _) => Take::Hub,
        (Some(Side::Host), _) => Take::Host,
        (None, data) => {
            let [member] = row.members.as_slice() else {
                let sentence = "a group is taken whole: --take hub or --take host, and edit single paths by `ops put`";
                return Err(Problem::new(Code::BadOperation, sentence));
            };
            let data = data.as_deref().unwrap_or_default();
            check_edit(rules, &Path::parse(&member.path)?, Some(data))?;
            Take::Data(data)
        }
    };
    store.resolve_conflict(id, take).await?;
    println!("{id} resolved");
    Ok(())
}

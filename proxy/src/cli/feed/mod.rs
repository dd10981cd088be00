//! `feed add|list|show|read|follow|skip|rewind|remove`

mod follow;
mod lines;

use std::{ffi::OsString, io::Write as _, time::SystemTime};

use clap::{Args, Subcommand};
use p2p_sync_proto::{Problem, policy::parse_type, settings::Problems};

use super::{Common, log_warnings, maps::ago, one};
use crate::store::{BATCH_CHANGES_MAX, Consumer, ConsumerFilter, Store};

/// Who brings what is committed here into other databases, and how far each is.
#[derive(Debug, Subcommand)]
pub(super) enum Feed {
    /// Make a consumer: a name under which the hub remembers how far it is. It begins with all that is there.
    Add {
        /// Letters, digits and _ . -
        name: String,
        /// Only of these maps, `@player` (what travels with players) or `@host` (what hosts say of themselves); * stands for
        /// any letters. May be given several times. Maps that come later begin by themselves.
        #[arg(long = "map", value_name = "MAP")]
        maps: Vec<String>,
        /// Only these types, by name or number; may be given several times.
        #[arg(long = "type", value_name = "TYPE")]
        types: Vec<String>,
    },
    /// Show all consumers, how far behind each is, and who reads it.
    List,
    /// Show how far a consumer is in each stream, the one that it is furthest behind in first.
    Show {
        /// As `feed list` shows it.
        name: String,
    },
    /// Print what a consumer gets next, one JSON object a line; nothing is acknowledged, and who follows it is not disturbed.
    Read {
        /// As `feed list` shows it.
        name: String,
        #[command(flatten)]
        bound: Bound,
    },
    /// Run a command again and again, with what is new on its standard input, one JSON object a line. When it ends with 0,
    /// that is acknowledged; otherwise it gets it again, in smaller pieces. Until SIGTERM or SIGINT.
    Follow(Follow),
    /// Take everything up to now for acknowledged, or of one stream up to a position: a change that your command cannot take.
    Skip {
        /// As `feed list` shows it.
        name: String,
        /// A map, `@player` or `@host`; all, if left out.
        stream: Option<String>,
        /// As `stream_sequence` of the last change that is not wanted; all that there are, if left out.
        #[arg(long, value_name = "SEQUENCE", requires = "stream")]
        upto: Option<u64>,
    },
    /// Have everything told again, beginning with a snapshot; or what came to a stream after a position.
    Rewind {
        /// As `feed list` shows it.
        name: String,
        /// A map, `@player` or `@host`; all, if left out.
        stream: Option<String>,
        /// As `stream_sequence` of the last change that is not to be told again; all are, if left out.
        #[arg(long, value_name = "SEQUENCE", requires = "stream")]
        to: Option<u64>,
    },
    /// Forget a consumer.
    Remove {
        /// As `feed list` shows it.
        name: String,
    },
}

#[derive(Debug, Args)]
pub(super) struct Follow {
    /// As `feed list` shows it.
    name: String,
    #[command(flatten)]
    bound: Bound,
    /// End when there is nothing new, and with 1 when the command fails: for cron, and for an embedded hub.
    #[arg(long)]
    once: bool,
    /// The command and its arguments. `sh -c '…'` for more than one.
    #[arg(required = true, last = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

#[derive(Debug, Args)]
pub(super) struct Bound {
    /// At most so many changes at a time.
    #[arg(long, value_name = "N", default_value = "500",
        value_parser = clap::value_parser!(u32).range(1..=i64::from(BATCH_CHANGES_MAX)))]
    limit: u32,
}

pub(super) async fn run(feed: &Feed, common: &Common) -> Result<(), Problems> {
    let config = common.load()?;
    log_warnings();
    let store = Store::connect(&config.store).await.map_err(one)?;
    let done = match feed {
        Feed::Add { name, maps, types } => add(&store, name, maps, types).await,
        Feed::List => list(&store).await,
        Feed::Show { name } => show(&store, name).await,
        Feed::Read { name, bound } => read(&store, name, bound.limit).await,
        Feed::Follow(wanted) => follow::follow(&store, wanted).await,
        Feed::Skip { name, stream, upto } => skip(&store, name, stream.as_deref(), *upto).await,
        Feed::Rewind { name, stream, to } => rewind(&store, name, stream.as_deref(), *to).await,
        Feed::Remove { name } => remove(&store, name).await,
    };
    store.close().await;
    done.map_err(one)
}

async fn add(store: &Store, name: &str, maps: &[String], types: &[String]) -> Result<(), Problem> {
    let names = types.iter().map(|name| parse_type(name));
    let filter = ConsumerFilter {
        maps: maps.to_vec(),
        types: names
            .map(|found| found.map(|data_type| data_type.as_str_name().to_owned()))
            .collect::<Result<_, _>>()?,
    };
    store.add_consumer(name, &filter).await?;
    println!("{name} added");
    Ok(())
}

async fn list(store: &Store) -> Result<(), Problem> {
    for consumer in store.consumers(None).await? {
        println!("{}", line(&consumer));
    }
    Ok(())
}

fn line(consumer: &Consumer) -> String {
    let named = |what: &str, names: &[String]| match names {
        [] => String::new(),
        names => format!(" {what}={}", names.join(",")),
    };
    let anew = match (consumer.begins, consumer.streams_anew) {
        (true, _) => " begins anew".to_owned(),
        (false, 0) => String::new(),
        (false, streams) => format!(" {streams} begin anew"),
    };
    format!(
        "{} behind={} streams={}{anew} acknowledged={} {}{}{}",
        consumer.name,
        consumer.behind,
        consumer.streams_behind,
        when(consumer.moved_at),
        consumer
            .reader
            .as_ref()
            .map_or("read by nobody".to_owned(), |reader| format!("read by {reader}")),
        named("maps", &consumer.filter.maps),
        named("types", &consumer.filter.types),
    )
}

fn when(at: Option<SystemTime>) -> String {
    at.map_or("never".to_owned(), ago)
}

async fn show(store: &Store, name: &str) -> Result<(), Problem> {
    let (consumer, streams) = store.consumer(name).await?;
    println!("{}", line(&consumer));
    for stream in streams {
        let at = stream
            .acknowledged
            .map_or("none".to_owned(), |sequence| sequence.to_string());
        let anew = stream.anew.map(|anew| format!(" begins anew: {}", anew.sentence()));
        println!(
            "{} behind={} at={at} head={} acknowledged={}{}",
            stream.stream,
            stream.behind,
            stream.head,
            when(stream.moved_at),
            anew.unwrap_or_default()
        );
    }
    Ok(())
}

async fn read(store: &Store, name: &str, limit: u32) -> Result<(), Problem> {
    let batch = store.peek_consumer(name, limit).await?;
    // Who does not read to the end, such as `head`, has seen enough.
    let _ = std::io::stdout().lock().write_all(lines::of(&batch).as_bytes());
    Ok(())
}

async fn skip(store: &Store, name: &str, stream: Option<&str>, upto: Option<u64>) -> Result<(), Problem> {
    store.read_consumer(name).await?.skip(stream, upto).await?;
    println!("{name} skipped");
    Ok(())
}

async fn rewind(store: &Store, name: &str, stream: Option<&str>, to: Option<u64>) -> Result<(), Problem> {
    store.read_consumer(name).await?.rewind(stream, to).await?;
    println!("{name} rewound");
    Ok(())
}

async fn remove(store: &Store, name: &str) -> Result<(), Problem> {
    store.read_consumer(name).await?.remove().await?;
    println!("{name} removed");
    Ok(())
}

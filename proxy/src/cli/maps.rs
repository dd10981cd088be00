//! `maps list|show|assign|migrate|release|force|rule|rules`

use std::time::SystemTime;

use clap::{Args, Subcommand};
use p2p_sync_proto::{Code, Problem, path::check_map, settings::Problems};
use uuid::Uuid;

use super::{Common, log_warnings, one};
use crate::{
    config::Config,
    hosts::assignment::{self, Rule},
    store::{Assignment, HandoverOrder, RuleChange, STANDBY_MAX, Store},
};

/// Who writes which map.
#[derive(Debug, Subcommand)]
pub(super) enum Maps {
    /// Show all maps that are or were held.
    List,
    /// Show who holds a map, who stands by for it, and who held it.
    Show {
        /// E.g. prontera.
        map: String,
    },
    /// Let a machine write a map that nobody holds: the one that is named, or the one that fits best.
    Assign {
        /// E.g. prontera.
        map: String,
        /// As `hosts list` shows it.
        host_id: Option<Uuid>,
    },
    /// Hand a map over while it goes on: the machine that is named, or the one that fits best, catches up; then the one that has
    /// the map stops, settles and releases it. A proxy has to run.
    Migrate {
        /// E.g. prontera.
        map: String,
        /// As `hosts list` shows it.
        host_id: Option<Uuid>,
    },
    /// Take a map from the machine that has it.
    Release {
        /// E.g. prontera.
        map: String,
    },
    /// Let a machine write a map, whoever has it: what that one still sends goes to limbo.
    Force {
        /// E.g. prontera.
        map: String,
        /// As `hosts list` shows it.
        host_id: Uuid,
    },
    /// Say what the hub does with a map by itself, and who may have it; without options it shows what holds.
    Rule(RuleArgs),
    /// Show the rules of all maps that have one.
    Rules,
}

#[derive(Debug, Args)]
pub(super) struct RuleArgs {
    /// E.g. prontera.
    map: String,
    /// Whether the hub gives the map to whoever fits best, and moves it to who fits better: yes or no.
    #[arg(long, value_name = "YES|NO", value_parser = yes_or_no, num_args = 0..=1, default_missing_value = "yes")]
    automatic: Option<bool>,
    /// How many machines keep a copy of it, 0 to 8, to take it over where its holder is lost.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(0..=i64::from(STANDBY_MAX)))]
    backups: Option<u8>,
    /// How many machines are named as its assistants, 0 to 8.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(0..=i64::from(STANDBY_MAX)))]
    assistants: Option<u8>,
    /// Which machines may have it, with commas between; `any` for all.
    #[arg(long, value_name = "HOST,HOST", value_parser = hosts)]
    hosts: Option<Allowed>,
    /// What a machine scores at least to be given it, 0 to 100.
    #[arg(long, value_name = "X", value_parser = score)]
    score_min: Option<f64>,
    /// Take the rule away: the map is given by the operator alone.
    #[arg(long, conflicts_with_all = ["automatic", "backups", "assistants", "hosts", "score_min"])]
    remove: bool,
}

/// Who may have a map; empty: any.
#[derive(Clone, Debug)]
struct Allowed(Vec<Uuid>);

fn yes_or_no(text: &str) -> Result<bool, String> {
    match text {
        "yes" => Ok(true),
        "no" => Ok(false),
        _ => Err("expected yes or no".to_owned()),
    }
}

fn hosts(text: &str) -> Result<Allowed, String> {
    if text == "any" {
        return Ok(Allowed(Vec::new()));
    }
    let parsed: Result<Vec<Uuid>, _> = text.split(',').map(|id| id.trim().parse()).collect();
    parsed
        .map(Allowed)
        .map_err(|_| "expected ids as `hosts list` shows them, with commas between, or any".to_owned())
}

fn score(text: &str) -> Result<f64, String> {
    let parsed = text.parse().ok().filter(|score| (0.0..=100.0).contains(score));
    parsed.ok_or_else(|| "expected a number from 0 to 100".to_owned())
}

pub(super) async fn run(maps: &Maps, common: &Common) -> Result<(), Problems> {
    let config = common.load()?;
    log_warnings();
    let store = Store::connect(&config.store).await.map_err(one)?;
    let done = match maps {
        Maps::List => list(&store).await,
        Maps::Show { map } => show(&store, map).await,
        Maps::Assign { map, host_id } => assign(&store, &config, map, *host_id).await,
        Maps::Migrate { map, host_id } => migrate(&store, &config, map, *host_id).await,
        Maps::Release { map } => release(&store, map).await,
        Maps::Force { map, host_id } => grant(&store, map, *host_id, true).await,
        Maps::Rule(wanted) => rule(&store, wanted).await,
        Maps::Rules => rules(&store).await,
    };
    store.close().await;
    done.map_err(one)
}

async fn list(store: &Store) -> Result<(), Problem> {
    for assignment in store.assignments(None).await? {
        print(&assignment);
    }
    Ok(())
}

async fn show(store: &Store, map: &str) -> Result<(), Problem> {
    let found = store.assignments(Some(map)).await?;
    let assignment = found.first().ok_or_else(|| never_held(map))?;
    print(assignment);
    println!("  stream at {}", assignment.stream_head);
    for (standing_by, hosts) in [("backup", &assignment.backups), ("assistant", &assignment.assistants)] {
        for host in hosts {
            println!("  {standing_by} {host}");
        }
    }
    if let Some(successor) = assignment.successor {
        println!("  on its way to {successor}");
    }
    for tenure in store.tenures(map).await? {
        let since = ago(tenure.granted_at);
        let until = match (tenure.ended_at, tenure.ended_by) {
            (None, _) => "still".to_owned(),
            (Some(ended), None) => ago(ended),
            (Some(ended), Some(how)) => format!("{} ({how})", ago(ended)),
        };
        println!(
            "  tenure={} {} from {since} until {until}",
            tenure.tenure, tenure.host_id
        );
    }
    Ok(())
}

fn print(assignment: &Assignment) {
    let Assignment {
        map,
        host_id,
        host_name,
        tenure,
        expires_in,
        ..
    } = assignment;
    match host_id {
        None => println!("{map} released tenure={tenure}"),
        Some(host_id) if expires_in.is_zero() => println!("{map} {host_id} tenure={tenure} run out {host_name}"),
        Some(host_id) => println!(
            "{map} {host_id} tenure={tenure} expires_in={}s {host_name}",
            expires_in.as_secs()
        ),
    }
}

pub(super) fn ago(then: SystemTime) -> String {
    let seconds = then.elapsed().unwrap_or_default().as_secs();
    match seconds {
        0..120 => format!("{seconds} s ago"),
        120..7200 => format!("{} min ago", seconds / 60),
        7200..172_800 => format!("{} h ago", seconds / 3600),
        _ => format!("{} days ago", seconds / 86_400),
    }
}

/// The host that fits a map best, and what the decision was made over.
async fn best(store: &Store, config: &Config, map: &str) -> Result<Uuid, Problem> {
    let world = store.world().await?;
    let unheard_of = assignment::MapFacts {
        map: map.to_owned(),
        ..Default::default()
    };
    let facts = world.maps.iter().find(|facts| facts.map == map).unwrap_or(&unheard_of);
    assignment::best(&world, &config.maps, facts).ok_or_else(|| {
        let sentence = format!(
            "no host fits {map} now that listens and has room: see `p2p-sync-proxy hosts list` and `maps rule {map}`, or name one"
        );
        Problem::new(Code::NotFound, sentence)
    })
}

async fn assign(store: &Store, config: &Config, map: &str, host_id: Option<Uuid>) -> Result<(), Problem> {
    check_map(map)?;
    let host_id = match host_id {
        Some(host_id) => host_id,
        None => best(store, config, map).await?,
    };
    grant(store, map, host_id, false).await
}

async fn migrate(store: &Store, config: &Config, map: &str, host_id: Option<Uuid>) -> Result<(), Problem> {
    check_map(map)?;
    let to = match host_id {
        Some(host_id) => host_id,
        None => best(store, config, map).await?,
    };
    assignment::check_listens(&store.world().await?, &config.maps, to)?;
    store.note_alive().await?;
    let order = HandoverOrder {
        by: None,
        map,
        to,
        score: 0.0,
    };
    store.begin_handover(&order, &config.maps).await?;
    println!("{map} is on its way to {to}");
    Ok(())
}

async fn grant(store: &Store, map: &str, host_id: Uuid, force: bool) -> Result<(), Problem> {
    check_map(map)?;
    let tenure = store.grant_map(map, host_id, force).await?;
    println!("{map} {host_id} tenure={tenure}");
    Ok(())
}

async fn release(store: &Store, map: &str) -> Result<(), Problem> {
    match store.release_map(map).await? {
        Some(holder) => println!("{map} released by {holder}"),
        None if store.assignments(Some(map)).await?.is_empty() => return Err(never_held(map)),
        None => println!("{map} was released before"),
    }
    Ok(())
}

async fn rule(store: &Store, wanted: &RuleArgs) -> Result<(), Problem> {
    let map = &wanted.map;
    check_map(map)?;
    let has_none = || {
        let sentence = format!("{map} has no rule: the hub does nothing with it by itself");
        Problem::new(Code::NotFound, sentence)
    };
    if wanted.remove {
        let was_there = store.drop_map_rule(map).await?;
        return if was_there { Ok(()) } else { Err(has_none()) };
    }
    let change = RuleChange {
        automatic: wanted.automatic,
        backups: wanted.backups,
        assistants: wanted.assistants,
        hosts: wanted.hosts.clone().map(|Allowed(hosts)| hosts),
        score_min: wanted.score_min,
    };
    for host in change.hosts.iter().flatten() {
        if store.host(*host).await?.is_none() {
            let sentence = format!("there is no host {host}: see `p2p-sync-proxy hosts list`");
            return Err(Problem::new(Code::NotFound, sentence));
        }
    }
    if change != RuleChange::default() {
        store.set_map_rule(map, &change).await?;
    }
    let rules = store.map_rules().await?;
    let (map, rule) = rules.iter().find(|(named, _)| named == map).ok_or_else(has_none)?;
    print_rule(map, rule);
    Ok(())
}

async fn rules(store: &Store) -> Result<(), Problem> {
    for (map, rule) in store.map_rules().await? {
        print_rule(&map, &rule);
    }
    Ok(())
}

fn print_rule(map: &str, rule: &Rule) {
    let automatic = if rule.automatic { "yes" } else { "no" };
    let hosts: Vec<String> = rule.hosts.iter().map(Uuid::to_string).collect();
    let hosts = if hosts.is_empty() {
        "any".to_owned()
    } else {
        hosts.join(",")
    };
    println!(
        "{map} automatic={automatic} backups={} assistants={} score_min={} hosts={hosts}",
        rule.backups, rule.assistants, rule.score_min
    );
}

fn never_held(map: &str) -> Problem {
    Problem::new(
        Code::NotFound,
        format!("nobody holds or held {map}: see `p2p-sync-proxy maps list`, or grant it"),
    )
}

//! `hosts invite|invitations|uninvite|add|list|show|role|lock|unlock|revoke|verdicts`

use std::{path::PathBuf, time::Duration};

use clap::{Args, Subcommand};
use p2p_sync_proto::{
    Code, Problem,
    path::check_map,
    settings::Problems,
    terminal::shown,
    token::{self, Token},
};
use uuid::Uuid;

use super::{Common, log_warnings, maps::ago, one};
use crate::{
    app::load_keyring,
    config::Config,
    hosts::assignment::{self, World},
    keyring::Keyring,
    store::{HostRole, HostRow, HostStatus, Invitation, Store},
    tls,
};

/// What to do with the volunteers' machines.
#[derive(Debug, Subcommand)]
pub(super) enum Hosts {
    /// Print a one-time token, on stdout, alone, by which a volunteer's machine enrols itself: `p2p-sync-agent enrol TOKEN`.
    Invite(Invite),
    /// Show the invitations of the last weeks: their numbers, what they give, and what became of them.
    Invitations,
    /// Withdraw an invitation that was not used yet.
    Uninvite {
        /// As `hosts invitations` shows it.
        number: u64,
    },
    /// Admit a machine by hand, and print its credential: once, on stdout, alone. It is a secret of that machine.
    Add(Machine),
    /// Show all machines, and what each scores as a host of maps.
    List,
    /// Show one machine, what it reported last of its load and its line, and how often which rule was found broken.
    Show {
        /// As `hosts list` shows it.
        host_id: Uuid,
    },
    /// Say whether a machine is a volunteer's (host) or your own (hub). Takes hold within 2 seconds.
    Role {
        /// As `hosts list` shows it.
        host_id: Uuid,
        /// What it may do.
        role: HostRole,
    },
    /// Keep a machine out, until `unlock`; what it has to send waits in its outbox, and it keeps its maps until their leases
    /// run out. Takes hold within 2 seconds.
    Lock {
        /// As `hosts list` shows it.
        host_id: Uuid,
    },
    /// Let a locked machine in again, with a new start where it was locked for forgery.
    Unlock {
        /// As `hosts list` shows it.
        host_id: Uuid,
    },
    /// Keep a machine out for good: it gives its maps up, and comes back only by an invitation, as another. Takes hold within
    /// 2 seconds.
    Revoke {
        /// As `hosts list` shows it.
        host_id: Uuid,
    },
    /// Show what was found against a machine, and what it reported of others: the newest first, one a line, the evidence
    /// last.
    Verdicts {
        /// As `hosts list` shows it.
        host_id: Uuid,
        /// At most so many.
        #[arg(long, value_name = "N", default_value = "100")]
        limit: u32,
    },
}

#[derive(Debug, Args)]
pub(super) struct Machine {
    /// The volunteer's game account; 0 for none. One account may have several machines.
    #[arg(long, value_name = "N")]
    account: u32,
    /// For people, e.g. the volunteer's name.
    #[arg(long, default_value = "")]
    name: String,
    /// Maps that the machine may write from when it is a host, with commas between; more by `maps assign`.
    #[arg(long, value_name = "MAP,MAP", value_delimiter = ',')]
    maps: Vec<String>,
    /// `hub` for a machine of your own, which holds the maps that nobody else fits, reports the metrics of other hosts, and asks
    /// for maps for them.
    #[arg(long, value_name = "ROLE", default_value = "host")]
    role: HostRole,
}

#[derive(Debug, Args)]
pub(super) struct Invite {
    #[command(flatten)]
    machine: Machine,
    /// How long the token can be used: 90s, 30m, 1h or 7d; 30 days at most.
    #[arg(long, value_name = "TIME", default_value = "1h", value_parser = duration)]
    expires: Duration,
    /// Where the machine reaches the hub, instead of `public_endpoint`.
    #[arg(long, value_name = "URL")]
    endpoint: Option<String>,
    /// The hub's own CA (PEM), instead of `public_ca`; the token pins it.
    #[arg(long, value_name = "FILE")]
    ca: Option<PathBuf>,
}

/// The longest that a token can be used.
const EXPIRES_MAX: Duration = Duration::from_hours(30 * 24);

/// Longest name of a host, bytes.
const NAME_BYTES_MAX: usize = 128;

pub(super) async fn run(hosts: &Hosts, common: &Common) -> Result<(), Problems> {
    let config = common.load()?;
    log_warnings();
    let store = Store::connect(&config.store).await.map_err(one)?;
    let done = match hosts {
        Hosts::Invite(wanted) => invite(&store, &config, wanted).await,
        Hosts::Invitations => invitations(&store).await,
        Hosts::Uninvite { number } => uninvite(&store, *number).await,
        Hosts::Add(machine) => add(&store, &config, machine).await,
        Hosts::List => list(&store, &config).await,
        Hosts::Show { host_id } => show(&store, &config, *host_id).await,
        Hosts::Role { host_id, role } => set_role(&store, *host_id, *role).await,
        Hosts::Lock { host_id } => set_status(&store, *host_id, HostStatus::Locked).await,
        Hosts::Unlock { host_id } => set_status(&store, *host_id, HostStatus::Active).await,
        Hosts::Revoke { host_id } => set_status(&store, *host_id, HostStatus::Revoked).await,
        Hosts::Verdicts { host_id, limit } => verdicts(&store, *host_id, *limit).await,
    };
    store.close().await;
    done.map_err(one)
}

/// `90s`, `30m`, `1h` or `7d`.
fn duration(text: &str) -> Result<Duration, String> {
    let split = text.len() - text.chars().next_back().map_or(0, char::len_utf8);
    let (number, unit) = text.split_at(split);
    let seconds = match unit {
        "s" => Some(1),
        "m" => Some(60),
        "h" => Some(60 * 60),
        "d" => Some(24 * 60 * 60),
        _ => None,
    };
    let parsed = number.parse::<u64>().ok().zip(seconds);
    parsed
        .and_then(|(number, seconds)| number.checked_mul(seconds))
        .map(Duration::from_secs)
        .filter(|time| (Duration::from_secs(1)..=EXPIRES_MAX).contains(time))
        .ok_or_else(|| "expected a time such as 90s, 30m, 1h or 7d, 30 days at most".to_owned())
}

impl Machine {
    fn check(&self) -> Result<(), Problem> {
        if self.name.len() > NAME_BYTES_MAX || self.name.contains(char::is_control) {
            let sentence = format!("a host's name has at most {NAME_BYTES_MAX} bytes and no control characters");
            return Err(Problem::new(Code::BadValue, sentence));
        }
        self.maps.iter().try_for_each(|map| check_map(map))
    }
}

async fn invite(store: &Store, config: &Config, wanted: &Invite) -> Result<(), Problem> {
    wanted.machine.check()?;
    let missing = || {
        let sentence = "say where hosts reach the hub: set public_endpoint, or give --endpoint https://host:port";
        Problem::new(Code::MissingValue, sentence)
    };
    let endpoint = wanted.endpoint.as_ref().or(config.public_endpoint.as_ref());
    let endpoint = endpoint.ok_or_else(missing)?.trim_end_matches('/').to_owned();
    token::check_endpoint(&endpoint)
        .map_err(|expected| Problem::new(Code::BadEndpoint, format!("--endpoint: {expected}")))?;
    let ca = wanted.ca.as_ref().or(config.public_ca.as_ref());
    let ca = ca.filter(|_| endpoint.starts_with("https:"));
    if let (Some(ca), Some(files)) = (ca, &config.tls) {
        tls::check_pin(files, ca)?;
    }
    let ca_pin = ca.map(|ca| tls::pin_of(ca)).transpose()?;
    let keyring = load_keyring(&config.store.connection, &config.keyring_file)?;
    let (key, token_id) = (keyring.current(), Uuid::new_v4());
    let invitation = Invitation {
        account_id: wanted.machine.account,
        name: wanted.machine.name.clone(),
        role: wanted.machine.role,
        maps: wanted.machine.maps.clone(),
        expires_in: wanted.expires,
    };
    let number = store.invite(token_id, key.id().as_str(), &invitation).await?;
    let token = Token {
        key_id: key.id().clone(),
        token_id,
        secret: key.token_secret(token_id),
        endpoint,
        ca_pin,
    };
    println!("{}", token.to_text().as_str());
    eprintln!(
        "invitation {number}: the volunteer runs `p2p-sync-agent enrol -` and pastes this line; it serves one machine once"
    );
    Ok(())
}

async fn invitations(store: &Store) -> Result<(), Problem> {
    for one in store.invitations().await? {
        let host = one.host_id.map(|host| format!(" host={host}")).unwrap_or_default();
        println!(
            "{} {} until {} account={} maps={}{host} {}",
            one.invitation_id,
            one.state,
            one.expires_at,
            one.account_id,
            one.maps.join(","),
            one.name
        );
    }
    Ok(())
}

async fn uninvite(store: &Store, number: u64) -> Result<(), Problem> {
    if store.revoke_invitation(number).await? {
        return Ok(());
    }
    let sentence = format!("no invitation {number} is open: see `p2p-sync-proxy hosts invitations`");
    Err(Problem::new(Code::NotFound, sentence))
}

async fn add(store: &Store, config: &Config, machine: &Machine) -> Result<(), Problem> {
    machine.check()?;
    let keyring: Keyring = load_keyring(&config.store.connection, &config.keyring_file)?;
    let key = keyring.current();
    let host = store
        .add_host(Uuid::new_v4(), machine.account, &machine.name, key.id().as_str())
        .await?;
    if machine.role != host.role {
        store.set_host_role(host.host_id, machine.role).await?;
    }
    println!("{}", key.credential(host.host_id, host.generation).to_text().as_str());
    for map in &machine.maps {
        store.grant_map(map, host.host_id, false).await?;
    }
    Ok(())
}

async fn list(store: &Store, config: &Config) -> Result<(), Problem> {
    let world = store.world().await?;
    for host in store.hosts().await? {
        println!("{}", line(&host, score(&world, config, host.host_id).as_str()));
    }
    Ok(())
}

/// Who was not heard within a day has none.
fn score(world: &World, config: &Config, host_id: Uuid) -> String {
    assignment::score(world, &config.maps, host_id).map_or_else(|| "none".to_owned(), |score| format!("{score:.0}"))
}

fn line(host: &HostRow, score: &str) -> String {
    format!(
        "{} {} account={} key={} generation={} seen={} role={} score={score} {}",
        host.host_id,
        host.status.as_str(),
        host.account_id,
        host.key_id,
        host.generation,
        host.last_seen.as_deref().unwrap_or("never"),
        host.role.as_str(),
        host.name
    )
}

/// So many reports of a host are shown.
const METRICS_SHOWN: u32 = 5;

async fn show(store: &Store, config: &Config, host_id: Uuid) -> Result<(), Problem> {
    let host = find(store, host_id).await?;
    let world = store.world().await?;
    println!("{}", line(&host, score(&world, config, host_id).as_str()));
    for report in store.metrics(host_id, METRICS_SHOWN).await? {
        let whose = if report.reported_by == host_id {
            String::new()
        } else {
            format!(" by {}", report.reported_by)
        };
        // A host's own words: nothing of them may steer the terminal.
        println!("metrics {}{whose} {}", ago(report.received_at), shown(&report.metrics));
    }
    if let Some(reason) = &host.lock_reason {
        println!("locked: {reason}");
    }
    for sum in store.verdict_sums(host_id).await? {
        println!(
            "{} {} rows={} operations={}",
            sum.verdict, sum.rule, sum.rows, sum.operations
        );
    }
    Ok(())
}

async fn verdicts(store: &Store, host_id: Uuid, limit: u32) -> Result<(), Problem> {
    find(store, host_id).await?;
    for verdict in store.verdicts(host_id, limit).await? {
        // Paths are the host's own words: nothing of them may steer the terminal.
        let path = verdict.path.unwrap_or_default();
        let operation = verdict.operation_id.map(|id| id.to_string()).unwrap_or_default();
        println!(
            "{} {} {} path={} operation={operation} {}",
            verdict.at,
            verdict.verdict,
            verdict.rule,
            path.escape_debug(),
            shown(&verdict.details)
        );
    }
    Ok(())
}

async fn find(store: &Store, host_id: Uuid) -> Result<HostRow, Problem> {
    store.host(host_id).await?.ok_or_else(|| unknown(host_id))
}

async fn set_role(store: &Store, host_id: Uuid, role: HostRole) -> Result<(), Problem> {
    if store.set_host_role(host_id, role).await? {
        return Ok(());
    }
    Err(unknown(host_id))
}

async fn set_status(store: &Store, host_id: Uuid, status: HostStatus) -> Result<(), Problem> {
    let now = store.set_host_status(host_id, status).await?;
    if now.ok_or_else(|| unknown(host_id))? == status {
        return Ok(());
    }
    let sentence =
        format!("host {host_id} is revoked for good: admit the machine anew with `p2p-sync-proxy hosts invite`");
    Err(Problem::new(Code::Revoked, sentence))
}

fn unknown(host_id: Uuid) -> Problem {
    Problem::new(
        Code::NotFound,
        format!("there is no host {host_id}: see `p2p-sync-proxy hosts list`"),
    )
}

//! Maps that change hands, through the whole hub: what hosts are told at once, what they may ask for, and who writes on where a
//! host is lost. The hosts are sealed by hand, so that they can stay silent, lie and repeat themselves.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use clap::Parser as _;
use p2p_sync_proto::{
    Code,
    envelope::Lane,
    v1::{
        self, AssignMap, CopyPosition, CopyPositions, ListMaps, MigrateMap, OutcomeState, ReleaseMap, duty::Role,
        map_request::What,
    },
};
use p2p_sync_tests::migrations::{self, Options};
use tokio::time::{sleep, timeout};
use tonic::transport::Channel;
use uuid::Uuid;

use crate::{
    wire::{Attendant, WireHost, batch},
    world::{PATIENCE, PROGRAM, World, run},
};

const PATH: &str = "prontera/ITEM_DROP/1";

/// A host that renews, attends and asks, as an agent does.
struct Player {
    host: WireHost,
    channel: Channel,
    attendant: Attendant,
    counter: u64,
    sequence: u64,
}

impl Player {
    async fn new(endpoint: &str, credential: &str) -> Self {
        let host = WireHost::new(endpoint, credential);
        let channel = host.connect().await;
        let renew = host.seal(Lane::Renew, &v1::RenewRequest { counter: 1 });
        let renewed = host.renew(&channel, renew).await.expect("the hub serves");
        assert_eq!(renewed.code(), v1::RejectCode::None, "{}", renewed.message);
        let attendant = host.attend(&channel).await;
        Self {
            host,
            channel,
            attendant,
            counter: 1,
            sequence: 0,
        }
    }

    fn id(&self) -> Uuid {
        self.host.credential().host_id
    }

    async fn ask(&mut self, what: What) -> v1::MapReply {
        self.counter += 1;
        self.host.map_call(&self.channel, self.counter, what).await
    }

    async fn renew(&mut self) -> v1::RenewReply {
        self.counter += 1;
        let counter = self.counter;
        let sealed = self.host.seal(Lane::Renew, &v1::RenewRequest { counter });
        self.host.renew(&self.channel, sealed).await.expect("the hub serves")
    }

    /// Writes under a tenure.
    async fn write(&mut self, tenure: u64) -> OutcomeState {
        self.sequence += 1;
        let mut op = self.host.operation(self.sequence, PATH, Some(r#"{"amount":1}"#));
        if let Some(version) = &mut op.version {
            version.tenure = tenure;
        }
        let sealed = self.host.seal(Lane::Critical, &batch(&[op]));
        let reply = self.host.critical(&self.channel, sealed).await.expect("answered");
        // An outcome that is not told is that all applied.
        reply.outcomes.first().map_or(OutcomeState::Applied, v1::Outcome::state)
    }
}

fn tenures(told: &v1::RenewReply) -> Vec<(String, u64)> {
    told.leases
        .iter()
        .map(|lease| (lease.map.clone(), lease.tenure))
        .collect()
}

fn held(map: &str, tenure: u64) -> Vec<(String, u64)> {
    vec![(map.to_owned(), tenure)]
}

fn migrate(map: &str, to: Option<Uuid>) -> What {
    What::Migrate(MigrateMap {
        map: map.to_owned(),
        host_id: to.map(|id| id.as_bytes().to_vec()).unwrap_or_default().into(),
    })
}

fn release(map: &str, tenure: u64) -> What {
    let map = map.to_owned();
    What::Release(ReleaseMap { map, tenure })
}

fn assign(map: &str, to: Option<Uuid>) -> What {
    What::Assign(AssignMap {
        map: map.to_owned(),
        host_id: to.map(|id| id.as_bytes().to_vec()).unwrap_or_default().into(),
    })
}

fn list(maps: &[&str]) -> What {
    let maps = maps.iter().map(|map| (*map).to_owned()).collect();
    What::List(ListMaps { maps })
}

/// Runs a command of the operator's without holding up what else is async.
fn command(world: &World, command: &[&str]) -> String {
    tokio::task::block_in_place(|| world.hub.command(command))
}

fn settings(more: &[(&'static str, String)]) -> Vec<(&'static str, String)> {
    let mut settings = vec![
        ("leases", "required".to_owned()),
        ("lease_seconds", "2".to_owned()),
        ("handover_seconds", "2".to_owned()),
        ("catch_up_seconds", "1".to_owned()),
        ("migration_min_seconds", "1".to_owned()),
    ];
    for (key, value) in more {
        settings.retain(|(known, _)| known != key);
        settings.push((key, value.clone()));
    }
    settings
}

fn calm() -> Vec<(&'static str, String)> {
    settings(&[("lease_seconds", "60".to_owned())])
}

#[test]
fn invariant_02_that_a_host_leaves_is_not_said_again_for_it_when_it_is_back() {
    let world = World::with(&calm());
    let host = WireHost::new(&world.endpoint(), &world.hub.add_host(1));
    run(async {
        let channel = host.connect().await;
        let leaving = v1::AttendRequest {
            leaving: true,
            ..Default::default()
        };
        assert_eq!(host.attend_by(&channel, &leaving).await.answer.code(), Code::None);
        let back = host.opened_again();
        let attendant = back.attend(&back.connect().await).await;
        // As whoever has recorded it could: it is sealed by the host, of the outbox before.
        let said_again = host.attend_by(&channel, &leaving).await;
        assert_eq!(said_again.answer.code(), Code::Replay, "{}", said_again.answer.message);
        drop(attendant);
    });
}

#[test]
fn a_host_is_told_at_once_of_what_it_holds_whichever_proxy_it_is_at_and_whoever_changed_it() {
    let world = World::with(&calm());
    let mut second = world.another_proxy();
    let endpoint = second.start();
    let credentials = [world.hub.add_host(1), world.hub.add_host(2)];
    run(async {
        let mut here = Player::new(&world.endpoint(), &credentials[0]).await;
        let mut there = Player::new(&endpoint, &credentials[1]).await;
        let first = here.attendant.answer.leases.clone().expect("told with the answer");
        assert!(first.governed && first.leases.is_empty() && first.lease_ms == 60_000);
        let (a, b) = (here.id().to_string(), there.id());
        command(&world, &["maps", "assign", "prontera", &a]);
        let begun = Instant::now();
        assert_eq!(tenures(&here.attendant.change().await), held("prontera", 1));
        assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
        let begun = here.ask(migrate("prontera", Some(b))).await;
        assert_eq!(begun.code(), Code::None, "{}", begun.message);
        assert_eq!(begun.maps[0].successor, b.as_bytes().to_vec());
        let duty = there.attendant.change().await.duties.remove(0);
        assert_eq!((duty.role(), duty.map.as_str()), (Role::Backup, "prontera"));
        assert_eq!(duty.host_id, here.id().as_bytes().to_vec());
        let copies = What::Copies(CopyPositions {
            positions: vec![CopyPosition {
                map: "prontera".to_owned(),
                sequence: 9,
            }],
        });
        let near = Instant::now();
        assert_eq!(there.ask(copies).await.code(), Code::None);
        let asked = here.attendant.change().await;
        assert!(
            near.elapsed() < Duration::from_secs(1),
            "its copy is near: {:?}",
            near.elapsed()
        );
        let duty = &asked.duties[0];
        assert_eq!((duty.role(), duty.tenure), (Role::HandOver, 1));
        assert!((1000..=2000).contains(&duty.within_ms), "{duty:?}");
        let renewed = here.renew().await;
        assert_eq!(renewed.duties.len(), 1, "a renewal tells the same: {renewed:?}");
        let released = Instant::now();
        let answer = here.ask(release("prontera", 1)).await;
        assert_eq!(answer.code(), Code::None, "{}", answer.message);
        assert_eq!(
            (answer.maps[0].host_id.as_ref(), answer.maps[0].tenure),
            (b.as_bytes().as_slice(), 2)
        );
        let granted = there.attendant.change().await;
        println!("told of it after {:?}", released.elapsed());
        assert!(released.elapsed() < Duration::from_secs(1), "{:?}", released.elapsed());
        assert_eq!((tenures(&granted), granted.duties.len()), (held("prontera", 2), 0));
        assert!(here.attendant.change().await.leases.is_empty());
        assert_eq!(there.write(2).await, OutcomeState::Applied);
        assert_eq!(here.write(1).await, OutcomeState::Limbo);
    });
}

#[test]
fn invariant_04_a_foreign_host_neither_releases_nor_moves_a_map_and_is_told_who_holds_it() {
    let world = World::with(&calm());
    let credentials = [world.hub.add_host_of(1, &["prontera"]), world.hub.add_host(2)];
    run(async {
        let mut holder = Player::new(&world.endpoint(), &credentials[0]).await;
        let mut stranger = Player::new(&world.endpoint(), &credentials[1]).await;
        let (a, b) = (holder.id(), stranger.id());
        for what in [
            release("prontera", 1),
            migrate("prontera", Some(b)),
            migrate("prontera", None),
        ] {
            let told = stranger.ask(what).await;
            assert_eq!(told.code(), Code::NotLeaseHolder);
            assert!(told.message.contains(&a.to_string()), "{}", told.message);
        }
        assert_eq!(stranger.ask(assign("prontera", None)).await.code(), Code::NotAllowed);
        let ruleless = tokio::task::block_in_place(|| world.hub.fails(&["maps", "rule", "prontera"]));
        assert!(ruleless.contains("prontera has no rule"), "{ruleless}");
        command(&world, &["maps", "rule", "geffen", "--hosts", &b.to_string()]);
        assert_eq!(stranger.ask(assign("geffen", Some(a))).await.code(), Code::NotAllowed);
        let granted = stranger.ask(assign("geffen", None)).await;
        assert_eq!((granted.code(), granted.maps[0].tenure), (Code::None, 1));
        let taken = holder.ask(assign("geffen", None)).await;
        assert_eq!(taken.code(), Code::NotAllowed);
        assert_eq!(holder.ask(release("prontera", 7)).await.code(), Code::StaleTenure);
        let listed = stranger.ask(list(&[])).await;
        let names: Vec<&str> = listed.maps.iter().map(|map| map.map.as_str()).collect();
        assert_eq!(names, ["geffen"], "what it holds or may have");
        let of_two = stranger.ask(list(&["prontera", "morocc"])).await;
        assert_eq!(of_two.maps.len(), 1);
        assert_eq!(of_two.maps[0].host_id, a.as_bytes().to_vec());
        assert_eq!(holder.ask(release("not a map", 1)).await.code(), Code::BadMap);
        assert_eq!(
            tenures(&holder.renew().await),
            held("prontera", 1),
            "nothing of it took hold"
        );
    });
}

#[test]
fn invariant_04_the_operators_own_machine_speaks_for_all_maps_and_hosts() {
    let world = World::with(&calm());
    let own = world.hub.command(&["hosts", "add", "--account", "1", "--role", "hub"]);
    let other = world.hub.add_host(2);
    run(async {
        let mut own = Player::new(&world.endpoint(), &own).await;
        let mut other = Player::new(&world.endpoint(), &other).await;
        let id = other.id();
        assert_eq!(own.ask(assign("prontera", Some(id))).await.code(), Code::None);
        assert_eq!(tenures(&other.attendant.change().await), held("prontera", 1));
        let listed = own.ask(list(&[])).await;
        assert_eq!(listed.maps.len(), 1, "it sees all");
        assert_eq!(own.ask(release("prontera", 1)).await.code(), Code::None);
        assert!(other.attendant.change().await.leases.is_empty());
        let path = format!("@host/{id}/HOST_METRICS");
        let report = |player: &Player, sequence| {
            let op = player
                .host
                .operation(sequence, &path, Some(r#"{"latency_ms":12,"players":3}"#));
            player.host.seal(Lane::Bulk, &batch(&[op]))
        };
        let sealed = report(&own, 1);
        let told = own.host.bulk(&own.channel, vec![sealed]).await.expect("answered");
        assert!(told[0].outcomes.is_empty(), "{told:?}");
        // Once it is a volunteer's machine, it is not.
        command(&world, &["hosts", "role", &own.id().to_string(), "host"]);
        let refused = async {
            let mut sequence = 1;
            loop {
                sequence += 1;
                let sealed = report(&own, sequence);
                let told = own.host.bulk(&own.channel, vec![sealed]).await.expect("answered");
                if told[0]
                    .outcomes
                    .first()
                    .is_some_and(|one| one.state() == OutcomeState::Rejected)
                {
                    break;
                }
                sleep(Duration::from_millis(200)).await;
            }
        };
        timeout(Duration::from_secs(10), refused)
            .await
            .expect("within some seconds");
        assert_eq!(own.ask(assign("geffen", Some(id))).await.code(), Code::NotAllowed);
    });
}

#[test]
fn invariant_04_a_request_for_a_map_that_was_recorded_changes_nothing() {
    let world = World::with(&calm());
    let credential = world.hub.add_host_of(1, &["prontera"]);
    run(async {
        let mut host = Player::new(&world.endpoint(), &credential).await;
        let what = Some(release("prontera", 1));
        let recorded = host.host.seal(Lane::Maps, &v1::MapRequest { counter: 2, what });
        let told = host.host.map_call_by(&host.channel, recorded.clone()).await;
        assert_eq!(told.code(), Code::None, "{}", told.message);
        let id = host.id().to_string();
        command(&world, &["maps", "assign", "prontera", &id]);
        let again = host.host.map_call_by(&host.channel, recorded).await;
        assert_eq!(again.code(), Code::Replay);
        // Neither a window nor this proxy has to know of it: the counter tells, together with that of renewals.
        host.counter = 1;
        assert_eq!(host.ask(release("prontera", 2)).await.code(), Code::Replay);
        host.counter = 1;
        assert_eq!(host.renew().await.code(), Code::Replay);
        assert_eq!(tenures(&host.renew().await), held("prontera", 2), "it holds it still");
        // Sealed for another lane, it is no request.
        let what = Some(release("prontera", 2));
        let renewal = host.host.seal(Lane::Renew, &v1::MapRequest { counter: 9, what });
        let mut client = v1::maps_client::MapsClient::new(host.channel.clone());
        client.call(renewal).await.expect_err("it does not open");
    });
}

#[test]
fn a_host_that_is_shut_out_hears_nothing_more_within_seconds_and_none_has_many_ears() {
    let world = World::with(&calm());
    let credentials = [world.hub.add_host(1), world.hub.add_host(2)];
    run(async {
        let mut host = Player::new(&world.endpoint(), &credentials[0]).await;
        let mut others = Vec::new();
        for _ in 0..4 {
            others.push(host.host.attend(&host.channel).await);
        }
        let last = timeout(PATIENCE, async {
            loop {
                let notice = host.attendant.next().await.expect("its reason is told");
                if notice.code() != Code::None {
                    return notice;
                }
            }
        });
        assert_eq!(last.await.expect("the oldest ends").code(), Code::RateLimited);
        assert!(host.attendant.next().await.is_none());
        let id = host.id().to_string();
        command(&world, &["hosts", "lock", &id]);
        let begun = Instant::now();
        let end = timeout(PATIENCE, async {
            while let Some(notice) = others[0].next().await {
                if notice.code() != Code::None {
                    return notice.code();
                }
            }
            Code::None
        });
        assert_eq!(end.await.expect("it ends"), Code::Locked);
        assert!(begun.elapsed() < Duration::from_secs(6), "{:?}", begun.elapsed());
        // Another goes on, and is told that nothing happens.
        let mut other = Player::new(&world.endpoint(), &credentials[1]).await;
        let beat = timeout(Duration::from_secs(10), other.attendant.next())
            .await
            .expect("a heartbeat");
        assert_eq!(
            beat.map(|notice| (notice.code(), notice.leases)),
            Some((Code::None, None))
        );
    });
}

#[test]
fn invariant_04_a_map_is_taken_from_a_holder_that_does_not_answer_and_what_it_writes_later_is_apart() {
    let world = World::with(&settings(&[("lease_seconds", "10".to_owned())]));
    let credentials = [world.hub.add_host_of(1, &["prontera"]), world.hub.add_host(2)];
    run(async {
        let mut deaf = Player::new(&world.endpoint(), &credentials[0]).await;
        let mut next = Player::new(&world.endpoint(), &credentials[1]).await;
        let to = next.id().to_string();
        command(&world, &["maps", "migrate", "prontera", &to]);
        let begun = Instant::now();
        assert_eq!(next.attendant.change().await.duties[0].role(), Role::Backup);
        // It never says how far its copy is: it has a second for it, and then the holder two.
        assert_eq!(deaf.attendant.change().await.duties[0].role(), Role::HandOver);
        assert_eq!(deaf.write(1).await, OutcomeState::Applied);
        deaf.renew().await;
        assert_eq!(tenures(&next.attendant.change().await), held("prontera", 2));
        let took = begun.elapsed();
        assert!(
            (Duration::from_millis(2500)..Duration::from_secs(8)).contains(&took),
            "{took:?}"
        );
        assert_eq!(deaf.write(1).await, OutcomeState::Limbo);
        assert_eq!(next.write(2).await, OutcomeState::Applied);
        let shown = command(&world, &["maps", "show", "prontera"]);
        assert!(shown.contains("(late)"), "{shown}");
    });
}

/// Renews as an agent does, and takes the first map that it is given.
async fn live(mut host: Player, mut until: tokio::sync::watch::Receiver<bool>) -> Option<(Instant, u64)> {
    let mut ticks = tokio::time::interval(Duration::from_millis(600));
    loop {
        tokio::select! {
            _ = ticks.tick() => {
                let renewed = host.renew().await;
                assert_eq!(renewed.code(), Code::None, "{}", renewed.message);
            }
            told = host.attendant.change() => {
                if let Some(lease) = told.leases.first() {
                    return Some((Instant::now(), lease.tenure));
                }
            }
            _ = until.changed() => return None,
        }
    }
}

#[test]
fn invariant_04_a_map_whose_holder_is_lost_goes_on_within_a_second_of_its_leases_end_also_with_a_proxy_lost() {
    let mut world = World::with(&settings(&[]));
    let mut second = world.another_proxy();
    let endpoint = second.start();
    let credentials = [world.hub.add_host(1), world.hub.add_host(2), world.hub.add_host(3)];
    world
        .hub
        .command(&["maps", "rule", "prontera", "--automatic", "--backups", "1"]);
    let (first_lapse, second_lapse) = run(async {
        let (over, until) = tokio::sync::watch::channel(false);
        let mut holder = Player::new(&endpoint, &credentials[0]).await;
        assert_eq!(
            tenures(&holder.attendant.change().await),
            held("prontera", 1),
            "given by itself"
        );
        let next = Player::new(&endpoint, &credentials[1]).await;
        let living = tokio::spawn(live(next, until.clone()));
        for _ in 0..6 {
            sleep(Duration::from_millis(500)).await;
            holder.renew().await;
        }
        assert!(!living.is_finished(), "as long as it renews it is its own");
        let lost = Instant::now();
        drop(holder);
        let (at, tenure) = living.await.expect("no panic").expect("it is given the map");
        assert_eq!(tenure, 2);
        let first_lapse = at - lost;
        // Whichever proxy assigns: the other one goes on.
        let third = Player::new(&endpoint, &credentials[2]).await;
        let living = tokio::spawn(live(third, until));
        sleep(Duration::from_millis(700)).await;
        tokio::task::block_in_place(|| world.hub.kill());
        let (at, tenure) = living.await.expect("no panic").expect("it is given the map");
        assert_eq!(tenure, 3);
        drop(over);
        (first_lapse, (at - lost).saturating_sub(first_lapse))
    });
    println!("without a writer: {first_lapse:?}, {second_lapse:?}");
    // Of two seconds.
    assert!(
        first_lapse > Duration::from_millis(1500) && first_lapse < Duration::from_secs(3),
        "{first_lapse:?}"
    );
    assert!(second_lapse < Duration::from_millis(3500), "{second_lapse:?}");
}

#[test]
fn invariant_04_the_hubs_downtime_takes_no_automatic_map_from_its_holder() {
    let mut world = World::with(&settings(&[("lease_seconds", "3".to_owned())]));
    let credentials = [world.hub.add_host(1), world.hub.add_host(2)];
    world.hub.command(&["maps", "rule", "prontera", "--automatic"]);
    run(async {
        let mut holder = Player::new(&world.endpoint(), &credentials[0]).await;
        assert_eq!(tenures(&holder.attendant.change().await), held("prontera", 1));
        let other = Player::new(&world.endpoint(), &credentials[1]).await;
        holder.renew().await;
        tokio::task::block_in_place(|| world.hub.kill());
        sleep(Duration::from_secs(5)).await;
        tokio::task::block_in_place(|| world.hub.start());
        // The other one is back first.
        let counter = other.counter;
        let mut other = Player {
            channel: other.host.connect().await,
            counter,
            ..other
        };
        assert_eq!(other.renew().await.code(), Code::None);
        let listening = other.host.attend(&other.channel).await;
        sleep(Duration::from_secs(1)).await;
        holder.channel = holder.host.connect().await;
        assert_eq!(tenures(&holder.renew().await), held("prontera", 1));
        assert!(listening.answer.leases.expect("told").leases.is_empty());
        let (tenure, writes) = (1, holder.write(1).await);
        assert_eq!((tenure, writes), (1, OutcomeState::Applied));
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn invariant_04_maps_that_change_hands_under_load_have_one_writer_and_lose_nothing() {
    let arguments = [
        "migrations",
        "--migrations",
        "12",
        "--kills-percent",
        "15",
        "--hosts",
        "3",
        "--maps",
        "2",
        "--write-every-ms",
        "50",
    ];
    let options = Options::parse_from(arguments);
    let report = migrations::measure(&options, Path::new(PROGRAM)).await;
    println!("{report}");
    // How long that took on a machine that does other things beside it says little; `tests/run migrations` has the bars.
    assert_eq!(report.wrong(), [""; 0]);
}

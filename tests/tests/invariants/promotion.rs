//! A Postgres with a standby that takes its place: what was acknowledged stays, the hub finds the server that takes writes, and
//! where something may have been lost, everybody is told.

use std::time::Duration;

use p2p_sync_proto::{Code, keys::Credential};
use p2p_sync_tests::{
    services::{OwnPostgres, shared_redis_url, wait_until},
    subscriber::{Told, from},
};
use tokio::time::timeout;

use crate::{
    crash::Run,
    subscribing::{Writer, assert_all_is_told, at, follow, last_of},
    world::{PATIENCE, World, run, until},
};

/// A primary and a standby that confirms each commit.
fn pair() -> (OwnPostgres, OwnPostgres) {
    run(async {
        let primary = OwnPostgres::new().await;
        let standby = primary.standby().await;
        primary.set("synchronous_standby_names", "standby").await;
        let client = primary.client().await;
        wait_until(PATIENCE, "commits wait for the standby", async || {
            let waits = "SELECT count(*) FROM pg_stat_replication WHERE sync_state = 'sync'";
            client.query_one(waits, &[]).await.expect("valid SQL").get::<_, i64>(0) == 1
        })
        .await;
        (primary, standby)
    })
}

/// A hub that knows both, and tests that read from the one that will be left.
fn world(primary: &OwnPostgres, standby: &OwnPostgres) -> World {
    let both = OwnPostgres::url_of(&[primary, standby]);
    World::on(&both, &shared_redis_url(), &[])
}

/// Follows to the end of a stream, over a snapshot that begins it anew.
async fn follow_on(world: &World, reader: &Writer, told: &mut Told, begins_anew: bool) {
    let end = last_of(world, "prontera");
    let mut subscriber = reader.host.subscribe(&reader.channel, &told.resume()).await;
    let begun_before = told.snapshots;
    let done = async {
        while at(told, "prontera") < end || begins_anew && told.snapshots == begun_before {
            let update = subscriber.next().await.expect("the stream goes on").expect("not over");
            assert!(matches!(update.code(), Code::None | Code::Resync), "{update:?}");
            if update.snapshot {
                told.sequences.clear();
                told.states.clear();
            }
            told.take(update);
        }
    };
    timeout(PATIENCE, done).await.expect("told in time");
    assert_eq!(told.snapshots > begun_before, begins_anew);
    assert_all_is_told(world, told, "prontera");
}

#[test]
fn invariants_01_to_03_a_standby_promoted_under_load_has_all_that_was_acknowledged_once_and_in_order() {
    let (mut primary, standby) = pair();
    let mut run_of = Run::new(world(&primary, &standby));
    let timeline = run_of.world.count("SELECT timeline FROM p2p_sync.hub");
    run_of.get_into_mid_stream();
    primary.kill();
    run_of.feed();
    assert!(run_of.unsettled() > 0, "it was killed when all was done");
    run(standby.promote());
    // It comes back as if nothing had happened, where the hub looks first, and takes writes.
    run(primary.start());
    run_of.get_into_mid_stream();
    assert!(
        run_of.agent.flush(PATIENCE),
        "it does not drain: {}",
        run_of.agent.log()
    );
    let written_since = |server: &OwnPostgres| {
        let sql = "SELECT count(*) FROM p2p_sync.operations";
        let count = run(async {
            server
                .client()
                .await
                .query_one(sql, &[])
                .await
                .expect("valid SQL")
                .get::<_, i64>(0)
        });
        usize::try_from(count).expect("never negative")
    };
    let here = written_since(&standby);
    assert!(here > written_since(&primary), "the former primary was written to");
    // A hub that is started now knows of neither, and asks both.
    run_of.world.hub.stop();
    run_of.world.hub.start();
    run_of.get_into_mid_stream();
    assert!(
        run_of.agent.flush(PATIENCE),
        "it does not drain: {}",
        run_of.agent.log()
    );
    assert!(written_since(&standby) > here, "the former primary was written to");
    primary.kill();
    let raised = run_of.world.count("SELECT timeline FROM p2p_sync.hub");
    assert_eq!(raised, timeline + 1, "nobody knows how much the standby had");
    run_of.account(false);
}

#[test]
fn a_server_that_takes_no_writes_any_more_refuses_nothing_and_is_left_for_one_that_does() {
    let (primary, standby) = pair();
    let mut run_of = Run::new(world(&primary, &standby));
    run_of.get_into_mid_stream();
    run(primary.set("default_transaction_read_only", "on"));
    run_of.feed();
    std::thread::sleep(Duration::from_secs(1));
    assert!(run_of.unsettled() > 0, "it takes writes");
    assert_eq!(run_of.agent.ledger().count("REJECTED"), 0);
    // The same connections serve again when it does.
    run(primary.set("default_transaction_read_only", "off"));
    run_of.get_into_mid_stream();
    run(primary.set("default_transaction_read_only", "on"));
    run(standby.promote());
    run_of.get_into_mid_stream();
    run_of.account(false);
}

#[test]
fn invariant_08_a_standby_that_lacked_commits_is_told_to_subscribers_and_tenures_jump_ahead() {
    let mut primary = run(OwnPostgres::new());
    let mut standby = run(primary.standby());
    let both = OwnPostgres::url_of(&[&primary, &standby]);
    let settings = [("leases", "required".to_owned()), ("lease_seconds", "60".to_owned())];
    let mut world = World::on(&both, &shared_redis_url(), &settings);
    world.hub.start();
    let credentials = [1, 2].map(|account| world.hub.add_host(account));
    let id_of = |credential: &String| {
        Credential::parse(credential)
            .expect("the hub gave it")
            .host_id
            .to_string()
    };
    let ids = credentials.each_ref().map(id_of);
    world.hub.command(&["maps", "assign", "prontera", &ids[0]]);
    let tenure = || world.count("SELECT tenure FROM p2p_sync.host_assignments WHERE map = 'prontera'");
    let before = tenure();
    let (mut told, mut writer, reader) = run(async {
        let mut writer = Writer::connect(&world.endpoint(), &credentials[0]).await;
        writer.tenure = before.cast_unsigned();
        let some = writer.some("prontera", 30);
        writer.bulk(&some).await;
        let mut told = Told::default();
        let reader = Writer::connect(&world.endpoint(), &credentials[1]).await;
        let mut first = reader.host.subscribe(&reader.channel, &from(&[("prontera", 0)])).await;
        let end = last_of(&world, "prontera");
        follow(&mut first, &mut told, |told| at(told, "prontera") >= end).await;
        // All that there is has come to the standby; what follows does not.
        settle(&primary).await;
        standby.kill();
        let lost = writer.some("prontera", 30);
        writer.bulk(&lost).await;
        let end = last_of(&world, "prontera");
        follow(&mut first, &mut told, |told| at(told, "prontera") >= end).await;
        (told, writer, reader)
    });
    world.hub.command(&["maps", "force", "prontera", &ids[1]]);
    let lost = tenure();
    assert!(lost > before);

    primary.kill();
    run(standby.start());
    run(standby.promote());
    let timeline = || world.count("SELECT timeline FROM p2p_sync.hub");
    until("the hub has noticed", || timeline() == 2);
    assert_eq!(tenure(), before, "the grant is lost");
    run(async {
        follow_on(&world, &reader, &mut told, true).await;
        // Who holds the map goes on under its tenure.
        let some = [writer.next("prontera/ITEM_DROP/1", Some(r#"{"amount":3}"#))];
        writer.critical(&some).await;
        follow_on(&world, &reader, &mut told, false).await;
    });
    world.hub.command(&["maps", "force", "prontera", &ids[1]]);
    assert!(tenure() > lost, "{} is no newer than {lost}, which was lost", tenure());
}

/// Waits until the standby has all that the primary has.
async fn settle(primary: &OwnPostgres) {
    let client = primary.client().await;
    let behind = "SELECT count(*) FROM pg_stat_replication WHERE flush_lsn < pg_current_wal_lsn()";
    wait_until(PATIENCE, "the standby has everything", async || {
        client.query_one(behind, &[]).await.expect("valid SQL").get::<_, i64>(0) == 0
    })
    .await;
}

#[test]
fn check_says_what_a_failover_can_lose() {
    let primary = run(OwnPostgres::new());
    let mut world = World::on(primary.url(), &shared_redis_url(), &[]);
    world.hub.start();
    world.hub.stop();
    let says = |expected: &str| {
        let (_, said) = world.hub.check();
        let database = said
            .lines()
            .find(|line| line.starts_with("database: "))
            .unwrap_or_default();
        assert!(
            database.starts_with("database: ok (schema version ") && database.contains(expected),
            "{said}"
        );
    };
    says("no replica is connected");
    let standby = run(primary.standby());
    says("WARNING: 1 replicas follow without being waited for");
    run(primary.set("synchronous_standby_names", "standby"));
    says("replicas confirm each commit before it is acknowledged");
    run(primary.set("synchronous_commit", "local"));
    says("WARNING: a replica confirms nothing");
    run(primary.set("synchronous_commit", "off"));
    says("WARNING: a crash of Postgres can lose acknowledged commits");
    drop(standby);
}

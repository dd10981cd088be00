//! A host writes the maps whose lease it holds, under the tenure it holds them, and nothing else.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use p2p_sync_proto::Code;
use p2p_sync_proxy::{
    operation::{Outcome, ValidOp},
    store::{HostStatus, Leases, Store},
};
use uuid::Uuid;

use crate::{
    fixture::{Hub, config, message, numbers, put, told},
    groups::{apply, group},
    presence::moved,
};

const PATH: &str = "prontera/NPC_STATE/1";

pub(crate) fn under(tenure: u64, path: &str, sequence: u64) -> ValidOp {
    ValidOp {
        tenure,
        ..put(path, sequence)
    }
}

impl Hub {
    pub(crate) async fn grant(&self, map: &str, host: Uuid) -> u64 {
        self.store.grant_map(map, host, false).await.expect("free")
    }

    /// Lets time pass in which a proxy notes that the hub serves.
    async fn serve_for(&self, time: Duration) {
        let begun = Instant::now();
        while begun.elapsed() < time {
            self.store.note_alive().await.expect("serves");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    async fn force(&self, map: &str, host: Uuid) -> u64 {
        self.store.grant_map(map, host, true).await.expect("forced")
    }

    /// What becomes of one operation of a host, and the sentence it is told.
    pub(crate) async fn one(&self, host: Uuid, op: ValidOp) -> (&'static str, String) {
        let committed = self.apply(host, vec![op]).await;
        let sentence = match &committed.outcomes[0].1 {
            Outcome::Rejected(problem) | Outcome::Limbo(problem) => problem.sentence.clone(),
            _ => String::new(),
        };
        (told(&committed)[0], sentence)
    }
}

#[tokio::test]
async fn invariant_04_a_map_is_written_by_its_holder_alone_and_others_are_told_who_that_is() {
    let hub = Hub::governed().await;
    let (a, b) = (hub.host().await, hub.host().await);
    let (outcome, sentence) = hub.one(a, under(0, PATH, 1)).await;
    assert_eq!(outcome, Code::NotLeaseHolder.label());
    assert!(sentence.starts_with("nobody holds the lease of prontera"), "{sentence}");

    assert_eq!(hub.grant("prontera", a).await, 1);
    assert_eq!(hub.one(a, under(1, PATH, 2)).await.0, "applied");
    for tenure in [0, 1, 2] {
        let (outcome, sentence) = hub.one(b, under(tenure, PATH, 1 + tenure)).await;
        assert_eq!(outcome, Code::NotLeaseHolder.label(), "tenure {tenure}");
        assert_eq!(sentence, format!("host {a} holds the lease of prontera, not this host"));
    }
    assert_eq!(numbers([&hub.state(PATH).await.expect("written").0]), [2]);
    let kept = "SELECT count(*) FROM p2p_sync.rejected_operations WHERE path LIKE 'prontera%'";
    assert_eq!(hub.count(kept).await, 4, "each with its reason");
    // What belongs to nobody's map is no lease's matter.
    let own = format!("@host/{b}/HOST_METRICS");
    assert_eq!(hub.one(b, under(0, &own, 9)).await.0, "applied");
}

#[tokio::test]
async fn invariant_04_a_tenure_that_has_passed_goes_to_limbo_and_one_that_never_was_is_refused() {
    let hub = Hub::governed().await;
    let (a, b) = (hub.host().await, hub.host().await);
    hub.grant("prontera", a).await;
    assert_eq!(hub.force("prontera", b).await, 2);
    // Made under its own tenure, or before it knew that.
    assert_eq!(hub.one(a, under(1, PATH, 1)).await.0, "limbo");
    assert_eq!(hub.one(a, under(0, PATH, 2)).await.0, "limbo");
    // The current one is another's, the next one nobody's.
    for (tenure, sequence) in [(2, 3), (3, 4)] {
        assert_eq!(
            hub.one(a, under(tenure, PATH, sequence)).await.0,
            Code::NotLeaseHolder.label()
        );
    }
    assert_eq!(hub.one(b, under(0, PATH, 1)).await.0, "limbo");
    let (outcome, sentence) = hub.one(b, under(1, PATH, 2)).await;
    assert_eq!(outcome, Code::NotLeaseHolder.label());
    assert!(
        sentence.contains("under tenure 2 and never held it under 1"),
        "{sentence}"
    );
    assert_eq!(hub.one(b, under(2, PATH, 3)).await.0, "applied");

    // Back to the first: what it made before is of a tenure that has passed.
    assert_eq!(hub.force("prontera", a).await, 3);
    assert_eq!(hub.one(a, under(1, PATH, 5)).await.0, "limbo");
    assert_eq!(hub.one(a, under(3, PATH, 6)).await.0, "applied");

    assert_eq!(hub.store.release_map("prontera").await, Ok(Some(a)));
    assert_eq!(hub.store.release_map("prontera").await, Ok(None));
    assert_eq!(hub.one(a, under(3, PATH, 7)).await.0, "limbo", "released");
    assert_eq!(hub.one(b, under(2, PATH, 4)).await.0, "limbo");
    assert_eq!(hub.one(a, under(4, PATH, 8)).await.0, Code::NotLeaseHolder.label());
    assert_eq!(hub.grant("prontera", a).await, 4, "each time it is given");
    assert_eq!(numbers([&hub.state(PATH).await.expect("written").0]), [6]);
    assert_eq!(hub.count("SELECT count(*) FROM p2p_sync.limbo_operations").await, 6);
}

#[tokio::test]
async fn invariant_04_what_was_put_into_limbo_or_refused_is_told_so_again_and_settles_nothing_else() {
    let hub = Hub::governed().await;
    let (a, b) = (hub.host().await, hub.host().await);
    hub.grant("prontera", a).await;
    hub.grant("geffen", b).await;
    hub.force("prontera", b).await;
    let batch = || {
        message(
            a,
            vec![
                under(1, PATH, 1),
                under(0, "geffen/NPC_STATE/1", 2),
                under(0, &format!("@host/{a}/HOST_METRICS"), 3),
                under(1, "prontera/NPC_STATE/2", 4),
            ],
        )
    };
    let expected = ["limbo", Code::NotLeaseHolder.label(), "applied", "limbo"];
    let first = hub.store.apply(&batch()).await.expect("serves");
    assert_eq!((told(&first), first.changes.len()), (expected.to_vec(), 1));
    let limbo = first
        .outcomes
        .iter()
        .find(|(index, _)| *index == 0)
        .map(|(_, outcome)| outcome.clone());
    // Also where the right to write has come back in between.
    hub.force("prontera", a).await;
    let again = hub.store.apply(&batch()).await.expect("serves");
    assert_eq!((told(&again), again.changes.len()), (expected.to_vec(), 0));
    assert!(
        again
            .outcomes
            .iter()
            .any(|(_, outcome)| Some(outcome) == limbo.as_ref()),
        "with its sentence"
    );
    let status = hub
        .store
        .operation_status(a, Uuid::nil(), Some(crate::fixture::at(1, 4)))
        .await;
    assert!(matches!(status, Ok(Some(Outcome::Limbo(_)))), "{status:?}");
    assert_eq!(hub.count("SELECT count(*) FROM p2p_sync.limbo_operations").await, 2);
    assert_eq!(hub.count("SELECT count(*) FROM p2p_sync.rejected_operations").await, 1);
}

#[tokio::test]
async fn invariant_04_a_group_goes_the_way_of_its_worst_member() {
    let hub = Hub::governed().await;
    let (a, b) = (hub.host().await, hub.host().await);
    for map in ["prontera", "geffen"] {
        hub.grant(map, a).await;
    }
    hub.grant("payon", b).await;
    let of = |sequence, members: &[(u64, &str)]| {
        let member = |(tenure, map): &(u64, &str)| under(*tenure, &format!("{map}/NPC_STATE/{sequence}"), sequence);
        group(members.iter().map(member).collect())
    };
    hub.force("geffen", b).await;
    let units = vec![
        of(1, &[(1, "prontera")]),
        of(2, &[(1, "prontera"), (1, "geffen")]),
        of(3, &[(1, "prontera"), (1, "geffen"), (1, "payon")]),
        vec![under(1, "prontera/NPC_STATE/4", 4)],
    ];
    let committed = apply(&hub, a, units).await;
    assert_eq!(
        told(&committed),
        ["applied", "limbo", Code::NotLeaseHolder.label(), "applied"]
    );
    assert_eq!(
        hub.count("SELECT count(*) FROM p2p_sync.states").await,
        2,
        "nothing of either"
    );
    let kept = "SELECT count(*) FROM p2p_sync.limbo_operations WHERE sequence = 2 AND path = '' AND tenure = 1 \
        AND payload -> 1 ->> 'path' = 'geffen/NPC_STATE/2' AND payload -> 0 -> 'data' = '{\"n\": 2}'";
    assert_eq!(hub.count(kept).await, 1);
    let refused = "SELECT count(*) FROM p2p_sync.rejected_operations WHERE sequence = 3 AND path = '' \
        AND jsonb_array_length(convert_from(payload, 'UTF8')::jsonb) = 3";
    assert_eq!(hub.count(refused).await, 1);
}

#[tokio::test]
async fn invariant_10_who_once_held_a_map_waits_for_none_of_its_holders_writes_and_holds_none_up() {
    let hub = Hub::governed().await;
    let (a, b) = (hub.host().await, hub.host().await);
    hub.grant("prontera", a).await;
    hub.grant("geffen", a).await;
    hub.force("prontera", b).await;
    assert_eq!(hub.one(b, under(2, PATH, 1)).await.0, "applied");
    let mut another = hub.database.client().await;
    let writes = another.transaction().await.expect("begins");
    let row = "SELECT FROM p2p_sync.map_states WHERE stream = 'prontera' FOR UPDATE";
    writes.execute(row, &[]).await.expect("locks");
    let units = vec![
        vec![under(1, PATH, 1)],
        vec![under(0, PATH, 2)],
        vec![under(2, PATH, 3)],
        group(vec![
            under(1, "geffen/NPC_STATE/1", 4),
            under(1, "prontera/NPC_STATE/2", 4),
        ]),
        vec![under(1, "geffen/NPC_STATE/1", 5)],
    ];
    let apart = tokio::time::timeout(Duration::from_secs(5), apply(&hub, a, units.clone())).await;
    let expected = ["limbo", "limbo", Code::NotLeaseHolder.label(), "limbo", "applied"];
    assert_eq!(told(&apart.expect("it waits for nobody")), expected);
    writes.rollback().await.expect("unlocks");
    assert_eq!(told(&apply(&hub, a, units).await), expected, "told again");
    let head = "SELECT head FROM p2p_sync.map_states WHERE stream = 'prontera'";
    assert_eq!(hub.count(head).await, 1, "nor does it use up a number");
    // What may become its own by the next grant is decided with the stream locked.
    assert_eq!(hub.one(a, under(3, PATH, 6)).await.0, Code::NotLeaseHolder.label());
    hub.force("prontera", a).await;
    assert_eq!(hub.one(a, under(3, PATH, 7)).await.0, "applied");
}

#[tokio::test]
async fn invariant_04_what_postgres_refuses_stands_alone_among_what_goes_to_limbo() {
    let hub = Hub::governed().await;
    let (a, b) = (hub.host().await, hub.host().await);
    hub.grant("prontera", a).await;
    hub.grant("geffen", a).await;
    hub.force("geffen", b).await;
    hub.sql
        .batch_execute("ALTER TABLE p2p_sync.states ADD CONSTRAINT no_poison CHECK (payload <> '{\"n\": 7}')")
        .await
        .expect("alters");
    let ops = (1..=20).map(|n| {
        let map = if n % 3 == 0 { "geffen" } else { "prontera" };
        under(1, &format!("{map}/NPC_STATE/{n}"), n)
    });
    let expected = (1..=20).map(|n| match n {
        7 => Code::StoreRefused.label(),
        _ if n % 3 == 0 => "limbo",
        _ => "applied",
    });
    assert_eq!(told(&hub.apply(a, ops.collect()).await), expected.collect::<Vec<_>>());
    assert_eq!(hub.count("SELECT count(*) FROM p2p_sync.limbo_operations").await, 6);
}

#[tokio::test]
async fn invariant_04_a_lease_that_has_run_out_still_lets_its_holder_write_until_another_is_given_the_map() {
    let hub = Hub::with(|config| config.leases = brief(1)).await;
    let (a, b) = (hub.host().await, hub.host().await);
    hub.grant("prontera", a).await;
    let running = hub.store.grant_map("prontera", b, false).await.expect_err("it runs");
    assert_eq!(running.code, Code::NotLeaseHolder);
    assert!(running.sentence.contains(&a.to_string()), "{running}");
    hub.serve_for(Duration::from_millis(1100)).await;
    assert_eq!(hub.one(a, under(1, PATH, 1)).await.0, "applied");
    let renewed = hub.store.renew_leases(a, 1, 1).await.expect("serves");
    let lease = &renewed.leases[0];
    assert_eq!((renewed.leases.len(), lease.tenure), (1, 1), "at its tenure");
    assert!((500..=1000).contains(&lease.expires_in.as_millis()), "{lease:?}");
    hub.store
        .grant_map("prontera", b, false)
        .await
        .expect_err("it runs again");
    hub.serve_for(Duration::from_millis(1100)).await;
    assert_eq!(hub.grant("prontera", b).await, 2);
    assert_eq!(hub.one(a, under(1, PATH, 2)).await.0, "limbo");
    let none = hub.store.renew_leases(a, 1, 2).await.expect("serves");
    assert!(none.leases.is_empty() && none.duties.is_empty(), "{none:?}");
}

pub(crate) fn brief(seconds: u64) -> Leases {
    Leases {
        required: true,
        length: Duration::from_secs(seconds),
    }
}

#[tokio::test]
async fn invariant_04_a_renewal_that_is_repeated_renews_nothing() {
    let hub = Hub::governed().await;
    let a = hub.host().await;
    hub.grant("prontera", a).await;
    let until = "SELECT extract(epoch FROM expires_at)::bigint FROM p2p_sync.host_assignments";
    hub.store.renew_leases(a, 5, 7).await.expect("new");
    let shorten = "UPDATE p2p_sync.host_assignments SET expires_at = now() - interval '1 h'";
    hub.sql.batch_execute(shorten).await.expect("updates");
    let before = hub.count(until).await;
    for (incarnation, counter) in [(5, 7), (5, 6), (4, 99), (0, 0)] {
        let refusal = hub.store.renew_leases(a, incarnation, counter).await.expect_err("old");
        assert_eq!(refusal.code, Code::Replay, "{incarnation}, {counter}");
        assert_eq!(hub.count(until).await, before);
    }
    hub.store.renew_leases(a, 5, 8).await.expect("newer");
    hub.store.renew_leases(a, 6, 1).await.expect("of a newer incarnation");
    assert!(hub.count(until).await > before + 3600);
}

#[tokio::test]
async fn the_time_that_the_hub_was_away_does_not_count_towards_the_end_of_a_lease() {
    let hub = Hub::governed().await;
    let (a, b) = (hub.host().await, hub.host().await);
    hub.grant("prontera", a).await;
    hub.grant("geffen", a).await;
    // An hour ago the hub went, when one lease had 20 s to run and the other had run out.
    let away = "UPDATE p2p_sync.hub SET alive_at = now() - interval '1 h'; \
        UPDATE p2p_sync.host_assignments SET expires_at = now() - interval '1 h' \
            + CASE map WHEN 'prontera' THEN interval '20 s' ELSE interval '-1 s' END";
    hub.sql.batch_execute(away).await.expect("updates");
    hub.store
        .grant_map("prontera", b, false)
        .await
        .expect_err("it runs still");
    assert_eq!(hub.grant("geffen", b).await, 2);
    let left = hub.store.assignments(Some("prontera")).await.expect("serves")[0].expires_in;
    assert!((15..=20).contains(&left.as_secs()), "{left:?}");
    // While it serves, time counts.
    assert_eq!(hub.store.note_alive().await, Ok(None));
    let later = hub.store.assignments(Some("prontera")).await.expect("serves")[0].expires_in;
    assert!(later <= left);
}

/// What the database finds when it comes back before any proxy has noted that: a lease that ran when it went, an hour ago.
async fn back_after_an_hour(hub: &Hub) {
    let away = "UPDATE p2p_sync.hub SET alive_at = now() - interval '1 h'; \
        UPDATE p2p_sync.host_assignments SET expires_at = now() - interval '1 h' + interval '20 s'";
    hub.sql.batch_execute(away).await.expect("updates");
}

#[tokio::test]
async fn invariant_04_after_an_outage_no_map_and_no_player_is_taken_before_it_is_noted_that_the_hub_was_away() {
    const GRANT: &str = "SELECT granted FROM p2p_sync.grant_map('prontera', $1, '1 min', false)";
    let hub = Hub::governed().await;
    let (a, b) = (hub.host().await, hub.host().await);
    hub.grant("prontera", a).await;
    hub.grant("geffen", b).await;
    let enters = |map| moved("enter", 7, map, 1, None);
    assert_eq!(told(&hub.apply(a, vec![enters("prontera")]).await), ["applied"]);
    back_after_an_hour(&hub).await;
    let granted = async || -> bool { hub.sql.query_one(GRANT, &[&b]).await.expect("valid SQL").get(0) };
    assert!(!granted().await, "the map is its holder's");
    let enrolled = "INSERT INTO p2p_sync.invitations (token_hash, key_id, account_id, name, maps, expires_at) \
        VALUES (sha256('x'), 'k1', 7, 'a host', '{prontera}', now() + interval '1 h'); \
        SELECT p2p_sync.enrol(sha256('x'), sha256('y'), gen_random_uuid(), 'k1', '1 min')";
    hub.sql.batch_execute(enrolled).await.expect("enrols");
    let kept = "SELECT count(*) FROM p2p_sync.host_assignments WHERE map = 'prontera' AND tenure = 1";
    assert_eq!(hub.count(kept).await, 1, "nor does it go to who comes anew");
    assert_eq!(told(&hub.apply(b, vec![enters("geffen")]).await), ["not yet"]);
    hub.store.note_alive().await.expect("serves");
    assert!(!granted().await, "nor after it");
    assert_eq!(told(&hub.apply(b, vec![enters("geffen")]).await), ["not yet"]);
    // The same hour with the hub serving: the lease has run out.
    hub.sql
        .batch_execute(
            "UPDATE p2p_sync.host_assignments SET expires_at = now() - interval '1 h' WHERE map = 'prontera'",
        )
        .await
        .expect("updates");
    assert_eq!(told(&hub.apply(b, vec![enters("geffen")]).await), ["applied"]);
    assert!(granted().await);
}

#[tokio::test]
async fn a_lease_that_is_renewed_before_the_outage_is_noted_runs_no_longer_for_it() {
    let hub = Hub::governed().await;
    let a = hub.host().await;
    hub.grant("prontera", a).await;
    back_after_an_hour(&hub).await;
    hub.store.renew_leases(a, 1, 1).await.expect("serves");
    let away = hub.store.note_alive().await.expect("serves");
    assert!(away.is_some_and(|away| away >= Duration::from_mins(59)), "{away:?}");
    let left = hub.store.assignments(Some("prontera")).await.expect("serves")[0].expires_in;
    assert!((50..=60).contains(&left.as_secs()), "{left:?}");
}

#[tokio::test]
async fn a_host_that_is_revoked_gives_its_maps_up_and_one_that_is_locked_keeps_them_until_they_run_out() {
    let hub = Hub::governed().await;
    let (a, b) = (hub.host().await, hub.host().await);
    hub.grant("prontera", a).await;
    hub.grant("geffen", a).await;
    assert_eq!(
        hub.store.set_host_status(a, HostStatus::Locked).await,
        Ok(Some(HostStatus::Locked))
    );
    hub.store.grant_map("prontera", b, false).await.expect_err("it runs");
    let refusal = hub.store.renew_leases(a, 1, 1).await.expect_err("locked");
    assert_eq!(refusal.code, Code::Replay, "it renews nothing");
    let refusal = hub.store.grant_map("payon", a, true).await.expect_err("locked");
    assert_eq!(refusal.code, Code::NotFound);
    assert_eq!(
        hub.store.set_host_status(a, HostStatus::Revoked).await,
        Ok(Some(HostStatus::Revoked))
    );
    assert_eq!(
        hub.store.set_host_status(Uuid::nil(), HostStatus::Revoked).await,
        Ok(None)
    );
    for map in ["prontera", "geffen"] {
        assert_eq!(hub.grant(map, b).await, 2);
        let ended: Vec<bool> = hub
            .store
            .tenures(map)
            .await
            .expect("serves")
            .iter()
            .map(|tenure| tenure.ended_at.is_some())
            .collect();
        assert_eq!(ended, [true, false]);
    }
}

#[tokio::test]
async fn without_leases_every_host_writes_and_what_was_written_under_one_gives_way() {
    let hub = Hub::governed().await;
    let (a, b) = (hub.host().await, hub.host().await);
    hub.force("prontera", b).await;
    hub.force("prontera", a).await;
    assert_eq!(hub.one(a, under(2, PATH, 5)).await.0, "applied");
    let off = Store::connect(&config(hub.database.url())).await.expect("connects");
    let later = off.apply(&message(b, vec![under(0, PATH, 6)])).await.expect("serves");
    assert_eq!(told(&later), ["applied"]);
    assert_eq!(numbers([&hub.state(PATH).await.expect("written").0]), [6]);
}

/// Hand-overs in CI; the full run is `P2P_SYNC_HANDOVERS=10000`.
const HANDOVERS: u64 = 200;

/// A map goes from host to host while four connections write it, two for each host, each under the newest tenure that its
/// host was told of. Once a hand-over is committed, nothing of an older tenure is committed any more.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn invariant_04_hand_overs_amid_writes_let_no_stale_write_through() {
    let handovers: u64 = std::env::var("P2P_SYNC_HANDOVERS")
        .ok()
        .and_then(|number| number.parse().ok())
        .unwrap_or(HANDOVERS);
    let hub = Hub::governed().await;
    let hosts = [hub.host().await, hub.host().await];
    let tenures = Arc::new([AtomicU64::new(0), AtomicU64::new(0)]);
    let (stop, written) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    tenures[0].store(hub.grant("prontera", hosts[0]).await, Ordering::SeqCst);
    let writers: Vec<_> = (0..4_usize)
        .map(|writer| {
            let (store, tenures, stop, written) = (hub.store.clone(), tenures.clone(), stop.clone(), written.clone());
            let host = writer % 2;
            tokio::spawn(async move {
                let (mut counts, mut sequence) = ([0_u64; 3], 0);
                while !stop.load(Ordering::SeqCst) {
                    sequence += 1;
                    let op = ValidOp {
                        tenure: tenures[host].load(Ordering::SeqCst),
                        // Each connection has sequences of its own.
                        position: crate::fixture::at(1 + writer as u64, sequence),
                        ..crate::fixture::every(&format!("prontera/CHAT_MESSAGE/{writer}"), 1, None)
                    };
                    let committed = store.apply(&message(hosts[host], vec![op])).await.expect("serves");
                    match told(&committed)[0] {
                        "applied" => counts[0] += 1,
                        "limbo" => counts[1] += 1,
                        _ => counts[2] += 1,
                    }
                    written.fetch_add(1, Ordering::SeqCst);
                }
                counts
            })
        })
        .collect();
    let begun = Instant::now();
    let mut committed_by_then = Vec::new();
    for handover in 1..=handovers {
        let host = usize::try_from(handover % 2).expect("0 or 1");
        let tenure = hub.force("prontera", hosts[host]).await;
        let before = format!("SELECT count(*) FROM p2p_sync.operations WHERE tenure < {tenure}");
        committed_by_then.push((tenure, hub.count(&before).await));
        tenures[host].store(tenure, Ordering::SeqCst);
        // At least one write in between, begun before or after.
        let so_far = written.load(Ordering::SeqCst);
        while written.load(Ordering::SeqCst) == so_far {
            tokio::time::sleep(Duration::from_micros(200)).await;
        }
    }
    stop.store(true, Ordering::SeqCst);
    let mut counts = [0; 3];
    for writer in writers {
        let of = writer.await.expect("no panic");
        counts.iter_mut().zip(of).for_each(|(sum, count)| *sum += count);
    }
    let mut stale = 0;
    let mut of_tenures = hub
        .sql
        .query(
            "SELECT tenure, count(*) FROM p2p_sync.operations GROUP BY 1 ORDER BY 1",
            &[],
        )
        .await
        .expect("reads")
        .into_iter()
        .map(|row| (row.get::<_, i64>(0).unsigned_abs(), row.get::<_, i64>(1)))
        .peekable();
    let mut older = 0;
    for (tenure, by_then) in committed_by_then {
        while let Some((_, count)) = of_tenures.next_if(|(of, _)| *of < tenure) {
            older += count;
        }
        stale += older - by_then;
    }
    let foreign = "SELECT count(*) FROM p2p_sync.operations AS o LEFT JOIN p2p_sync.map_tenures AS t \
        ON t.map = o.stream AND t.tenure = o.tenure AND t.host_id = o.host_id WHERE t.host_id IS NULL";
    let [applied, limbo, refused] = counts;
    println!(
        "{handovers} hand-overs in {:?}: {applied} applied, {limbo} in limbo, {refused} refused",
        begun.elapsed()
    );
    assert_eq!((stale, hub.count(foreign).await), (0, 0), "stale, foreign");
    let logged = u64::try_from(hub.count("SELECT count(*) FROM p2p_sync.operations").await).expect("positive");
    let kept = u64::try_from(hub.count("SELECT count(*) FROM p2p_sync.limbo_operations").await).expect("positive");
    assert_eq!((logged, kept), (applied, limbo), "nothing lost");
    assert!(applied > 0 && limbo > 0, "the writes met the hand-overs");
}

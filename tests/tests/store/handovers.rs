//! Hosts that fight for players.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use p2p_sync_proxy::{
    operation::ValidOp,
    store::{Leases, Store},
};
use uuid::Uuid;

use crate::{
    fixture::{Hub, at, every, message, told},
    presence::{NOT_HERE, moved},
};

/// Hand-overs in CI; the full run is `P2P_SYNC_PLAYER_HANDOVERS=10000`.
const HANDOVERS: u64 = 150;
const PLAYERS: u64 = 4;

/// One connection of a host that enters players, writes them, and gives them up or does not.
struct Fighter {
    store: Store,
    stop: Arc<AtomicBool>,
    host: Uuid,
    map: &'static str,
    /// Each connection has sequences of its own.
    incarnation: u64,
}

impl Fighter {
    /// How many operations were applied, went to limbo, were refused, and had to wait.
    async fn fight(self) -> [u64; 4] {
        let mut random = fastrand::Rng::new();
        let position = |sequence| at(self.incarnation, sequence);
        let (mut counts, mut next) = ([0_u64; 4], 1);
        while !self.stop.load(Ordering::SeqCst) {
            let character = random.u64(1..=PLAYERS);
            let mut ops = Vec::new();
            let mut add = |op: ValidOp, presence: Option<u64>| {
                ops.push(ValidOp {
                    account_id: 0,
                    position: position(next),
                    presence: presence.map(position),
                    ..op
                });
                next += 1;
                next - 1
            };
            let log = |character| every(&format!("@char/{character}/QUEST_PROGRESS/1"), 1, None);
            // What a host writes that has it no more, or not yet.
            add(log(character), None);
            let came = add(moved("enter", character, self.map, 1, None), None);
            for _ in 0..random.usize(0..4) {
                add(log(character), Some(came));
            }
            if random.u8(..) < 200 {
                add(moved("leave", character, "", 1, None), Some(came));
            }
            add(log(random.u64(1..=PLAYERS)), None);
            let mut waits = true;
            for _ in 0..3 {
                let committed = self
                    .store
                    .apply(&message(self.host, ops.clone()))
                    .await
                    .expect("serves");
                let outcomes = told(&committed);
                for outcome in &outcomes {
                    let kind = ["applied", "limbo", NOT_HERE, "not yet"]
                        .iter()
                        .position(|kind| kind == outcome);
                    counts[kind.unwrap_or_else(|| panic!("{outcome}"))] += 1;
                }
                let mut left = outcomes.iter().map(|outcome| *outcome == "not yet");
                ops.retain(|_| left.next().unwrap_or_default());
                waits = !ops.is_empty();
                if !waits {
                    break;
                }
            }
            if waits {
                // The operator's word ends the wait of others who come later.
                self.store.release_player(character).await.expect("serves");
            }
        }
        counts
    }
}

/// Two hosts fight for the same players, by two connections each: they enter, write, leave, or do not leave and lose the
/// player by the operator's hand. Nothing of a tenure is committed after a later one began, but what was made before a release.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn invariant_04_hosts_that_fight_for_players_write_none_that_is_the_others() {
    let handovers: u64 = std::env::var("P2P_SYNC_PLAYER_HANDOVERS")
        .ok()
        .and_then(|number| number.parse().ok())
        .unwrap_or(HANDOVERS);
    let hub = Hub::with(|config| {
        config.leases = Leases {
            required: true,
            length: Duration::from_hours(1),
        };
    })
    .await;
    let hosts = [hub.host().await, hub.host().await];
    for (map, host) in [("prontera", hosts[0]), ("geffen", hosts[1])] {
        hub.store.grant_map(map, host, false).await.expect("free");
    }
    let stop = Arc::new(AtomicBool::new(false));
    let begun = Instant::now();
    let fighters: Vec<_> = (0..4_usize)
        .map(|fighter| {
            let of = Fighter {
                store: hub.store.clone(),
                stop: stop.clone(),
                host: hosts[fighter % 2],
                map: ["prontera", "geffen"][fighter % 2],
                incarnation: 1 + fighter as u64,
            };
            tokio::spawn(of.fight())
        })
        .collect();
    let moves = "SELECT count(*) FROM p2p_sync.player_tenures WHERE tenure > 0";
    while u64::try_from(hub.count(moves).await).expect("positive") < handovers {
        assert!(begun.elapsed() < Duration::from_mins(30), "they come no further");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    stop.store(true, Ordering::SeqCst);
    let mut counts = [0; 4];
    for fighter in fighters {
        let of = fighter.await.expect("no panic");
        counts.iter_mut().zip(of).for_each(|(sum, count)| *sum += count);
    }
    let [applied, limbo, refused, not_yet] = counts;
    println!(
        "{} hand-overs in {:?}: {applied} applied, {limbo} in limbo, {refused} refused, {not_yet} not yet",
        hub.count(moves).await,
        begun.elapsed()
    );
    // Of each character's operations in the order of their commits: the tenures of who wrote them grow, but for what was
    // made before its host released the player.
    let stale = "SELECT count(*) FROM ( \
            SELECT o.*, split_part(path, '/', 2)::bigint AS char_id, \
                max(tenure) OVER (PARTITION BY split_part(path, '/', 2) ORDER BY stream_sequence) AS newest \
            FROM p2p_sync.operations AS o) AS o \
        WHERE o.tenure < o.newest AND NOT EXISTS (SELECT FROM p2p_sync.player_tenures AS t \
            WHERE t.char_id = o.char_id AND t.tenure = o.tenure AND t.host_id = o.host_id \
                AND (o.incarnation, o.sequence) <= (t.ended_incarnation, t.ended_sequence))";
    // None is another host's.
    let foreign = "SELECT count(*) FROM p2p_sync.operations AS o LEFT JOIN p2p_sync.player_tenures AS t \
        ON t.char_id = split_part(o.path, '/', 2)::bigint AND t.tenure = o.tenure AND t.host_id = o.host_id \
        WHERE t.host_id IS NULL";
    assert_eq!(
        (hub.count(stale).await, hub.count(foreign).await),
        (0, 0),
        "stale, foreign"
    );
    let twice = "SELECT count(*) FROM (SELECT FROM p2p_sync.player_tenures WHERE tenure > 0 GROUP BY char_id, tenure HAVING count(*) > 1) AS _";
    assert_eq!(hub.count(twice).await, 0, "two hosts had one tenure");
    let logged = u64::try_from(hub.count("SELECT count(*) FROM p2p_sync.operations").await).expect("positive");
    let kept = u64::try_from(hub.count("SELECT count(*) FROM p2p_sync.limbo_operations").await).expect("positive");
    assert_eq!((logged, kept), (applied, limbo), "nothing lost");
    assert!(applied > 0 && limbo > 0 && not_yet > 0, "they met");
}

//! Agent, hub, Postgres and Redis killed in mid-stream, and the link between them cut: nothing acknowledged is lost
//! and nothing is there twice.

use std::path::Path;

use p2p_sync_proto::{
    Policies, json,
    policy::{Keep, Place},
    v1::SyncDataType,
};
use p2p_sync_tests::{
    faulty_link::FaultyLink,
    recording::Happening,
    services::{OwnPostgres, OwnRedis, shared_redis_url},
    stack::{Agent, is_settled},
};
use serde_json::json;
use uuid::Uuid;

use crate::world::{PATIENCE, PROGRAM, World, run, until};

/// Operations fed before something is killed; more than can be settled by the time it is.
const FEED_OPS: usize = 4000;

/// Of them, applied by then.
const MID_STREAM_OPS: usize = 200;
/// Fewer would show too little.
const APPLIED_MIN: usize = 1000;

/// An agent process that is fed, and all it was fed with.
pub(crate) struct Run {
    pub(crate) world: World,
    pub(crate) agent: Agent,
    fed: Vec<Happening>,
}

impl Run {
    pub(crate) fn new(mut world: World) -> Self {
        world.hub.start();
        let endpoint = world.endpoint();
        Self::through(world, &endpoint, "no")
    }

    /// The hub is reached at `endpoint`. With `conflation` much of what is fed is never sent.
    fn through(world: World, endpoint: &str, conflation: &str) -> Self {
        let folder = world.folder.path().join("agent");
        let settings = [
            ("retry_delay_max_ms", "500".to_owned()),
            ("sync_interval_ms", "5".to_owned()),
            ("conflation", conflation.to_owned()),
        ];
        let mut agent = Agent::new(Path::new(PROGRAM), &folder, endpoint, &world.hub.add_host(1), &settings);
        agent.start();
        Self {
            world,
            agent,
            fed: Vec::new(),
        }
    }

    pub(crate) fn feed(&mut self) {
        for _ in 0..FEED_OPS {
            let happening = happening(self.fed.len());
            assert!(
                self.agent.submit(self.fed.len() as u64, &happening),
                "the agent is gone: {}",
                self.agent.log()
            );
            self.fed.push(happening);
        }
    }

    /// Feeds, and returns when a part of it is applied.
    pub(crate) fn get_into_mid_stream(&mut self) {
        let before = self.agent.ledger().count("APPLIED");
        self.feed();
        until("a part is applied", || {
            self.agent.ledger().count("APPLIED") > before + MID_STREAM_OPS
        });
    }

    pub(crate) fn unsettled(&self) -> usize {
        let ledger = self.agent.ledger();
        ledger.said.values().filter(|said| !is_settled(&said.state)).count()
    }

    /// Waits until all is settled, and compares what the agent was told with what Postgres holds.
    pub(crate) fn account(mut self, agent_was_killed: bool) {
        assert!(
            self.agent.flush(PATIENCE),
            "the outbox does not drain: {}",
            self.agent.log()
        );
        self.agent.stop();
        let held = self.world.held();
        let ledger = self.agent.ledger();
        let mut applied = 0;
        for (tag, happening) in self.fed.iter().enumerate() {
            let told = ledger
                .ids
                .get(&(tag as u64))
                .and_then(|id| Some((id, ledger.said.get(id)?)));
            if ledger
                .refused
                .get(&(tag as u64))
                .is_some_and(|refusal| refusal["label"] == "QUEUE_FULL")
            {
                continue;
            }
            let Some((id, said)) = told else {
                assert!(agent_was_killed, "operation {tag} was never answered");
                continue;
            };
            let (path, keep) = path_of(happening);
            let operation_id: Uuid = id.parse().expect("an id");
            match said.state.as_str() {
                "APPLIED" => {
                    let position = said.position.expect("told with each state");
                    assert!(
                        held.has(operation_id, &path, position),
                        "acknowledged and lost: {id} of {path}"
                    );
                    if keep == Keep::Every {
                        assert_eq!(held.logged.get(&operation_id), Some(&1), "{id} of {path} in the log");
                    }
                    applied += 1;
                }
                "SUPERSEDED" => assert_eq!(keep, Keep::Latest, "an `every` operation was conflated: {path}"),
                "ACCEPTED" if agent_was_killed && !said.spooled => {}
                // Settled, and killed before that was told.
                _ if agent_was_killed
                    && held.logged.get(&operation_id).is_none_or(|&rows| rows == 1)
                    && said.position.is_some_and(|position| {
                        held.logged.contains_key(&operation_id)
                            || keep == Keep::Latest && held.has(operation_id, &path, position)
                    }) => {}
                state => panic!("{id} of {path} ended as {state:?}, spooled: {}", said.spooled),
            }
        }
        // The rest was conflated: how much of it depends on how far the agent fell behind.
        assert!(
            applied >= APPLIED_MIN,
            "only {applied} of {} were applied",
            self.fed.len()
        );
        self.world.assert_log_is_in_order_without_duplicates();
        assert_eq!(self.world.count("SELECT count(*) FROM p2p_sync.rejected_operations"), 0);
    }
}

/// Of both lanes and both ways of keeping, on paths that are written again and again; some are deleted.
fn happening(number: usize) -> Happening {
    let of = |data_type, payload: Option<serde_json::Value>, entity: Option<String>| Happening {
        at_ms: 0,
        data_type,
        map: ["prontera", "geffen"][number % 2].to_owned(),
        account_id: 2_000_001,
        entity,
        payload: payload.map(|json| json.to_string()),
    };
    let id = number / 5 % 20;
    match number % 5 {
        0 => of(
            SyncDataType::ChatMessage,
            Some(json!({"char_id": id, "text": format!("number {number}")})),
            None,
        ),
        1 => of(
            SyncDataType::PlayerPosition,
            Some(json!({"char_id": id, "x": number % 300, "y": 7})),
            None,
        ),
        2 => of(
            SyncDataType::CriticalGameState,
            Some(json!({"event": "mvp", "number": number})),
            None,
        ),
        3 => of(SyncDataType::ItemDrop, Some(json!({"drop_id": id, "amount": 1})), None),
        _ => of(SyncDataType::ItemDrop, None, Some(id.to_string())),
    }
}

fn path_of(happening: &Happening) -> (String, Keep) {
    let policies = Policies::builtin();
    let policy = policies.of(happening.data_type);
    let place = Place {
        host_id: Uuid::nil(),
        map: &happening.map,
        account_id: happening.account_id,
        char_id: None,
        entity: happening.entity.as_deref(),
    };
    let facts = happening
        .payload
        .as_deref()
        .map(|payload| json::check(payload).expect("made above"));
    let path = policy.path(&place, facts.as_ref()).expect("made above");
    (path.as_str().to_owned(), policy.keep)
}

#[test]
fn invariant_01_and_02_killing_the_agent_loses_nothing_that_was_on_disk_and_repeats_nothing() {
    let mut run = Run::new(World::not_started());
    for _ in 0..3 {
        run.get_into_mid_stream();
        run.agent.kill();
        assert!(run.unsettled() > 0, "it was killed when all was done");
        run.agent.start();
    }
    run.account(true);
}

#[test]
fn invariant_01_and_02_killing_the_hub_loses_nothing_and_repeats_nothing() {
    let mut run = Run::new(World::not_started());
    for _ in 0..3 {
        run.get_into_mid_stream();
        run.world.hub.kill();
        run.feed();
        assert!(run.unsettled() > 0, "it was killed when all was done");
        run.world.hub.start();
    }
    run.account(false);
}

#[test]
fn invariant_01_and_02_killing_postgres_loses_nothing_and_repeats_nothing() {
    let mut postgres = run(OwnPostgres::new());
    let mut run_of = Run::new(World::on(postgres.url(), &shared_redis_url(), &[]));
    run_of.get_into_mid_stream();
    run(postgres.restart());
    run_of.get_into_mid_stream();
    postgres.kill();
    run_of.feed();
    assert!(run_of.unsettled() > 0, "it was killed when all was done");
    run(postgres.start());
    run_of.account(false);
}

#[test]
fn invariant_01_and_02_killing_redis_neither_undoes_nor_hides_a_commit() {
    let mut redis = run(OwnRedis::new());
    let postgres = run(p2p_sync_tests::services::database());
    let mut run_of = Run::new(World::on(postgres.url(), &redis.url(), &[]));
    run_of.get_into_mid_stream();
    redis.kill();
    run_of.get_into_mid_stream();
    assert!(run_of.agent.flush(PATIENCE), "without Redis everything still settles");
    run(redis.start());
    run_of.get_into_mid_stream();
    run_of.account(false);
}

#[test]
fn invariant_01_and_02_a_link_that_is_cut_anywhere_loses_nothing_and_repeats_nothing() {
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let mut world = World::not_started();
    let link = FaultyLink::to(&world.hub.start());
    let endpoint = link.endpoint();
    let mut run = Run::through(world, &endpoint, "yes");
    for _ in 0..5 {
        run.get_into_mid_stream();
        std::thread::sleep(std::time::Duration::from_millis(random.u64(0..100)));
        until("there is a connection to cut", || link.cut());
    }
    run.account(false);
}

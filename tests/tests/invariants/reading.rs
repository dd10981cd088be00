//! What readers are told: never what is lost.

use std::{
    cell::Cell,
    time::{Duration, Instant},
};

use p2p_sync_proto::{
    Code,
    envelope::Lane,
    v1::{self, pull_reply, pull_request::What},
};
use serde_json::{Value, json};
use tonic::transport::Channel;

use crate::{
    wire::{WireHost, batch},
    world::{World, run, until},
};

const PATH: &str = "prontera/ITEM_DROP/7";
/// As long as a cache may be behind its database, with room for a busy machine; states are cached for a minute.
const SEEN_WITHIN: Duration = Duration::from_secs(30);

/// A host without an agent, at one proxy.
struct Reader {
    host: WireHost,
    channel: Channel,
    written: Cell<u64>,
}

impl Reader {
    fn at(endpoint: &str, credential: &str) -> Self {
        let host = WireHost::new(endpoint, credential);
        let channel = run(host.connect());
        Self {
            host,
            channel,
            written: Cell::new(0),
        }
    }

    fn write_amount(&self, path: &str, amount: u64) {
        self.written.set(self.written.get() + 1);
        let payload = json!({"drop_id": 7, "amount": amount}).to_string();
        let operation = self.host.operation(self.written.get(), path, Some(&payload));
        let sealed = self.host.seal(Lane::Critical, &batch(&[operation]));
        let reply = run(self.host.critical(&self.channel, sealed)).expect("answered");
        assert!(reply.code() == Code::None && reply.outcomes.is_empty(), "{reply:?}");
    }

    fn get(&self, get: v1::Get) -> Result<v1::State, Code> {
        let what = Some(What::Get(get));
        let sealed = self.host.seal(Lane::Pull, &v1::PullRequest { what });
        let reply = run(self.host.pull(&self.channel, sealed)).expect("answered");
        match (reply.code(), reply.what) {
            (Code::None, Some(pull_reply::What::State(state))) => Ok(state),
            (code, _) => Err(code),
        }
    }

    fn amount(&self, get: v1::Get) -> Result<u64, Code> {
        self.get(get).map(|state| amount_of(&state))
    }
}

fn amount_of(state: &v1::State) -> u64 {
    let data: Value = serde_json::from_slice(&state.payload).expect("JSON");
    data["amount"].as_u64().expect("a number")
}

fn whatever() -> v1::Get {
    v1::Get { path: PATH.to_owned() }
}

fn amounts(readers: &[Reader; 2]) -> [Result<u64, Code>; 2] {
    readers.each_ref().map(|reader| reader.amount(whatever()))
}

/// The first one writes an amount until both are told it by the cache, as they are once the database says another.
fn cache(world: &World, readers: &[Reader; 2], amount: u64) {
    let other = "UPDATE p2p_sync.states SET payload = jsonb_set(payload, '{amount}', '0') WHERE path = $1";
    until("both are told by the cache", || {
        readers[0].write_amount(PATH, amount);
        world.rows(other, &[&PATH]);
        amounts(readers) == [Ok(amount); 2]
    });
}

#[test]
fn invariant_03_after_the_database_went_back_no_cache_tells_what_was_lost_and_all_take_what_comes() {
    let world = World::new();
    let mut other = world.another_proxy();
    let endpoints = [world.endpoint(), other.start()];
    let readers = endpoints.map(|endpoint| Reader::at(&endpoint, &world.hub.add_host(1)));
    readers[0].write_amount(PATH, 1);
    world.rows("UPDATE p2p_sync.map_states SET head = 1000", &[]);
    cache(&world, &readers, 2);
    let lost = readers[1].get(whatever()).expect("there").stream_sequence;
    // As a backup has it that was made after the first write.
    for went_back in [
        "UPDATE p2p_sync.states SET payload = '{\"drop_id\": 7, \"amount\": 1}', stream_sequence = 1, sequence = 1",
        "DELETE FROM p2p_sync.operations WHERE stream_sequence > 1",
        "UPDATE p2p_sync.map_states SET head = 1",
    ] {
        world.rows(went_back, &[]);
    }
    assert_eq!(amounts(&readers), [Ok(2); 2], "the caches know nothing of it yet");
    world.rows("UPDATE p2p_sync.hub SET timeline = timeline + 1", &[]);
    let begun = Instant::now();
    until("both tell what is there", || amounts(&readers) == [Ok(1); 2]);
    assert!(begun.elapsed() < SEEN_WITHIN, "after {:?}", begun.elapsed());
    cache(&world, &readers, 3);
    let taken = readers[1].get(whatever()).expect("there").stream_sequence;
    assert!(taken < lost, "{taken} of the new time, {lost} of the one that is lost");
}

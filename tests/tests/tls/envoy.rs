//! Envoy before the hub: what is sent and followed through it, while it or a proxy ends or comes back.

use std::{thread, time::Duration};

use p2p_sync_agent::{Agent, AgentEvent, Config, Subscription};
use p2p_sync_proto::v1::{State, SyncDataType};
use p2p_sync_tests::{edge::Edge, recording::Happening, stack};
use serde_json::json;

use crate::{
    edge::{assert_hosts_go_through, assert_plaintext_is_told},
    world::{PATIENCE, World, chat, put_critical, until, until_up},
};

/// Above the 15 s after which Envoy ends calls unless told otherwise.
const IDLE: Duration = Duration::from_secs(20);

/// A host that sends by both lanes, and one that follows what is sent.
struct Traffic {
    writer: stack::Agent,
    reader: Agent,
    sent: u64,
    told: Vec<State>,
}

impl Traffic {
    /// Begun, through an edge.
    fn through(world: &World, edge: &Edge) -> Self {
        let mut writer = world.host("writer", &edge.endpoint());
        writer.start();
        until_up(&mut writer);
        let text = format!(
            "main_server_endpoint = {}\nencryption_key = {}\ntls_ca = {}\nretry_delay_max_ms = 300\n",
            edge.endpoint(),
            world.hub.add_host(2),
            world.ca.file(world.folder.path()).display()
        );
        let config = Config::parse(&text, &world.folder.path().join("reader"), |_| None).expect("valid settings");
        let reader = Agent::start(config).expect("starts");
        let all = Subscription {
            stream: "prontera".to_owned(),
            types: vec![],
            path_prefix: String::new(),
        };
        reader.subscribe(all).expect("taken");
        let mut traffic = Self {
            writer,
            reader,
            sent: 1,
            told: Vec::new(),
        };
        // A subscription begins with the newest of each path: what is behind that is told one by one.
        assert!(traffic.writer.submit(0, &chat(0)));
        until("the stream is followed", || {
            traffic.take();
            !traffic.told.is_empty()
        });
        traffic
    }

    /// Some operations, over 2 s.
    fn flow(&mut self) {
        for _ in 0..40 {
            for number in self.sent..self.sent + 10 {
                assert!(self.writer.submit(number, &chat(number)));
            }
            let event = Happening {
                data_type: SyncDataType::CriticalGameState,
                entity: None,
                payload: Some(json!({ "round": self.sent }).to_string()),
                ..chat(0)
            };
            assert!(self.writer.submit(self.sent + 10, &event));
            self.sent += 11;
            self.take();
            thread::sleep(Duration::from_millis(50));
        }
    }

    fn take(&mut self) {
        while let Some(event) = self.reader.next_event(|_| true) {
            if let AgentEvent::Update { state, .. } = event {
                self.told.push(state);
            }
        }
    }

    /// Everything took effect once, and was told once and in order, and so with what others sent.
    fn assert_nothing_is_lost(&mut self, world: &World, others: u64) {
        assert!(self.writer.flush(PATIENCE), "{}", self.writer.log());
        assert_eq!(self.writer.ledger().count("APPLIED") as u64, self.sent);
        let all = self.sent + others;
        assert_eq!(world.stored().cast_unsigned(), all);
        until("all is told", || {
            self.take();
            self.told.len() as u64 >= all
        });
        let in_order = self.told.is_sorted_by(|a, b| a.stream_sequence < b.stream_sequence);
        assert!(in_order && self.told.len() as u64 == all, "told twice, or out of order");
    }
}

#[test]
fn hosts_go_through_envoy_by_its_name_and_by_a_path() {
    let mut world = World::with(&[]);
    world.hub.start();
    let envoy = Edge::envoy(&world.place("envoy", &[]));
    assert_hosts_go_through(&world, &envoy);
    assert_plaintext_is_told(&world, &envoy, |plain| {
        format!("E107 BAD_ENDPOINT: {plain} speaks TLS: begin main_server_endpoint with https://")
    });
}

#[test]
fn envoy_that_ends_connections_in_mid_stream_loses_and_doubles_nothing() {
    let mut world = World::with(&[]);
    world.hub.start();
    let short = [
        (
            "idle_timeout: 3600s",
            "idle_timeout: 3600s, max_connection_duration: 1s",
        ),
        (
            "codec_type: HTTP2\n",
            "codec_type: HTTP2\n                drain_timeout: 0.2s\n",
        ),
    ];
    let mut envoy = Edge::envoy(&world.place("envoy", &short));
    let mut traffic = Traffic::through(&world, &envoy);
    traffic.flow();
    let ended = envoy.counter("http.hosts.downstream_cx_max_duration_reached");
    assert!(ended > 3, "Envoy ended {ended} connections");
    // As before a restart: connections are told to go, and soon nobody is let in.
    envoy.administer("POST /drain_listeners?graceful");
    traffic.flow();
    envoy.kill();
    envoy.start();
    traffic.flow();
    traffic.assert_nothing_is_lost(&world, 0);
}

#[test]
fn envoy_that_is_killed_and_started_again_loses_and_doubles_nothing() {
    let mut world = World::with(&[]);
    world.hub.start();
    let mut envoy = Edge::envoy(&world.place("envoy", &[]));
    let mut traffic = Traffic::through(&world, &envoy);
    for _ in 0..3 {
        traffic.flow();
        envoy.kill();
        traffic.flow();
        envoy.start();
    }
    traffic.assert_nothing_is_lost(&world, 0);
}

#[test]
fn a_proxy_behind_envoy_is_taken_out_and_in_again_and_nothing_is_lost() {
    let (mut world, mut other, address) = World::of_two();
    world.hub.start();
    other.start();
    let mut place = world.place("envoy", &[]);
    place.proxies.push(address);
    let envoy = Edge::envoy(&place);
    let well = |proxies| {
        let gauge = "cluster.p2p_sync.membership_healthy";
        until("so many proxies are well", || envoy.counter(gauge) == proxies);
    };
    well(2);
    let mut traffic = Traffic::through(&world, &envoy);
    traffic.flow();
    other.stop();
    well(1);
    traffic.flow();
    other.start();
    well(2);
    traffic.flow();
    world.hub.kill();
    traffic.flow();
    well(1);
    world.hub.start();
    well(2);
    traffic.flow();
    traffic.assert_nothing_is_lost(&world, 0);
    let clusters = envoy.administer("GET /clusters");
    for proxy in &place.proxies {
        let calls = clusters
            .lines()
            .find_map(|line| line.strip_prefix(&format!("p2p_sync::{proxy}::rq_success::")));
        assert!(
            calls.is_some_and(|calls| calls.trim() != "0"),
            "{proxy} was asked nothing: {clusters}"
        );
    }
}

#[test]
fn idle_streams_outlast_the_timeouts_of_envoy_and_one_that_it_cuts_is_opened_again() {
    let mut world = World::with(&[]);
    world.hub.start();
    let shipped = Edge::envoy(&world.place("envoy", &[]));
    let short = [("stream_idle_timeout: 0s", "stream_idle_timeout: 6s")];
    let impatient = Edge::envoy(&world.place("impatient", &short));
    let mut traffic = Traffic::through(&world, &shipped);
    let mut cut = world.host("cut", &impatient.endpoint());
    cut.start();
    until_up(&mut cut);
    for number in 1..=2 {
        assert!(
            cut.submit(number, &chat(1_000_000 + number)) && cut.flush(PATIENCE),
            "{}",
            cut.log()
        );
        traffic.flow();
        thread::sleep(IDLE);
    }
    traffic.flow();
    traffic.assert_nothing_is_lost(&world, 2);
    let streams = |edge: &Edge| {
        let is_one = |call: &str| call.ends_with("Bulk/Stream") || call.ends_with("Subscribe/Watch");
        edge.ended().iter().filter(|(_, call)| is_one(call)).count()
    };
    assert_eq!(streams(&shipped), 0, "a stream was cut: {:?}", shipped.ended());
    assert!(
        !traffic.writer.log().contains("the link is down"),
        "{}",
        traffic.writer.log()
    );
    assert!(streams(&impatient) > 0, "nothing was cut: {:?}", impatient.ended());
}

#[test]
fn what_one_host_sends_too_fast_holds_up_no_other_behind_envoy() {
    let mut world = World::with(&[("host_ops_per_second", "100".to_owned())]);
    world.hub.start();
    let soon = [("idle_timeout: 60s", "idle_timeout: 1s")];
    let envoy = Edge::envoy(&world.place("envoy", &soon));
    let [mut loud, mut quiet] = ["loud", "quiet"].map(|name| world.host(name, &envoy.endpoint()));
    for agent in [&mut loud, &mut quiet] {
        agent.start();
        until_up(agent);
    }
    for number in 0..4000 {
        let text: String = std::iter::repeat_with(fastrand::alphanumeric).take(200).collect();
        let payload = json!({"char_id": 150_001, "message": text}).to_string();
        let said = Happening {
            payload: Some(payload),
            ..chat(number)
        };
        assert!(loud.submit(number, &said));
    }
    // Its first batches have taken what it may send at once.
    until("the loud host is heard", || world.stored() > 0);
    for number in 0..20 {
        // Applied, within what a critical call is given.
        put_critical(&quiet, number);
        thread::sleep(Duration::from_millis(200));
    }
    let status = loud.ask(json!({"do": "status"}));
    assert_ne!(
        status["outbox_operations"], 0,
        "the loud host was done before: {status}"
    );
    // What they leave behind is closed as well.
    drop((loud, quiet));
    until("no connection is left to the hub", || {
        envoy.counter("cluster.p2p_sync.upstream_cx_active") == 0
    });
}

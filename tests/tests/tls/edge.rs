//! nginx before the hub, and what holds for every edge.

use std::{
    collections::BTreeSet,
    thread,
    time::{Duration, Instant},
};

use p2p_sync_tests::edge::Edge;
use serde_json::json;

use crate::world::{World, chat, link_problem, put_critical, run, until, until_up};

/// Hosts that name the edge's root, and a path below it, reach the hub by each of their connections.
pub(crate) fn assert_hosts_go_through(world: &World, edge: &Edge) {
    for (number, path) in (0..).zip(["", "/p2p-sync"]) {
        let mut agent = world.host(&format!("host-{number}"), &(edge.endpoint() + path));
        agent.start();
        until_up(&mut agent);
        let begun = Instant::now();
        assert!(
            agent.submit(number, &chat(number)) && agent.flush(Duration::from_mins(1)),
            "{}",
            agent.log()
        );
        // Agents ping every 10 s, and that moves what nginx holds back.
        assert!(begun.elapsed() < Duration::from_secs(6), "a batch waited for a ping");
        put_critical(&agent, 3);
        let got = agent.ask(json!({"do": "get", "path": "prontera/MAP_STATE"}));
        assert_eq!(got["data"]["users"], 3, "{got}");
        let (told, well) = run("agent", &["check"], agent.config(), &[]);
        assert!(well && told.contains("tls: ok ("), "{told}");
    }
}

/// A host that speaks plaintext to the edge's port tells this.
pub(crate) fn assert_plaintext_is_told(world: &World, edge: &Edge, problem: impl Fn(&str) -> String) {
    let plain = edge.endpoint().replace("https:", "http:");
    let mut agent = world.host("plaintext", &plain);
    agent.start();
    let problem = problem(&plain);
    until(&problem, || link_problem(&mut agent).contains(&problem));
}

#[test]
fn hosts_go_through_nginx_by_its_name_and_by_a_path() {
    let mut world = World::with(&[]);
    world.hub.start();
    let nginx = Edge::nginx(&world.place("nginx", &[]));
    assert_hosts_go_through(&world, &nginx);
    assert_plaintext_is_told(&world, &nginx, |plain| {
        format!("E107 BAD_ENDPOINT: {plain} answers, but speaks no HTTP/2")
    });
}

#[test]
fn nginx_that_ends_connections_in_mid_stream_loses_and_doubles_nothing() {
    let mut world = World::with(&[]);
    world.hub.start();
    // The second request on a connection, for the bulk lane its stream, is told GOAWAY.
    let nginx = Edge::nginx(&world.place("nginx", &[("keepalive_requests 1000000", "keepalive_requests 2")]));
    let mut agent = world.host("host", &nginx.endpoint());
    agent.start();
    until_up(&mut agent);
    for number in 0..1000 {
        assert!(agent.submit(number, &chat(number)));
        if number % 50 == 0 {
            put_critical(&agent, number);
        }
    }
    assert!(agent.flush(Duration::from_mins(1)), "{}", agent.log());
    assert!(world.stored() >= 1000);
    assert_eq!(agent.ledger().count("REJECTED"), 0);
    let connections: BTreeSet<String> = nginx.ended().into_iter().map(|(connection, _)| connection).collect();
    assert!(connections.len() > 5, "nginx ended no connection: {connections:?}");
}

#[test]
fn an_idle_stream_outlasts_the_timeouts_of_nginx() {
    let mut world = World::with(&[]);
    world.hub.start();
    // Just above the pings of the agents (10 s) and of the proxy (20 s).
    let short = [
        ("keepalive_timeout 75s", "keepalive_timeout 14s"),
        ("grpc_read_timeout 60s", "grpc_read_timeout 24s"),
        ("grpc_send_timeout 60s", "grpc_send_timeout 24s"),
    ];
    let nginx = Edge::nginx(&world.place("nginx", &short));
    let mut agent = world.host("host", &nginx.endpoint());
    agent.start();
    until_up(&mut agent);
    assert!(agent.submit(1, &chat(1)) && agent.flush(Duration::from_mins(1)));
    thread::sleep(Duration::from_secs(40));
    assert!(agent.submit(2, &chat(2)) && agent.flush(Duration::from_mins(1)));
    assert_eq!(world.stored(), 2);
    let streams: Vec<_> = nginx
        .ended()
        .into_iter()
        .filter(|(_, call)| call.ends_with("Bulk/Stream"))
        .collect();
    assert!(streams.is_empty(), "a stream was cut: {streams:?}");
    assert!(!agent.log().contains("the link is down"), "{}", agent.log());
}

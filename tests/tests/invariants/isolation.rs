//! One hostile host, connection or address that slows or stops nobody else.

use std::{
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use futures::future::join_all;
use p2p_sync_agent::{Agent, OperationState};
use p2p_sync_proto::{
    PROTOCOL_VERSION,
    envelope::Lane,
    ids::new_id,
    keys::{KeyId, MasterKey},
    limits::BATCH_OPS_MAX,
    v1::{
        self, BatchReply, HelloRequest, Operation, OutcomeState, RejectCode, bulk_client::BulkClient,
        session_client::SessionClient,
    },
};
use p2p_sync_tests::raw_peer::{RawPeer, framed, framed_bytes, outcome};
use tokio::{sync::mpsc, time::timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Streaming, transport::Channel};
use uuid::Uuid;

use crate::{
    wire::{WireHost, batch, id_of},
    world::{PATIENCE, World, chat, event, run, until},
};

/// The least that can be set.
const OPS_PER_SECOND: u32 = 100;
const APPLY: &str = "/p2p_sync.v1.Critical/Apply";
const STREAM: &str = "/p2p_sync.v1.Bulk/Stream";
/// What is taken of answers unread where that does not matter.
const WINDOW: u32 = 65_535;
/// A message, and the first of a stream, is there within 10 s.
const MESSAGE_TIMEOUT: Duration = Duration::from_secs(10);

fn world(settings: &[(&str, String)]) -> World {
    World::with(settings)
}

fn limited() -> World {
    world(&[("host_ops_per_second", OPS_PER_SECOND.to_string())])
}

/// Puts on paths of their own from a sequence on.
fn drops(host: &WireHost, first: u64, count: usize) -> Vec<Operation> {
    let put = |sequence| {
        host.operation(
            sequence,
            &format!("prontera/ITEM_DROP/{sequence}"),
            Some(r#"{"amount":1}"#),
        )
    };
    (first..).take(count).map(put).collect()
}

async fn apply(host: &WireHost, channel: &Channel, operations: &[Operation]) -> BatchReply {
    let sealed = host.seal(Lane::Critical, &batch(operations));
    host.critical(channel, sealed).await.expect("answered")
}

fn address(world: &World) -> SocketAddr {
    let endpoint = world.endpoint();
    endpoint.trim_start_matches("http://").parse().expect("an address")
}

async fn peer(world: &World, window: u32) -> RawPeer {
    let connected = RawPeer::connect(address(world), Ipv4Addr::LOCALHOST, window).await;
    connected.expect("the hub serves")
}

/// A stream of batches: what is sent there, and what comes back.
async fn stream(channel: &Channel) -> (mpsc::Sender<v1::Sealed>, Streaming<v1::Sealed>) {
    let (batches, waiting) = mpsc::channel(64);
    let answers = BulkClient::new(channel.clone())
        .stream(ReceiverStream::new(waiting))
        .await;
    (batches, answers.expect("the hub takes a stream").into_inner())
}

#[test]
fn invariant_10_a_host_over_its_rate_is_told_when_to_come_again_and_others_are_not() {
    let world = limited();
    let greedy = WireHost::new(&world.endpoint(), &world.hub.add_host(1));
    let modest = WireHost::new(&world.endpoint(), &world.hub.add_host(2));
    run(async {
        let (greedy_channel, modest_channel) = (greedy.connect().await, modest.connect().await);
        let burst = drops(&greedy, 1, BATCH_OPS_MAX);
        assert_eq!(apply(&greedy, &greedy_channel, &burst).await.code(), RejectCode::None);
        let more = drops(&greedy, 1001, BATCH_OPS_MAX);
        let refused = apply(&greedy, &greedy_channel, &more).await;
        assert_eq!(refused.code(), RejectCode::RateLimited, "{}", refused.message);
        assert!(refused.outcomes.is_empty(), "nothing of it is decided");
        assert!(
            (1000..=6000).contains(&refused.retry_after_ms),
            "{} ms for what comes at {OPS_PER_SECOND} a second",
            refused.retry_after_ms
        );
        let others = drops(&modest, 1, BATCH_OPS_MAX);
        assert_eq!(apply(&modest, &modest_channel, &others).await.code(), RejectCode::None);
        tokio::time::sleep(Duration::from_millis(refused.retry_after_ms.into())).await;
        let again = apply(&greedy, &greedy_channel, &more).await;
        assert_eq!(
            (again.code(), again.outcomes.len()),
            (RejectCode::None, 0),
            "{}",
            again.message
        );
    });
    assert_eq!(world.held().logged.len(), 3 * BATCH_OPS_MAX);
    let written = "SELECT count(DISTINCT (host_id, xmin::text)) FROM p2p_sync.operations";
    let transactions = world.count(written);
    // The burst of both hosts was used up at once, so that each of the three messages came in slices of 32.
    assert_eq!(transactions, 3 * 16, "what a host at its rate sends is written evenly");
    let told = world.hub.log().matches("a host is held back").count();
    assert_eq!(told, 1, "told once, and not for each message: {}", world.hub.log());
}

#[test]
fn invariant_10_nobody_uses_up_anothers_rate_by_its_name() {
    let world = limited();
    let honest = WireHost::new(&world.endpoint(), &world.hub.add_host(1));
    let master = MasterKey::generate(KeyId::parse("k1").expect("a key id"));
    let credential = master.credential(honest.credential().host_id, honest.credential().generation);
    let forger = WireHost::new(&world.endpoint(), &credential.to_text());
    run(async {
        let channel = honest.connect().await;
        for _ in 0..4 {
            let sealed = forger.seal(Lane::Critical, &batch(&drops(&forger, 1, BATCH_OPS_MAX)));
            let refused = forger.critical(&channel, sealed).await.expect_err("does not open");
            assert_eq!(refused.code(), tonic::Code::Unauthenticated);
        }
        let taken = apply(&honest, &channel, &drops(&honest, 1, BATCH_OPS_MAX)).await;
        assert_eq!(taken.code(), RejectCode::None, "{}", taken.message);
    });
}

/// More than a burst of each kind.
const FLOOD: usize = 1200;

#[test]
fn invariant_10_what_an_agent_has_too_much_of_comes_later_all_of_it_and_in_order() {
    let world = limited();
    let config = world.config("max_queue_size = 100000\ncritical_timeout_ms = 30000\n");
    let agent = Agent::start(config).expect("starts");
    agent.wait_for_link(PATIENCE);
    let began = Instant::now();
    let mut accepted: Vec<Uuid> = Vec::new();
    for number in 0..FLOOD {
        let said = format!(r#"{{"char_id":{},"text":"number {number}"}}"#, number % 3);
        accepted.push(agent.submit(&chat(&said)).expect("there is room"));
        let happened = format!(r#"{{"number":{number}}}"#);
        accepted.push(agent.submit(&event(&happened)).expect("there is room"));
    }
    // A neighbour meanwhile is served as ever.
    let neighbour = Agent::start(world.config("critical_timeout_ms = 30000\n")).expect("starts");
    neighbour.wait_for_link(PATIENCE);
    for number in 0..20 {
        let at = Instant::now();
        let (id, settled) = neighbour
            .submit_critical(&event(&format!(r#"{{"neighbour":{number}}}"#)))
            .expect("taken");
        assert_eq!(settled.state, OperationState::Applied, "{:?}", settled.problem);
        assert!(
            at.elapsed() < Duration::from_secs(5),
            "a neighbour waited {:?}",
            at.elapsed()
        );
        accepted.push(id);
    }
    assert!(agent.flush(PATIENCE), "not everything came: {:?}", agent.status());
    let seconds = (FLOOD - BATCH_OPS_MAX) / OPS_PER_SECOND as usize;
    let least = Duration::from_secs(seconds as u64 - 1);
    assert!(
        began.elapsed() >= least,
        "it came within {:?}, faster than it may",
        began.elapsed()
    );
    agent.shutdown().expect("stops");
    neighbour.shutdown().expect("stops");
    world.held().assert_log_is(&accepted);
    world.assert_log_is_in_order_without_duplicates();
}

/// As shipped, with a rate for what is said.
fn types_with_a_rate() -> String {
    include_str!("../../../conf/types.toml").replace(
        "[CHAT_MESSAGE]\nowner = \"map\"",
        "[CHAT_MESSAGE]\nops_per_second = 5\nowner = \"map\"",
    )
}

fn world_with_types(types: &str) -> World {
    let mut world = World::not_started_with(&[("types_file", "types.toml".to_owned())]);
    let folder = world.hub.config().parent().expect("a folder").to_owned();
    std::fs::write(folder.join("types.toml"), types).expect("the folder can be written");
    let shipped = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../conf/schemas");
    std::fs::create_dir(folder.join("schemas")).expect("a folder can be made");
    for schema in std::fs::read_dir(shipped).expect("it is shipped").flatten() {
        std::fs::copy(schema.path(), folder.join("schemas").join(schema.file_name())).expect("can be copied");
    }
    world.hub.start();
    world
}

#[test]
fn invariant_10_a_type_that_comes_too_fast_holds_back_itself_alone_and_in_order() {
    let world = world_with_types(&types_with_a_rate());
    let host = WireHost::new(&world.endpoint(), &world.hub.add_host(1));
    let path = "prontera/CHAT_MESSAGE/1";
    let said: Vec<_> = (1..=30)
        .map(|sequence| {
            let operation = host.operation(2 * sequence, path, Some(r#"{"char_id":1,"text":"hi"}"#));
            host.after((sequence > 1).then(|| 2 * (sequence - 1)), operation)
        })
        .collect();
    let others = drops(&host, 101, 10);
    let message: Vec<_> = said.iter().chain(&others).cloned().collect();
    run(async {
        let channel = host.connect().await;
        let reply = apply(&host, &channel, &message).await;
        assert_eq!(reply.code(), RejectCode::None, "{}", reply.message);
        assert!(reply.retry_after_ms > 0);
        let held: Vec<_> = reply
            .outcomes
            .iter()
            .map(|outcome| (outcome.index, outcome.state(), outcome.code()))
            .collect();
        let expected = (10..30).map(|index| (index, OutcomeState::NotYet, RejectCode::RateLimited));
        assert_eq!(
            held,
            expected.collect::<Vec<_>>(),
            "a burst of two seconds' goes, and all else"
        );
        let too_early = apply(&host, &channel, &said[20..21]).await;
        assert_eq!(too_early.outcomes.len(), 1, "what is held back is not settled");
    });
    let held = world.held();
    assert_eq!(held.logged.len(), 20);
    assert!(
        said[..10]
            .iter()
            .chain(&others)
            .all(|operation| held.logged.contains_key(&id_of(operation)))
    );

    let agent = Agent::start(world.config("")).expect("starts");
    agent.wait_for_link(PATIENCE);
    let spoken: Vec<_> = (0..40)
        .map(|number| {
            agent
                .submit(&chat(&format!(r#"{{"char_id":2,"text":"{number}"}}"#)))
                .expect("room")
        })
        .collect();
    let (_, settled) = agent.submit_critical(&event("{}")).expect("taken");
    assert_ne!(settled.state, OperationState::Rejected);
    assert!(agent.flush(PATIENCE), "not everything came: {:?}", agent.status());
    agent.shutdown().expect("stops");
    let held = world.held();
    assert!(spoken.iter().all(|id| held.logged.contains_key(id)));
    world.assert_log_is_in_order_without_duplicates();
}

#[test]
fn invariant_10_a_connection_whose_messages_do_not_open_is_cut_after_one_and_the_same_answer() {
    let world = world(&[("max_connections_per_address", "16".to_owned())]);
    let host = WireHost::new(&world.endpoint(), &world.hub.add_host(1));
    let master = MasterKey::generate(KeyId::parse("k1").expect("a key id"));
    let stranger = WireHost::new(&world.endpoint(), &master.credential(new_id(), 1).to_text());
    run(async {
        let channel = host.connect().await;
        let mut peer = peer(&world, WINDOW).await;
        let (mut answers, began) = (0, Instant::now());
        while !peer.is_cut() && began.elapsed() < PATIENCE {
            let Ok(mut call) = peer.call(APPLY).await else { break };
            let sealed = stranger.seal(Lane::Critical, &batch(&[]));
            if call.body.send_data(framed(&sealed), true).is_err() {
                break;
            }
            let Ok(answer) = call.answer.await else { break };
            let Ok((status, message)) = outcome::<v1::Sealed>(answer).await else {
                break;
            };
            assert_eq!(
                (status.as_str(), message),
                ("16", None),
                "UNAUTHENTICATED, whatever was sent before"
            );
            answers += 1;
        }
        assert!(answers >= 64, "so many are borne with, not {answers}");
        until_async("the connection is cut", async || peer.is_cut()).await;
        let taken = apply(&host, &channel, &drops(&host, 1, 1)).await;
        assert_eq!(taken.code(), RejectCode::None, "the neighbour's connection goes on");
    });
}

#[test]
fn invariant_10_resets_count_as_messages_that_do_not_open() {
    let world = world(&[("max_connections_per_address", "16".to_owned())]);
    run(async {
        let mut peer = peer(&world, WINDOW).await;
        let began = Instant::now();
        while !peer.is_cut() && began.elapsed() < PATIENCE {
            let Ok(mut call) = peer.call(APPLY).await else { break };
            // The hub has taken it by then: what is reset before that HTTP/2 counts by itself.
            tokio::time::sleep(Duration::from_millis(10)).await;
            call.body.send_reset(h2::Reason::CANCEL);
        }
        until_async("the connection is cut", async || peer.is_cut()).await;
    });
}

/// Looks every 10 ms until `holds`.
async fn until_async(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let begun = Instant::now();
    while !holds().await {
        assert!(begun.elapsed() < PATIENCE, "not so within {PATIENCE:?}: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[test]
fn invariant_10_half_a_message_and_a_stream_that_says_nothing_end_in_time() {
    // As behind an edge: nothing is known of addresses.
    let world = world(&[]);
    let host = WireHost::new(&world.endpoint(), &world.hub.add_host(1));
    run(async {
        let mut peer = peer(&world, WINDOW).await;
        let began = Instant::now();
        let mut half = peer.call(APPLY).await.expect("a call");
        half.body
            .send_data(framed_bytes(&[0; 5000]).slice(..100), false)
            .expect("sent");
        let silent = peer.call(STREAM).await.expect("a stream");
        // This one says who it is, and may be silent then.
        let mut known = peer.call(STREAM).await.expect("a stream");
        let sealed = host.seal(Lane::Bulk, &batch(&[]));
        known.body.send_data(framed(&sealed), false).expect("sent");
        for (name, call) in [("half a message", half), ("a silent stream", silent)] {
            let answer = timeout(3 * MESSAGE_TIMEOUT, call.answer).await;
            let answer = answer.unwrap_or_else(|_| panic!("{name} goes on")).expect("an answer");
            let (status, _) = outcome::<v1::Sealed>(answer).await.expect("it ends");
            assert_eq!(status, "4", "{name}: DEADLINE_EXCEEDED");
        }
        assert!(began.elapsed() >= MESSAGE_TIMEOUT, "an honest line has some time");
        known
            .body
            .send_data(framed(&host.seal(Lane::Bulk, &batch(&drops(&host, 1, 1)))), true)
            .expect("goes on");
        let answer = known.answer.await.expect("answered");
        assert_eq!(outcome::<v1::Sealed>(answer).await.expect("it ends").0, "0");
    });
    assert_eq!(world.held().logged.len(), 1);
}

/// More than one host has permits.
const UNREAD_CALLS: u64 = 24;

#[test]
fn invariant_10_answers_that_nobody_reads_hold_nothing_and_their_connection_is_cut() {
    let world = world(&[]);
    let host = WireHost::new(&world.endpoint(), &world.hub.add_host(1));
    run(async {
        let reading = host.connect().await;
        let mut peer = peer(&world, 0).await;
        let mut answers = Vec::new();
        for sequence in 1..=UNREAD_CALLS {
            let sealed = host.seal(Lane::Critical, &batch(&drops(&host, sequence, 1)));
            let mut call = peer.call(APPLY).await.expect("room for a call");
            call.body.send_data(framed(&sealed), true).expect("sent");
            // Kept, and not read.
            answers.push(call.answer);
            until_async("it is written", async || world_rows(&world) == sequence).await;
        }
        let began = Instant::now();
        let taken = apply(&host, &reading, &drops(&host, 1000, 1)).await;
        assert_eq!(taken.code(), RejectCode::None, "{}", taken.message);
        assert!(began.elapsed() < Duration::from_secs(10));
        until_async("the connection is cut", async || peer.is_cut()).await;
        drop(answers);
    });
}

fn world_rows(world: &World) -> u64 {
    tokio::task::block_in_place(|| world.held().logged.len() as u64)
}

#[test]
fn invariant_10_a_host_has_a_few_streams_and_the_oldest_gives_way() {
    let world = world(&[]);
    let host = Arc::new(WireHost::new(&world.endpoint(), &world.hub.add_host(1)));
    run(async {
        let channel = host.connect().await;
        let mut streams = Vec::new();
        for number in 0..5 {
            let (batches, mut answers) = stream(&channel).await;
            let sealed = host.seal(Lane::Bulk, &batch(&drops(&host, 1 + number, 1)));
            batches.send(sealed).await.expect("taken");
            answers.message().await.expect("open").expect("answered");
            streams.push((batches, answers));
        }
        let (_batches, mut oldest) = streams.remove(0);
        let ended = timeout(Duration::from_secs(20), oldest.message())
            .await
            .expect("it ends");
        assert!(ended.expect("in order").is_none());
        let rest = streams
            .iter_mut()
            .enumerate()
            .map(async |(number, (batches, answers))| {
                let sealed = host.seal(Lane::Bulk, &batch(&drops(&host, 100 + number as u64, 1)));
                batches.send(sealed).await.expect("taken");
                answers.message().await.expect("open").expect("answered");
            });
        join_all(rest).await;
    });
}

#[test]
fn invariant_10_hellos_have_a_rate_and_another_hosts_are_answered() {
    let world = world(&[]);
    let [greedy, modest] = [1, 2].map(|account| WireHost::new(&world.endpoint(), &world.hub.add_host(account)));
    run(async {
        let channel = greedy.connect().await;
        let hello = || HelloRequest {
            protocol_version: PROTOCOL_VERSION,
            ..Default::default()
        };
        let mut refused = 0;
        for _ in 0..400 {
            let answer = SessionClient::new(channel.clone())
                .hello(greedy.seal(Lane::Hello, &hello()))
                .await;
            let reply: v1::HelloReply = greedy.open(answer.expect("answered").get_ref());
            refused += usize::from(reply.code() == RejectCode::RateLimited);
        }
        assert!(refused > 0, "as many as it likes");
        modest.connect().await;
    });
}

#[test]
fn invariant_10_an_address_has_its_connections_and_another_address_its_own() {
    let world = world(&[("max_connections_per_address", "2".to_owned())]);
    run(async {
        let hub = address(&world);
        let from = async |last: u8| RawPeer::connect(hub, Ipv4Addr::new(127, 0, 0, last), WINDOW).await;
        let _two = [from(2).await.expect("room"), from(2).await.expect("room")];
        until_async("a third is closed", async || match from(2).await {
            Err(_) => true,
            Ok(third) => {
                tokio::time::sleep(Duration::from_millis(50)).await;
                third.is_cut()
            }
        })
        .await;
        let other = from(3).await.expect("another's room");
        thread::sleep(Duration::from_millis(50));
        assert!(!other.is_cut());
    });
    until("the hub tells it", || {
        world.hub.log().contains("max_connections_per_address = 0")
    });
}

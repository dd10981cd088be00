//! What readers are told: never what is lost, never what is older than they know, and in the end all of it.

use std::{
    cell::Cell,
    collections::BTreeMap,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use p2p_sync_agent::{Agent, Attached, Config, OperationState, Question, Settled};
use p2p_sync_proto::{
    Code,
    envelope::Lane,
    v1::{self, SyncDataType, pull_reply, pull_request::What},
};
use p2p_sync_tests::{faulty_link::FaultyLink, services::shared_redis_url, stack};
use serde_json::{Value, json};
use tonic::transport::Channel;
use uuid::Uuid;

use crate::{
    wire::{WireHost, batch},
    world::{PATIENCE, PROGRAM, World, run, until},
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

    fn id(&self) -> Uuid {
        self.host.credential().host_id
    }

    /// Writes, or without a payload deletes; gives the outcome where it is not plainly applied.
    fn write(&self, path: &str, payload: Option<&str>) -> Option<Code> {
        self.written.set(self.written.get() + 1);
        let operation = self.host.operation(self.written.get(), path, payload);
        let sealed = self.host.seal(Lane::Critical, &batch(&[operation]));
        let reply = run(self.host.critical(&self.channel, sealed)).expect("answered");
        assert_eq!(reply.code(), Code::None, "{reply:?}");
        reply.outcomes.first().map(v1::Outcome::code)
    }

    fn write_amount(&self, path: &str, amount: u64) {
        let payload = json!({"drop_id": 7, "amount": amount}).to_string();
        assert_eq!(self.write(path, Some(&payload)), None);
    }

    fn ask(&self, what: What) -> Result<pull_reply::What, Code> {
        let sealed = self.host.seal(Lane::Pull, &v1::PullRequest { what: Some(what) });
        let reply = run(self.host.pull(&self.channel, sealed)).expect("answered");
        match reply.code() {
            Code::None => Ok(reply.what.expect("an answer")),
            code => Err(code),
        }
    }

    fn get(&self, get: v1::Get) -> Result<v1::State, Code> {
        match self.ask(What::Get(get))? {
            pull_reply::What::State(state) => Ok(state),
            other => panic!("no state: {other:?}"),
        }
    }

    fn amount(&self, get: v1::Get) -> Result<u64, Code> {
        self.get(get).map(|state| amount_of(&state))
    }

    fn page(&self, what: What) -> Result<v1::Page, Code> {
        match self.ask(what)? {
            pull_reply::What::Page(page) => Ok(page),
            other => panic!("no page: {other:?}"),
        }
    }
}

fn amount_of(state: &v1::State) -> u64 {
    let data: Value = serde_json::from_slice(&state.payload).expect("JSON");
    data["amount"].as_u64().expect("a number")
}

fn whatever() -> v1::Get {
    v1::Get {
        path: PATH.to_owned(),
        ..Default::default()
    }
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

/// Two proxies, of which the second's cache misses what the first one writes once it is told to.
struct Behind {
    world: World,
    readers: [Reader; 2],
    first: stack::Hub,
    link: FaultyLink,
}

impl Behind {
    fn new() -> Self {
        let redis = shared_redis_url();
        let link = FaultyLink::to(redis.trim_start_matches("redis://").trim_end_matches('/'));
        let world = World::new();
        let mut first = world.another_proxy_by(link.address());
        let readers = [first.start(), world.endpoint()].map(|at| Reader::at(&at, &world.hub.add_host(1)));
        Self {
            world,
            readers,
            first,
            link,
        }
    }

    /// The second one's cache holds 1, and the database 2; gives the versions of both.
    fn fall_behind(&self) -> [v1::State; 2] {
        cache(&self.world, &self.readers, 1);
        let older = self.readers[1].get(whatever()).expect("there");
        self.link.swallow();
        self.readers[0].write_amount(PATH, 2);
        let newer = self.readers[0].get(whatever()).expect("there");
        assert_eq!(amounts(&self.readers), [Ok(2), Ok(1)], "the second one is behind");
        [older, newer]
    }
}

/// What is not older than a state.
fn since(state: &v1::State) -> v1::Get {
    v1::Get {
        at_least: state.version,
        at_least_host_id: state.host_id.clone(),
        ..whatever()
    }
}

#[test]
fn invariant_03_a_cache_that_is_behind_never_answers_who_knows_of_a_newer_version() {
    let behind = Behind::new();
    let [older, newer] = behind.fall_behind();
    let [writer, reader] = &behind.readers;
    // Refused, and settled by that.
    let too_many = json!({"drop_id": 7, "amount": 40_000}).to_string();
    assert!(writer.write(PATH, Some(&too_many)).is_some());
    let at = |sequence| v1::Get {
        at_least_sequence: sequence,
        ..whatever()
    };
    let version = newer.version.expect("each has one");
    let of_sequence = |sequence| v1::Get {
        at_least: Some(v1::Version { sequence, ..version }),
        ..since(&newer)
    };
    for (get, told) in [
        (since(&older), Ok(1)),
        (at(older.stream_sequence), Ok(1)),
        (since(&newer), Ok(2)),
        (at(newer.stream_sequence), Ok(2)),
        (of_sequence(version.sequence + 1), Ok(2)),
        (of_sequence(version.sequence + 2), Err(Code::NotYetSettled)),
        (at(newer.stream_sequence + 100), Err(Code::NotYetSettled)),
        (
            v1::Get {
                at_least: newer.version,
                ..whatever()
            },
            Err(Code::NotYetSettled),
        ),
        (whatever(), Ok(1)),
    ] {
        assert_eq!(reader.amount(get.clone()), told, "{get:?}");
    }
    // An edit is a version too, of nobody's.
    let edited = json!({"drop_id": 7, "amount": 5}).to_string();
    behind.world.hub.command(&["ops", "put", PATH, "--data", &edited]);
    let edit = writer.get(of_sequence(version.sequence + 1));
    let edit = edit.expect("of the database, for the version is another host's");
    assert_eq!(amount_of(&edit), 5);
    assert_eq!(reader.amount(since(&edit)), Ok(5));
    assert!(behind.first.pid() > 0, "it serves to the end");
}

fn asked(ask: impl FnOnce(Question) -> Settled, request: &Value) -> Result<Value, Code> {
    let settled = ask(Question::Read {
        data_type: SyncDataType::ItemDrop,
        map: "prontera".to_owned(),
        account_id: 0,
        request: request.to_string(),
    });
    match (settled.state, settled.problem) {
        (OperationState::Applied, None) => {
            let data: Value = serde_json::from_str(settled.data.as_deref().expect("data")).expect("JSON");
            Ok(data["data"]["amount"].clone())
        }
        (_, problem) => Err(problem.expect("says why").code),
    }
}

#[test]
fn agents_programs_and_people_ask_for_a_version_by_what_an_answer_says() {
    let behind = Behind::new();
    let world = &behind.world;
    let folder = world.folder.path().join("agent");
    let credential = world.hub.add_host(1);
    let mut standalone = stack::Agent::new(Path::new(PROGRAM), &folder, &world.endpoint(), &credential, &[]);
    let shown = |arguments: &[&str]| {
        let mut command = Command::new(PROGRAM);
        command.args(["agent", "get", PATH]).args(arguments).arg("--config");
        let output = command
            .arg(folder.join("p2p_data_sync.conf"))
            .output()
            .expect("the program runs");
        let told: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
        (
            told["data"]["amount"].clone(),
            String::from_utf8_lossy(&output.stderr).into_owned(),
        )
    };
    let agent = Agent::start(world.config("")).expect("starts");
    let [older, newer] = behind.fall_behind();
    let answer = |state: &v1::State| {
        let version = state.version.expect("each has one");
        json!({
            "tenure": version.tenure,
            "incarnation": version.incarnation,
            "sequence": version.sequence,
            "host_id": Uuid::from_slice(&state.host_id).expect("16 bytes"),
        })
    };
    // In this process, in another that is attached, over the lines of a script, and by the command line.
    let by_itself = |request: &Value| {
        asked(
            |question| agent.wait(agent.ask(question, false).expect("taken"), Some(PATIENCE)),
            request,
        )
    };
    let (told, _) = shown(&[]);
    assert_eq!(told, 1, "without an agent");
    let version = answer(&newer);
    let text = |name: &str| version[name].to_string();
    let known = format!(
        "{}:{}:{}@{}",
        text("tenure"),
        text("incarnation"),
        text("sequence"),
        behind.readers[0].id()
    );
    assert_eq!(shown(&["--at-least", &known]).0, 2);
    standalone.start();
    let text = format!("agent_socket = {}\n", standalone.socket().display());
    let attached = Attached::start(Config::parse(&text, Path::new(""), |_| None).expect("valid")).expect("starts");
    until("it is there", || attached.status().link_up);
    let by_attached = |request: &Value| {
        asked(
            |question| attached.wait(attached.ask(question, false).expect("taken"), Some(PATIENCE)),
            request,
        )
    };
    for (members, told) in [
        (json!({}), Ok(json!(1))),
        (json!({"at_least": answer(&older)}), Ok(json!(1))),
        (json!({"at_least": answer(&newer)}), Ok(json!(2))),
        (json!({"at_least_sequence": newer.stream_sequence}), Ok(json!(2))),
        (
            json!({"at_least_sequence": newer.stream_sequence + 1}),
            Err(Code::NotYetSettled),
        ),
        (
            json!({"at_least": {"incarnation": 1, "sequence": 1}}),
            Err(Code::NotYetSettled),
        ),
    ] {
        let with = |mut request: Value, more: &Value| {
            let members = more.as_object().expect("an object").clone();
            request.as_object_mut().expect("an object").extend(members);
            request
        };
        for request in [json!({"drop_id": 7}), json!({"path": PATH})] {
            let request = with(request, &members);
            assert_eq!(by_itself(&request), told, "{request}");
            assert_eq!(by_attached(&request), told, "{request}");
        }
        let line = with(json!({"do": "get", "path": PATH}), &members);
        let answered = standalone.ask(line);
        let amount = &answered["data"]["amount"];
        match told {
            Ok(told) => assert_eq!(*amount, told, "{members}: {answered}"),
            Err(code) => assert_eq!(answered["label"], code.label(), "{members}"),
        }
    }
    let sequence = (newer.stream_sequence + 1).to_string();
    let (_, refused) = shown(&["--at-least-sequence", &sequence]);
    assert!(refused.contains("403") && refused.contains("ask again"), "{refused}");
    let (_, refused) = shown(&["--at-least", "3:4"]);
    assert!(refused.contains("3:7:5"), "{refused}");
}

#[test]
fn a_scan_amid_writes_is_made_whole_by_what_changed_since_it_began() {
    let world = World::new();
    let reader = Reader::at(&world.endpoint(), &world.hub.add_host(1));
    let path = |number: u64| format!("prontera/ITEM_DROP/{number}");
    for number in 3..9 {
        reader.write_amount(&path(number), 1);
    }
    reader.write_amount("prontera_in/ITEM_DROP/1", 1);
    let scan = |prefix: &str, cursor: &[u8]| {
        reader.page(What::Scan(v1::Scan {
            prefix: prefix.to_owned(),
            limit: 2,
            cursor: cursor.to_vec().into(),
        }))
    };
    let mut states = BTreeMap::new();
    let mut take = |page: &v1::Page| {
        for state in &page.states {
            if state.deleted {
                states.remove(&state.path);
            } else {
                states.insert(state.path.clone(), amount_of(state));
            }
        }
    };
    let mut page = scan("prontera/", b"").expect("a page");
    let starts = page.starts.clone();
    let streams: Vec<_> = starts
        .iter()
        .map(|start| (start.stream.as_str(), start.sequence))
        .collect();
    assert_eq!(streams, [("prontera", 6)]);
    take(&page);
    // Before and behind where the scan is.
    reader.write_amount(&path(1), 2);
    reader.write_amount(&path(4), 2);
    assert_eq!(reader.write(&path(3), None), None);
    assert_eq!(reader.write(&path(8), None), None);
    while page.more {
        page = scan("prontera/", &page.cursor).expect("a page");
        assert!(page.starts.is_empty(), "where it began the first page says");
        take(&page);
    }
    let changes = || {
        reader.page(What::ChangesSince(v1::ChangesSince {
            stream: "prontera".to_owned(),
            limit: 0,
            cursor: starts[0].cursor.clone(),
        }))
    };
    take(&changes().expect("a page"));
    let held =
        "SELECT path, (payload ->> 'amount')::bigint FROM p2p_sync.states WHERE stream = 'prontera' AND NOT deleted";
    let held: BTreeMap<String, u64> = world
        .rows(held, &[])
        .iter()
        .map(|row| (row.get(0), row.get::<_, i64>(1).cast_unsigned()))
        .collect();
    assert_eq!(states, held);

    let of_more = scan("pront", b"").expect("a page");
    let streams: Vec<_> = of_more.starts.iter().map(|start| start.stream.as_str()).collect();
    assert_eq!(streams, ["prontera", "prontera_in"]);
    let many = "INSERT INTO p2p_sync.map_states SELECT 'prt' || number, 1, hub_id FROM p2p_sync.hub, generate_series(1, 63) AS number";
    world.rows(many, &[]);
    let of_all = scan("", b"").expect("a page");
    assert!(of_all.starts_left_out && of_all.starts.is_empty(), "65 streams");
    world.rows("DELETE FROM p2p_sync.map_states WHERE stream = 'prt1'", &[]);
    let of_all = scan("", b"").expect("a page");
    assert!(!of_all.starts_left_out && of_all.starts.len() == 64);

    // What was read before the database went back cannot be gone on with.
    let cursor = of_all.cursor;
    world.rows("UPDATE p2p_sync.hub SET timeline = timeline + 1", &[]);
    assert_eq!(scan("", &cursor).expect_err("of another time"), Code::BadCursor);
    assert_eq!(changes().expect_err("of another time"), Code::BadCursor);
    assert!(scan("", b"").is_ok(), "from the beginning");
}

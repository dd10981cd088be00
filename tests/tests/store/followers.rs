//! `feed follow`, as the process that it is: killed anywhere, with commands that fail, beside others.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    env, fs,
    os::unix::{fs::PermissionsExt as _, process::CommandExt as _},
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use p2p_sync_proto::envelope::Lane;
use p2p_sync_proxy::{operation::ValidOp, store::Store};
use p2p_sync_tests::{
    services::wait_until,
    stack::{self, HubDatabase},
};
use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use serde_json::Value;
use uuid::Uuid;

use crate::{
    fixture::{Hub, at, delete, every, message, put, told},
    groups::group,
};

const PROGRAM: &str = env!("CARGO_BIN_EXE_demo");
const PATIENCE: Duration = Duration::from_secs(30);
const WRITERS: u64 = 4;
const MAPS: u64 = 6;

/// A hub's database, and its program beside it, with a folder for what a consumer copies.
struct Scene {
    hub: Hub,
    program: stack::Hub,
    folder: tempfile::TempDir,
}

impl Scene {
    async fn new() -> Self {
        let hub = Hub::new().await;
        let folder = tempfile::tempdir().expect("a folder");
        let database = HubDatabase::Server(hub.database.url().to_owned());
        let at = folder.path().join("hub");
        let program = tokio::task::block_in_place(|| stack::Hub::new(Path::new(PROGRAM), &at, &database, &[]));
        let scene = Self { hub, program, folder };
        fs::create_dir(scene.copy()).expect("the folder can be written");
        scene.feed(&["add", "copy"]);
        scene
    }

    /// Where the command puts what it gets.
    fn copy(&self) -> PathBuf {
        self.folder.path().join("copy")
    }

    /// Runs `feed …` to its end, which is a good one; gives its standard output.
    fn feed(&self, arguments: &[&str]) -> String {
        let arguments: Vec<&str> = ["feed"].iter().chain(arguments).copied().collect();
        tokio::task::block_in_place(|| self.program.command(&arguments))
    }

    /// Runs `feed …`, which fails; gives its standard error.
    fn fails(&self, arguments: &[&str]) -> String {
        let mut command = Command::new(PROGRAM);
        command
            .args(["proxy", "--config"])
            .arg(self.program.config())
            .arg("feed")
            .args(arguments);
        let output = output(command);
        assert!(!output.status.success(), "{arguments:?} did not fail");
        stderr(&output)
    }

    /// `feed follow copy` with a script that gets the copy's folder as $1, in a process group of its own.
    fn follow(&self, options: &[&str], script: &str) -> Command {
        let file = self.folder.path().join("apply");
        if !file.exists() {
            fs::write(&file, format!("#!/bin/sh -e\n{script}")).expect("writes");
            fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).expect("its own file");
        }
        let mut command = Command::new(PROGRAM);
        command
            .args(["proxy", "feed", "follow", "copy", "--config"])
            .arg(self.program.config());
        command.args(options).arg("--").arg(file).arg(self.copy());
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
        command
    }

    fn batches(&self) -> usize {
        fs::read_to_string(self.copy().join("order"))
            .unwrap_or_default()
            .lines()
            .count()
    }
}

fn spawn(mut command: Command) -> Child {
    command.spawn().expect("the program runs")
}

fn output(mut command: Command) -> Output {
    tokio::task::block_in_place(|| command.output()).expect("the program runs")
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn pid(child: &Child) -> Pid {
    Pid::from_child(child)
}

/// Takes a while, and tells when which batch took effect.
const KEEP: &str = "\
cat > \"$1/.$P2P_SYNC_BATCH\"
sleep 0.0$((P2P_SYNC_BATCH % 5))
mv \"$1/.$P2P_SYNC_BATCH\" \"$1/$P2P_SYNC_BATCH\"
echo $P2P_SYNC_BATCH >> \"$1/order\"
";

/// A database that a consumer copies to. It keeps the number of the last batch and refuses older ones, takes a batch whole or not
/// at all, and a change that it has once.
#[derive(Debug, Default)]
struct Copy {
    batch: u64,
    positions: HashMap<String, u64>,
    /// By path: position and payload.
    states: BTreeMap<String, (u64, Value)>,
    /// Operations of paths whose operations each count.
    every: BTreeSet<(String, u64)>,
    /// Changes that came again, and batches that came too late or were cut off by a kill.
    repeated: usize,
    refused: usize,
}

impl Copy {
    /// Takes what the command was given, in the order in which it took effect.
    fn of(folder: &Path) -> Self {
        let order = fs::read_to_string(folder.join("order")).expect("something was told");
        let mut copy = Self::default();
        for number in order.lines() {
            let text = fs::read_to_string(folder.join(number)).expect("it was kept");
            let number = number.parse().expect("a number");
            if number <= copy.batch || !text.ends_with('\n') {
                copy.refused += 1;
                continue;
            }
            copy.batch = number;
            let mut at = HashMap::new();
            for line in text.lines() {
                let line: Value = serde_json::from_str(line).expect("JSON");
                copy.take(&line, &mut at);
            }
        }
        copy
    }

    fn take(&mut self, line: &Value, at: &mut HashMap<String, u64>) {
        assert_eq!(line["timeline"], 1);
        if line["event"] == "snapshot" {
            assert!(line["stream"].is_null(), "no single stream begins anew: {line}");
            (self.positions, self.states, self.every) = Default::default();
            return;
        }
        let (stream, path) = (
            line["stream"].as_str().expect("text"),
            line["path"].as_str().expect("text"),
        );
        let sequence = line["stream_sequence"].as_u64().expect("a number");
        let before = at.insert(stream.to_owned(), sequence).unwrap_or(0);
        assert!(sequence > before, "each stream in its order: {line}");
        let position = self.positions.entry(stream.to_owned()).or_default();
        if sequence <= *position {
            self.repeated += 1;
            return;
        }
        *position = sequence;
        if line["keep"] == "every" {
            self.every.insert((stream.to_owned(), sequence));
        }
        if line["deleted"] == true {
            self.states.remove(path);
        } else {
            self.states.insert(path.to_owned(), (sequence, line["data"].clone()));
        }
    }
}

/// Writes to all maps until it is told to stop: both lanes, deletions, operations that each count, and groups.
async fn write(store: Store, writer: u64, stop: Arc<AtomicBool>, mut random: fastrand::Rng) -> u64 {
    let (host, mut sequence) = (Uuid::from_u128(u128::from(writer) + 1), 0);
    while !stop.load(Ordering::Relaxed) {
        let mut valid = message(host, vec![]);
        valid.lane = if random.bool() { Lane::Critical } else { Lane::Bulk };
        let units = random.u32(1..=8);
        for index in 0..units {
            sequence += 1;
            let unit = if random.u8(0..5) == 0 {
                let maps = [random.u64(0..MAPS / 2), random.u64(MAPS / 2..MAPS)];
                group(maps.map(|map| one(&mut random, map, writer, sequence)).into())
            } else {
                let map = random.u64(0..MAPS);
                vec![one(&mut random, map, writer, sequence)]
            };
            valid.ops.extend(unit.into_iter().map(|op| ValidOp { index, ..op }));
        }
        let committed = store.apply(&valid).await.expect("serves");
        let outcomes = told(&committed);
        assert!(
            outcomes.iter().all(|told| ["applied", "superseded"].contains(told)),
            "{outcomes:?}"
        );
    }
    sequence
}

fn one(random: &mut fastrand::Rng, map: u64, writer: u64, sequence: u64) -> ValidOp {
    let shared = random.u64(0..20);
    let op = match random.u8(0..10) {
        0..=4 => put(&format!("map{map}/NPC_STATE/{shared}"), sequence),
        5..=6 => delete(&format!("map{map}/NPC_STATE/{shared}"), sequence),
        // Each of a path of its own, so that none has a predecessor.
        _ => every(&format!("map{map}/CHAT_MESSAGE/{writer}-{sequence}"), sequence, None),
    };
    ValidOp {
        position: at(1, sequence),
        ..op
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn invariant_08_a_consumer_that_is_killed_anywhere_copies_what_many_write_in_order_and_misses_nothing() {
    let kills: usize = env::var("P2P_SYNC_TEST_CONSUMER_KILLS").map_or(20, |kills| kills.parse().expect("a number"));
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let scene = Scene::new().await;
    let stop = Arc::new(AtomicBool::new(false));
    let writers: Vec<_> = (0..WRITERS)
        .map(|writer| tokio::spawn(write(scene.hub.store.clone(), writer, stop.clone(), random.fork())))
        .collect();
    for _ in 0..kills {
        let (batches, limit) = (scene.batches(), random.u32(1..200).to_string());
        let mut child = spawn(scene.follow(&["--limit", &limit], KEEP));
        wait_until(PATIENCE, "something was told", async || scene.batches() > batches).await;
        tokio::time::sleep(Duration::from_millis(random.u64(0..80))).await;
        // Alone, so that its command goes on without it, or with its command.
        if random.bool() {
            kill_process(pid(&child), Signal::KILL).expect("it runs");
        } else {
            kill_process_group(pid(&child), Signal::KILL).expect("it runs");
        }
        tokio::task::block_in_place(|| child.wait()).expect("it has ended");
    }
    stop.store(true, Ordering::Relaxed);
    let mut written = 0;
    for writer in writers {
        written += writer.await.expect("no panic");
    }
    finish(&scene).await;

    let copy = Copy::of(&scene.copy());
    println!(
        "{written} written, {} came again, {} batches refused",
        copy.repeated, copy.refused
    );
    assert!(copy.repeated > 0, "no kill fell between reading and acknowledging");
    let states = scene.hub.sql.query(
        "SELECT path, stream_sequence, payload FROM p2p_sync.states WHERE NOT deleted",
        &[],
    );
    let states: BTreeMap<String, (u64, Value)> = states
        .await
        .expect("reads")
        .iter()
        .map(|row| (row.get(0), (row.get::<_, i64>(1).unsigned_abs(), row.get(2))))
        .collect();
    assert!(states.len() > 100);
    assert_eq!(copy.states, states);
    let logged = scene.hub.sql.query(
        "SELECT stream, stream_sequence FROM p2p_sync.operations WHERE keeps_every",
        &[],
    );
    let logged: BTreeSet<(String, u64)> = logged
        .await
        .expect("reads")
        .iter()
        .map(|row| (row.get(0), row.get::<_, i64>(1).unsigned_abs()))
        .collect();
    assert_eq!(copy.every, logged);
    let listed = scene.feed(&["list"]);
    assert!(listed.starts_with("copy behind=0 streams=0 acknowledged="), "{listed}");
}

/// Follows to the end, once Postgres has noticed that the one before is gone.
async fn finish(scene: &Scene) {
    let mut said = String::new();
    wait_until(PATIENCE, "the rest is told", async || {
        let output = output(scene.follow(&["--once"], KEEP));
        said = stderr(&output);
        assert!(output.status.success() || said.contains("NOT_ALLOWED"), "{said}");
        output.status.success()
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_command_does_not_take_is_told_again_until_it_does_and_alone_in_the_end() {
    let scene = Scene::new().await;
    let ops = (1..=40).map(|n| put(&format!("prontera/NPC_STATE/{n}"), n)).collect();
    scene.hub.apply(Uuid::nil(), ops).await;
    // One change that it cannot take, unless that was mended.
    let script = format!("{KEEP}test -e \"$1/mended\" || ! grep -q 'NPC_STATE/7\"' \"$1/$P2P_SYNC_BATCH\"\n");
    let once = output(scene.follow(&["--once"], &script));
    assert!(!once.status.success());
    let said = stderr(&once);
    assert!(
        said.contains("UNKNOWN_OUTCOME") && said.contains("ended with exit status: 1"),
        "{said}"
    );
    assert!(
        said.contains("41 lines, prontera 1 (prontera/NPC_STATE/1) to prontera 40"),
        "{said}"
    );
    assert_eq!(scene.batches(), 1);

    let child = spawn(scene.follow(&["--limit", "8"], &script));
    let behind = async |most: i64| {
        let sum = "SELECT sum(behind)::bigint FROM p2p_sync.consumer_streams";
        scene.hub.count(sum).await <= most
    };
    wait_until(PATIENCE, "all before it is acknowledged", async || behind(34).await).await;
    assert!(!behind(33).await, "and nothing after it");
    let last = || {
        let order = fs::read_to_string(scene.copy().join("order")).expect("reads");
        fs::read_to_string(scene.copy().join(order.lines().last().expect("one"))).expect("reads")
    };
    wait_until(PATIENCE, "it comes alone", async || last().lines().count() == 1).await;
    fs::write(scene.copy().join("mended"), "").expect("writes");
    wait_until(PATIENCE, "the rest follows", async || behind(0).await).await;
    kill_process(pid(&child), Signal::TERM).expect("it runs");
    let output = tokio::task::block_in_place(|| child.wait_with_output()).expect("it ends");
    assert!(output.status.success(), "SIGTERM ends it well");
    assert!(
        stderr(&output).contains("prontera 7 (prontera/NPC_STATE/7); again in"),
        "{}",
        stderr(&output)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_follower_is_told_who_follows_and_one_that_is_told_to_stop_finishes_its_batch() {
    let scene = Scene::new().await;
    scene.hub.apply(Uuid::nil(), vec![put("prontera/NPC_STATE/1", 1)]).await;
    let slow = format!("touch \"$1/begun\"; sleep 1; {KEEP}");
    let first = spawn(scene.follow(&[], &slow));
    wait_until(PATIENCE, "the command runs", async || {
        scene.copy().join("begun").exists()
    })
    .await;
    let process = format!("copy is read by process {} on ", first.id());
    for other in [
        stderr(&output(scene.follow(&[], &slow))),
        scene.fails(&["remove", "copy"]),
        scene.fails(&["rewind", "copy"]),
        scene.fails(&["skip", "copy"]),
    ] {
        assert!(other.contains("NOT_ALLOWED") && other.contains(&process), "{other}");
    }
    assert!(
        scene
            .feed(&["list"])
            .contains(&format!("read by process {}", first.id()))
    );
    fs::remove_file(scene.copy().join("begun")).expect("it is there");
    scene.hub.apply(Uuid::nil(), vec![put("prontera/NPC_STATE/1", 2)]).await;
    wait_until(PATIENCE, "the command runs again", async || {
        scene.copy().join("begun").exists()
    })
    .await;
    kill_process(pid(&first), Signal::TERM).expect("it runs");
    let ended = tokio::task::block_in_place(|| first.wait_with_output()).expect("it ends");
    assert!(ended.status.success(), "{}", stderr(&ended));
    assert_eq!(
        scene.hub.count("SELECT sequence FROM p2p_sync.consumer_cursors").await,
        2
    );
    assert!(scene.feed(&["show", "copy"]).contains("prontera behind=0 at=2 head=2"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_look_prints_what_comes_next_one_object_a_line() {
    let scene = Scene::new().await;
    let player = put("@char/150001/PLAYER_DATA", 1);
    scene
        .hub
        .apply(Uuid::from_u128(7), vec![player, delete("prontera/NPC_STATE/1", 2)])
        .await;
    let read = scene.feed(&["read", "copy"]);
    let lines: Vec<Value> = read
        .lines()
        .map(|line| serde_json::from_str(line).expect("JSON"))
        .collect();
    assert_eq!(lines[0], serde_json::json!({"event": "snapshot", "timeline": 1}));
    let received = lines[1]["received_at_ms"].as_u64().expect("a number");
    assert!(received > 1_700_000_000_000);
    let expected = serde_json::json!({
        "event": "change", "timeline": 1, "stream": "@player", "stream_sequence": 1, "path": "@char/150001/PLAYER_DATA",
        "type": "PLAYER_DATA", "keep": "latest", "version": {"tenure": 0, "incarnation": 1, "sequence": 1}, "deleted": false,
        "account_id": 2_000_001, "host_id": Uuid::from_u128(7), "hub_edit": 0, "received_at_ms": received, "data": {"n": 1},
    });
    assert_eq!(lines[1], expected);
    assert_eq!(
        (&lines[2]["deleted"], &lines[2]["data"], lines.len()),
        (&Value::Bool(true), &Value::Null, 3)
    );
    assert_eq!(scene.feed(&["read", "copy", "--limit", "1"]).lines().count(), 2);
    assert_eq!(scene.feed(&["read", "copy"]), read);
}

#[tokio::test(flavor = "multi_thread")]
async fn mistakes_in_arguments_are_told_with_what_to_do() {
    let scene = Scene::new().await;
    scene.hub.apply(Uuid::nil(), vec![put("prontera/NPC_STATE/1", 1)]).await;
    for (arguments, code, hint) in [
        (&["add", "a b"][..], "BAD_VALUE", "letters"),
        (&["add", "copy"], "BAD_VALUE", "feed remove copy"),
        (&["add", "x", "--map", "pron/tera"], "BAD_MAP", "@player"),
        (
            &["add", "x", "--type", "PLAYER_DATE"],
            "UNKNOWN_TYPE",
            "did you mean PLAYER_DATA",
        ),
        (&["show", "copi"], "NOT_FOUND", "feed list"),
        (&["read", "copi"], "NOT_FOUND", "feed list"),
        (&["remove", "copi"], "NOT_FOUND", "feed list"),
        (&["follow", "copi", "--", "true"], "NOT_FOUND", "feed list"),
        (
            &["follow", "copy", "--", "./no-such-command"],
            "BAD_VALUE",
            "./no-such-command cannot be run",
        ),
        (&["rewind", "copy", "geffen"], "NOT_FOUND", "feed show copy"),
        (&["skip", "copy", "prontera"], "BAD_VALUE", "skip all streams"),
        (&["skip", "copy", "--upto", "7"], "", "<STREAM>"),
        (&["read", "copy", "--limit", "0"], "", "1..=10000"),
        (&["follow", "copy"], "", "COMMAND"),
    ] {
        let said = scene.fails(arguments);
        assert!(said.contains(code) && said.contains(hint), "{arguments:?}: {said}");
    }
}

//! A machine whose clock is wrong: it is told, and nothing else comes of it.

use std::{env, path::Path, process::Command};

use p2p_sync_tests::stack::Agent;
use serde_json::Value;

use crate::world::{PROGRAM, World};

/// A library that shows a program another time.
const FAKETIME: &str = "P2P_SYNC_TEST_FAKETIME";
/// Both clocks are this machine's, but for the time that a busy one takes in between.
const PREEMPTION_MS: i64 = 20_000;

/// What an agent says that sees another time, how it ends, and what it logs.
fn told(agent: &Agent, command: &[&str], shift: &str) -> (String, bool, String) {
    let library = env::var(FAKETIME).unwrap_or_else(|_| panic!("{FAKETIME} is not set. Run tests/run."));
    let output = Command::new(PROGRAM)
        .arg("agent")
        .args(command)
        .arg("--config")
        .arg(agent.config())
        .env("LD_PRELOAD", library)
        .env("FAKETIME", shift)
        // What it waits by goes on as it does.
        .env("FAKETIME_DONT_FAKE_MONOTONIC", "1")
        .output()
        .expect("the program runs");
    let [out, err] = [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned());
    (out, output.status.success(), err)
}

#[test]
fn a_clock_that_is_wrong_is_told_once_with_its_direction_and_nothing_is_refused_for_it() {
    let world = World::new();
    for (number, (shift, skew_ms, sentence)) in [
        ("-1h", 3_600_000, Some("min behind the hub's")),
        ("+3h", -10_800_000, Some(" h ahead of the hub's")),
        ("+0", 0, None),
    ]
    .into_iter()
    .enumerate()
    {
        let folder = world.folder.path().join(format!("agent-{number}"));
        let credential = world.hub.add_host(1);
        let agent = Agent::new(Path::new(PROGRAM), &folder, &world.endpoint(), &credential, &[]);
        let put = [
            "put",
            "ITEM_DROP",
            "{\"drop_id\":7}",
            "--map",
            "prontera",
            "--timeout",
            "60",
        ];
        let (out, applied, err) = told(&agent, &put, shift);
        assert!(applied && out.contains("APPLIED"), "{shift}: {out}{err}");
        let times = err.matches("CLOCK_SKEW").count();
        assert_eq!(times, usize::from(sentence.is_some()), "{shift}: {err}");

        let (out, _, err) = told(&agent, &["status"], shift);
        let status: Value = serde_json::from_str(&out).unwrap_or_else(|error| panic!("{error}: {out}{err}"));
        let told_ms = status["clock_skew_ms"].as_i64().expect("a number");
        assert!((told_ms - skew_ms).abs() < PREEMPTION_MS, "{shift}: {told_ms} ms");
        assert_eq!(status["link_up"], true, "{status}");

        let (out, well, _) = told(&agent, &["check"], shift);
        let line = out.lines().find(|line| line.starts_with("clock: ")).unwrap_or_default();
        assert_eq!(well, sentence.is_none(), "{shift}: {out}");
        assert!(line.contains(sentence.unwrap_or("ok (")), "{shift}: {line}");
    }
}

//! A whole system with nothing installed: the embedded hub, an agent, and a hub that is killed.

use std::{
    path::Path,
    thread,
    time::{Duration, Instant},
};

use p2p_sync_agent::{Agent, Config, OperationState, Priority, Submission};
use p2p_sync_proto::{path, v1::SyncDataType};
use p2p_sync_tests::stack::{Hub, HubDatabase};
use tempfile::TempDir;

const PATIENCE: Duration = Duration::from_mins(2);

struct Embedded {
    hub: Hub,
    agent: Agent,
    _folder: TempDir,
}

impl Embedded {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder can be made");
        let program = Path::new(env!("CARGO_BIN_EXE_demo"));
        // Of the agent's choosing: it has to be the same after a restart.
        let port = std::net::TcpListener::bind("127.0.0.1:0")
            .expect("a free port")
            .local_addr()
            .expect("bound")
            .port();
        let hub_folder = folder.path().join("hub");
        let mut hub = Hub::new(
            program,
            &hub_folder,
            &HubDatabase::Embedded,
            &[("port", port.to_string())],
        );
        let credential = hub.add_host(1);
        let endpoint = hub.start();
        let text =
            format!("main_server_endpoint = {endpoint}\nencryption_key = {credential}\nretry_delay_max_ms = 500\n");
        let config = Config::parse(&text, folder.path(), |_| None).expect("valid settings");
        Self {
            hub,
            agent: Agent::start(config).expect("starts"),
            _folder: folder,
        }
    }
}

fn drop_of(payload: &str) -> Submission<'_> {
    Submission {
        data_type: SyncDataType::ItemDrop,
        map: "prontera",
        account_id: 2_000_001,
        entity: None,
        char_id: None,
        payload: Some(payload),
        priority: Priority::ByType,
        notify: false,
    }
}

fn amount_at(agent: &Agent, drop_id: u64) -> Option<u64> {
    let path = path::Path::parse(&format!("prontera/ITEM_DROP/{drop_id}")).expect("a path");
    let state = agent.get(&path, Some(PATIENCE)).expect("the hub answers")?;
    serde_json::from_slice::<serde_json::Value>(&state.payload).expect("JSON")["amount"].as_u64()
}

#[test]
fn an_operation_goes_from_an_agent_into_the_embedded_hub_and_comes_back() {
    let Embedded { agent, .. } = &Embedded::new();
    assert_eq!(amount_at(agent, 7), None);
    let id = agent.submit(&drop_of(r#"{"drop_id":7,"amount":3}"#)).expect("taken");
    assert_eq!(agent.wait(id, Some(PATIENCE)).state, OperationState::Applied);
    assert_eq!(amount_at(agent, 7), Some(3));
}

#[test]
fn invariant_01_an_embedded_hub_killed_in_mid_stream_loses_nothing_it_acknowledged() {
    let Embedded { hub, agent, .. } = &mut Embedded::new();
    let mut submitted = Vec::new();
    for round in 1..=3 {
        for drop_id in 0..1500 {
            let payload = format!(r#"{{"drop_id":{drop_id},"amount":{round}}}"#);
            submitted.push((drop_id, agent.submit(&drop_of(&payload)).expect("taken")));
        }
        let applied = |submitted: &[(u64, _)]| -> Vec<u64> {
            let is_applied = |(_, id): &&(u64, _)| agent.result(*id).state == OperationState::Applied;
            submitted[submitted.len() - 1500..]
                .iter()
                .filter(is_applied)
                .map(|(drop_id, _)| *drop_id)
                .collect()
        };
        let begun = Instant::now();
        while applied(&submitted).is_empty() {
            assert!(begun.elapsed() < PATIENCE, "nothing is applied: {:?}", agent.status());
            thread::sleep(Duration::from_millis(1));
        }
        hub.kill();
        let acknowledged = applied(&submitted);
        assert!(acknowledged.len() < 1500, "it was killed when all was done");
        hub.start();
        for drop_id in acknowledged.iter().step_by(50) {
            assert_eq!(amount_at(agent, *drop_id), Some(round), "acknowledged and lost");
        }
    }
    assert!(agent.flush(PATIENCE), "everything settles: {:?}", agent.status());
    for drop_id in (0..1500).step_by(100) {
        assert_eq!(amount_at(agent, drop_id), Some(3));
    }
}

//! nginx before the hub, by the file that operators are given.

use std::{
    collections::BTreeSet,
    env, fs,
    path::PathBuf,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use p2p_sync_tests::services::free_port;
use serde_json::json;

use crate::world::{World, chat, link_problem, put_critical, run, until, until_up};

const SHIPPED: &str = include_str!("../../../conf/nginx/p2p_sync.conf");

/// An nginx on a hub's certificate, killed with this value.
struct Nginx {
    process: Child,
    port: u16,
    log: PathBuf,
}

impl Nginx {
    /// With the shipped file, in which some values are others.
    fn before(world: &World, others: &[(&str, &str)]) -> Self {
        let program = env::var("P2P_SYNC_TEST_NGINX").expect("P2P_SYNC_TEST_NGINX is not set. Run tests/run.");
        let folder = world.folder.path().join("nginx");
        fs::create_dir(&folder).expect("a folder can be made");
        let port = free_port();
        let mut text = SHIPPED.to_owned();
        let hub = world.hub_folder();
        let own = [
            ("listen 443 ssl http2;", format!("listen 127.0.0.1:{port} ssl http2;")),
            ("127.0.0.1:50051", format!("127.0.0.1:{}", world.port)),
            (
                "/etc/ssl/hub.example.org/fullchain.pem",
                hub.join("hub.pem").display().to_string(),
            ),
            (
                "/etc/ssl/hub.example.org/privkey.pem",
                hub.join("hub.key").display().to_string(),
            ),
        ];
        let others = others.iter().map(|(from, to)| (*from, (*to).to_owned()));
        for (from, to) in own.into_iter().chain(others) {
            assert!(text.contains(from), "the shipped file has no {from:?}");
            text = text.replace(from, &to);
        }
        fs::write(folder.join("p2p_sync.conf"), text).expect("the folder can be written");
        let paths = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
            .map(|kind| format!("{kind}_temp_path {0}/{kind};\n", folder.display()))
            .concat();
        let main = format!(
            "daemon off;\nmaster_process off;\npid {0}/pid;\nerror_log {0}/error.log info;\nevents {{}}\nhttp {{\n\
             log_format calls '$connection $request_uri $status';\naccess_log {0}/access.log calls;\n{paths}\
             include {0}/p2p_sync.conf;\n}}\n",
            folder.display()
        );
        let config = folder.join("nginx.conf");
        fs::write(&config, main).expect("the folder can be written");
        let process = Command::new(program)
            .arg("-p")
            .arg(&folder)
            .arg("-c")
            .arg(config)
            .stderr(Stdio::null())
            .spawn()
            .expect("nginx runs");
        Self {
            process,
            port,
            log: folder.join("access.log"),
        }
    }

    /// Calls and streams that have ended: the connection's number, and what was called.
    fn ended(&self) -> Vec<(String, String)> {
        let log = fs::read_to_string(&self.log).unwrap_or_default();
        let fields = |line: &str| {
            let mut fields = line.split(' ').map(str::to_owned);
            Some((fields.next()?, fields.next()?))
        };
        log.lines().filter_map(fields).collect()
    }
}

impl Drop for Nginx {
    fn drop(&mut self) {
        // Gone already is as good as killed.
        let _ = (self.process.kill(), self.process.wait());
    }
}

#[test]
fn hosts_go_through_nginx_by_its_name_and_by_a_path() {
    let mut world = World::with(&[]);
    world.hub.start();
    let nginx = Nginx::before(&world, &[]);
    for (number, path) in (0..).zip(["", "/p2p-sync"]) {
        let endpoint = format!("https://localhost:{}{path}", nginx.port);
        let mut agent = world.host(&format!("host-{number}"), &endpoint);
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
    // The edge's own port, spoken to as plaintext.
    let plain = format!("http://localhost:{}", nginx.port);
    let mut agent = world.host("plaintext", &plain);
    agent.start();
    let problem = format!("E107 BAD_ENDPOINT: {plain} answers, but speaks no HTTP/2");
    until(&problem, || link_problem(&mut agent).contains(&problem));
}

#[test]
fn an_edge_that_ends_connections_in_mid_stream_loses_and_doubles_nothing() {
    let mut world = World::with(&[]);
    world.hub.start();
    // The second request on a connection, for the bulk lane its stream, is told GOAWAY.
    let nginx = Nginx::before(&world, &[("keepalive_requests 1000000", "keepalive_requests 2")]);
    let mut agent = world.host("host", &format!("https://localhost:{}", nginx.port));
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
fn an_idle_stream_outlasts_the_edges_timeouts() {
    let mut world = World::with(&[]);
    world.hub.start();
    // Just above the pings of the agents (10 s) and of the proxy (20 s).
    let short = [
        ("keepalive_timeout 75s", "keepalive_timeout 14s"),
        ("grpc_read_timeout 60s", "grpc_read_timeout 24s"),
        ("grpc_send_timeout 60s", "grpc_send_timeout 24s"),
    ];
    let nginx = Nginx::before(&world, &short);
    let mut agent = world.host("host", &format!("https://localhost:{}", nginx.port));
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

//! nginx and Envoy before hubs, by the files that operators are given.

use std::{
    env,
    ffi::OsString,
    fs::{self, File},
    io::{Read as _, Write as _},
    net::TcpStream,
    os::unix::net::UnixStream,
    path::PathBuf,
    process::{Child, Command},
    thread,
    time::{Duration, Instant},
};

use crate::services::free_port;

const NGINX: &str = include_str!("../../conf/nginx/p2p_sync.conf");
const ENVOY: &str = include_str!("../../conf/envoy/p2p_sync.yaml");
/// What one of them may take to listen.
const START_TIMEOUT: Duration = Duration::from_secs(30);
/// The one proxy of the file for Envoy.
const ENDPOINT: &str =
    "              - endpoint: { address: { socket_address: { address: 127.0.0.1, port_value: 50051 } } }\n";

/// An edge on a port of its own, which stays the same when it is started again; killed with this value.
pub struct Edge {
    command: Vec<OsString>,
    process: Option<Child>,
    port: u16,
    folder: PathBuf,
    scheme: &'static str,
}

/// What an edge is put together from.
pub struct Place<'a> {
    /// A new one, for all that belongs to the edge.
    pub folder: PathBuf,
    /// `address:port` of each proxy.
    pub proxies: Vec<String>,
    /// Where `hub.pem` and `hub.key` are; without one, the edge speaks plaintext.
    pub certificate: Option<PathBuf>,
    /// What stands otherwise in the file, as it is and as it is here.
    pub others: &'a [(&'a str, &'a str)],
}

impl Edge {
    /// nginx, which serves when this returns.
    pub fn nginx(place: &Place<'_>) -> Self {
        let (mut edge, folder) = (Self::at(place, "P2P_SYNC_TEST_NGINX"), place.folder.display());
        let (listen, ssl) = (
            "listen 443 ssl http2;",
            if edge.scheme == "https" { " ssl" } else { "" },
        );
        let servers = place.proxies.iter().map(|proxy| format!("    server {proxy};\n"));
        let mut own = vec![
            (listen, format!("listen 127.0.0.1:{}{ssl} http2;", edge.port)),
            ("    server 127.0.0.1:50051;\n", servers.collect()),
        ];
        let files = ["    ssl_certificate /etc/ssl/", "    ssl_certificate_key /etc/ssl/"];
        if place.certificate.is_none() {
            own.extend(files.map(|file| (file, file.replace("ssl", "# ssl"))));
        }
        fs::write(place.folder.join("p2p_sync.conf"), place.fill(NGINX, own)).expect("the folder can be written");
        let paths = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
            .map(|kind| format!("{kind}_temp_path {folder}/{kind};\n"))
            .concat();
        let main = format!(
            "daemon off;\nmaster_process off;\npid {folder}/pid;\nerror_log {folder}/error.log info;\nevents {{}}\n\
             http {{\nlog_format calls '$connection $request_uri $status';\naccess_log {folder}/access.log calls;\n{paths}\
             include {folder}/p2p_sync.conf;\n}}\n",
        );
        let file = place.folder.join("nginx.conf");
        fs::write(&file, main).expect("the folder can be written");
        let arguments: [OsString; 4] = ["-p".into(), place.folder.clone().into(), "-c".into(), file.into()];
        edge.command.extend(arguments);
        edge.start();
        edge
    }

    /// Envoy, which serves when this returns. Its one worker is shared by all connections.
    pub fn envoy(place: &Place<'_>) -> Self {
        let (mut edge, folder) = (Self::at(place, "P2P_SYNC_TEST_ENVOY"), place.folder.display());
        let listen = r#"{ address: "::", port_value: 443, ipv4_compat: true }"#;
        let proxies = place.proxies.iter().map(|proxy| {
            let (address, port) = proxy.split_once(':').expect("address:port");
            ENDPOINT.replace("127.0.0.1", address).replace("50051", port)
        });
        // In its order, for a cluster's address stands in no other form.
        let own = vec![
            (listen, format!("{{ address: 127.0.0.1, port_value: {} }}", edge.port)),
            (ENDPOINT, proxies.collect()),
            (
                "                codec_type: HTTP2\n",
                format!(
                    "                codec_type: HTTP2\n                access_log:\n                  - name: calls\n                    \
                     typed_config:\n                      \
                     \"@type\": type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog\n                      \
                     path: {folder}/access.log\n                      \
                     log_format: {{ text_format_source: {{ inline_string: \"%CONNECTION_ID% %REQ(:PATH)%\\n\" }} }}\n"
                ),
            ),
        ];
        let mut text = place.fill(ENVOY, own);
        if place.certificate.is_none() {
            let (before, rest) = text
                .split_once("        - transport_socket:\n")
                .expect("a socket of TLS");
            let (_, after) = rest
                .split_once("          transport_socket_connect")
                .expect("its timeout");
            text = format!("{before}        - transport_socket_connect{after}");
        }
        text += &format!("admin: {{ address: {{ pipe: {{ path: {folder}/admin }} }} }}\n");
        let file = place.folder.join("p2p_sync.yaml");
        fs::write(&file, text).expect("the folder can be written");
        edge.command.extend([OsString::from("-c"), file.into()]);
        let arguments = "--disable-hot-restart --concurrency 1 --log-level warning --file-flush-interval-msec 100 \
                         --drain-strategy immediate --drain-time-s 1";
        edge.command.extend(arguments.split(' ').map(OsString::from));
        edge.start();
        edge
    }

    fn at(place: &Place<'_>, program: &str) -> Self {
        let path = env::var_os(program).unwrap_or_else(|| panic!("{program} is not set. Run tests/run."));
        fs::create_dir(&place.folder).expect("a folder can be made");
        Self {
            command: vec![path],
            process: None,
            port: free_port(),
            folder: place.folder.clone(),
            scheme: if place.certificate.is_some() { "https" } else { "http" },
        }
    }

    /// As an agent's `main_server_endpoint`.
    pub fn endpoint(&self) -> String {
        format!("{}://localhost:{}", self.scheme, self.port)
    }

    /// Starts it, and returns when it listens.
    pub fn start(&mut self) {
        let said = self.folder.join("said");
        let output = File::create(&said).expect("the folder can be written");
        let process = Command::new(&self.command[0])
            .args(&self.command[1..])
            .current_dir(&self.folder)
            .stdout(output.try_clone().expect("a file can be cloned"))
            .stderr(output)
            .spawn();
        let process = self.process.insert(process.expect("the edge runs"));
        let begun = Instant::now();
        while TcpStream::connect(("127.0.0.1", self.port)).is_err() {
            let ended = process.try_wait().expect("it is our child");
            assert!(
                ended.is_none() && begun.elapsed() < START_TIMEOUT,
                "the edge does not serve: {}",
                fs::read_to_string(&said).unwrap_or_default()
            );
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            // Gone already is as good as killed.
            let _ = (process.kill(), process.wait());
        }
    }

    /// Calls and streams that have ended: the connection's number, and what was called.
    pub fn ended(&self) -> Vec<(String, String)> {
        let log = fs::read_to_string(self.folder.join("access.log")).unwrap_or_default();
        let fields = |line: &str| {
            let mut fields = line.split(' ').map(str::to_owned);
            Some((fields.next()?, fields.next()?))
        };
        log.lines().filter_map(fields).collect()
    }

    /// What Envoy's administration answers, `GET /stats` for one.
    pub fn administer(&self, request: &str) -> String {
        let mut admin = UnixStream::connect(self.folder.join("admin")).expect("Envoy runs");
        let mut answer = String::new();
        write!(
            admin,
            "{request} HTTP/1.1\r\nhost: admin\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
        )
        .and_then(|()| admin.read_to_string(&mut answer))
        .expect("Envoy answers");
        answer
    }

    /// One of Envoy's counters, by its whole name.
    ///
    /// # Panics
    /// Where there is none of this name.
    pub fn counter(&self, name: &str) -> u64 {
        let stats = self.administer(&format!("GET /stats?filter={name}"));
        let line = stats
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
        let number = line.and_then(|number| number.trim().parse().ok());
        number.unwrap_or_else(|| panic!("Envoy counts no {name}: {stats}"))
    }
}

impl Place<'_> {
    /// The shipped file with what is this edge's own in it.
    fn fill(&self, shipped: &str, mut own: Vec<(&str, String)>) -> String {
        if let Some(folder) = &self.certificate {
            let file = |name| folder.join(name).display().to_string();
            own.push(("/etc/ssl/hub.example.org/fullchain.pem", file("hub.pem")));
            own.push(("/etc/ssl/hub.example.org/privkey.pem", file("hub.key")));
        }
        let others = self.others.iter().map(|(from, to)| (*from, (*to).to_owned()));
        let mut text = shipped.to_owned();
        for (from, to) in own.into_iter().chain(others) {
            assert!(text.contains(from), "the shipped file has no {from:?}");
            text = text.replace(from, &to);
        }
        text
    }
}

impl Drop for Edge {
    fn drop(&mut self) {
        self.kill();
    }
}

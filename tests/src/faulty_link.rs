//! A link that fails: a TCP forwarder before a hub that records, cuts, delays, or swallows what passes.

use std::{
    io::{self, Read as _, Write as _},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
    time::Duration,
};

/// A recording that grows past this is a test gone wrong.
const RECORDED_BYTES_MAX: usize = 64 * 1024 * 1024;
const CHUNK_BYTES: usize = 16 * 1024;

/// Forwards connections to a hub until it is dropped; then all of them are cut and new ones refused.
pub struct FaultyLink {
    address: SocketAddr,
    shared: Arc<Shared>,
}

struct Shared {
    hub: String,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Both ends of each connection.
    open: Vec<TcpStream>,
    recorded: Option<Vec<u8>>,
    delay: Duration,
    swallows: bool,
    closed: bool,
}

impl FaultyLink {
    /// A link to the hub at `http://host:port`, which need not be there yet.
    pub fn to(hub: &str) -> Self {
        Self::at("127.0.0.1", hub)
    }

    /// As [`Self::to`], at another of loopback's addresses; what it leads to may be any server.
    pub fn at(ip: &str, hub: &str) -> Self {
        let listener = TcpListener::bind((ip, 0)).expect("loopback has a free port");
        let address = listener.local_addr().expect("bound");
        let hub = hub.trim_start_matches("http://").to_owned();
        let shared = Arc::new(Shared {
            hub,
            state: Mutex::default(),
        });
        let accepting = shared.clone();
        thread::spawn(move || {
            for agent in listener.incoming().map_while(Result::ok) {
                if accepting.state().closed {
                    return;
                }
                // A hub that is not there: the agent's connection ends at once.
                let _ = accepting.join(agent);
            }
        });
        Self { address, shared }
    }

    /// As an agent's `main_server_endpoint`.
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Keeps a copy of every byte from now on, both directions in one row.
    pub fn record(&self) {
        self.shared.state().recorded = Some(Vec::new());
    }

    /// What passed since [`Self::record`].
    pub fn recorded(&self) -> Vec<u8> {
        self.shared.state().recorded.clone().unwrap_or_default()
    }

    /// Holds each piece back for so long, in each direction.
    pub fn delay(&self, delay: Duration) {
        self.shared.state().delay = delay;
    }

    /// A black hole from now on: connections open and stay open, and nothing comes through.
    pub fn swallow(&self) {
        self.shared.state().swallows = true;
    }

    /// Lets everything through again at once. Connections that have lost bytes are cut.
    pub fn heal(&self) {
        let mut state = self.shared.state();
        (state.swallows, state.delay) = (false, Duration::ZERO);
        drop(state);
        self.cut();
    }

    /// Ends every connection, wherever it is in its bytes; gives whether there was any.
    pub fn cut(&self) -> bool {
        let open = std::mem::take(&mut self.shared.state().open);
        for stream in &open {
            // Closed already is as good as cut.
            let _ = stream.shutdown(Shutdown::Both);
        }
        !open.is_empty()
    }
}

impl Drop for FaultyLink {
    fn drop(&mut self) {
        self.shared.state().closed = true;
        self.cut();
        // Lets the accepting thread see it.
        let _ = TcpStream::connect(self.address);
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn join(self: &Arc<Self>, agent: TcpStream) -> io::Result<()> {
        let hub = if self.state().swallows {
            None
        } else {
            Some(TcpStream::connect(&self.hub)?)
        };
        self.state().open.push(agent.try_clone()?);
        if let Some(hub) = hub {
            hub.set_nodelay(true)?;
            agent.set_nodelay(true)?;
            self.state().open.push(hub.try_clone()?);
            self.forward(hub.try_clone()?, agent.try_clone()?);
            self.forward(agent, hub);
        }
        Ok(())
    }

    fn forward(self: &Arc<Self>, mut from: TcpStream, mut to: TcpStream) {
        let shared = self.clone();
        thread::spawn(move || {
            let mut chunk = vec![0; CHUNK_BYTES];
            while let Ok(bytes @ 1..) = from.read(&mut chunk) {
                let Some(delay) = shared.pass(&chunk[..bytes]) else {
                    continue;
                };
                thread::sleep(delay);
                if to.write_all(&chunk[..bytes]).is_err() {
                    break;
                }
            }
            // Either end going ends both.
            let _ = (from.shutdown(Shutdown::Both), to.shutdown(Shutdown::Both));
        });
    }

    /// Records a piece; `None` where it is swallowed, else how long it is held back.
    fn pass(&self, piece: &[u8]) -> Option<Duration> {
        let mut state = self.state();
        if state.swallows {
            return None;
        }
        if let Some(recorded) = &mut state.recorded {
            recorded.extend_from_slice(piece);
            assert!(
                recorded.len() <= RECORDED_BYTES_MAX,
                "more is recorded than any test sends"
            );
        }
        Some(state.delay)
    }
}

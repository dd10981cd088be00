//! Slow connections of several kinds, each from an address of its own, and some that open streams only to reset them.

use std::{
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc, LazyLock,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use prost::bytes::Bytes;
use tokio::{net::TcpSocket, task::JoinSet, time::sleep};

use crate::raw_peer::{RawPeer, framed_bytes};

const FLOODERS: u16 = 4;
/// Streams that hang on a connection that has such.
const HANGING_STREAMS: usize = 16;
/// As large as a message may be, all of it but its end.
const HALF_BYTES: usize = 2 * 1024 * 1024;

/// They, until they are stopped.
pub(super) struct Slow {
    tasks: JoinSet<()>,
    held: Arc<AtomicU64>,
    resets: Arc<AtomicU64>,
}

impl Slow {
    pub(super) async fn start(hub: SocketAddr, connections: u16) -> Self {
        let mut tasks = JoinSet::new();
        let (held, resets) = (Arc::<AtomicU64>::default(), Arc::<AtomicU64>::default());
        for number in 0..connections {
            tasks.spawn(again_and_again(hub, number, Arc::clone(&held)));
        }
        for number in 0..FLOODERS {
            tasks.spawn(flood(hub, address(0xff00 + number), Arc::clone(&resets)));
        }
        // All of them connect, and have sent what they send.
        sleep(Duration::from_secs(3)).await;
        Self { tasks, held, resets }
    }

    /// Connections that the hub bears with now.
    pub(super) fn held(&self) -> u64 {
        self.held.load(Ordering::Relaxed)
    }

    /// Gives how many streams were reset.
    pub(super) async fn stop(mut self) -> u64 {
        self.tasks.shutdown().await;
        sleep(Duration::from_secs(1)).await;
        self.resets.load(Ordering::Relaxed)
    }
}

fn address(number: u16) -> Ipv4Addr {
    let [high, low] = number.to_be_bytes();
    Ipv4Addr::new(127, 1, high, low)
}

/// One is taken out of the count when it is dropped, be its task ended.
struct Counted(Arc<AtomicU64>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Whoever is cut comes again a second later.
async fn again_and_again(hub: SocketAddr, number: u16, held: Arc<AtomicU64>) {
    loop {
        held.fetch_add(1, Ordering::Relaxed);
        let counted = Counted(Arc::clone(&held));
        // How it ended says nothing: it comes again.
        let _ended = match number % 4 {
            0 => silent(hub, address(number)).await,
            1 => hang(hub, address(number), 0, 0).await,
            2 => hang(hub, address(number), 1, HALF_BYTES).await,
            _ => hang(hub, address(number), HANGING_STREAMS, 16).await,
        };
        drop(counted);
        sleep(Duration::from_secs(1)).await;
    }
}

/// Does not even greet.
async fn silent(hub: SocketAddr, from: Ipv4Addr) -> std::io::Result<()> {
    let socket = TcpSocket::new_v4()?;
    socket.bind(SocketAddr::new(from.into(), 0))?;
    let stream = socket.connect(hub).await?;
    stream.readable().await
}

/// Opens some streams, sends so many bytes of a message on each and waits.
async fn hang(hub: SocketAddr, from: Ipv4Addr, streams: usize, bytes: usize) -> std::io::Result<()> {
    // Made once: what it costs to make is not the hub's.
    static MESSAGE: LazyLock<Bytes> = LazyLock::new(|| framed_bytes(&[0; HALF_BYTES]));
    let mut peer = RawPeer::connect(hub, from, 65_535).await?;
    let mut calls = Vec::new();
    for _ in 0..streams {
        let called = peer.call("/p2p_sync.v1.Bulk/Stream").await;
        let mut call = called.map_err(std::io::Error::other)?;
        let sent = call.body.send_data(MESSAGE.slice(..bytes.min(HALF_BYTES)), false);
        sent.map_err(std::io::Error::other)?;
        calls.push(call);
    }
    while !peer.is_cut() {
        sleep(Duration::from_millis(200)).await;
    }
    Ok(())
}

async fn flood(hub: SocketAddr, from: Ipv4Addr, resets: Arc<AtomicU64>) {
    loop {
        if let Ok(mut peer) = RawPeer::connect(hub, from, 65_535).await {
            while !peer.is_cut()
                && let Ok(mut call) = peer.call("/p2p_sync.v1.Critical/Apply").await
            {
                call.body.send_reset(h2::Reason::CANCEL);
                resets.fetch_add(1, Ordering::Relaxed);
                tokio::task::yield_now().await;
            }
        }
        sleep(Duration::from_millis(100)).await;
    }
}

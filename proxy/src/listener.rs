//! The door: how many connections are open, that each speaks TLS where the hub does, and soon says what it wants.
//!
//! A connection has one of the hub's places only once it has shaken hands and begun to speak HTTP/2. Before that it stands at
//! the door, which has places of its own, the oldest giving way: so handshakes that hang keep nobody out.

use std::{
    fmt, io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use futures::Stream;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, Sleep, sleep},
};
use tokio_rustls::{Accept, TlsAcceptor, server::TlsStream};
use tonic::transport::server::Connected;

use crate::{
    admission::{
        Place, Places,
        peers::{Peer, Peers},
    },
    tls::Served,
};

/// The fixed bytes that every HTTP/2 connection begins with (RFC 9113, section 3.4).
const GREETING_BYTES: usize = 24;
/// Connections at the door. A handshake takes some round trips, so that the oldest of so many hangs.
const AT_THE_DOOR_MAX: usize = 256;
/// How often an open connection is looked at by itself.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);
/// Before accepting again when the system gives no more descriptors.
const ACCEPT_RETRY_DELAY: Duration = Duration::from_millis(100);

/// Connections as they come, at most `connections_max` open at one time and as many of an address as `peers` let in; further
/// ones are closed at once.
///
/// One that does not begin to speak HTTP/2, after the handshake where there is `tls`, within `greeting_timeout` is cut;
/// later, HTTP/2's keepalive finds the dead. No connection waits for another's handshake: each is its own task's.
pub fn connections(
    listener: TcpListener,
    tls: Option<Served>,
    connections_max: usize,
    peers: Peers,
    greeting_timeout: Duration,
) -> impl Stream<Item = io::Result<Connection>> {
    let room = Arc::new(Room {
        max: connections_max,
        free: Arc::new(Semaphore::new(connections_max)),
        told: AtomicBool::new(false),
    });
    let door = Places::new(AT_THE_DOOR_MAX);
    futures::stream::unfold((listener, peers), move |(listener, peers)| {
        let (room, door, tls) = (Arc::clone(&room), Arc::clone(&door), tls.clone());
        async move {
            loop {
                let (stream, address) = match listener.accept().await {
                    Ok(accepted) => accepted,
                    Err(error) => {
                        tracing::warn!(%error, "a connection cannot be accepted");
                        sleep(ACCEPT_RETRY_DELAY).await;
                        continue;
                    }
                };
                if let Some(peer) = peers.enter(address) {
                    let place = door.place();
                    place.grow(1);
                    let greeting = Greeting {
                        bytes_missing: GREETING_BYTES,
                        timeout: Box::pin(sleep(greeting_timeout)),
                        place,
                        room,
                    };
                    return Some((Connection::new(stream, tls.as_ref(), peer, greeting), (listener, peers)));
                }
            }
        }
    })
}

/// The hub's places.
#[derive(Debug)]
struct Room {
    max: usize,
    free: Arc<Semaphore>,
    /// That there is none is told once.
    told: AtomicBool,
}

impl Room {
    fn place(&self) -> Option<OwnedSemaphorePermit> {
        let place = Arc::clone(&self.free).try_acquire_owned().ok();
        let was_told = self.told.swap(place.is_none(), Ordering::Relaxed);
        if place.is_none() && !was_told {
            tracing::warn!(
                connections_max = self.max,
                "connections are turned away: raise max_connections"
            );
        }
        place
    }
}

/// An open connection, counted as long as it lives.
#[derive(Debug)]
pub struct Connection {
    stream: Io,
    peer: Arc<Peer>,
    greeting: Option<Greeting>,
    look: Pin<Box<Sleep>>,
    /// Absent at the door.
    place: Option<OwnedSemaphorePermit>,
}

enum Io {
    Plain(TcpStream),
    /// Whoever reads or writes first brings the handshake to its end.
    Handshake(Box<Accept<TcpStream>>),
    Tls(Box<TlsStream<TcpStream>>),
    /// The handshake failed.
    Failed,
}

impl fmt::Debug for Io {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Plain(_) => "Plain",
            Self::Handshake(_) => "Handshake",
            Self::Tls(_) => "Tls",
            Self::Failed => "Failed",
        })
    }
}

#[derive(Debug)]
struct Greeting {
    bytes_missing: usize,
    timeout: Pin<Box<Sleep>>,
    place: Place,
    room: Arc<Room>,
}

/// What reads and writes once there is nothing left to shake hands about.
trait Bytes: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Bytes for T {}

impl Connection {
    fn new(stream: TcpStream, tls: Option<&Served>, peer: Arc<Peer>, greeting: Greeting) -> io::Result<Self> {
        stream.set_nodelay(true)?;
        let stream = match tls {
            Some(served) => {
                let config = Arc::clone(&served.borrow());
                Io::Handshake(Box::new(TlsAcceptor::from(config).accept(stream)))
            }
            None => Io::Plain(stream),
        };
        Ok(Self {
            stream,
            peer,
            greeting: Some(greeting),
            look: Box::pin(sleep(LOOK_INTERVAL)),
            place: None,
        })
    }

    /// What reads and writes, once the handshake is over.
    fn poll_bytes(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Pin<&mut dyn Bytes>>> {
        if let Io::Handshake(handshake) = &mut self.stream {
            match Pin::new(handshake.as_mut()).poll(cx) {
                Poll::Ready(Ok(stream)) => self.stream = Io::Tls(Box::new(stream)),
                Poll::Ready(Err(error)) => {
                    self.stream = Io::Failed;
                    let peer = self.peer.address();
                    tracing::debug!(%peer, %error, "a TLS handshake failed");
                    return Poll::Ready(Err(error));
                }
                Poll::Pending => {
                    ready!(self.poll_too_late(cx));
                    return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
                }
            }
        }
        Poll::Ready(match &mut self.stream {
            Io::Plain(stream) => Ok(Pin::new(stream)),
            Io::Tls(stream) => Ok(Pin::new(stream)),
            Io::Handshake(_) | Io::Failed => Err(io::ErrorKind::NotConnected.into()),
        })
    }

    /// Ready when the time for a greeting is over, or its place at the door another's; never after one.
    fn poll_too_late(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        match &mut self.greeting {
            Some(greeting) if greeting.place.poll_given_way(cx).is_ready() => Poll::Ready(()),
            Some(greeting) => greeting.timeout.as_mut().poll(cx),
            None => Poll::Pending,
        }
    }

    /// The greeting is over: from the door into the hub, where there is room.
    fn enter(&mut self) -> io::Result<()> {
        if let Some(greeting) = self.greeting.take_if(|greeting| greeting.bytes_missing == 0) {
            self.place = Some(greeting.room.place().ok_or(io::ErrorKind::ConnectionRefused)?);
        }
        Ok(())
    }

    /// Fails when the connection ends; looks again by itself.
    fn look(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        while self.look.as_mut().poll(cx).is_ready() {
            self.look.as_mut().reset(Instant::now() + LOOK_INTERVAL);
        }
        match self.peer.ends() {
            None => Ok(()),
            Some(why) => {
                tracing::debug!(peer = %self.peer.address(), why, "a connection is cut");
                Err(io::ErrorKind::ConnectionAborted.into())
            }
        }
    }
}

impl AsyncRead for Connection {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.look(cx)?;
        let before = buf.filled().len();
        let read = ready!(self.poll_bytes(cx))?.poll_read(cx, buf);
        if read.is_pending() {
            ready!(self.poll_too_late(cx));
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        if let Some(greeting) = &mut self.greeting {
            greeting.bytes_missing = greeting.bytes_missing.saturating_sub(buf.filled().len() - before);
            self.enter()?;
        }
        read
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.look(cx)?;
        ready!(self.poll_bytes(cx))?.poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.look(cx)?;
        ready!(self.poll_bytes(cx))?.poll_write_vectored(cx, bufs)
    }

    /// Both kinds of streams are.
    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_bytes(cx))?.poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.stream {
            Io::Plain(stream) => Pin::new(stream).poll_shutdown(cx),
            Io::Tls(stream) => Pin::new(stream).poll_shutdown(cx),
            // Nothing was said that would have to be ended; dropping it closes it.
            Io::Handshake(_) | Io::Failed => Poll::Ready(Ok(())),
        }
    }
}

impl Connected for Connection {
    type ConnectInfo = Arc<Peer>;

    fn connect_info(&self) -> Arc<Peer> {
        Arc::clone(&self.peer)
    }
}

#[cfg(test)]
mod tests {
    use futures::StreamExt;
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        task::JoinHandle,
    };

    use super::*;

    const PREFACE: &[u8; GREETING_BYTES] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

    type Door = Pin<Box<dyn Stream<Item = io::Result<Connection>> + Send>>;

    async fn door(
        connections_max: usize,
        per_address: Option<usize>,
        greeting_timeout: Duration,
    ) -> (std::net::SocketAddr, Door) {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("bound");
        let peers = Peers::new(per_address);
        (
            address,
            Box::pin(connections(listener, None, connections_max, peers, greeting_timeout)),
        )
    }

    async fn next(door: &mut Door) -> Connection {
        door.next().await.expect("open").expect("accepted")
    }

    /// One that reads its greeting in a task of its own, as a server does; gives how that ended.
    fn read_on(mut connection: Connection) -> JoinHandle<(io::Result<usize>, Connection)> {
        tokio::spawn(async move { (connection.read(&mut [0; 32]).await, connection) })
    }

    #[tokio::test]
    async fn one_connection_too_many_is_closed_and_room_comes_back() {
        let (address, mut door) = door(1, None, Duration::from_mins(1)).await;
        let mut greeted = async || {
            let mut stream = TcpStream::connect(address).await.expect("connects");
            stream.write_all(PREFACE).await.expect("taken");
            let (read, connection) = read_on(next(&mut door).await).await.expect("no panic");
            (read, connection, stream)
        };
        let (first, inside, _stream) = greeted().await;
        assert_eq!(first.expect("let in"), GREETING_BYTES);
        let (second, turned_away, mut stream) = greeted().await;
        assert_eq!(second.expect_err("no room").kind(), io::ErrorKind::ConnectionRefused);
        drop(turned_away);
        assert!(
            matches!(stream.read(&mut [0]).await, Ok(0) | Err(_)),
            "closed without a byte"
        );
        drop(inside);
        let (third, _inside, _stream) = greeted().await;
        assert_eq!(third.expect("let in"), GREETING_BYTES);
    }

    #[tokio::test]
    async fn a_connection_that_says_nothing_is_cut() {
        let (address, mut door) = door(1, None, Duration::from_millis(10)).await;
        let _silent = TcpStream::connect(address).await.expect("connects");
        let mut inside = next(&mut door).await;
        let error = inside.read(&mut [0; 32]).await.expect_err("cut");
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }

    #[tokio::test]
    async fn invariant_10_connections_that_hang_at_the_door_keep_nobody_out() {
        let (address, mut door) = door(1, None, Duration::from_mins(1)).await;
        let (mut streams, mut hanging) = (Vec::new(), Vec::new());
        for _ in 0..AT_THE_DOOR_MAX {
            streams.push(TcpStream::connect(address).await.expect("connects"));
            hanging.push(read_on(next(&mut door).await));
        }
        let mut honest = TcpStream::connect(address).await.expect("connects");
        let inside = next(&mut door).await;
        honest.write_all(PREFACE).await.expect("taken");
        let (read, _inside) = read_on(inside).await.expect("no panic");
        assert_eq!(read.expect("let in"), GREETING_BYTES);
        let (oldest, _) = hanging.remove(0).await.expect("no panic");
        assert_eq!(oldest.expect_err("gave way").kind(), io::ErrorKind::TimedOut);
        assert!(hanging.iter().all(|later| !later.is_finished()), "and nobody else did");
    }

    #[tokio::test]
    async fn invariant_10_an_address_has_no_more_than_its_connections() {
        let (address, mut door) = door(8, Some(1), Duration::from_mins(1)).await;
        let _first = TcpStream::connect(address).await.expect("connects");
        let _inside = next(&mut door).await;
        let mut second = TcpStream::connect(address).await.expect("connects");
        let mut byte = [0];
        tokio::select! {
            _ = door.next() => panic!("one too many was let in"),
            read = second.read(&mut byte) => assert!(matches!(read, Ok(0) | Err(_)), "closed without a byte"),
        }
    }
}

//! The door: how many connections are open, that each speaks TLS where the hub does, and soon says what it wants.

use std::{
    fmt, io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use futures::Stream;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Sleep, sleep},
};
use tokio_rustls::{Accept, TlsAcceptor, server::TlsStream};
use tonic::transport::server::{Connected, TcpConnectInfo};

use crate::tls::Served;

/// The fixed bytes that every HTTP/2 connection begins with (RFC 9113, section 3.4).
const GREETING_BYTES: usize = 24;
/// Before accepting again when the system gives no more descriptors.
const ACCEPT_RETRY_DELAY: Duration = Duration::from_millis(100);

/// Connections as they come, at most `connections_max` open at one time; further ones are closed at once.
///
/// One that does not begin to speak HTTP/2, after the handshake where there is `tls`, within `greeting_timeout` is cut;
/// later, HTTP/2's keepalive finds the dead. No connection waits for another's handshake: each is its own task's.
pub fn connections(
    listener: TcpListener,
    tls: Option<Served>,
    connections_max: usize,
    greeting_timeout: Duration,
) -> impl Stream<Item = io::Result<Connection>> {
    let room = Arc::new(Semaphore::new(connections_max));
    futures::stream::unfold((listener, false), move |(listener, mut told)| {
        let (room, tls) = (Arc::clone(&room), tls.clone());
        async move {
            loop {
                let accepted = listener.accept().await;
                match (accepted, Arc::clone(&room).try_acquire_owned()) {
                    (Ok((stream, _)), Ok(permit)) => {
                        let connection = Connection::new(stream, tls.as_ref(), permit, greeting_timeout);
                        return Some((connection, (listener, false)));
                    }
                    (Ok(_), Err(_)) if !told => {
                        told = true;
                        tracing::warn!(connections_max, "connections are turned away: raise max_connections");
                    }
                    (Ok(_), Err(_)) => {}
                    (Err(error), _) => {
                        tracing::warn!(%error, "a connection cannot be accepted");
                        sleep(ACCEPT_RETRY_DELAY).await;
                    }
                }
            }
        }
    })
}

/// An open connection, counted as long as it lives.
#[derive(Debug)]
pub struct Connection {
    stream: Io,
    peer: TcpConnectInfo,
    greeting: Option<Greeting>,
    _permit: OwnedSemaphorePermit,
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
}

/// What reads and writes once there is nothing left to shake hands about.
trait Bytes: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Bytes for T {}

impl Connection {
    fn new(
        stream: TcpStream,
        tls: Option<&Served>,
        permit: OwnedSemaphorePermit,
        timeout: Duration,
    ) -> io::Result<Self> {
        stream.set_nodelay(true)?;
        let greeting = Greeting {
            bytes_missing: GREETING_BYTES,
            timeout: Box::pin(sleep(timeout)),
        };
        let peer = stream.connect_info();
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
            _permit: permit,
        })
    }

    /// What reads and writes, once the handshake is over.
    fn poll_bytes(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Pin<&mut dyn Bytes>>> {
        if let Io::Handshake(handshake) = &mut self.stream {
            match Pin::new(handshake.as_mut()).poll(cx) {
                Poll::Ready(Ok(stream)) => self.stream = Io::Tls(Box::new(stream)),
                Poll::Ready(Err(error)) => {
                    self.stream = Io::Failed;
                    let peer = self.peer.remote_addr();
                    tracing::debug!(?peer, %error, "a TLS handshake failed");
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

    /// Ready when the time for a greeting is over; never after one.
    fn poll_too_late(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        match &mut self.greeting {
            Some(greeting) => greeting.timeout.as_mut().poll(cx),
            None => Poll::Pending,
        }
    }
}

impl AsyncRead for Connection {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let read = ready!(self.poll_bytes(cx))?.poll_read(cx, buf);
        if read.is_pending() {
            ready!(self.poll_too_late(cx));
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        if let Some(greeting) = &mut self.greeting {
            greeting.bytes_missing = greeting.bytes_missing.saturating_sub(buf.filled().len() - before);
            if greeting.bytes_missing == 0 {
                self.greeting = None;
            }
        }
        read
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        ready!(self.poll_bytes(cx))?.poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
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
    type ConnectInfo = TcpConnectInfo;

    fn connect_info(&self) -> TcpConnectInfo {
        self.peer.clone()
    }
}

#[cfg(test)]
mod tests {
    use futures::StreamExt;
    use tokio::io::AsyncReadExt;

    use super::*;

    type Door = Pin<Box<dyn Stream<Item = io::Result<Connection>>>>;

    async fn door(connections_max: usize, greeting_timeout: Duration) -> (std::net::SocketAddr, Door) {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("bound");
        (
            address,
            Box::pin(connections(listener, None, connections_max, greeting_timeout)),
        )
    }

    #[tokio::test]
    async fn one_connection_too_many_is_closed_and_room_comes_back() {
        let (address, mut door) = door(1, Duration::from_mins(1)).await;
        let _first = TcpStream::connect(address).await.expect("connects");
        let inside = door.next().await.expect("open").expect("accepted");
        let mut second = TcpStream::connect(address).await.expect("connects");
        let mut byte = [0];
        tokio::select! {
            _ = door.next() => panic!("one too many was let in"),
            read = second.read(&mut byte) => assert!(matches!(read, Ok(0) | Err(_)), "closed without a byte"),
        }
        drop(inside);
        let _third = TcpStream::connect(address).await.expect("connects");
        door.next().await.expect("open").expect("accepted");
    }

    #[tokio::test]
    async fn a_connection_that_says_nothing_is_cut() {
        let (address, mut door) = door(1, Duration::from_millis(10)).await;
        let _silent = TcpStream::connect(address).await.expect("connects");
        let mut inside = door.next().await.expect("open").expect("accepted");
        let error = inside.read(&mut [0; 32]).await.expect_err("cut");
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }
}

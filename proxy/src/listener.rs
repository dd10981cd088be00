//! The door: how many connections are open, and that each soon says what it wants.

use std::{
    io,
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
use tonic::transport::server::{Connected, TcpConnectInfo};

/// The fixed bytes that every HTTP/2 connection begins with (RFC 9113, section 3.4).
const GREETING_BYTES: usize = 24;
/// Before accepting again when the system gives no more descriptors.
const ACCEPT_RETRY_DELAY: Duration = Duration::from_millis(100);

/// Connections as they come, at most `connections_max` open at one time; further ones are closed at once.
///
/// One that does not begin to speak HTTP/2 within `greeting_timeout` is cut; later, HTTP/2's keepalive finds the dead.
pub fn connections(
    listener: TcpListener,
    connections_max: usize,
    greeting_timeout: Duration,
) -> impl Stream<Item = io::Result<Connection>> {
    let room = Arc::new(Semaphore::new(connections_max));
    futures::stream::unfold((listener, false), move |(listener, mut told)| {
        let room = Arc::clone(&room);
        async move {
            loop {
                let accepted = listener.accept().await;
                match (accepted, Arc::clone(&room).try_acquire_owned()) {
                    (Ok((stream, _)), Ok(permit)) => {
                        return Some((Connection::new(stream, permit, greeting_timeout), (listener, false)));
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
    stream: TcpStream,
    greeting: Option<Greeting>,
    _permit: OwnedSemaphorePermit,
}

#[derive(Debug)]
struct Greeting {
    bytes_missing: usize,
    timeout: Pin<Box<Sleep>>,
}

impl Connection {
    fn new(stream: TcpStream, permit: OwnedSemaphorePermit, timeout: Duration) -> io::Result<Self> {
        stream.set_nodelay(true)?;
        let greeting = Greeting {
            bytes_missing: GREETING_BYTES,
            timeout: Box::pin(sleep(timeout)),
        };
        Ok(Self {
            stream,
            greeting: Some(greeting),
            _permit: permit,
        })
    }
}

impl AsyncRead for Connection {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(cx, buf);
        let Some(greeting) = &mut self.greeting else {
            return read;
        };
        if read.is_pending() {
            ready!(greeting.timeout.as_mut().poll(cx));
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        greeting.bytes_missing = greeting.bytes_missing.saturating_sub(buf.filled().len() - before);
        if greeting.bytes_missing == 0 {
            self.greeting = None;
        }
        read
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

impl Connected for Connection {
    type ConnectInfo = TcpConnectInfo;

    fn connect_info(&self) -> TcpConnectInfo {
        self.stream.connect_info()
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
            Box::pin(connections(listener, connections_max, greeting_timeout)),
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

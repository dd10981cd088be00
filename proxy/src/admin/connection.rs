//! Connections of tools: how many, how slow, and how they end.

use std::{
    future::poll_fn,
    net::SocketAddr,
    pin::pin,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use axum::{Extension, Router};
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore, watch},
    task::JoinSet,
    time::{sleep, timeout},
};
use tokio_rustls::{TlsAcceptor, rustls::ServerConfig};

use crate::{
    admission::{Place, Places},
    tls::Served,
};

/// Connections on which no right token was shown yet; the oldest gives way.
const STRANGERS_MAX: usize = 64;
/// Connections of tools.
const CLIENTS_MAX: usize = 64;
/// For shaking hands.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Until a request's head is whole; a connection that nothing comes on is closed after as long.
const HEAD_TIMEOUT: Duration = Duration::from_secs(30);
/// What hyper buffers of a connection, heads included.
const BUFFER_BYTES_MAX: usize = 64 * 1024;
const HEADERS_MAX: usize = 64;
/// Before accepting again when the system gives no more descriptors.
const ACCEPT_RETRY_DELAY: Duration = Duration::from_millis(100);

/// The rooms that connections stand in.
#[derive(Debug)]
pub(super) struct Room {
    strangers: Arc<Places>,
    clients: Arc<Semaphore>,
}

/// Whose connection it is.
#[derive(Debug)]
pub(super) struct Client {
    address: SocketAddr,
    stranger: Place,
    clients: Arc<Semaphore>,
    /// Absent among strangers.
    place: Mutex<Option<OwnedSemaphorePermit>>,
}

impl Room {
    fn new() -> Self {
        Self {
            strangers: Places::new(STRANGERS_MAX),
            clients: Arc::new(Semaphore::new(CLIENTS_MAX)),
        }
    }

    fn stranger(&self, address: SocketAddr) -> Arc<Client> {
        let stranger = self.strangers.place();
        stranger.grow(1);
        Arc::new(Client {
            address,
            stranger,
            clients: Arc::clone(&self.clients),
            place: Mutex::default(),
        })
    }
}

impl Client {
    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Shown the right token, a connection stands apart from strangers; false where there is no room.
    pub(super) fn enter(&self) -> bool {
        let mut place = self.place.lock().unwrap_or_else(PoisonError::into_inner);
        if place.is_none() {
            *place = Arc::clone(&self.clients).try_acquire_owned().ok();
            if place.is_some() {
                self.stranger.clear();
            }
        }
        place.is_some()
    }
}

/// Serves whoever connects until `draining` turns true, and what was begun to its end; dropping it cuts all.
pub(super) async fn serve(
    listener: TcpListener,
    router: Router,
    tls: Option<Served>,
    mut draining: watch::Receiver<bool>,
) {
    let room = Room::new();
    let mut open = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = over(&mut draining) => break,
        };
        while open.try_join_next().is_some() {}
        match accepted {
            Ok((stream, address)) => {
                let client = room.stranger(address);
                let router = router.clone();
                open.spawn(connection(stream, client, router, tls.clone(), draining.clone()));
            }
            Err(error) => {
                tracing::warn!(%error, "a connection of a tool cannot be accepted");
                sleep(ACCEPT_RETRY_DELAY).await;
            }
        }
    }
    drop(listener);
    while open.join_next().await.is_some() {}
}

/// Waits until the hub drains.
async fn over(draining: &mut watch::Receiver<bool>) {
    // An error means that the sender is gone, and with it the reason to serve.
    let _over = draining.wait_for(|draining| *draining).await;
}

async fn connection(
    stream: TcpStream,
    client: Arc<Client>,
    router: Router,
    tls: Option<Served>,
    draining: watch::Receiver<bool>,
) {
    let served = async {
        stream.set_nodelay(true).ok();
        match tls {
            None => speak(stream, &client, router, draining).await,
            Some(served) => {
                let config = as_http1(&served.borrow());
                let shaken = timeout(HANDSHAKE_TIMEOUT, TlsAcceptor::from(config).accept(stream)).await;
                match shaken {
                    Ok(Ok(stream)) => speak(stream, &client, router, draining).await,
                    Ok(Err(error)) => tracing::debug!(client = %client.address, %error, "a TLS handshake failed"),
                    Err(_) => {}
                }
            }
        }
    };
    tokio::select! {
        () = served => {}
        () = poll_fn(|cx| client.stranger.poll_given_way(cx)) => {
            tracing::debug!(client = %client.address, "a connection without a token gives way to a younger one");
        }
    }
}

/// The hosts' certificate, for the HTTP that tools speak.
fn as_http1(config: &ServerConfig) -> Arc<ServerConfig> {
    let mut config = config.clone();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Arc::new(config)
}

async fn speak<S>(stream: S, client: &Arc<Client>, router: Router, mut draining: watch::Receiver<bool>)
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let service = TowerToHyperService::new(router.layer(Extension(Arc::clone(client))));
    let mut speaking = pin!(
        http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD_TIMEOUT)
            .max_buf_size(BUFFER_BYTES_MAX)
            .max_headers(HEADERS_MAX)
            .serve_connection(TokioIo::new(stream), service)
            .with_upgrades()
    );
    let ended = tokio::select! {
        ended = speaking.as_mut() => ended,
        () = over(&mut draining) => {
            speaking.as_mut().graceful_shutdown();
            speaking.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(client = %client.address, %error, "a connection of a tool ended");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn invariant_10_connections_without_a_token_keep_no_tool_out() {
        let address = SocketAddr::from(([127, 0, 0, 1], 1));
        let room = Room::new();
        let tool = room.stranger(address);
        assert!(tool.enter() && tool.enter(), "once for all of its requests");
        let strangers: Vec<_> = (0..=STRANGERS_MAX).map(|_| room.stranger(address)).collect();
        assert!(strangers[0].stranger.has_given_way() && !strangers[1].stranger.has_given_way());
        assert!(!tool.stranger.has_given_way());
        assert!(strangers[STRANGERS_MAX].enter());
        let more = (0..CLIENTS_MAX).map(|_| room.stranger(address)).collect::<Vec<_>>();
        assert_eq!(more.iter().filter(|client| client.enter()).count(), CLIENTS_MAX - 2);
        drop(tool);
        assert!(more[CLIENTS_MAX - 1].enter(), "room comes back");
    }
}

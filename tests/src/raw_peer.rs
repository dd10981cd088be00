//! A peer that speaks HTTP/2 as badly as it likes.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr},
};

use h2::{RecvStream, SendStream, client};
use prost::bytes::Bytes;
use tokio::{net::TcpSocket, task::JoinHandle};
use tonic::codegen::http::{Request, Response};

/// A connection to a hub without TLS.
pub struct RawPeer {
    requests: client::SendRequest<Bytes>,
    connection: JoinHandle<()>,
}

/// A request in the making, and its answer.
pub struct RawCall {
    /// What is sent.
    pub body: SendStream<Bytes>,
    /// What comes back.
    pub answer: client::ResponseFuture,
}

impl RawPeer {
    /// Connects from an address of loopback; `window` is how much of each answer it takes unread.
    pub async fn connect(hub: SocketAddr, from: Ipv4Addr, window: u32) -> io::Result<Self> {
        let socket = TcpSocket::new_v4()?;
        socket.bind(SocketAddr::new(from.into(), 0))?;
        let stream = socket.connect(hub).await?;
        let speaking = client::Builder::new()
            .initial_window_size(window)
            .max_concurrent_reset_streams(1 << 16)
            .handshake(stream)
            .await;
        let (requests, connection) = speaking.map_err(io::Error::other)?;
        let connection = tokio::spawn(async move {
            // How it ends is for who looks whether it has.
            let _ended = connection.await;
        });
        Ok(Self { requests, connection })
    }

    /// Whether the hub has ended it.
    pub fn is_cut(&self) -> bool {
        self.connection.is_finished()
    }

    /// Begins a call of a method such as `/p2p_sync.v1.Critical/Apply`.
    pub async fn call(&mut self, method: &str) -> Result<RawCall, h2::Error> {
        self.requests.clone().ready().await?;
        let request = Request::post(format!("http://hub{method}"))
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .body(())
            .expect("a request");
        let (answer, body) = self.requests.send_request(request, false)?;
        Ok(RawCall { body, answer })
    }
}

impl Drop for RawPeer {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

/// A message as gRPC frames it.
pub fn framed(message: &impl prost::Message) -> Bytes {
    framed_bytes(&message.encode_to_vec())
}

/// Bytes as gRPC frames them.
pub fn framed_bytes(message: &[u8]) -> Bytes {
    let length = u32::try_from(message.len()).expect("no message is so long");
    [&[0], &length.to_be_bytes()[..], message].concat().into()
}

/// The status that an answer ends with, and its first message, if it has one.
pub async fn outcome<M: prost::Message + Default>(
    answer: Response<RecvStream>,
) -> Result<(String, Option<M>), h2::Error> {
    let (head, mut body) = answer.into_parts();
    let mut bytes = Vec::new();
    while let Some(chunk) = body.data().await {
        let chunk = chunk?;
        body.flow_control().release_capacity(chunk.len())?;
        bytes.extend_from_slice(&chunk);
    }
    let trailers = body.trailers().await?.unwrap_or(head.headers);
    let status = trailers.get("grpc-status").and_then(|status| status.to_str().ok());
    let message = bytes.get(5..).and_then(|message| M::decode(message).ok());
    Ok((status.unwrap_or_default().to_owned(), message))
}

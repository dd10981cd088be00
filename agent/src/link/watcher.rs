//! Following streams of the hub: what it pushes, opened one by one, over a connection that is made when it is first used.

use std::{sync::Arc, time::Duration};

use p2p_sync_proto::{
    Code, Problem,
    envelope::Lane,
    ids::read_id,
    limits::SEALED_BYTES_MAX,
    message::Label,
    v1::{self, Update, subscribe_client::SubscribeClient},
};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::timeout,
};
use tonic::{Streaming, transport::Channel};

use super::{
    connect::Connector,
    session::{self, Sealer, Sent, not_opened},
};
use crate::{config::Config, keys::Keys};

/// For the hub to begin a watch.
const OPEN_TIMEOUT: Duration = Duration::from_secs(10);
/// Of a watch, before what was told is taken: a slow program's watch holds up no other.
const STREAM_WINDOW_BYTES: u32 = 64 * 1024;
/// How many heartbeats may stay away, and how long that is at least and at most.
const HEARTBEATS_MISSED_MAX: u32 = 3;
const SILENCE: (Duration, Duration) = (Duration::from_secs(3), Duration::from_mins(2));
/// Watches at a time: as many calls as hubs allow on one connection unless told otherwise.
const WATCHES_MAX: u32 = 64;

/// Opens watches.
pub(crate) struct Watcher {
    way: Way,
    places: Arc<Semaphore>,
}

enum Way {
    Hub {
        connector: Connector,
        client: SubscribeClient<Channel>,
        sealer: Sealer,
    },
    /// Through an agent that serves on a socket.
    #[cfg(unix)]
    Agent(std::path::PathBuf),
}

/// What one watch tells.
pub(crate) struct Updates {
    messages: Messages,
    /// What is silent for so long is taken for dead.
    silence: Duration,
    _place: OwnedSemaphorePermit,
}

enum Messages {
    Hub {
        connector: Connector,
        sealer: Sealer,
        messages: Box<Streaming<v1::Sealed>>,
        /// Of the next message.
        label: Label,
    },
    #[cfg(unix)]
    Agent(crate::local_api::WatchLines),
}

impl Watcher {
    /// Must be called inside a runtime. `incarnation` is 0 where no outbox takes part; `sent` is its count.
    pub(crate) fn new(config: &Config, keys: Arc<Keys>, incarnation: u64, sent: Arc<Sent>) -> Self {
        let connector = Connector::new(config, sent.clone());
        let channel = session::endpoint(config)
            .initial_stream_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(WATCHES_MAX * STREAM_WINDOW_BYTES)
            .connect_with_connector_lazy(connector.clone());
        let client = SubscribeClient::with_origin(channel, session::origin(config));
        Self::by(Way::Hub {
            connector,
            client: client.max_decoding_message_size(SEALED_BYTES_MAX),
            sealer: Sealer::new(keys, incarnation, sent),
        })
    }

    /// Follows through the agent that serves on a socket.
    #[cfg(unix)]
    pub(crate) fn through_agent(socket: std::path::PathBuf) -> Self {
        Self::by(Way::Agent(socket))
    }

    fn by(way: Way) -> Self {
        let places = Arc::new(Semaphore::new(WATCHES_MAX as usize));
        Self { way, places }
    }

    /// Begins a watch. `QUEUE_FULL` with 64 of them, codes of the hub's refusal, or `HUB_UNAVAILABLE`.
    pub(crate) async fn open(&self, request: v1::SubscribeRequest) -> Result<(Update, Updates), Problem> {
        let opened = timeout(OPEN_TIMEOUT, self.open_in_time(request)).await;
        let silent = |_| {
            Err(Problem::new(
                Code::HubUnavailable,
                "the hub did not begin a watch in time",
            ))
        };
        opened.unwrap_or_else(silent)
    }

    async fn open_in_time(&self, request: v1::SubscribeRequest) -> Result<(Update, Updates), Problem> {
        let full = |_| {
            let sentence = format!("{WATCHES_MAX} streams are followed through this agent already: end a subscription");
            Problem::new(Code::QueueFull, sentence)
        };
        let place = self.places.clone().try_acquire_owned().map_err(full)?;
        let (answer, messages) = match &self.way {
            Way::Hub {
                connector,
                client,
                sealer,
            } => {
                let failed = |status| connector.problem_of(&status);
                let (label, sealed) = sealer.seal(Lane::Subscribe, &request);
                let answered = client.clone().watch(sealed).await.map_err(failed)?;
                let mut messages = answered.into_inner();
                let first = messages.message().await.map_err(failed)?.ok_or_else(closed)?;
                let answer: Update = sealer.open(&label, &first)?;
                check(&answer)?;
                let label = Label {
                    id: read_id(&answer.watch_id).ok_or_else(not_opened)?,
                    sequence: 1,
                    ..label
                };
                let messages = Messages::Hub {
                    connector: connector.clone(),
                    sealer: sealer.clone(),
                    messages: Box::new(messages),
                    label,
                };
                (answer, messages)
            }
            #[cfg(unix)]
            Way::Agent(socket) => {
                let mut lines = crate::local_api::WatchLines::open(socket, &request).await?;
                let answer = lines.next().await?.ok_or_else(closed)?;
                check(&answer)?;
                (answer, Messages::Agent(lines))
            }
        };
        let heartbeat = Duration::from_millis(answer.heartbeat_ms.into());
        let silence = (heartbeat * HEARTBEATS_MISSED_MAX).clamp(SILENCE.0, SILENCE.1);
        let updates = Updates {
            messages,
            silence,
            _place: place,
        };
        Ok((answer, updates))
    }
}

impl Updates {
    /// The next message; `HUB_UNAVAILABLE` where none comes in time, or the hub ends the watch without a word.
    pub(crate) async fn next(&mut self) -> Result<Update, Problem> {
        let next = async {
            match &mut self.messages {
                Messages::Hub {
                    connector,
                    sealer,
                    messages,
                    label,
                } => {
                    let failed = |status| connector.problem_of(&status);
                    let sealed = messages.message().await.map_err(failed)?.ok_or_else(closed)?;
                    let update = sealer.open(label, &sealed)?;
                    label.sequence += 1;
                    Ok(update)
                }
                #[cfg(unix)]
                Messages::Agent(lines) => lines.next().await?.ok_or_else(closed),
            }
        };
        let silent = |_| Err(Problem::new(Code::HubUnavailable, "the hub tells nothing any more"));
        timeout(self.silence, next).await.unwrap_or_else(silent)
    }
}

/// The refusal that a message is, if it is one. RESYNC is none: it begins a snapshot.
pub(crate) fn check(update: &Update) -> Result<(), Problem> {
    match Code::try_from(update.code).unwrap_or(Code::Internal) {
        Code::None | Code::Resync => Ok(()),
        code => Err(Problem::new(code, update.message.clone())),
    }
}

fn closed() -> Problem {
    Problem::new(Code::HubUnavailable, "the hub has ended the watch")
}

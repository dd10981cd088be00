//! What other proxies commit, told by Redis: a wake-up with the change along, which may be lost.

use std::{collections::HashSet, sync::Arc, time::Duration};

use futures::StreamExt as _;
use p2p_sync_proto::v1;
use prost::Message as _;
use redis::{Msg, RedisResult, aio::PubSubSink};
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};

use super::{
    Streams,
    ring::{Batch, Entry},
};
use crate::{
    hosts::attend::{self, Attends},
    pipeline::Hub,
    redis_client::RedisClient,
};

/// For Redis to answer.
const TIMEOUT: Duration = Duration::from_secs(1);
/// A connection that died without a word is noticed after this and the time for an answer.
const PING_INTERVAL: Duration = Duration::from_secs(3);
/// Before the first attempt to connect again, and before the later ones.
const RETRY_DELAYS: (Duration, Duration) = (Duration::from_millis(20), Duration::from_millis(500));

/// The channel of a stream.
pub fn channel(prefix: &str, stream: &str) -> String {
    format!("{prefix}:updates:{stream}")
}

/// Hears what is published of the streams that are followed, and that maps change hands, as long as the proxy serves.
pub async fn listen(hub: Arc<Hub>, client: RedisClient, prefix: String) {
    let streams = Arc::clone(&hub.streams);
    let mut delay = RETRY_DELAYS.0;
    let mut told = false;
    loop {
        let error = match hear(&streams, &hub.attends, &client, &prefix, &mut delay).await {
            Ok(()) => "the connection was closed".to_owned(),
            Err(error) => error.to_string(),
        };
        streams.set_hears_others(false);
        let lasted = delay == RETRY_DELAYS.0;
        if lasted || !told {
            tracing::warn!(
                error,
                "Redis tells nothing of other proxies: the database is asked instead"
            );
            told = true;
        }
        sleep(delay.mul_f64(0.5 + fastrand::f64())).await;
        delay = (delay * 2).min(RETRY_DELAYS.1);
    }
}

/// One connection; returns when it ends. `delay` is short again once it has served.
async fn hear(
    streams: &Arc<Streams>,
    attends: &Attends,
    client: &RedisClient,
    prefix: &str,
    delay: &mut Duration,
) -> RedisResult<()> {
    let pubsub = client.hear().await?;
    let (mut sink, mut messages) = pubsub.split();
    let mut heard = HashSet::new();
    let maps = attend::channel(prefix);
    within(sink.subscribe(&maps)).await?;
    hear_of(streams, &mut sink, prefix, &mut heard).await?;
    // From here on nothing is missed but what Redis loses; what came before is looked for.
    streams.set_hears_others(true);
    *delay = RETRY_DELAYS.0;
    let mut pings = interval(PING_INTERVAL);
    pings.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            message = messages.next() => match message {
                Some(message) if message.get_channel_name() == maps => attends.hear(),
                Some(message) => told(streams, prefix, &message),
                None => return Ok(()),
            },
            () = streams.changed() => {
                if hear_of(streams, &mut sink, prefix, &mut heard).await? {
                    streams.look_now();
                }
            }
            _ = pings.tick() => {
                let _pong: redis::Value = within(sink.ping()).await?;
            }
        }
    }
}

/// Listens for what is followed now, and for nothing else; gives whether something was added.
async fn hear_of(
    streams: &Streams,
    sink: &mut PubSubSink,
    prefix: &str,
    heard: &mut HashSet<String>,
) -> RedisResult<bool> {
    let followed: HashSet<String> = streams.followed().into_iter().collect();
    let channels = |names: &[&String]| -> Vec<String> { names.iter().map(|name| channel(prefix, name)).collect() };
    let added: Vec<&String> = followed.difference(heard).collect();
    if !added.is_empty() {
        within(sink.subscribe(channels(&added))).await?;
    }
    let gone: Vec<&String> = heard.difference(&followed).collect();
    if !gone.is_empty() {
        within(sink.unsubscribe(channels(&gone))).await?;
    }
    let has_more = !added.is_empty();
    *heard = followed;
    Ok(has_more)
}

/// What cannot be read is found by the next look at the heads.
fn told(streams: &Arc<Streams>, prefix: &str, message: &Msg) {
    let name = message.get_channel_name();
    let stream = name
        .strip_prefix(prefix)
        .and_then(|rest| rest.strip_prefix(":updates:"));
    let (Some(stream), Ok(published)) = (stream, v1::Published::decode(message.get_payload_bytes())) else {
        tracing::debug!(channel = name, "an update of another proxy cannot be read");
        return;
    };
    let v1::Published {
        after,
        upto,
        states,
        left_out,
        critical,
        timeline,
    } = published;
    let entries = (!left_out).then(|| {
        states
            .into_iter()
            .map(|state| Arc::new(Entry::of_state(state)))
            .collect()
    });
    let batch = Batch {
        after,
        upto,
        entries,
        urgent: critical,
    };
    streams.hear(stream, timeline, batch);
}

async fn within<T>(call: impl Future<Output = RedisResult<T>>) -> RedisResult<T> {
    let silent = |_| Err((redis::ErrorKind::Io, "Redis does not answer").into());
    timeout(TIMEOUT, call).await.unwrap_or_else(silent)
}

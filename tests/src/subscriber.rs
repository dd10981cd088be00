//! A subscriber without an agent: it opens what it is told by hand, and sees whether a position was left out.

use std::collections::HashMap;

use p2p_sync_proto::{
    ids::read_id,
    keys::{Credential, Direction},
    limits::SEALED_BYTES_MAX,
    message::{self, Label},
    v1::{self, Sealed, StreamPosition, SubscribeRequest, Update, subscribe_client::SubscribeClient},
};
use tonic::{Status, Streaming, transport::Channel};

/// A watch that the hub has answered.
pub struct Subscriber {
    credential: Credential,
    /// Of the messages behind the answer, but for their number.
    label: Label,
    number: u64,
    /// The hub's answer.
    pub answer: Update,
    messages: Streaming<Sealed>,
}

/// Asks for streams, each from a position.
pub fn from(positions: &[(&str, u64)]) -> SubscribeRequest {
    let position = |(stream, sequence): &(&str, u64)| StreamPosition {
        stream: (*stream).to_owned(),
        sequence: *sequence,
    };
    SubscribeRequest {
        from: positions.iter().map(position).collect(),
        ..Default::default()
    }
}

impl Subscriber {
    /// Opens a watch under a label of the host's that was not used yet; the hub may refuse it in its answer.
    pub async fn open(
        channel: &Channel,
        credential: &Credential,
        label: Label,
        request: &SubscribeRequest,
    ) -> Result<Self, Status> {
        let sealed = message::seal(&credential.to_hub, Direction::ToHub, &label, request);
        Self::answered(channel, credential, label, sealed).await
    }

    /// As [`Self::open`], by a message that is sealed.
    pub async fn answered(
        channel: &Channel,
        credential: &Credential,
        label: Label,
        sealed: Sealed,
    ) -> Result<Self, Status> {
        let mut client = SubscribeClient::new(channel.clone()).max_decoding_message_size(SEALED_BYTES_MAX);
        let mut messages = client.watch(sealed).await?.into_inner();
        let first = messages.message().await?.expect("the hub answers");
        let answer: Update =
            message::open(&credential.to_host, Direction::ToHost, &label, &first).expect("sealed as the answer");
        let id = read_id(&answer.watch_id).unwrap_or_default();
        Ok(Self {
            credential: credential.clone(),
            label: Label { id, ..label },
            number: 0,
            answer,
            messages,
        })
    }

    /// The next message as it came; none after the last.
    pub async fn sealed(&mut self) -> Result<Option<Sealed>, Status> {
        self.messages.message().await
    }

    /// Opens a message as the one of a number; none where it is not.
    pub fn open_as(&self, number: u64, sealed: &Sealed) -> Option<Update> {
        let label = Label {
            sequence: number,
            ..self.label.clone()
        };
        message::open(&self.credential.to_host, Direction::ToHost, &label, sealed).ok()
    }

    /// The next message; none after the last.
    ///
    /// # Panics
    /// When it is not the next one that the hub sealed for this watch.
    pub async fn next(&mut self) -> Result<Option<Update>, Status> {
        let Some(sealed) = self.sealed().await? else {
            return Ok(None);
        };
        self.number += 1;
        Ok(Some(
            self.open_as(self.number, &sealed).expect("the next one of this watch"),
        ))
    }
}

/// Where a subscriber is, and what it holds.
#[derive(Debug, Default)]
pub struct Told {
    /// By stream.
    pub at: HashMap<String, u64>,
    /// The newest of each path, deletions included.
    pub states: HashMap<String, v1::State>,
    /// All changes, in the order in which they came.
    pub sequences: Vec<(String, u64)>,
    /// Snapshots that were begun.
    pub snapshots: usize,
    /// Of the last message.
    pub timeline: u64,
}

impl Told {
    /// Takes a message.
    ///
    /// # Panics
    /// When it does not go on where the one before ended, or tells something outside of what it covers or out of order.
    pub fn take(&mut self, update: Update) {
        self.timeline = update.timeline;
        for covered in update.covered {
            let at = self.at.entry(covered.stream).or_default();
            assert_eq!(*at, covered.after, "a heartbeat shows that something was missed");
            *at = covered.upto;
        }
        if update.stream.is_empty() {
            return;
        }
        let at = self.at.entry(update.stream.clone()).or_default();
        if update.snapshot {
            self.snapshots += 1;
            *at = 0;
        }
        assert_eq!(*at, update.after, "something was missed of {}", update.stream);
        let mut last = update.after;
        for state in update.states {
            assert!(
                state.stream_sequence > last,
                "out of order, or twice, in {}",
                update.stream
            );
            last = state.stream_sequence;
            self.sequences.push((update.stream.clone(), last));
            self.states.insert(state.path.clone(), state);
        }
        assert!(last <= update.upto, "told beyond what is covered");
        *at = update.upto;
    }

    /// Asks to go on from here.
    pub fn resume(&self) -> SubscribeRequest {
        let positions: Vec<(&str, u64)> = self.at.iter().map(|(stream, at)| (stream.as_str(), *at)).collect();
        SubscribeRequest {
            timeline: self.timeline,
            ..from(&positions)
        }
    }
}

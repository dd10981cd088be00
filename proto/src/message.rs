//! A message in its envelope: from a value to [`v1::Sealed`] and back.

use prost::Message;
use uuid::Uuid;

use crate::{
    body,
    envelope::{self, ENVELOPE_VERSION, Header, Lane, NotOpened},
    keys::{Credential, Direction, KeyId, SealKey},
    v1,
};

/// What the outside of an envelope says, read but not yet believed: only opening proves it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Label {
    /// The master key that the sender's key was derived from.
    pub key_id: KeyId,
    /// Who sends, or is sent to.
    pub host_id: Uuid,
    /// Of the host's credential.
    pub generation: u32,
    /// Of the host's outbox; 0 where none takes part.
    pub incarnation: u64,
    /// Counts the messages of one lane within the incarnation.
    pub sequence: u64,
    /// Of the batch or request.
    pub id: Uuid,
    /// What the message is for.
    pub lane: Lane,
}

impl Label {
    /// Reads the outside of an envelope.
    pub fn read(sealed: &v1::Sealed) -> Result<Self, NotOpened> {
        if sealed.version != u32::from(ENVELOPE_VERSION) {
            return Err(NotOpened);
        }
        Ok(Self {
            key_id: KeyId::parse(&sealed.key_id).map_err(|_| NotOpened)?,
            host_id: Uuid::from_slice(&sealed.host_id).map_err(|_| NotOpened)?,
            generation: sealed.generation,
            incarnation: sealed.incarnation,
            sequence: sealed.sequence,
            id: Uuid::from_slice(&sealed.id).map_err(|_| NotOpened)?,
            lane: Lane::try_from(sealed.lane).map_err(|_| NotOpened)?,
        })
    }

    /// The label of a host's message under its credential.
    pub fn from_credential(credential: &Credential, incarnation: u64, sequence: u64, id: Uuid, lane: Lane) -> Self {
        Self {
            key_id: credential.key_id.clone(),
            host_id: credential.host_id,
            generation: credential.generation,
            incarnation,
            sequence,
            id,
            lane,
        }
    }

    /// What the seal of a message under this label covers beside its body.
    pub fn header(&self, direction: Direction) -> Header<'_> {
        Header {
            key_id: &self.key_id,
            generation: self.generation,
            direction,
            host_id: self.host_id,
            incarnation: self.incarnation,
            sequence: self.sequence,
            id: self.id,
            lane: self.lane,
        }
    }
}

/// Compresses, encodes and seals a message.
pub fn seal(key: &SealKey, direction: Direction, label: &Label, message: &impl Message) -> v1::Sealed {
    v1::Sealed {
        version: u32::from(ENVELOPE_VERSION),
        key_id: label.key_id.as_str().to_owned(),
        host_id: label.host_id.as_bytes().to_vec().into(),
        generation: label.generation,
        incarnation: label.incarnation,
        sequence: label.sequence,
        id: label.id.as_bytes().to_vec().into(),
        lane: u32::from(label.lane as u8),
        body: envelope::seal(key, &label.header(direction), &body::encode(message)).into(),
    }
}

/// Opens and decodes a message; one identical error for every way of not opening.
pub fn open<M: Message + Default>(
    key: &SealKey,
    direction: Direction,
    label: &Label,
    sealed: &v1::Sealed,
) -> Result<M, NotOpened> {
    let plain = envelope::open(key, &label.header(direction), &sealed.body)?;
    body::decode(&plain).ok_or(NotOpened)
}

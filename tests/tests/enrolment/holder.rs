//! A token's holder that seals by hand, as often and with as many keys as wanted.

use p2p_sync_proto::{
    identity::Identity,
    keys::Direction,
    message::{self, Label},
    token::Token,
    v1::{self, enrol_client::EnrolClient},
};
use tonic::{Status, transport::Channel};

/// What a machine sends for a token.
pub(crate) fn request(token: &Token, identity: &Identity) -> v1::EnrolRequest {
    v1::EnrolRequest {
        public_key: identity.public_key().to_vec().into(),
        proof: identity.prove_enrolment(token.token_id).into(),
        agent_version: String::new(),
    }
}

/// Seals a request by a token.
pub(crate) fn sealed(token: &Token, request: &v1::EnrolRequest) -> v1::Sealed {
    let key = token.secret.seal_key(Direction::ToHub);
    message::seal(&key, Direction::ToHub, &token.label(), request)
}

/// Sends what was sealed, and opens the answer.
pub(crate) async fn send(channel: &Channel, token: &Token, sealed: v1::Sealed) -> Result<v1::EnrolReply, Status> {
    let answer = EnrolClient::new(channel.clone()).exchange(sealed).await?.into_inner();
    let label = Label::read(&answer).expect("the hub's label");
    let key = token.secret.seal_key(Direction::ToHost);
    Ok(message::open(&key, Direction::ToHost, &label, &answer).expect("the hub's seal"))
}

/// A whole exchange.
pub(crate) async fn exchange(channel: &Channel, token: &Token, identity: &Identity) -> Result<v1::EnrolReply, Status> {
    send(channel, token, sealed(token, &request(token, identity))).await
}

pub(crate) async fn connect(endpoint: &str) -> Channel {
    let address = Channel::from_shared(endpoint.to_owned()).expect("an address");
    address.connect().await.expect("the hub listens")
}

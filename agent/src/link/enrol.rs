//! The exchange of a one-time token for a credential.

use std::{sync::Arc, time::Duration};

use p2p_sync_proto::{
    Code, Problem,
    identity::Identity,
    keys::{Credential, Direction},
    limits::SEALED_BYTES_MAX,
    message::{self, Label},
    token::Token,
    v1::{self, enrol_client::EnrolClient},
};
use zeroize::Zeroizing;

use super::{
    connect::{Connector, problem_in},
    session::{endpoint, not_opened, origin},
};
use crate::config::Config;

/// A reply that was lost is asked for again, with the same key.
const ATTEMPTS: u32 = 3;
const PAUSE: Duration = Duration::from_secs(1);

/// What the hub gave.
pub(crate) struct Enrolled {
    pub(crate) credential: Credential,
    pub(crate) maps: Vec<String>,
    pub(crate) maps_taken: Vec<String>,
}

/// Gives a token and a public key for a credential. The same token and key get the same one again.
pub(crate) async fn exchange(config: &Config, token: &Token, identity: &Identity) -> Result<Enrolled, Problem> {
    let mut attempt = 1;
    loop {
        match exchange_once(config, token, identity).await {
            Err(problem) if problem.code.is_retryable() && attempt < ATTEMPTS => {
                tracing::info!("the token could not be exchanged yet, it is tried again: {problem}");
                attempt += 1;
                tokio::time::sleep(PAUSE).await;
            }
            done => return done,
        }
    }
}

async fn exchange_once(config: &Config, token: &Token, identity: &Identity) -> Result<Enrolled, Problem> {
    let connector = Connector::new(config, Arc::default());
    let connected = endpoint(config).connect_with_connector(connector.clone()).await;
    let channel = connected
        .map_err(|error| problem_in(&error).unwrap_or_else(|| Problem::new(Code::HubUnavailable, error.to_string())))?;
    let request = v1::EnrolRequest {
        public_key: identity.public_key().to_vec().into(),
        proof: identity.prove_enrolment(token.token_id).into(),
        agent_version: env!("CARGO_PKG_VERSION").to_owned(),
    };
    let label = token.label();
    let to_hub = token.secret.seal_key(Direction::ToHub);
    let mut call = tonic::Request::new(message::seal(&to_hub, Direction::ToHub, &label, &request));
    call.set_timeout(config.connect_timeout);
    let mut client = EnrolClient::with_origin(channel, origin(config)).max_decoding_message_size(SEALED_BYTES_MAX);
    let answer = client.exchange(call).await.map_err(|status| match status.code() {
        tonic::Code::Unauthenticated => Problem::new(
            Code::NotOpened,
            "the hub does not open this token: it is for another hub, or the hub has retired its key since; ask the operator \
             for a new one",
        ),
        _ => connector.problem_of(&status),
    })?;
    let sealed = answer.into_inner();
    if Label::read(&sealed).as_ref() != Ok(&label) {
        return Err(not_opened());
    }
    let to_host = token.secret.seal_key(Direction::ToHost);
    let reply: v1::EnrolReply =
        message::open(&to_host, Direction::ToHost, &label, &sealed).map_err(|_| not_opened())?;
    let code = reply.code();
    let credential = Zeroizing::new(reply.credential);
    if code != Code::None {
        return Err(Problem::new(code, reply.message));
    }
    let credential =
        Credential::parse(&credential).map_err(|error| Problem::new(Code::BadCredential, error.to_string()))?;
    Ok(Enrolled {
        credential,
        maps: reply.maps,
        maps_taken: reply.maps_taken,
    })
}

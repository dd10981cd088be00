//! What this host asks and tells the hub of maps, over the critical lane's connection.

use p2p_sync_proto::{
    Code, Problem,
    envelope::Lane,
    limits::SEALED_BYTES_MAX,
    v1::{self, MapInfo, map_request::What, maps_client::MapsClient},
};

use super::session::{Session, problem_of};
use crate::shared::Shared;

/// Makes one call. Codes of the hub's refusal, or `HUB_UNAVAILABLE`.
///
/// What changes something is made after what was made before and before any renewal that is made later: the hub takes
/// nothing that comes out of order.
pub(crate) async fn call(shared: &Shared, what: What) -> Result<Vec<MapInfo>, Problem> {
    let not_up = || {
        let down = shared.link.problem();
        down.unwrap_or_else(|| Problem::new(Code::HubUnavailable, "the hub has not answered yet: try again"))
    };
    let session = shared.session.load_full().ok_or_else(not_up)?;
    if let What::List(_) = what {
        return ask(
            shared,
            &session,
            v1::MapRequest {
                counter: 0,
                what: Some(what),
            },
        )
        .await;
    }
    let mut last = shared.leases.counter.lock().await;
    let mut change = |what: What| {
        *last += 1;
        v1::MapRequest {
            counter: *last,
            what: Some(what),
        }
    };
    match ask(shared, &session, change(what.clone())).await {
        // Whose answer did not come in time may have been overtaken.
        Err(problem) if problem.code == Code::Replay => ask(shared, &session, change(what)).await,
        answered => answered,
    }
}

async fn ask(shared: &Shared, session: &Session, request: v1::MapRequest) -> Result<Vec<MapInfo>, Problem> {
    let (label, sealed) = session.sealer.seal(Lane::Maps, &request);
    let mut call = tonic::Request::new(sealed);
    call.set_timeout(shared.config.connect_timeout);
    let mut client = MapsClient::with_origin(session.channel.clone(), session.origin.clone())
        .max_decoding_message_size(SEALED_BYTES_MAX);
    let answer = client.call(call).await.map_err(|status| problem_of(&status))?;
    let reply: v1::MapReply = session.sealer.open(&label, &answer.into_inner())?;
    match Code::try_from(reply.code).unwrap_or(Code::Internal) {
        Code::None => Ok(reply.maps),
        code => Err(Problem::new(code, reply.message)),
    }
}

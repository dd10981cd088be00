//! Renewing the host's leases, over the critical lane's connection.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use p2p_sync_proto::{
    Code, Problem,
    envelope::Lane,
    limits::SEALED_BYTES_MAX,
    v1::{self, session_client::SessionClient},
};

use super::session::{Session, problem_of};
use crate::shared::Shared;

/// Between two renewals at least, however much is in doubt.
const PAUSE_MIN: Duration = Duration::from_millis(500);
/// And at most: for a hub that tells nothing between renewals.
const PAUSE_MAX: Duration = Duration::from_mins(1);

/// Renews all leases and takes over what the hub says of them; gives how long it may be until the next time.
pub(super) async fn renew(shared: &Arc<Shared>, session: &Session) -> Result<Duration, Problem> {
    // What was told up to here this renewal tells whole, and no change is on its way beside it.
    let mut last = shared.leases.counter.lock().await;
    *last += 1;
    let (asked, counter) = (Instant::now(), *last);
    let (label, sealed) = session.sealer.seal(Lane::Renew, &v1::RenewRequest { counter });
    let mut call = tonic::Request::new(sealed);
    call.set_timeout(shared.config.connect_timeout);
    let mut client = SessionClient::with_origin(session.channel.clone(), session.origin.clone())
        .max_decoding_message_size(SEALED_BYTES_MAX);
    let answer = client.renew(call).await.map_err(|status| problem_of(&status))?;
    shared.metrics.answered(asked.elapsed());
    let reply: v1::RenewReply = session.sealer.open(&label, &answer.into_inner())?;
    shared.keys.heard(&label, reply.renew_credential);
    match Code::try_from(reply.code).unwrap_or(Code::Internal) {
        Code::None => {}
        code => return Err(Problem::new(code, reply.message)),
    }
    shared.take_leases(&reply, asked);
    Ok(Duration::from_millis(reply.lease_ms / 3).clamp(PAUSE_MIN, PAUSE_MAX))
}

/// Renews them every third of their time, soon when one is in doubt and at once when the hub tells of changes, until it is
/// dropped.
pub(super) async fn keep(shared: &Arc<Shared>, session: &Session, mut pause: Duration) {
    loop {
        let due = async {
            tokio::time::sleep(PAUSE_MIN).await;
            // Either way they are renewed.
            let _ = tokio::time::timeout(pause.saturating_sub(PAUSE_MIN), shared.leases.doubt.notified()).await;
        };
        tokio::select! {
            () = due => {}
            () = shared.leases.told.notified() => {}
        }
        match renew(shared, session).await {
            Ok(next) => pause = next,
            Err(problem) => {
                tracing::debug!("the leases could not be renewed, it is tried again: {problem}");
                pause = PAUSE_MIN * 2;
            }
        }
    }
}

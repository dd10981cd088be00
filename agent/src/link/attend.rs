//! What the hub tells of leases and duties when it changes, over the critical lane's connection.

use std::{
    convert::Infallible,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use p2p_sync_proto::{
    Code, Problem,
    envelope::Lane,
    ids::read_id,
    limits::SEALED_BYTES_MAX,
    message::Label,
    v1::{self, Notice, maps_client::MapsClient},
};
use tokio::time::{sleep, timeout};

use super::session::{Session, not_opened, problem_of};
use crate::{resend, shared::Shared};

/// For the hub to begin.
const OPEN_TIMEOUT: Duration = Duration::from_secs(10);
/// How many heartbeats may stay away, and how long that is at least and at most.
const HEARTBEATS_MISSED_MAX: u32 = 3;
const SILENCE: (Duration, Duration) = (Duration::from_secs(3), Duration::from_mins(2));
/// First and longest delay before the hub is asked again to tell: renewals go on meanwhile.
const RETRY: (Duration, Duration) = (Duration::from_millis(200), Duration::from_mins(1));

/// Attends as long as the connection lasts; ends never.
pub(super) async fn keep(shared: Arc<Shared>, session: Arc<Session>) {
    let mut attempts = 0;
    loop {
        let began = Instant::now();
        let Err(problem) = attend(&shared, &session).await;
        tracing::debug!("the hub tells nothing of leases between renewals: {problem}");
        attempts = if began.elapsed() > RETRY.1 { 1 } else { attempts + 1 };
        sleep(resend::delay(attempts, RETRY, fastrand::f64())).await;
    }
}

async fn attend(shared: &Arc<Shared>, session: &Session) -> Result<Infallible, Problem> {
    loop {
        let mut notices = timeout(OPEN_TIMEOUT, Notices::open(shared, session))
            .await
            .map_err(silent)??;
        // What changed before the hub listened was told by nobody.
        shared.leases.told.notify_one();
        loop {
            let next = tokio::select! {
                next = notices.next(session) => next?,
                // It is to be told so.
                () = shared.leaving_told.notified() => break,
            };
            if let Some(leases) = &next.leases {
                shared.notice_leases(leases);
            }
        }
    }
}

/// What the hub tells one after the other.
struct Notices {
    messages: tonic::Streaming<v1::Sealed>,
    /// Of the next one.
    label: Label,
    silence: Duration,
}

impl Notices {
    async fn open(shared: &Shared, session: &Session) -> Result<Self, Problem> {
        let request = v1::AttendRequest {
            leaving: shared.leaving.load(Ordering::SeqCst),
            keeps_no_copies: !shared.config.keep_backups,
        };
        let (label, sealed) = session.sealer.seal(Lane::Attend, &request);
        let mut client = MapsClient::with_origin(session.channel.clone(), session.origin.clone())
            .max_decoding_message_size(SEALED_BYTES_MAX);
        let answered = client.attend(sealed).await.map_err(|status| problem_of(&status))?;
        let mut messages = answered.into_inner();
        let first = read(&mut messages).await?;
        let answer: Notice = session.sealer.open(&label, &first)?;
        check(&answer)?;
        let heartbeat = Duration::from_millis(answer.heartbeat_ms.into());
        Ok(Self {
            messages,
            label: Label {
                id: read_id(&answer.attend_id).ok_or_else(not_opened)?,
                sequence: 1,
                ..label
            },
            silence: (heartbeat * HEARTBEATS_MISSED_MAX).clamp(SILENCE.0, SILENCE.1),
        })
    }

    async fn next(&mut self, session: &Session) -> Result<Notice, Problem> {
        let sealed = timeout(self.silence, read(&mut self.messages))
            .await
            .map_err(silent)??;
        let notice: Notice = session.sealer.open(&self.label, &sealed)?;
        self.label.sequence += 1;
        check(&notice)?;
        Ok(notice)
    }
}

async fn read(messages: &mut tonic::Streaming<v1::Sealed>) -> Result<v1::Sealed, Problem> {
    let message = messages.message().await.map_err(|status| problem_of(&status))?;
    message.ok_or_else(|| Problem::new(Code::HubUnavailable, "the hub has ended what it told"))
}

fn check(notice: &Notice) -> Result<(), Problem> {
    match Code::try_from(notice.code).unwrap_or(Code::Internal) {
        Code::None => Ok(()),
        code => Err(Problem::new(code, notice.message.clone())),
    }
}

fn silent(_: tokio::time::error::Elapsed) -> Problem {
    Problem::new(Code::HubUnavailable, "the hub tells nothing any more")
}

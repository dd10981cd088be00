//! What this host tells of itself now and then: how busy its machine and its line are, an operation of type
//! `HOST_METRICS`.
//!
//! A program may write the same path. What it wrote last stands beside what is told here, so that the hub has both.

mod machine;

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::Ordering},
    time::{Duration, Instant},
};

use p2p_sync_proto::v1::SyncDataType;
use serde_json::{Map, Value, json};

use crate::{
    lanes::{Priority, Submission},
    shared::Shared,
};

use machine::Machine;

/// Of the program's own, which is told again with each report.
const PROGRAM_BYTES_MAX: usize = 4096;
/// Round trips that the one told is the median of.
const ROUND_TRIPS: usize = 9;

/// What is known between two reports.
#[derive(Default)]
pub(crate) struct Metrics {
    round_trips: Mutex<VecDeque<Duration>>,
    program: Mutex<Map<String, Value>>,
}

impl Metrics {
    /// The hub has answered something that takes it no time.
    pub(crate) fn answered(&self, in_time: Duration) {
        let mut last = lock(&self.round_trips);
        last.truncate(ROUND_TRIPS - 1);
        last.push_front(in_time);
    }

    /// Takes note of what a program tells, if it is of this.
    pub(crate) fn note(&self, submission: &Submission<'_>) {
        if submission.data_type != SyncDataType::HostMetrics || submission.entity.is_some() {
            return;
        }
        let payload = submission.payload.filter(|payload| payload.len() <= PROGRAM_BYTES_MAX);
        let told = payload.and_then(|payload| serde_json::from_str(payload).ok());
        *lock(&self.program) = told.unwrap_or_default();
    }

    fn latency(&self) -> Option<Duration> {
        let mut last: Vec<Duration> = lock(&self.round_trips).iter().copied().collect();
        last.sort_unstable();
        last.get(last.len() / 2).copied()
    }
}

/// Reports every so often while the hub answers, until it is dropped. What could not be told then is out of date later.
pub(crate) async fn report(shared: Arc<Shared>, interval: Duration) {
    let mut before = Sample::take(&shared);
    loop {
        tokio::time::sleep(interval).await;
        let now = Sample::take(&shared);
        if shared.link.is_up() && !shared.is_stopping() {
            let payload = payload(&shared, &before, &now);
            let submission = Submission {
                data_type: SyncDataType::HostMetrics,
                map: "",
                account_id: 0,
                entity: None,
                char_id: None,
                payload: Some(&payload),
                priority: Priority::ByType,
                notify: false,
            };
            let taken = shared.take(false, |announce| shared.lanes.take(&submission, announce));
            if let Err(problem) = taken {
                tracing::debug!("how this host is could not be told: {problem}");
            }
        }
        before = now;
    }
}

fn payload(shared: &Shared, before: &Sample, now: &Sample) -> String {
    let mut told = lock(&shared.metrics.program).clone();
    now.machine.tell(&before.machine, &mut told);
    let seconds = now.at.duration_since(before.at).as_secs_f64();
    let mut tell = |name: &str, value: Value| _ = told.insert(name.to_owned(), value);
    tell("upload_used_kbps", json!(kbps(now.bytes_up - before.bytes_up, seconds)));
    tell(
        "download_used_kbps",
        json!(kbps(now.bytes_down - before.bytes_down, seconds)),
    );
    if shared.config.upload_limit_kbps > 0 {
        // What the line can carry nobody here knows; what it may, the volunteer has said.
        tell("upload_kbps", json!(shared.config.upload_limit_kbps));
    }
    if let Some(latency) = shared.metrics.latency() {
        tell("latency_ms", json!(tenths(latency.as_secs_f64() * 1000.0)));
    }
    tell("disconnects", json!(shared.link.disconnects.load(Ordering::Relaxed)));
    tell("maps", json!(shared.leases.held().len()));
    Value::Object(told).to_string()
}

/// What is counted, at a moment.
struct Sample {
    at: Instant,
    machine: Machine,
    bytes_up: u64,
    bytes_down: u64,
}

impl Sample {
    fn take(shared: &Shared) -> Self {
        Self {
            at: Instant::now(),
            machine: Machine::read(),
            bytes_up: shared.sent.bytes_up.load(Ordering::Relaxed),
            bytes_down: shared.sent.bytes_down.load(Ordering::Relaxed),
        }
    }
}

#[allow(
    clippy::cast_possible_truncation,
    clippy::cast_precision_loss,
    clippy::cast_sign_loss
)]
fn kbps(bytes: u64, seconds: f64) -> u64 {
    (bytes as f64 * 8.0 / 1000.0 / seconds.max(0.001)).round() as u64
}

fn tenths(number: f64) -> f64 {
    (number * 10.0).round() / 10.0
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_latency_is_the_median_of_the_last_round_trips() {
        let metrics = Metrics::default();
        assert_eq!(metrics.latency(), None);
        for milliseconds in [500, 500, 500, 500, 500, 1, 2, 3, 4, 900, 5, 6, 7, 8] {
            metrics.answered(Duration::from_millis(milliseconds));
        }
        assert_eq!(metrics.latency(), Some(Duration::from_millis(5)));
    }

    #[test]
    fn what_a_program_tells_last_is_kept_unless_it_is_long_or_of_something_else() {
        let metrics = Metrics::default();
        let told = |data_type, payload| {
            metrics.note(&Submission {
                data_type,
                map: "",
                account_id: 0,
                entity: None,
                char_id: None,
                payload,
                priority: Priority::ByType,
                notify: false,
            });
            Value::Object(lock(&metrics.program).clone())
        };
        let players = json!({"players": 7});
        assert_eq!(told(SyncDataType::HostMetrics, Some(r#"{"players":7}"#)), players);
        assert_eq!(told(SyncDataType::MapState, Some(r#"{"users":3}"#)), players);
        let long = format!("{{\"text\":\"{}\"}}", "x".repeat(PROGRAM_BYTES_MAX));
        assert_eq!(told(SyncDataType::HostMetrics, Some(&long)), json!({}));
        told(SyncDataType::HostMetrics, Some(r#"{"players":7}"#));
        assert_eq!(told(SyncDataType::HostMetrics, None), json!({}));
    }

    #[test]
    fn rates_are_in_kilobits_a_second() {
        assert_eq!(kbps(125_000, 10.0), 100);
        assert_eq!(kbps(0, 0.0), 0);
    }
}

//! Feeding the agent on a fixed schedule: the recording by one thread, as a game loop does, and calls that wait by many.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use hdrhistogram::Histogram;
use p2p_sync_agent::{Agent, OperationState};
use p2p_sync_proto::v1::SyncDataType;

use super::{
    Options,
    ledger::{Ledger, Submitted},
};
use crate::{
    recording::Happening,
    times::{histogram, microseconds},
};

/// The types that callers wait for.
const CALLED_TYPES: [SyncDataType; 3] = [
    SyncDataType::CriticalGameState,
    SyncDataType::MapState,
    SyncDataType::PlayerPosition,
];

/// What was fed, and how it went.
pub(super) struct Fed<'a> {
    pub(super) happenings: &'a [Happening],
    pub(super) began: Instant,
    /// How late the recording's thread was at worst.
    pub(super) late: Duration,
    /// Operations that the agent did not take.
    pub(super) refused: usize,
    pub(super) calls: Calls,
}

/// How the waiting calls went.
pub(super) struct Calls {
    /// Microseconds from when a call was due to its answer.
    pub(super) latency: Histogram<u64>,
    /// Calls without an answer in time.
    pub(super) timeouts: usize,
    pub(super) refused: usize,
}

impl Calls {
    fn new() -> Self {
        Self {
            latency: histogram(),
            timeouts: 0,
            refused: 0,
        }
    }

    fn add(&mut self, other: &Self) {
        self.latency.add(&other.latency).expect("of the same bounds");
        self.timeouts += other.timeouts;
        self.refused += other.refused;
    }
}

/// Replays the recording, with callers beside it until it ends.
pub(super) fn feed<'a>(options: &Options, agent: &Agent, happenings: &'a [Happening], ledger: &Ledger) -> Fed<'a> {
    let rounds = options.rounds as usize;
    ledger.reserve(happenings.len() * rounds * 2);
    let ended = AtomicBool::new(false);
    let began = Instant::now();
    std::thread::scope(|scope| {
        let caller = |number| Caller {
            options,
            agent,
            happenings,
            ledger,
            began,
            number,
        };
        let callers: Vec<_> = (0..options.callers)
            .map(|number| {
                let (caller, ended) = (caller(number), &ended);
                scope.spawn(move || caller.call(ended))
            })
            .collect();
        let (late, refused) = replay(options, agent, happenings, ledger, began);
        ended.store(true, Ordering::Relaxed);
        let mut calls = Calls::new();
        for caller in callers {
            calls.add(&caller.join().expect("a caller does not panic"));
        }
        Fed {
            happenings,
            began,
            late,
            refused,
            calls,
        }
    })
}

/// Submits every happening when it is due; gives how late it was at worst, and how many were refused.
fn replay(
    options: &Options,
    agent: &Agent,
    happenings: &[Happening],
    ledger: &Ledger,
    began: Instant,
) -> (Duration, usize) {
    let (mut late, mut refused) = (Duration::ZERO, 0);
    let round_ms = happenings.last().map_or(0, |happening| happening.at_ms);
    for round in 0..u64::from(options.rounds) {
        for (index, happening) in happenings.iter().enumerate() {
            let due = began + Duration::from_millis(round * round_ms + happening.at_ms).div_f64(options.speed);
            sleep_until(due);
            late = late.max(due.elapsed());
            let at = Instant::now();
            match agent.submit(&happening.submission()) {
                Ok(id) => ledger.submitted(
                    id,
                    Submitted {
                        at,
                        waited: false,
                        happening: index,
                    },
                ),
                Err(_) => refused += 1,
            }
        }
    }
    (late, refused)
}

/// One of the threads that make waiting calls.
struct Caller<'a> {
    options: &'a Options,
    agent: &'a Agent,
    happenings: &'a [Happening],
    ledger: &'a Ledger,
    began: Instant,
    number: u32,
}

impl Caller<'_> {
    /// Calls on its share of the schedule until the recording has ended.
    fn call(&self, ended: &AtomicBool) -> Calls {
        let mut calls = Calls::new();
        let by_type = CALLED_TYPES.map(|data_type| {
            let is_put = |happening: &Happening| happening.data_type == data_type && happening.payload.is_some();
            let indices = self
                .happenings
                .iter()
                .enumerate()
                .filter(|(_, happening)| is_put(happening));
            indices.map(|(index, _)| index).collect::<Vec<_>>()
        });
        for number in (self.number..).step_by(self.options.callers as usize) {
            let due = self.began + Duration::from_secs_f64(f64::from(number) / f64::from(self.options.calls));
            sleep_until(due);
            if ended.load(Ordering::Relaxed) {
                break;
            }
            let of_type = &by_type[number as usize % by_type.len()];
            let happening = of_type[number as usize / by_type.len() % of_type.len()];
            let at = Instant::now();
            match self.agent.submit_critical(&self.happenings[happening].submission()) {
                Ok((id, settled)) => {
                    self.ledger.submitted(
                        id,
                        Submitted {
                            at,
                            waited: true,
                            happening,
                        },
                    );
                    calls.latency.saturating_record(microseconds(due.elapsed()));
                    calls.timeouts += usize::from(settled.state == OperationState::Unknown);
                }
                Err(_) => calls.refused += 1,
            }
        }
        calls
    }
}

fn sleep_until(due: Instant) {
    let left = due.saturating_duration_since(Instant::now());
    if !left.is_zero() {
        std::thread::sleep(left);
    }
}

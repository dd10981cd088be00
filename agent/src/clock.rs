//! How far this machine's clock is from the hub's. Nothing is decided by either: what the hub sees is ordered by versions and
//! by when it came. But a volunteer wonders at times that are shown wrong, and certificates and tokens end by the clock.

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use p2p_sync_proto::{Code, Problem};

/// From here on it is told. Time servers keep clocks within milliseconds, and the way to the hub takes seconds at the most.
const TOLD_BEYOND: Duration = Duration::from_secs(30);

/// What the hub's time has shown.
#[derive(Default)]
pub(crate) struct Clock {
    last: Mutex<Last>,
}

#[derive(Clone, Copy, Default)]
struct Last {
    ahead_ms: Option<i64>,
    told: bool,
}

impl Clock {
    /// Takes the hub's time from the answer to a call, and tells once that this machine's is another. An older hub tells none.
    pub(crate) fn heard(&self, hub_time_ms: u64, asked_at: SystemTime, took: Duration) {
        if hub_time_ms == 0 {
            return;
        }
        let ahead_ms = hub_ahead_ms(hub_time_ms, asked_at, took);
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let problem = problem_of(ahead_ms);
        if let (Some(problem), false) = (&problem, last.told) {
            tracing::warn!("{problem}");
        }
        *last = Last {
            ahead_ms: Some(ahead_ms),
            told: problem.is_some(),
        };
    }

    /// By how many milliseconds the hub's clock is ahead of this machine's, negative where it is behind; absent until it was
    /// heard.
    pub(crate) fn hub_ahead_ms(&self) -> Option<i64> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner).ahead_ms
    }
}

/// The hub read its clock somewhere within the call: taken for the middle, that is wrong by half of it at the most.
fn hub_ahead_ms(hub_time_ms: u64, asked_at: SystemTime, took: Duration) -> i64 {
    let middle = asked_at + took / 2;
    let here = match middle.duration_since(UNIX_EPOCH) {
        Ok(since) => i128::try_from(since.as_millis()).unwrap_or(i128::MAX),
        Err(before) => -i128::try_from(before.duration().as_millis()).unwrap_or(i128::MAX),
    };
    let ahead = i128::from(hub_time_ms).saturating_sub(here);
    i64::try_from(ahead).unwrap_or(if ahead > 0 { i64::MAX } else { i64::MIN })
}

/// `CLOCK_SKEW` where this machine's clock is to be set.
pub(crate) fn problem_of(hub_ahead_ms: i64) -> Option<Problem> {
    let apart = Duration::from_millis(hub_ahead_ms.unsigned_abs());
    if apart <= TOLD_BEYOND {
        return None;
    }
    let direction = if hub_ahead_ms > 0 { "behind" } else { "ahead of" };
    let sentence = format!(
        "this machine's clock is {} {direction} the hub's: set it by a time server, on Linux `timedatectl set-ntp true`; nothing \
         is refused for it, but times are shown wrong, and certificates seem to be over or not to have begun",
        shown(apart)
    );
    Some(Problem::new(Code::ClockSkew, sentence))
}

/// In the largest unit of which there are two.
fn shown(apart: Duration) -> String {
    let seconds = apart.as_secs();
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7_200 => format!("{} min", seconds / 60),
        7_200..172_800 => format!("{} h", seconds / 3_600),
        _ => format!("{} days", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hubs_time_is_compared_with_the_middle_of_the_call() {
        let at = |seconds| UNIX_EPOCH + Duration::from_secs(seconds);
        for (hub_time_ms, asked_at, took_ms, ahead_ms) in [
            (1_000_000, at(1_000), 0, 0),
            (1_000_000, at(999), 2_000, 0),
            (1_060_000, at(1_000), 1_000, 59_500),
            (1_000_000, at(1_060), 0, -60_000),
            (u64::MAX, at(0), 0, i64::MAX),
            (1, UNIX_EPOCH - Duration::from_secs(5), 0, 5_001),
        ] {
            let took = Duration::from_millis(took_ms);
            assert_eq!(hub_ahead_ms(hub_time_ms, asked_at, took), ahead_ms, "{hub_time_ms}");
        }
    }

    #[test]
    fn beyond_half_a_minute_it_is_told_in_which_direction_and_by_how_much() {
        assert_eq!([0, 30_000, -30_000].map(problem_of), [None, None, None]);
        for (ahead_ms, part) in [
            (31_000, "clock is 31 s behind the hub's"),
            (-45_000, "clock is 45 s ahead of the hub's"),
            (3_599_000, "59 min behind"),
            (-7_200_000, "2 h ahead"),
            (i64::MIN, "days ahead"),
        ] {
            let problem = problem_of(ahead_ms).expect("too much");
            assert_eq!(problem.code, Code::ClockSkew);
            assert!(problem.sentence.contains(part), "{ahead_ms}: {problem}");
        }
    }

    #[test]
    fn it_is_told_once_until_the_clock_was_right_again() {
        let clock = Clock::default();
        let told = |hub_seconds: u64| {
            clock.heard(
                hub_seconds * 1_000,
                UNIX_EPOCH + Duration::from_secs(100),
                Duration::ZERO,
            );
            clock.last.lock().expect("not poisoned").told
        };
        assert_eq!(clock.hub_ahead_ms(), None);
        assert_eq!([100, 200, 201, 100, 200].map(told), [false, true, true, false, true]);
        assert_eq!(clock.hub_ahead_ms(), Some(100_000));
        clock.heard(0, UNIX_EPOCH, Duration::ZERO);
        assert_eq!(
            clock.hub_ahead_ms(),
            Some(100_000),
            "a hub that tells no time says nothing"
        );
    }
}

//! Admission: how much of the hub one host, one connection or one address may take, so that none slows or stops the others.
//!
//! Three things follow one another. `peers` bounds what connects, before anything is known of it. `intake` bounds what is
//! on its way in and not opened yet, which anybody can send. `hosts` bounds what a host may do, and counts only what the
//! host's own seal proves: nobody uses up another's share by its name.

pub mod hosts;
pub mod intake;
pub mod peers;
mod places;

use std::{num::NonZeroU32, time::Duration};

use governor::{
    NotUntil, Quota, RateLimiter,
    clock::{Clock, MonotonicClock},
    middleware::StateInformationMiddleware,
    state::{InMemoryState, NotKeyed},
};
use std::time::Instant;

pub use places::{Place, Places};

/// So much a second on average, and a burst.
#[derive(Debug)]
pub(crate) struct Rate {
    limiter: RateLimiter<NotKeyed, InMemoryState, MonotonicClock, StateInformationMiddleware>,
    per_second: NonZeroU32,
    burst: NonZeroU32,
}

impl Rate {
    pub(crate) fn new(per_second: NonZeroU32, burst: NonZeroU32) -> Self {
        let quota = Quota::per_second(per_second).allow_burst(burst);
        Self {
            limiter: RateLimiter::direct_with_clock(quota, MonotonicClock).with_middleware(),
            per_second,
            burst,
        }
    }

    /// Takes so many of it and gives how many are left, or none and says how long it is until they are there. More than a burst
    /// counts as one.
    pub(crate) fn take(&self, many: usize) -> Result<u32, Duration> {
        let many = u32::try_from(many).unwrap_or(u32::MAX).min(self.burst.get());
        let Some(many) = NonZeroU32::new(many) else {
            return Ok(self.burst.get());
        };
        let wait = |not_until: NotUntil<Instant>| not_until.wait_time_from(MonotonicClock.now());
        match self.limiter.check_n(many) {
            Ok(taken) => taken.map(|left| left.remaining_burst_capacity()).map_err(wait),
            // Never: it is at most a burst.
            Err(_) => Ok(0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_gives_a_burst_and_then_says_when_there_is_more() {
        let number = |number| NonZeroU32::new(number).expect("not zero");
        let rate = Rate::new(number(10), number(20));
        assert_eq!(rate.take(0), Ok(20));
        assert_eq!(rate.take(12), Ok(8));
        let rate = Rate::new(number(10), number(20));
        assert_eq!(rate.take(usize::MAX), Ok(0), "more than a burst is one");
        let wait = rate.take(5).expect_err("used up");
        assert!(
            wait > Duration::from_millis(300) && wait <= Duration::from_millis(500),
            "{wait:?}"
        );
    }
}

//! When to try again: exponential backoff with jitter, as a plain function.

use std::time::Duration;

/// The delay before attempt `attempt + 1`, after `attempt` attempts have failed (from 1).
///
/// Doubles from `first` up to `longest`; `random` in 0..1 takes up to half of it off, so that hosts that lost the hub
/// together do not come back together.
pub(crate) fn delay(attempt: u32, (first, longest): (Duration, Duration), random: f64) -> Duration {
    let doubled = first.saturating_mul(1 << attempt.saturating_sub(1).min(20));
    doubled.min(longest).mul_f64(1.0 - random.clamp(0.0, 1.0) / 2.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOUNDS: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

    #[test]
    fn the_delay_doubles_up_to_its_bound() {
        let delays: Vec<u128> = (1..=8).map(|attempt| delay(attempt, BOUNDS, 0.0).as_millis()).collect();
        assert_eq!(delays, [100, 200, 400, 800, 1600, 3200, 5000, 5000]);
        assert_eq!(delay(u32::MAX, BOUNDS, 0.0), BOUNDS.1);
    }

    #[test]
    fn jitter_takes_off_half_at_most() {
        assert_eq!(delay(1, BOUNDS, 1.0), Duration::from_millis(50));
        assert_eq!(delay(1, BOUNDS, 0.5), Duration::from_millis(75));
    }
}

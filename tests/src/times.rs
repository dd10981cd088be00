//! How long things took, as runs print and write it.

use std::{fmt, time::Duration};

use hdrhistogram::Histogram;
use serde::Serialize;

/// A distribution of times.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Times {
    pub(crate) count: u64,
    pub(crate) p50_ms: f64,
    pub(crate) p99_ms: f64,
    pub(crate) max_ms: f64,
}

impl Times {
    pub(crate) fn of(histogram: &Histogram<u64>) -> Self {
        Self {
            count: histogram.len(),
            p50_ms: milliseconds(histogram.value_at_quantile(0.5)),
            p99_ms: milliseconds(histogram.value_at_quantile(0.99)),
            max_ms: milliseconds(histogram.max()),
        }
    }
}

/// A line for each, below a head.
pub(crate) fn write_table(f: &mut fmt::Formatter<'_>, rows: &[(&str, &Times)]) -> fmt::Result {
    writeln!(
        f,
        "{:24}{:>10}{:>10}{:>10}{:>10}",
        "", "count", "p50 ms", "p99 ms", "max ms"
    )?;
    for (name, times) in rows {
        let Times {
            count,
            p50_ms,
            p99_ms,
            max_ms,
        } = times;
        writeln!(f, "{name:24}{count:>10}{p50_ms:>10.2}{p99_ms:>10.2}{max_ms:>10.2}")?;
    }
    Ok(())
}

/// Microseconds, from 1 to ten minutes, in three digits.
pub(crate) fn histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, 600_000_000, 3).expect("valid bounds")
}

pub(crate) fn microseconds(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

#[allow(clippy::cast_precision_loss)]
pub(crate) fn milliseconds(microseconds: u64) -> f64 {
    microseconds as f64 / 1000.0
}

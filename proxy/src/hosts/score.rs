//! How good a host is for a map, 0 to 100: by what the hub measures itself, and by what the host says of itself, which is its
//! word. What nobody knows counts half.

use std::time::Duration;

/// At most this is as good as it gets, milliseconds; from the other on it is as bad.
const LATENCY_MS: (f64, f64) = (20.0, 300.0);
/// A line of so much carries any map.
const UPLOAD_KBPS: f64 = 10_000.0;
/// As much free memory needs no more.
const FREE_MB: f64 = 2_048.0;
/// So many broken connections weigh as much as a lease that ran out.
const DISCONNECTS_PER_LAPSE: f64 = 10.0;
/// After so long a host has shown that it stays.
const UPTIME: Duration = Duration::from_hours(1);
/// What a host said longer ago is not known any more.
pub const WORD_KEPT: Duration = Duration::from_mins(5);

/// What counts how much; of their sum.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Weights {
    /// Processor time that is free; the host's word.
    pub cpu: f64,
    /// Memory that is free; the host's word.
    pub memory: f64,
    /// The way to the hub; the host's word.
    pub latency: f64,
    /// What its line carries upwards; the host's word.
    pub upload: f64,
    /// Leases that ran out and hand-overs that were late within a day, by the hub; connections that broke, by the host.
    pub stability: f64,
    /// How long it has been up, by the hub.
    pub uptime: f64,
    /// How many maps it has room for beside those it holds, by the hub.
    pub room: f64,
}

impl Default for Weights {
    fn default() -> Self {
        Self {
            cpu: 20.0,
            memory: 10.0,
            latency: 15.0,
            upload: 10.0,
            stability: 25.0,
            uptime: 5.0,
            room: 15.0,
        }
    }
}

impl Weights {
    /// The names of all, as settings and people call them.
    pub const NAMES: [&'static str; 7] = ["cpu", "memory", "latency", "upload", "stability", "uptime", "room"];

    /// Those of the names, in their order.
    pub fn of(numbers: [f64; 7]) -> Self {
        let [cpu, memory, latency, upload, stability, uptime, room] = numbers;
        Self {
            cpu,
            memory,
            latency,
            upload,
            stability,
            uptime,
            room,
        }
    }

    /// In the order of the names.
    pub fn numbers(&self) -> [f64; 7] {
        [
            self.cpu,
            self.memory,
            self.latency,
            self.upload,
            self.stability,
            self.uptime,
            self.room,
        ]
    }
}

/// What a host says of itself; each may be missing.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Word {
    /// 0 to 100, of all cores.
    pub cpu_percent: Option<f64>,
    /// Of the machine.
    pub ram_total_mb: Option<f64>,
    /// Of that.
    pub ram_free_mb: Option<f64>,
    /// What the line carries.
    pub upload_kbps: Option<f64>,
    /// To the hub and back.
    pub latency_ms: Option<f64>,
    /// Since its agent started.
    pub disconnects: Option<f64>,
    /// More maps it does not want.
    pub maps_max: Option<usize>,
}

/// What is known of a host.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Facts {
    /// Its own word, where it is not too old.
    pub word: Word,
    /// Leases that ran out and went to others, and hand-overs that were late, within a day.
    pub lapses: u32,
    /// Since it opened its outbox.
    pub uptime: Duration,
    /// Since it was heard last.
    pub silence: Duration,
}

/// A host's score, but for the maps it holds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rating {
    rest: f64,
    room: f64,
}

impl Rating {
    /// Rates a host; one that has missed its renewals, as who is silent for longer than `silent_after` has, is half as stable.
    pub fn of(weights: &Weights, facts: &Facts, silent_after: Duration) -> Self {
        let Word {
            cpu_percent,
            ram_total_mb,
            ram_free_mb,
            upload_kbps,
            latency_ms,
            disconnects,
            maps_max: _,
        } = facts.word;
        // Of a small machine half of its memory is as much as a large one needs.
        let enough_mb = ram_total_mb.map_or(FREE_MB, |total| (total / 2.0).clamp(1.0, FREE_MB));
        let troubles = f64::from(facts.lapses) + disconnects.unwrap_or(0.0).max(0.0) / DISCONNECTS_PER_LAPSE;
        let punctuality = if facts.silence > silent_after { 0.5 } else { 1.0 };
        let parts = [
            (weights.cpu, part(cpu_percent, |percent| 1.0 - percent / 100.0)),
            (weights.memory, part(ram_free_mb, |free| free / enough_mb)),
            (
                weights.latency,
                part(latency_ms, |ms| (LATENCY_MS.1 - ms) / (LATENCY_MS.1 - LATENCY_MS.0)),
            ),
            (weights.upload, part(upload_kbps, |kbps| kbps / UPLOAD_KBPS)),
            (weights.stability, punctuality / (1.0 + troubles)),
            (
                weights.uptime,
                part(Some(facts.uptime.as_secs_f64()), |seconds| {
                    seconds / UPTIME.as_secs_f64()
                }),
            ),
        ];
        let all: f64 = weights.numbers().iter().sum();
        let rest: f64 = parts.iter().map(|(weight, part)| weight * part).sum();
        Self {
            rest: 100.0 * rest / all,
            room: 100.0 * weights.room / all,
        }
    }

    /// The score of a host that holds so many maps of those it may have at most.
    pub fn with(&self, held: usize, maps_max: usize) -> f64 {
        #[expect(clippy::cast_precision_loss, reason = "maps are counted in thousands")]
        let share = held as f64 / maps_max.max(1) as f64;
        self.rest + self.room * (1.0 - share.min(1.0))
    }
}

/// 0 to 1; what is not known, or is no number, is half.
fn part(known: Option<f64>, rate: impl Fn(f64) -> f64) -> f64 {
    known
        .map(rate)
        .filter(|part| part.is_finite())
        .map_or(0.5, |part| part.clamp(0.0, 1.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SILENT: Duration = Duration::from_secs(40);

    fn score(facts: &Facts) -> f64 {
        Rating::of(&Weights::default(), facts, SILENT).with(0, 10)
    }

    fn good() -> Facts {
        Facts {
            word: Word {
                cpu_percent: Some(0.0),
                ram_total_mb: Some(16_384.0),
                ram_free_mb: Some(8_192.0),
                upload_kbps: Some(50_000.0),
                latency_ms: Some(5.0),
                disconnects: Some(0.0),
                maps_max: None,
            },
            lapses: 0,
            uptime: UPTIME,
            silence: Duration::from_secs(10),
        }
    }

    #[test]
    fn the_best_host_has_a_hundred_and_everything_that_is_worse_costs() {
        let best = score(&good());
        assert!((best - 100.0).abs() < 1e-9, "{best}");
        let worse: [fn(&mut Facts); 8] = [
            |facts| facts.word.cpu_percent = Some(50.0),
            |facts| facts.word.ram_free_mb = Some(100.0),
            |facts| facts.word.upload_kbps = Some(1000.0),
            |facts| facts.word.latency_ms = Some(150.0),
            |facts| facts.word.disconnects = Some(3.0),
            |facts| facts.lapses = 1,
            |facts| facts.uptime = Duration::from_mins(1),
            |facts| facts.silence = Duration::from_mins(1),
        ];
        for (number, change) in worse.iter().enumerate() {
            let mut facts = good();
            change(&mut facts);
            let less = score(&facts);
            assert!(less < best - 1.0, "{number}: {less}");
        }
        let rating = Rating::of(&Weights::default(), &good(), SILENT);
        assert!(rating.with(5, 10) < best && rating.with(10, 10) < rating.with(5, 10));
    }

    #[test]
    fn what_is_not_known_counts_half_and_no_word_leads_out_of_0_to_100() {
        let unknown = score(&Facts {
            word: Word::default(),
            ..good()
        });
        let worst = Word {
            cpu_percent: Some(100.0),
            ram_total_mb: Some(512.0),
            ram_free_mb: Some(0.0),
            upload_kbps: Some(0.0),
            latency_ms: Some(900.0),
            disconnects: Some(0.0),
            maps_max: None,
        };
        let low = score(&Facts { word: worst, ..good() });
        assert!(low < unknown && unknown < 100.0, "{low} {unknown}");
        for number in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, -1e308, 1e308] {
            let word = Word {
                cpu_percent: Some(number),
                ram_total_mb: Some(number),
                ram_free_mb: Some(number),
                upload_kbps: Some(number),
                latency_ms: Some(number),
                disconnects: Some(number),
                maps_max: None,
            };
            let told = score(&Facts { word, ..good() });
            assert!((0.0..=100.0).contains(&told), "{number}: {told}");
        }
    }

    #[test]
    fn what_weighs_nothing_changes_nothing() {
        let only_latency = Weights::of([0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0]);
        let mut facts = good();
        facts.lapses = 9;
        facts.word.cpu_percent = Some(100.0);
        let rated = Rating::of(&only_latency, &facts, SILENT).with(9, 10);
        assert!((rated - 100.0).abs() < 1e-9, "{rated}");
    }
}

//! The machine, as Linux tells of it. Elsewhere nothing is told of it.

use serde_json::{Map, Value, json};

use super::tenths;

/// Times of all processors since the machine was started, and its memory now.
#[derive(Debug, Default)]
pub(super) struct Machine {
    times: Option<Times>,
    memory: Option<Memory>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Times {
    busy: u64,
    all: u64,
    cores: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Memory {
    total_mb: u64,
    free_mb: u64,
}

impl Machine {
    #[cfg(target_os = "linux")]
    pub(super) fn read() -> Self {
        let read = |file: &str| std::fs::read_to_string(file).ok();
        Self {
            times: read("/proc/stat").and_then(|text| Times::of(&text)),
            memory: read("/proc/meminfo").and_then(|text| Memory::of(&text)),
        }
    }

    #[cfg(not(target_os = "linux"))]
    pub(super) fn read() -> Self {
        Self::default()
    }

    /// Adds what is known to a report.
    pub(super) fn tell(&self, before: &Self, told: &mut Map<String, Value>) {
        let mut tell = |name: &str, value: Value| _ = told.insert(name.to_owned(), value);
        if let (Some(now), Some(before)) = (self.times, before.times) {
            if let Some(percent) = now.percent_since(before) {
                tell("cpu_percent", json!(percent));
            }
            tell("cpu_cores", json!(now.cores));
        }
        if let Some(memory) = self.memory {
            tell("ram_total_mb", json!(memory.total_mb));
            tell("ram_free_mb", json!(memory.free_mb));
        }
    }
}

#[cfg_attr(not(any(target_os = "linux", test)), allow(dead_code))]
impl Times {
    /// Of `/proc/stat`: user, nice, system, idle, iowait, irq, softirq and steal; what guests took is in the first two.
    fn of(text: &str) -> Option<Self> {
        let all = text.lines().find_map(|line| line.strip_prefix("cpu "))?;
        let times: Vec<u64> = all
            .split_whitespace()
            .take(8)
            .map(|time| time.parse().ok())
            .collect::<Option<_>>()?;
        let all: u64 = times.iter().sum();
        let idle = times.get(3)? + times.get(4).unwrap_or(&0);
        let is_core = |line: &&str| {
            let number = line.strip_prefix("cpu").and_then(|rest| rest.bytes().next());
            number.is_some_and(|digit| digit.is_ascii_digit())
        };
        Some(Self {
            busy: all - idle,
            all,
            cores: text.lines().filter(is_core).count(),
        })
    }
}

impl Times {
    #[allow(clippy::cast_precision_loss)]
    fn percent_since(self, before: Self) -> Option<f64> {
        let all = self.all.checked_sub(before.all).filter(|all| *all > 0)?;
        let busy = self.busy.saturating_sub(before.busy).min(all);
        Some(tenths(busy as f64 * 100.0 / all as f64))
    }
}

#[cfg_attr(not(any(target_os = "linux", test)), allow(dead_code))]
impl Memory {
    /// Of `/proc/meminfo`; free is what programs can have.
    fn of(text: &str) -> Option<Self> {
        let kib = |name: &str| -> Option<u64> {
            let line = text.lines().find_map(|line| line.strip_prefix(name))?;
            line.split_whitespace().next()?.parse().ok()
        };
        Some(Self {
            total_mb: kib("MemTotal:")? / 1024,
            free_mb: kib("MemAvailable:")? / 1024,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STAT: &str =
        "cpu  100 0 50 800 50 0 0 0 7 0\ncpu0 50 0 25 400 25 0 0 0 0 0\ncpu1 50 0 25 400 25 0 0 0 0 0\nintr 5\n";

    #[test]
    fn the_processors_share_is_of_the_time_since_the_last_look() {
        let before = Times::of(STAT).expect("Linux' own");
        assert_eq!((before.busy, before.all, before.cores), (150, 1000, 2));
        let now = Times::of("cpu  130 0 60 840 70 0 0 0\ncpu0 1 1 1 1\n").expect("Linux' own");
        assert_eq!(now.percent_since(before), Some(40.0));
        assert_eq!(before.percent_since(now), None);
        assert_eq!(before.percent_since(before), None);
    }

    #[test]
    fn free_memory_is_what_programs_can_have() {
        let text = "MemTotal:        8388608 kB\nMemFree:          102400 kB\nMemAvailable:    4194304 kB\n";
        let memory = Memory::of(text).expect("Linux' own");
        assert_eq!((memory.total_mb, memory.free_mb), (8192, 4096));
        assert_eq!(Memory::of("MemTotal: 1 kB\n"), None);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn this_machine_tells_of_itself() {
        let mut told = Map::new();
        let now = Machine::read();
        now.tell(&Machine::read(), &mut told);
        assert!(told["cpu_cores"].as_u64() >= Some(1), "{told:?}");
        let (total, free) = (told["ram_total_mb"].as_u64(), told["ram_free_mb"].as_u64());
        assert!(total > free && free > Some(0), "{told:?}");
    }
}

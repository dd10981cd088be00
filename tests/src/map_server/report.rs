//! What the runs of the sample came to, for people and as JSON, and whether the bars hold.

use std::{fmt, io, path::Path};

use serde::Serialize;
use serde_json::Value;

use super::{Scenario, account::Account};

/// The p99 of the timers' lateness, against the runs without the library.
const LATENESS_RATIO_MAX: f64 = 1.10;
/// An enqueue's p50, and how much its p99.9 may exceed an empty call's; microseconds.
const ENQUEUE_P50_US_MAX: f64 = 1.0;
const ENQUEUE_P999_EXTRA_US_MAX: f64 = 20.0;
/// What the library may add with the queue filled.
const RESIDENT_KIB_MAX: f64 = 24.0 * 1024.0;
const DESCRIPTORS_MAX: f64 = 12.0;

/// One run of the sample.
#[derive(Debug, Serialize)]
pub(super) struct Run {
    scenario: Scenario,
    sample: Value,
    /// The delivery afterwards, where the hub was not there before.
    drained: Option<Value>,
    account: Option<Account>,
}

/// All of them.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    seconds: u32,
    events_per_second: u32,
    pub(super) runs: Vec<Run>,
    /// Memory and descriptors with operations that cannot be sent.
    pub(super) queued: Value,
}

/// A figure and what it may be at most.
struct Bar {
    what: String,
    value: f64,
    most: f64,
}

impl Bar {
    /// What could not be measured does not hold.
    fn holds(&self) -> bool {
        self.value <= self.most
    }
}

impl Run {
    pub(super) fn new(scenario: Scenario, sample: Value, drained: Option<Value>, account: Option<Account>) -> Self {
        Self {
            scenario,
            sample,
            drained,
            account,
        }
    }

    /// A figure by the names of its group, row and, where it has several, column; not a number where it is missing.
    fn figure(&self, path: &str) -> f64 {
        figure(&self.sample, path)
    }

    fn failures(&self) -> Vec<String> {
        let mut failures = self.account.as_ref().map(Account::failures).unwrap_or_default();
        for (path, what) in [
            ("/events/refused", "calls were refused"),
            ("/events/waiting_for_room", "events had no room until the end"),
            ("/status/rejected", "operations were rejected"),
        ] {
            let count = self.figure(path);
            if count > 0.0 {
                failures.push(format!("{count} {what}"));
            }
        }
        // The last to speak to the hub: what it left in the outbox is late, and not lost.
        let last = self.drained.as_ref().unwrap_or(&self.sample);
        if figure(last, "/end/flushed") == 0.0 {
            let left = figure(last, "/status/outbox");
            failures.push(format!(
                "the flush did not end in its time: {left} operations are still in the outbox"
            ));
        }
        failures
    }
}

fn figure(figures: &Value, path: &str) -> f64 {
    figures.pointer(path).and_then(Value::as_f64).unwrap_or(f64::NAN)
}

/// The middle one; the mean of two where there is none.
fn median(mut values: Vec<f64>) -> f64 {
    values.retain(|value| !value.is_nan());
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => f64::NAN,
        count => f64::midpoint(values[(count - 1) / 2], values[count / 2]),
    }
}

impl Report {
    pub(super) fn new(seconds: u32, events_per_second: u32) -> Self {
        Self {
            seconds,
            events_per_second,
            runs: Vec::new(),
            queued: Value::Null,
        }
    }

    /// The median of a figure over the runs of a scenario.
    fn of(&self, scenario: Scenario, path: &str) -> f64 {
        let runs = self.runs.iter().filter(|run| run.scenario == scenario);
        median(runs.map(|run| run.figure(path)).collect())
    }

    fn lateness_ratio(&self, scenario: Scenario) -> f64 {
        self.of(scenario, "/lateness/all/p99_us") / self.of(Scenario::Without, "/lateness/all/p99_us")
    }

    fn scenarios(&self) -> impl Iterator<Item = Scenario> {
        Scenario::ALL
            .into_iter()
            .filter(|scenario| self.runs.iter().any(|run| run.scenario == *scenario))
    }

    /// What must not be, in words; with `strict` the bars too, for they take a quiet machine.
    pub(super) fn failures(&self, strict: bool) -> Vec<String> {
        let mut failures = Vec::new();
        for run in &self.runs {
            let of_run = run.failures().into_iter();
            failures.extend(of_run.map(|failure| format!("{:?}: {failure}", run.scenario)));
        }
        if strict {
            let missed = self.bars().into_iter().filter(|bar| !bar.holds());
            failures.extend(missed.map(|bar| format!("{} is {:.2}, at most {:.2}", bar.what, bar.value, bar.most)));
        }
        failures
    }

    fn bars(&self) -> Vec<Bar> {
        let mut bars = Vec::new();
        let mut bar = |what: String, value, most| bars.push(Bar { what, value, most });
        for scenario in self.scenarios().filter(|scenario| *scenario != Scenario::Without) {
            let ratio = self.lateness_ratio(scenario);
            bar(format!("{scenario:?}: lateness p99, ratio"), ratio, LATENESS_RATIO_MAX);
            let p50 = self.of(scenario, "/cost/enqueue/p50_us");
            bar(format!("{scenario:?}: enqueue p50, us"), p50, ENQUEUE_P50_US_MAX);
            let p999 = self.of(scenario, "/cost/enqueue/p999_us");
            let most = self.of(scenario, "/cost/empty_call/p999_us") + ENQUEUE_P999_EXTRA_US_MAX;
            bar(format!("{scenario:?}: enqueue p99.9, us"), p999, most);
        }
        for (name, what, most) in [
            ("resident_kib", "resident added, KiB", RESIDENT_KIB_MAX),
            ("descriptors", "descriptors added", DESCRIPTORS_MAX),
        ] {
            let before = figure(&self.queued, &format!("/process/before_init/{name}"));
            let added = figure(&self.queued, &format!("/process/queued/{name}")) - before;
            bar(format!("10,000 queued: {what}"), added, most);
        }
        bars
    }

    pub(super) fn write(&self, file: &Path) -> io::Result<()> {
        let json = serde_json::to_string_pretty(self).expect("plain data");
        std::fs::write(file, json + "\n")
    }

    fn write_table(
        &self,
        f: &mut fmt::Formatter<'_>,
        title: &str,
        columns: &[(&str, &str)],
        scale: f64,
    ) -> fmt::Result {
        write!(f, "{title:24}")?;
        for (name, _) in columns {
            write!(f, "{name:>14}")?;
        }
        writeln!(f)?;
        for scenario in self.scenarios() {
            write!(f, "{:24}", format!("  {scenario:?}"))?;
            for (_, path) in columns {
                write!(f, "{:>14.2}", self.of(scenario, path) * scale)?;
            }
            writeln!(f)?;
        }
        Ok(())
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let runs = self.runs.len();
        let (seconds, events) = (self.seconds, self.events_per_second);
        writeln!(
            f,
            "map_server: {runs} runs of {seconds} s at {events} events/s; medians of a scenario's runs"
        )?;
        let lateness = |name| {
            [("p50", "p50_us"), ("p99", "p99_us"), ("max", "max_us")]
                .map(|(_, column)| format!("/lateness/{name}/{column}"))
        };
        for (title, name) in [
            ("all timers, late by ms", "all"),
            ("mob AI, late by ms", "mob_ai_100ms"),
        ] {
            let [p50, p99, max] = lateness(name);
            let columns = [("p50", p50.as_str()), ("p99", p99.as_str()), ("max", max.as_str())];
            self.write_table(f, title, &columns, 0.001)?;
        }
        let turn = [
            ("p50", "/loop/turn/p50_us"),
            ("p99", "/loop/turn/p99_us"),
            ("max", "/loop/turn/max_us"),
            ("woken late p99", "/loop/oversleep/p99_us"),
        ];
        self.write_table(f, "turn of the loop, ms", &turn, 0.001)?;
        for lane in ["empty_call", "enqueue", "enqueue_bulk", "enqueue_critical"] {
            let columns = ["p50_us", "p99_us", "p999_us", "max_us"].map(|name| (name, format!("/cost/{lane}/{name}")));
            let columns = columns
                .each_ref()
                .map(|(name, path)| (name.trim_end_matches("_us"), path.as_str()));
            self.write_table(f, &format!("{lane}, us"), &columns, 1.0)?;
        }
        let waiting = [
            ("count", "/cost/waiting_call/count"),
            ("p50 us", "/cost/waiting_call/p50_us"),
            ("p99 us", "/cost/waiting_call/p99_us"),
            ("unknown", "/events/waited_unknown"),
            ("still ms", "/usage/stood_still_ms"),
        ];
        self.write_table(f, "waiting calls", &waiting, 1.0)?;
        let usage = [
            ("loop cores", "/usage/loop_core_share"),
            ("agent cores", "/usage/agent_core_share"),
            ("taken off", "/usage/switches_taken"),
            ("events/s", "/usage/events_per_second"),
            ("queue full", "/events/queue_full"),
            ("resident KiB", "/process/steady/resident_kib"),
            ("descriptors", "/process/steady/descriptors"),
            ("threads", "/process/steady/threads"),
        ];
        self.write_table(f, "use of the machine", &usage, 1.0)?;
        for run in &self.runs {
            let Some(account) = &run.account else { continue };
            let Account {
                taken,
                settled,
                every_taken,
                every_logged,
                paths,
                paths_wrong,
                ..
            } = account;
            writeln!(
                f,
                "  {:?}: taken {taken}, settled {settled}; each counts: {every_taken}, logged {every_logged}; \
                 newest: {paths} paths, {paths_wrong} wrong",
                run.scenario
            )?;
        }
        for bar in self.bars() {
            let verdict = if bar.holds() { "holds" } else { "MISSED" };
            writeln!(f, "{:52}{:>12.2}{:>12.2}  {verdict}", bar.what, bar.value, bar.most)?;
        }
        Ok(())
    }
}

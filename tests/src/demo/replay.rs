//! Feeding the agents at a pace, killing one midway, and showing how it goes.

use std::{
    collections::HashMap,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    io::IsTerminal as _,
    time::{Duration, Instant},
};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use p2p_sync_proto::Policies;

use crate::{recording::Happening, stack::Agent};

/// What was sent, and through whom.
pub(super) struct Sent {
    /// The agent of each happening, by its index; `None`: the agent was dead at that moment.
    pub(super) by: Vec<Option<usize>>,
}

/// How long the killed agent stays dead.
const DEAD: Duration = Duration::from_millis(500);
/// A busy machine's disk takes what was told in far less.
const ON_DISK_WITHIN: Duration = Duration::from_secs(30);
const REDRAW: Duration = Duration::from_millis(200);
/// Without a terminal a line is printed this often.
const PRINT: Duration = Duration::from_secs(3);

/// Which host serves a map.
pub(super) fn host_of(happening: &Happening, hosts: usize) -> usize {
    let mut hasher = DefaultHasher::new();
    happening.map.hash(&mut hasher);
    usize::try_from(hasher.finish() % hosts as u64).expect("few hosts")
}

pub(super) fn replay(agents: &mut [Agent], happenings: &[Happening], speed: f64) -> Sent {
    let mut show = Show::new(happenings);
    let mut sent = Sent {
        by: Vec::with_capacity(happenings.len()),
    };
    let began = Instant::now();
    let (kill_at, hosts) = (happenings.len() / 2, agents.len());
    for (tag, happening) in happenings.iter().enumerate() {
        let due = began + Duration::from_millis(happening.at_ms).div_f64(speed);
        while Instant::now() < due {
            std::thread::sleep(due.saturating_duration_since(Instant::now()).min(REDRAW));
            show.draw(agents, tag);
        }
        if tag == kill_at {
            await_players(&agents[0], &sent, happenings);
            show.say("demo: killing the agent of host 1 (SIGKILL)");
            agents[0].kill();
            std::thread::sleep(DEAD);
            agents[0].start();
            show.say("demo: it is back, with what its outbox held");
        }
        let host = host_of(happening, hosts);
        let taken = agents[host].submit(tag as u64, happening);
        sent.by.push(taken.then_some(host));
        if tag % 256 == 0 {
            show.draw(agents, tag);
        }
    }
    show.finish(agents, happenings.len());
    sent
}

/// Until it is on the host's disk who came and went: what is lost of that is for the operator to mend (`players release`),
/// and not what is shown here.
fn await_players(agent: &Agent, sent: &Sent, happenings: &[Happening]) {
    let is_safe = || {
        let ledger = agent.ledger();
        let of_host = (0..)
            .zip(sent.by.iter().zip(happenings))
            .filter(|(_, (by, one))| **by == Some(0) && one.moves().is_some());
        of_host.into_iter().all(|(tag, _): (u64, _)| {
            let said = ledger.ids.get(&tag).and_then(|id| ledger.said.get(id));
            said.is_some_and(|said| said.spooled || said.state == "APPLIED")
        })
    };
    let began = Instant::now();
    while !is_safe() && began.elapsed() < ON_DISK_WITHIN {
        std::thread::sleep(DEAD / 10);
    }
}

/// A bar and a line per lane.
struct Show<'a> {
    happenings: &'a [Happening],
    policies: Policies,
    bar: ProgressBar,
    lanes: [ProgressBar; 2],
    _all: MultiProgress,
    drawn: Instant,
    printed: Instant,
}

impl<'a> Show<'a> {
    fn new(happenings: &'a [Happening]) -> Self {
        let all = MultiProgress::new();
        let style = |template: &str| ProgressStyle::with_template(template).expect("a valid template");
        let bar = all.add(ProgressBar::new(happenings.len() as u64));
        bar.set_style(style("replaying {wide_bar} {pos}/{len} {elapsed}"));
        let lane = |name: &'static str| {
            let line = all.add(ProgressBar::no_length());
            line.set_style(style("  {prefix:8} {msg}"));
            line.set_prefix(name);
            line
        };
        let lanes = [lane("critical"), lane("bulk")];
        let now = Instant::now();
        Self {
            happenings,
            policies: Policies::builtin(),
            bar,
            lanes,
            _all: all,
            drawn: now,
            printed: now,
        }
    }

    fn say(&self, line: &str) {
        self.bar.suspend(|| println!("{line}"));
    }

    fn draw(&mut self, agents: &[Agent], sent: usize) {
        if self.drawn.elapsed() < REDRAW {
            return;
        }
        self.drawn = Instant::now();
        self.bar.set_position(sent as u64);
        let lines = self.lines(agents, sent);
        for (bar, line) in self.lanes.iter().zip(&lines) {
            bar.set_message(line.clone());
        }
        if !std::io::stdout().is_terminal() && self.printed.elapsed() >= PRINT {
            self.printed = Instant::now();
            println!(
                "demo: {sent}/{} critical: {} bulk: {}",
                self.happenings.len(),
                lines[0],
                lines[1]
            );
        }
    }

    /// What each lane was given, and what came back.
    fn lines(&self, agents: &[Agent], sent: usize) -> [String; 2] {
        let mut lanes: [HashMap<&str, usize>; 2] = Default::default();
        let ledgers: Vec<_> = agents.iter().map(Agent::ledger).collect();
        for (tag, happening) in self.happenings[..sent].iter().enumerate() {
            let lane = usize::from(!self.policies.of(happening.data_type).critical);
            *lanes[lane].entry("sent").or_default() += 1;
            let ledger = &ledgers[host_of(happening, agents.len())];
            let said = ledger.ids.get(&(tag as u64)).and_then(|id| ledger.said.get(id));
            let state = said.map_or("", |said| said.state.as_str());
            *lanes[lane]
                .entry(if state == "APPLIED" { "acknowledged" } else { "waiting" })
                .or_default() += 1;
        }
        lanes.map(|lane| {
            let count = |name| lane.get(name).copied().unwrap_or(0);
            format!(
                "{} sent, {} acknowledged, {} on their way",
                count("sent"),
                count("acknowledged"),
                count("waiting")
            )
        })
    }

    fn finish(&mut self, agents: &[Agent], sent: usize) {
        self.drawn -= REDRAW;
        self.draw(agents, sent);
        self.bar.finish();
        self.lanes.iter().for_each(ProgressBar::finish);
    }
}

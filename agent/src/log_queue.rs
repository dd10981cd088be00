//! The process' log as lines that a host program takes on its own thread.
//!
//! A log call never waits: what finds no room is counted, and the count is told as a line of its own.

use std::{
    fmt::{self, Write as _},
    sync::{
        LazyLock, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
};

use crossbeam_channel::{Receiver, Sender, bounded};
use p2p_sync_proto::{Code, Problem};
use tracing::{
    Event, Level, Metadata, Subscriber,
    field::{Field, Visit},
    level_filters::LevelFilter,
};
use tracing_subscriber::{
    Layer,
    layer::{Context, SubscriberExt as _},
};

use crate::events::{AgentEvent, stamp};

/// Lines not taken yet.
pub(crate) const LINES_MAX: usize = 1024;
/// Of one line; the rest of it is cut off.
const LINE_BYTES_MAX: usize = 2048;
/// Of other crates only what somebody has to look at is told.
const OTHERS_LEVEL: Level = Level::WARN;

const LEVELS: [Level; 5] = [Level::ERROR, Level::WARN, Level::INFO, Level::DEBUG, Level::TRACE];

static QUEUE: LazyLock<Queue> = LazyLock::new(Queue::new);
/// As an index into [`LEVELS`].
static LEVEL: AtomicUsize = AtomicUsize::new(0);

/// Makes the process' log come as [`AgentEvent::Log`]: lines of this software up to `level`, of others up to warnings.
/// Again, it changes the level.
///
/// `UNSUPPORTED` where the process has another subscriber already: that one gets the lines.
pub fn install(level: Level) -> Result<(), Problem> {
    static IS_INSTALLED: Mutex<bool> = Mutex::new(false);
    let mut is_installed = IS_INSTALLED.lock().unwrap_or_else(PoisonError::into_inner);
    LEVEL.store(
        LEVELS.iter().position(|known| *known == level).unwrap_or_default(),
        Ordering::Relaxed,
    );
    if *is_installed {
        tracing::callsite::rebuild_interest_cache();
        return Ok(());
    }
    let taken = |_| {
        let sentence = "the process has a subscriber for tracing already, which gets the lines: leave this call out";
        Problem::new(Code::Unsupported, sentence)
    };
    tracing::subscriber::set_global_default(tracing_subscriber::registry().with(Lines)).map_err(taken)?;
    *is_installed = true;
    Ok(())
}

/// The stamp of the oldest line that waits.
pub(crate) fn oldest() -> Option<u64> {
    QUEUE.oldest()
}

/// Takes the oldest line if `fits`.
pub(crate) fn next(fits: impl FnOnce(&AgentEvent) -> bool) -> Option<AgentEvent> {
    QUEUE.next(fits)
}

/// What of tracing becomes a line.
struct Lines;

impl<S: Subscriber> Layer<S> for Lines {
    fn enabled(&self, metadata: &Metadata<'_>, _: Context<'_, S>) -> bool {
        let ours = metadata.target().starts_with("p2p_sync");
        let level = LEVELS[LEVEL.load(Ordering::Relaxed)];
        *metadata.level() <= if ours { level } else { level.min(OTHERS_LEVEL) }
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(LevelFilter::from_level(LEVELS[LEVEL.load(Ordering::Relaxed)]))
    }

    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let mut line = Line::default();
        event.record(&mut line);
        QUEUE.tell(*event.metadata().level(), line.finish());
    }
}

/// A line in the making.
#[derive(Default)]
struct Line {
    message: String,
    fields: String,
}

impl Line {
    fn finish(self) -> String {
        let mut line = self.message;
        line += &self.fields;
        if line.contains(char::is_control) {
            line = line.replace(char::is_control, " ");
        }
        line.truncate(line.floor_char_boundary(LINE_BYTES_MAX));
        line
    }
}

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        // Writing to a String does not fail; a value whose own Debug does is left as far as it came.
        let _ = match field.name() {
            "message" => write!(self.message, "{value:?}"),
            name => write!(self.fields, " {name}={value:?}"),
        };
    }
}

type Told = (u64, AgentEvent);

/// The lines of a process. A channel, so that no log call waits for whoever takes them.
struct Queue {
    tell: Sender<Told>,
    told: Receiver<Told>,
    /// The oldest, once it was looked at.
    front: Mutex<Option<Told>>,
    left_out: AtomicU64,
}

impl Queue {
    fn new() -> Self {
        let (tell, told) = bounded(LINES_MAX);
        Self {
            tell,
            told,
            front: Mutex::default(),
            left_out: AtomicU64::new(0),
        }
    }

    fn tell(&self, level: Level, message: String) {
        if let Some(count) = self.take_left_out()
            && self.tell.try_send(left_out(count)).is_err()
        {
            self.left_out.fetch_add(count, Ordering::Relaxed);
        }
        let line = (stamp(), AgentEvent::Log { level, message });
        if self.tell.try_send(line).is_err() {
            self.left_out.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn oldest(&self) -> Option<u64> {
        self.front().as_ref().map(|(stamp, _)| *stamp)
    }

    fn next(&self, fits: impl FnOnce(&AgentEvent) -> bool) -> Option<AgentEvent> {
        let mut front = self.front();
        let fit = front.as_ref().is_some_and(|(_, line)| fits(line));
        if fit { front.take().map(|(_, line)| line) } else { None }
    }

    /// The oldest line; after all others, how many were left out behind them.
    fn front(&self) -> MutexGuard<'_, Option<Told>> {
        let mut front = self.front.lock().unwrap_or_else(PoisonError::into_inner);
        if front.is_none() {
            let waiting = self.told.try_recv().ok();
            *front = waiting.or_else(|| self.take_left_out().map(left_out));
        }
        front
    }

    fn take_left_out(&self) -> Option<u64> {
        // Looked at first, for it is nearly always 0 and shared by all who log.
        let some = self.left_out.load(Ordering::Relaxed) > 0;
        some.then(|| self.left_out.swap(0, Ordering::Relaxed))
            .filter(|&count| count > 0)
    }
}

fn left_out(count: u64) -> Told {
    let message = format!("{count} lines of the log were left out here, for nobody took them: take events more often");
    let level = Level::WARN;
    (stamp(), AgentEvent::Log { level, message })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(queue: &Queue) -> Vec<String> {
        let text = |event| match event {
            AgentEvent::Log { message, .. } => message,
            other => panic!("not a line: {other:?}"),
        };
        std::iter::from_fn(|| queue.next(|_| true)).map(text).collect()
    }

    #[test]
    fn lines_beyond_the_bound_are_counted_and_the_count_is_told_where_they_are_missing() {
        let queue = Queue::new();
        for number in 0..LINES_MAX + 7 {
            queue.tell(Level::INFO, number.to_string());
        }
        let lines = texts(&queue);
        assert_eq!(lines.len(), LINES_MAX + 1);
        assert!(lines[LINES_MAX].starts_with("7 lines"), "{}", lines[LINES_MAX]);
        queue.tell(Level::INFO, "on".to_owned());
        assert_eq!(texts(&queue), ["on"]);
    }

    #[test]
    fn lines_left_out_are_told_before_the_next_that_finds_room() {
        let queue = Queue::new();
        for number in 0..=LINES_MAX {
            queue.tell(Level::INFO, number.to_string());
        }
        for _ in 0..2 {
            queue.next(|_| true).expect("there are more");
        }
        queue.tell(Level::INFO, "on".to_owned());
        let lines = texts(&queue);
        assert!(lines[lines.len() - 2].starts_with("1 lines"), "{lines:?}");
        assert_eq!(lines[lines.len() - 1], "on");
    }

    #[test]
    fn a_line_that_does_not_fit_stays_the_oldest() {
        let queue = Queue::new();
        queue.tell(Level::INFO, "one".to_owned());
        let oldest = queue.oldest();
        queue.tell(Level::INFO, "two".to_owned());
        assert!(queue.next(|_| false).is_none());
        assert_eq!(queue.oldest(), oldest);
        assert_eq!(texts(&queue), ["one", "two"]);
    }

    /// The process' own queue and subscriber: one test, for both are there once.
    #[test]
    fn what_is_logged_comes_as_one_line_with_its_fields_and_installing_again_changes_the_level() {
        install(Level::INFO).expect("nothing else subscribes in these tests");
        install(Level::WARN).expect("again");
        tracing::info!("too quiet");
        install(Level::INFO).expect("again");
        tracing::info!(path = "prontera/MAP_STATE", count = 2, "two\nlines of the {}", "test");
        tracing::info!(target: "h2", "of others");
        let lines = texts(&QUEUE);
        let expected = "two lines of the test path=\"prontera/MAP_STATE\" count=2";
        assert!(lines.iter().any(|line| line == expected), "{lines:?}");
        let unwanted = |line: &String| line.contains("too quiet") || line.contains("of others");
        assert!(!lines.iter().any(unwanted), "{lines:?}");
    }
}

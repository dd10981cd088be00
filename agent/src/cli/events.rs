//! `run --events`: each change of an operation as a line, written by a thread of its own, so that a reader who is slow
//! holds up no lane.

use std::{
    io::{self, Write},
    sync::atomic::{AtomicU64, Ordering},
    thread,
    time::Duration,
};

use crossbeam_channel::{Receiver, Sender, bounded};
use serde_json::json;

use crate::{local_api::event_json, results::Event};

/// Changes that wait to be written; beyond it they are counted and left out.
pub(super) const CHANGES_MAX: usize = 65_536;
/// For the reader to take what waits at the end, and as long again for the last of it.
const END_TIMEOUT: Duration = Duration::from_secs(2);

/// The way of changes to who reads them.
pub(super) struct Events {
    tell: Sender<Told>,
    left_out: AtomicU64,
    written: Receiver<()>,
}

enum Told {
    Change(Event),
    LeftOut(u64),
    End,
}

impl Events {
    /// Starts the thread that writes to `output`.
    pub(super) fn to(mut output: impl Write + Send + 'static, changes_max: usize) -> io::Result<Self> {
        let (tell, told) = bounded(changes_max);
        let (done, written) = bounded(1);
        thread::Builder::new().name("p2p-events".to_owned()).spawn(move || {
            for next in told {
                let line = match next {
                    Told::Change(event) => event_json(&event),
                    Told::LeftOut(count) => {
                        tracing::warn!(count, "events were left out, for nobody read them in time");
                        json!({ "left_out": count })
                    }
                    Told::End => break,
                };
                // In one piece, for answers go there as well. A reader that went away is told nothing more.
                let _ = output.write_all(format!("{line}\n").as_bytes());
            }
            let _ = output.flush();
            let _ = done.send(());
        })?;
        Ok(Self {
            tell,
            left_out: AtomicU64::new(0),
            written,
        })
    }

    /// Hands a change over; never waits.
    pub(super) fn tell(&self, event: &Event) {
        self.tell_left_out();
        if self.tell.try_send(Told::Change(event.clone())).is_err() {
            self.left_out.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn tell_left_out(&self) {
        // Looked at first, for it is nearly always 0.
        if self.left_out.load(Ordering::Relaxed) == 0 {
            return;
        }
        let count = self.left_out.swap(0, Ordering::Relaxed);
        if count > 0 && self.tell.try_send(Told::LeftOut(count)).is_err() {
            self.left_out.fetch_add(count, Ordering::Relaxed);
        }
    }

    /// Waits until all is written, or its reader has had time enough.
    pub(super) fn end(&self) {
        self.tell_left_out();
        let is_told = self.tell.send_timeout(Told::End, END_TIMEOUT).is_ok();
        if !is_told || self.written.recv_timeout(END_TIMEOUT).is_err() {
            let count = self.tell.len() as u64 + self.left_out.load(Ordering::Relaxed);
            tracing::warn!(count, "nobody reads the events: these are not told");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use p2p_sync_proto::Position;
    use uuid::Uuid;

    use super::*;
    use crate::results::{OperationState, Settled};

    /// A pipe without a buffer.
    struct Pipe(mpsc::SyncSender<String>);

    impl Write for Pipe {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let text = String::from_utf8_lossy(bytes).into_owned();
            self.0.send(text).map_err(|_| io::ErrorKind::BrokenPipe)?;
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn event(number: u128) -> Event {
        Event {
            operation_id: Uuid::from_u128(number),
            position: Position {
                incarnation: 1,
                sequence: 1,
            },
            settled: Settled::plain(OperationState::Applied),
        }
    }

    #[test]
    fn invariant_10_who_reads_no_events_holds_nobody_up_and_is_told_how_many_were_left_out() {
        let (to_reader, reader) = mpsc::sync_channel(0);
        let events = Events::to(Pipe(to_reader), 4).expect("a thread can be started");
        // One more may be on its way already.
        for number in 0..20 {
            events.tell(&event(number));
        }
        let reading = thread::spawn(move || reader.iter().collect::<Vec<String>>());
        while !events.tell.is_empty() {
            thread::yield_now();
        }
        events.tell(&event(20));
        events.end();
        drop(events);
        let lines = reading.join().expect("no panic");
        let lines: Vec<serde_json::Value> = lines
            .iter()
            .map(|line| serde_json::from_str(line).expect("one object each"))
            .collect();
        let left_out = &lines[lines.len() - 2]["left_out"];
        assert_eq!(left_out.as_u64(), Some(21 - (lines.len() as u64 - 1)), "{lines:?}");
        assert_eq!(lines[lines.len() - 1]["operation_id"], Uuid::from_u128(20).to_string());
    }

    #[test]
    fn a_reader_that_is_gone_or_stuck_does_not_stop_the_end() {
        let (to_reader, reader) = mpsc::sync_channel(0);
        let events = Events::to(Pipe(to_reader), 4).expect("a thread can be started");
        for number in 0..20 {
            events.tell(&event(number));
        }
        events.end();
        drop(reader);
        events.end();
    }
}

//! Following a stream line by line, each update one JSON object, beside what the agent tells its program.

use std::{
    io::{self, Write},
    sync::Arc,
    time::Duration,
};

use p2p_sync_proto::{Problem, terminal::shown};
use serde_json::{Value, json};
use tokio::runtime::Handle;

use crate::{
    events::{AgentEvent, Events},
    read::state_json,
    subscriptions::{Subscription, Subscriptions},
};

/// How often a reader is looked after while there is nothing to tell it.
const LOOK_INTERVAL: Duration = Duration::from_millis(500);

/// A subscription with a queue of its own. Ends when dropped.
pub(crate) struct Watch {
    subscriptions: Arc<Subscriptions>,
    id: u64,
    events: Arc<Events>,
}

impl Watch {
    pub(crate) fn begin(
        subscriptions: &Arc<Subscriptions>,
        runtime: &Handle,
        subscription: Subscription,
    ) -> Result<Self, Problem> {
        let events = Arc::new(Events::new());
        let id = subscriptions.begin(runtime, subscription, &events, true)?;
        Ok(Self {
            subscriptions: subscriptions.clone(),
            id,
            events,
        })
    }

    /// Writes each update as it comes, until the output fails, its reader `is_gone` or the agent shuts down.
    pub(crate) fn write_lines(&self, output: &mut impl Write, is_gone: impl Fn() -> bool) -> io::Result<()> {
        while self.events.wait(LOOK_INTERVAL) || !(self.events.is_closed() || is_gone()) {
            let update = self.events.next(|_| true);
            if let Some(AgentEvent::Update { state, snapshot, .. }) = update {
                writeln!(output, "{}", shown(&update_json(&state, snapshot).to_string()))?;
                output.flush()?;
            }
        }
        Ok(())
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.subscriptions.end(self.id);
    }
}

/// A state with `"snapshot": true` where one begins with it.
fn update_json(state: &p2p_sync_proto::v1::State, snapshot: bool) -> Value {
    let mut line = state_json(state);
    if snapshot {
        line["snapshot"] = json!(true);
    }
    line
}

//! Turns at what there is little of, so shared that neither hosts nor tools ever have all of it.

use tokio::sync::{AcquireError, Semaphore, SemaphorePermit};

use super::Caller;

/// Turns of one kind. Who waits has asked before who comes later, of his own.
#[derive(Debug)]
pub(super) struct Turns {
    all: Semaphore,
    hosts: Semaphore,
    /// The operator's commands are processes of their own, and nobody waits for them here.
    tools: Semaphore,
}

/// Given back with this value.
#[derive(Debug)]
pub(super) struct Turn<'a> {
    _own: Result<SemaphorePermit<'a>, AcquireError>,
    _of_all: Result<SemaphorePermit<'a>, AcquireError>,
}

impl Turns {
    /// So many at one time, and of hosts and of tools each at most so many, which are fewer.
    pub(super) fn new(max: usize, each_max: usize) -> Self {
        debug_assert!(each_max < max, "something is left for the others");
        Self {
            all: Semaphore::new(max),
            hosts: Semaphore::new(each_max),
            tools: Semaphore::new(each_max),
        }
    }

    /// Waits for one. Nobody closes the semaphores, so that an error never comes.
    pub(super) async fn take(&self, caller: Caller) -> Turn<'_> {
        let own = match caller {
            Caller::Host { .. } => &self.hosts,
            Caller::Tool | Caller::Operator => &self.tools,
        };
        Turn {
            _own: own.acquire().await,
            _of_all: self.all.acquire().await,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;

    use futures::{FutureExt as _, future::join_all};
    use p2p_sync_proto::Position;
    use uuid::Uuid;

    use super::*;

    #[test]
    fn invariant_10_neither_hosts_nor_tools_keep_each_other_from_a_turn() {
        let host = Caller::Host {
            host_id: Uuid::nil(),
            position: Position {
                incarnation: 1,
                sequence: 1,
            },
        };
        for (many, other) in [(host, Caller::Tool), (Caller::Tool, host)] {
            let turns = Turns::new(3, 2);
            let mut flood = pin!(join_all((0..100).map(|_| turns.take(many))));
            assert!(flood.as_mut().now_or_never().is_none(), "most of them wait");
            let first = turns.take(other).now_or_never();
            assert!(first.is_some(), "one of the others does not");
            assert!(turns.take(other).now_or_never().is_none(), "there are three");
        }
    }
}

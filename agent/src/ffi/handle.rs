//! Agents as C knows them: numbers that name a slot and its generation, so that one kept too long names nothing.

use std::sync::{
    Arc, Mutex, MutexGuard, PoisonError,
    atomic::{AtomicU64, Ordering},
};

use arc_swap::ArcSwapOption;
use p2p_sync_proto::{Code, Problem};

use super::lifecycle::Running;

/// Names a running agent; 0 names none. Stays refused after its shutdown, also when other agents are started.
pub type p2p_sync_agent = u64;

/// Agents of one process at a time.
const AGENTS_MAX: usize = 8;

struct Slot {
    /// Of the agent that is or was here last. Changes under [`CHANGING`] alone.
    handle: AtomicU64,
    running: ArcSwapOption<Running>,
}

static SLOTS: [Slot; AGENTS_MAX] = [const {
    Slot {
        handle: AtomicU64::new(0),
        running: ArcSwapOption::const_empty(),
    }
}; AGENTS_MAX];

/// Held to start or end an agent; calls on agents take no lock.
static CHANGING: Mutex<()> = Mutex::new(());

/// The agent that a handle names: `SHUT_DOWN` where it named one, `BAD_HANDLE` where it never did.
pub(super) fn running(handle: p2p_sync_agent) -> Result<Arc<Running>, Problem> {
    let slot = slot(handle)?;
    match slot.running.load_full() {
        Some(running) if slot.handle.load(Ordering::Acquire) == handle => Ok(running),
        _ => Err(Problem::new(
            Code::ShutDown,
            "this agent was shut down: start one again",
        )),
    }
}

/// Finds a slot for an agent that `start` makes.
pub(super) fn insert(start: impl FnOnce() -> Result<Running, Problem>) -> Result<p2p_sync_agent, Problem> {
    let _changing = changing();
    let free = SLOTS
        .iter()
        .zip(1_u64..)
        .find(|(slot, _)| slot.running.load().is_none());
    let (slot, number) = free.ok_or_else(|| {
        let sentence = format!("{AGENTS_MAX} agents run in this process already: shut one down first");
        Problem::new(Code::TooManyAgents, sentence)
    })?;
    let running = start()?;
    let generation = (slot.handle.load(Ordering::Relaxed) >> 32) + 1;
    let handle = generation << 32 | number;
    slot.handle.store(handle, Ordering::Release);
    slot.running.store(Some(Arc::new(running)));
    Ok(handle)
}

/// Takes an agent out, to be shut down; `None` where that was done before.
pub(super) fn remove(handle: p2p_sync_agent) -> Result<Option<Arc<Running>>, Problem> {
    let slot = slot(handle)?;
    let _changing = changing();
    if slot.handle.load(Ordering::Relaxed) != handle {
        return Ok(None);
    }
    Ok(slot.running.swap(None))
}

/// The slot of a handle that names an agent or named one.
fn slot(handle: p2p_sync_agent) -> Result<&'static Slot, Problem> {
    let number = usize::try_from(handle & u64::from(u32::MAX)).unwrap_or(0);
    let slot = number.checked_sub(1).and_then(|index| SLOTS.get(index));
    slot.filter(|slot| (1..=slot.handle.load(Ordering::Relaxed) >> 32).contains(&(handle >> 32)))
        .ok_or_else(|| {
            Problem::new(
                Code::BadHandle,
                "this handle never named an agent: pass what p2p_sync_start gave",
            )
        })
}

fn changing() -> MutexGuard<'static, ()> {
    CHANGING.lock().unwrap_or_else(PoisonError::into_inner)
}

//! Programs that hand their operations over to this agent: how far each has come, and what all of them are told.
//!
//! A program numbers its operations, and an operation's number goes to disk in the commit that holds the operation: so
//! neither a kill of the agent nor one of the program makes two of one.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use crossbeam_channel::{Receiver, Sender, TrySendError};
use p2p_sync_proto::{Position, Problem};
use prost::bytes::Bytes;
use uuid::Uuid;

use crate::{
    attach_lines,
    outbox::{Change, now_ms},
    results::Event,
};

/// Programs remembered; beyond it the one that was not there for longest gives way.
const CLIENTS_MAX: usize = 1024;
/// Lines that wait to be read by one program; one that reads so slowly is cut off, and asks when it is back.
const LINES_MAX: usize = 65_536;
/// How often it is looked whether the gone are done with.
const LOOK_EVERY: Duration = Duration::from_millis(1);

/// All programs that are attached, or were.
#[derive(Default)]
pub(crate) struct Clients {
    known: Mutex<HashMap<Uuid, Arc<Client>>>,
    waiting: Mutex<Waiting>,
    outlets: Mutex<Vec<Outlet>>,
    outlets_made: AtomicU64,
    /// How many outlets there are: most events find none.
    attached: AtomicUsize,
    /// Operations whose states are asked of the hub, of all connections.
    pub(crate) unresolved: AtomicUsize,
}

/// One program, over all of its connections.
#[derive(Debug)]
pub(crate) struct Client {
    id: Uuid,
    /// The highest number taken or refused, on disk or not. Locked while one is taken: two connections of one program
    /// take turns.
    pub(crate) taken: Mutex<u64>,
    /// The highest number on disk.
    on_disk: AtomicU64,
    connections: AtomicUsize,
    used_ms: AtomicU64,
}

impl Client {
    fn new(id: Uuid, number: u64, used_ms: u64) -> Self {
        Self {
            id,
            taken: Mutex::new(number),
            on_disk: AtomicU64::new(number),
            connections: AtomicUsize::new(0),
            used_ms: AtomicU64::new(used_ms),
        }
    }

    /// The highest number that a kill of this agent does not undo.
    pub(crate) fn on_disk(&self) -> u64 {
        self.on_disk.load(Ordering::SeqCst)
    }
}

/// Numbers that were taken and are not on disk, in the order of positions.
#[derive(Default)]
struct Waiting {
    numbers: VecDeque<Taken>,
    positions: HashSet<Position>,
}

#[derive(Debug)]
struct Taken {
    client: Arc<Client>,
    number: u64,
    /// `None`: the operation was refused.
    position: Option<Position>,
    /// What is kept of a refused operation.
    refused: Option<Refused>,
}

/// An operation that was refused, as it is kept as a dead letter. It has a position that the hub never gets to see.
#[derive(Clone, Debug)]
pub(crate) struct Refused {
    pub(crate) position: Position,
    pub(crate) operation: Bytes,
    pub(crate) problem: Problem,
}

/// Where the lines for one connection go in.
struct Outlet {
    id: u64,
    client: Uuid,
    lines: Sender<Arc<str>>,
    is_cut: Arc<AtomicBool>,
    has_hung_up: HasHungUp,
}

/// Whether the program at the other end is gone; what it wrote before may not have been read.
pub(crate) type HasHungUp = Box<dyn Fn() -> bool + Send + Sync>;

/// Where they come out; it is taken away when this is dropped.
pub(crate) struct Connection<'c> {
    clients: &'c Clients,
    pub(crate) client: Arc<Client>,
    id: u64,
    pub(crate) lines: Receiver<Arc<str>>,
    pub(crate) to_lines: Sender<Arc<str>>,
    /// Set when the program did not read what it was told.
    pub(crate) is_cut: Arc<AtomicBool>,
}

/// What attached programs handed over that one commit takes to disk.
#[derive(Default)]
pub(crate) struct HandedOver(Waiting);

impl Clients {
    /// `found` on disk: each program's number, and when it was last used.
    pub(crate) fn new(found: Vec<(Uuid, u64, u64)>) -> Self {
        let clients = Self::default();
        let known = found
            .into_iter()
            .map(|(id, number, used_ms)| (id, Arc::new(Client::new(id, number, used_ms))));
        *lock(&clients.known) = known.collect();
        clients
    }

    /// A program has connected. Gives also the program that is forgotten for it, if one is.
    pub(crate) fn attach(&self, id: Uuid, has_hung_up: HasHungUp) -> (Connection<'_>, Option<Change>) {
        let mut known = lock(&self.known);
        let mut forgotten = None;
        if known.len() >= CLIENTS_MAX && !known.contains_key(&id) {
            let unused = known
                .values()
                .filter(|client| client.connections.load(Ordering::SeqCst) == 0);
            let oldest = unused.min_by_key(|client| client.used_ms.load(Ordering::Relaxed));
            forgotten = oldest.map(|client| client.id);
        }
        if let Some(forgotten) = forgotten {
            known.remove(&forgotten);
        }
        let client = known
            .entry(id)
            .or_insert_with(|| Arc::new(Client::new(id, 0, 0)))
            .clone();
        client.connections.fetch_add(1, Ordering::SeqCst);
        client.used_ms.store(now_ms(), Ordering::Relaxed);
        drop(known);
        let (to_lines, lines) = crossbeam_channel::bounded(LINES_MAX);
        let connection = Connection {
            clients: self,
            client,
            id: self.outlets_made.fetch_add(1, Ordering::Relaxed),
            lines,
            to_lines: to_lines.clone(),
            is_cut: Arc::default(),
        };
        lock(&self.outlets).push(Outlet {
            id: connection.id,
            client: id,
            lines: to_lines,
            is_cut: connection.is_cut.clone(),
            has_hung_up,
        });
        self.attached.fetch_add(1, Ordering::SeqCst);
        (connection, forgotten.map(Change::ForgetClient))
    }

    /// Waits until what programs that are gone had written is taken, or the time is over: it was made before what a program
    /// that comes now will say, and must not overwrite that.
    pub(crate) fn wait_for_the_gone(&self, timeout: Duration) {
        let deadline = Instant::now() + timeout;
        while lock(&self.outlets).iter().any(|outlet| (outlet.has_hung_up)()) && Instant::now() < deadline {
            std::thread::sleep(LOOK_EVERY);
        }
    }

    /// An operation of a program was taken at a position. Called in the order of positions.
    pub(crate) fn note_taken(&self, client: &Arc<Client>, number: u64, position: Position) {
        let mut waiting = lock(&self.waiting);
        waiting.positions.insert(position);
        waiting.numbers.push_back(Taken {
            client: client.clone(),
            number,
            position: Some(position),
            refused: None,
        });
    }

    /// An operation of a program was refused: it is buried in the commit of its number.
    pub(crate) fn note_refused(&self, client: &Arc<Client>, number: u64, refused: Refused) {
        lock(&self.waiting).numbers.push_back(Taken {
            client: client.clone(),
            number,
            position: None,
            refused: Some(refused),
        });
    }

    /// Numbers that are not on disk.
    pub(crate) fn waiting_numbers(&self) -> usize {
        lock(&self.waiting).numbers.len()
    }

    /// Operations that are not on disk: refused ones left out.
    pub(crate) fn waiting_ops(&self) -> usize {
        lock(&self.waiting).positions.len()
    }

    /// Whether an operation is a program's and not on disk.
    pub(crate) fn is_waiting(&self, position: Position) -> bool {
        lock(&self.waiting).positions.contains(&position)
    }

    /// Takes out what goes to disk with the operations up to a position, that one included.
    pub(crate) fn take_up_to(&self, last: Option<Position>) -> HandedOver {
        let mut waiting = lock(&self.waiting);
        let mut taken = Waiting::default();
        while let Some(next) = waiting.numbers.pop_front_if(|next| next.position <= last) {
            if let Some(position) = next.position {
                waiting.positions.remove(&position);
                taken.positions.insert(position);
            }
            taken.numbers.push_back(next);
        }
        HandedOver(taken)
    }

    /// Puts back what a commit did not take.
    pub(crate) fn put_back(&self, handed_over: HandedOver) {
        let mut waiting = lock(&self.waiting);
        waiting.positions.extend(handed_over.0.positions);
        for number in handed_over.0.numbers.into_iter().rev() {
            waiting.numbers.push_front(number);
        }
    }

    /// Tells programs how far they are on disk now.
    pub(crate) fn on_disk(&self, handed_over: &HandedOver) {
        for (client, number) in handed_over.highest() {
            client.on_disk.fetch_max(number, Ordering::SeqCst);
            let line = attach_lines::durable(number).into();
            self.send(Some(client.id), &line);
        }
    }

    /// Tells all programs what became of an operation. Each knows its own.
    pub(crate) fn tell(&self, event: &Event) {
        if self.attached.load(Ordering::SeqCst) > 0 && event.settled.state.is_settled() {
            let line = attach_lines::state(event.operation_id, &event.settled).into();
            self.send(None, &line);
        }
    }

    fn send(&self, to: Option<Uuid>, line: &Arc<str>) {
        for outlet in lock(&self.outlets).iter() {
            if to.is_some_and(|client| client != outlet.client) {
                continue;
            }
            if let Err(TrySendError::Full(_)) = outlet.lines.try_send(line.clone())
                && !outlet.is_cut.swap(true, Ordering::SeqCst)
            {
                tracing::warn!(client = %outlet.client, "an attached program reads too slowly and is cut off");
            }
        }
    }
}

impl Drop for Connection<'_> {
    fn drop(&mut self) {
        lock(&self.clients.outlets).retain(|outlet| outlet.id != self.id);
        self.clients.attached.fetch_sub(1, Ordering::SeqCst);
        self.client.used_ms.store(now_ms(), Ordering::Relaxed);
        self.client.connections.fetch_sub(1, Ordering::SeqCst);
    }
}

impl HandedOver {
    /// Whether an operation is a program's: not sent to the hub before it is on disk.
    pub(crate) fn contains(&self, position: Position) -> bool {
        self.0.positions.contains(&position)
    }

    /// What a commit has to say of the programs.
    pub(crate) fn changes(&self) -> impl Iterator<Item = Change> {
        let highest = self.highest();
        let numbers = highest
            .into_iter()
            .map(|(client, number)| Change::Client(client.id, number));
        let refused = self.0.numbers.iter().filter_map(|next| next.refused.as_ref());
        let buried = refused.flat_map(|refused| {
            let Refused {
                position,
                operation,
                problem,
            } = refused.clone();
            [Change::Withdraw(position), Change::Bury(position, operation, problem)]
        });
        numbers.chain(buried)
    }

    fn highest(&self) -> Vec<(&Client, u64)> {
        let mut highest: HashMap<Uuid, (&Client, u64)> = HashMap::new();
        for next in &self.0.numbers {
            highest.insert(next.client.id, (&*next.client, next.number));
        }
        highest.into_values().collect()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use p2p_sync_proto::Code;

    use super::*;

    fn at(sequence: u64) -> Position {
        Position {
            incarnation: 1,
            sequence,
        }
    }

    fn changes(handed_over: &HandedOver) -> Vec<(u128, u64)> {
        let mut changes: Vec<_> = handed_over
            .changes()
            .map(|change| match change {
                Change::Client(id, number) => (id.as_u128(), number),
                Change::Bury(position, ..) | Change::Withdraw(position) => (u128::MAX, position.sequence),
                other => panic!("not of a client: {other:?}"),
            })
            .collect();
        changes.sort_unstable();
        changes
    }

    #[test]
    fn a_number_goes_to_disk_with_its_operation_and_a_refused_one_behind_those_before_it() {
        let clients = Clients::default();
        let (first, _) = clients.attach(Uuid::from_u128(1), Box::new(|| false));
        let (second, _) = clients.attach(Uuid::from_u128(2), Box::new(|| false));
        let refused = Refused {
            position: at(6),
            operation: Bytes::new(),
            problem: Problem::new(Code::BadMap, "no map"),
        };
        clients.note_taken(&first.client, 1, at(5));
        clients.note_refused(&first.client, 2, refused);
        clients.note_taken(&second.client, 1, at(7));
        clients.note_taken(&first.client, 3, at(8));
        assert!(
            clients.take_up_to(None).0.numbers.is_empty(),
            "what is before a refused one is not on disk"
        );
        let handed_over = clients.take_up_to(Some(at(7)));
        let buried = [(u128::MAX, 6); 2];
        assert_eq!(changes(&handed_over), [&[(1, 2), (2, 1)], &buried[..]].concat());
        assert!(handed_over.contains(at(5)) && !clients.is_waiting(at(5)));
        clients.put_back(handed_over);
        assert_eq!(clients.waiting_ops(), 3);
        let numbers = [(1, 3), (2, 1)];
        assert_eq!(
            changes(&clients.take_up_to(Some(at(8)))),
            [&numbers, &buried[..]].concat()
        );
        assert_eq!(first.client.on_disk(), 0, "nobody has said so yet");
    }

    #[test]
    fn invariant_12_clients_are_bounded_and_who_is_attached_is_never_forgotten() {
        let found = (0..CLIENTS_MAX as u64).map(|number| (Uuid::from_u128(u128::from(number)), number, number));
        let clients = Clients::new(found.collect());
        let (oldest, forgotten) = clients.attach(Uuid::nil(), Box::new(|| false));
        assert!(forgotten.is_none(), "it was known");
        let (_new, forgotten) = clients.attach(Uuid::max(), Box::new(|| false));
        let Some(Change::ForgetClient(forgotten)) = forgotten else {
            panic!("there was no room");
        };
        assert_eq!(
            forgotten,
            Uuid::from_u128(1),
            "the one unused longest but for the one that is attached"
        );
        assert_eq!(lock(&clients.known).len(), CLIENTS_MAX);
        drop(oldest);
    }

    #[test]
    fn invariant_12_who_does_not_read_is_cut_off() {
        let clients = Clients::default();
        let (connection, _) = clients.attach(Uuid::nil(), Box::new(|| false));
        let line: Arc<str> = "{}".into();
        for _ in 0..LINES_MAX {
            clients.send(None, &line);
        }
        assert!(!connection.is_cut.load(Ordering::SeqCst));
        clients.send(None, &line);
        assert!(connection.is_cut.load(Ordering::SeqCst));
        assert_eq!(connection.lines.len(), LINES_MAX);
    }
}

//! What connects: how many connections an address has, and which of them are cut.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    num::NonZeroU32,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use super::Rate;

/// Messages that did not open, of one connection: a burst, and so many a second after it. An honest host whose credential is
/// no longer good sends one and goes.
const UNOPENED_BURST: NonZeroU32 = NonZeroU32::new(64).expect("not zero");
const UNOPENED_PER_SECOND: NonZeroU32 = NonZeroU32::new(2).expect("not zero");
/// Of one address. Beyond it each of its connections has one.
const ADDRESS_UNOPENED_BURST: NonZeroU32 = NonZeroU32::new(256).expect("not zero");
const ADDRESS_UNOPENED_PER_SECOND: NonZeroU32 = NonZeroU32::new(8).expect("not zero");
/// New connections of one address: whole tables of agents behind one router come back within a burst.
const CONNECTS_BURST: NonZeroU32 = NonZeroU32::new(256).expect("not zero");
const CONNECTS_PER_SECOND: NonZeroU32 = NonZeroU32::new(16).expect("not zero");
/// Before a connection is cut, for its last answer to go out.
const CUT_DELAY: Duration = Duration::from_millis(50);
/// A connection on which no message was opened lasts so long, where addresses tell who connects.
const STRANGER_MAX: Duration = Duration::from_secs(30);
/// Answers that wait to be read, and none of them is for so long, cut the connection.
const UNREAD_MAX: Duration = Duration::from_secs(30);
/// Addresses remembered; beyond it those without a connection are forgotten.
const ADDRESSES_MAX: usize = 16 * 1024;

/// Everything that is connected, by its address.
#[derive(Debug)]
pub struct Peers {
    /// Absent: an edge stands before the hub, everybody comes from its addresses, and it keeps such bounds itself.
    per_address: Option<usize>,
    addresses: Mutex<HashMap<IpAddr, Arc<Address>>>,
}

#[derive(Debug)]
struct Address {
    connections: AtomicUsize,
    connects: Rate,
    unopened: Rate,
    /// Its connections are turned away, and that was told.
    told: AtomicBool,
}

/// One connection, counted as long as it lives.
#[derive(Debug)]
pub struct Peer {
    address: SocketAddr,
    /// Absent where addresses tell nothing.
    of: Option<Arc<Address>>,
    unopened: Rate,
    since: Instant,
    opened: AtomicBool,
    cut_at: Mutex<Option<Instant>>,
    unread: Mutex<Unread>,
}

#[derive(Debug)]
struct Unread {
    answers: usize,
    /// When there were none, or one was read.
    since: Instant,
}

impl Peers {
    /// At most so many connections of an address; `None` where all come through an edge.
    pub fn new(per_address: Option<usize>) -> Self {
        Self {
            per_address,
            addresses: Mutex::default(),
        }
    }

    /// A connection of this address, or `None` where it has too many.
    pub fn enter(&self, address: SocketAddr) -> Option<Arc<Peer>> {
        let of = match self.per_address {
            None => None,
            Some(connections_max) => Some(self.of(address.ip()).enter(address, connections_max)?),
        };
        Some(Arc::new(Peer {
            address,
            of,
            unopened: Rate::new(UNOPENED_PER_SECOND, UNOPENED_BURST),
            since: Instant::now(),
            opened: AtomicBool::new(false),
            cut_at: Mutex::default(),
            unread: Mutex::new(Unread {
                answers: 0,
                since: Instant::now(),
            }),
        }))
    }

    fn of(&self, address: IpAddr) -> Arc<Address> {
        let mut addresses = self.addresses.lock().unwrap_or_else(PoisonError::into_inner);
        if addresses.len() >= ADDRESSES_MAX {
            addresses.retain(|_, known| known.connections.load(Ordering::Relaxed) > 0);
        }
        let address = addresses.entry(whose(address)).or_insert_with(|| {
            Arc::new(Address {
                connections: AtomicUsize::new(0),
                connects: Rate::new(CONNECTS_PER_SECOND, CONNECTS_BURST),
                unopened: Rate::new(ADDRESS_UNOPENED_PER_SECOND, ADDRESS_UNOPENED_BURST),
                told: AtomicBool::new(false),
            })
        });
        Arc::clone(address)
    }
}

/// Whoever has one IPv6 address has its whole network of 64 bits.
pub(crate) fn whose(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => {
            let network = address.to_bits() & !u128::from(u64::MAX);
            IpAddr::V6(Ipv6Addr::from_bits(network))
        }
        address @ IpAddr::V4(_) => address,
    }
}

impl Address {
    fn enter(self: Arc<Self>, address: SocketAddr, connections_max: usize) -> Option<Arc<Self>> {
        // Connections enter one after the other.
        let has_room = self.connections.load(Ordering::Relaxed) < connections_max;
        if has_room && self.connects.take(1).is_ok() {
            self.connections.fetch_add(1, Ordering::Relaxed);
            self.told.store(false, Ordering::Relaxed);
            return Some(self);
        }
        if !self.told.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                address = %address.ip(), connections_max,
                "connections of an address are turned away: if it is that of a load balancer, set max_connections_per_address = 0"
            );
        }
        None
    }
}

impl Peer {
    /// Where it comes from.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// A message opened: there is a host at the other end.
    pub fn opened(&self) {
        self.opened.store(true, Ordering::Relaxed);
    }

    /// Whether one has.
    pub fn is_known(&self) -> bool {
        self.opened.load(Ordering::Relaxed)
    }

    /// A message did not open, or was given up before it could. Too many cut the connection. An edge's connections carry
    /// others' messages too, and are not cut for one's.
    pub fn unopened(&self) {
        let Some(of) = &self.of else { return };
        // Both are counted.
        let within = [self.unopened.take(1), of.unopened.take(1)];
        if within.iter().any(Result::is_err) {
            self.cut();
        }
    }

    fn cut(&self) {
        let mut cut_at = lock(&self.cut_at);
        if cut_at.is_none() {
            *cut_at = Some(Instant::now() + CUT_DELAY);
            tracing::debug!(address = %self.address, "a connection is cut: too much of what it sent did not open");
        }
    }

    /// An answer waits to be read.
    pub(super) fn answer_waits(&self) {
        let mut unread = lock(&self.unread);
        if unread.answers == 0 {
            unread.since = Instant::now();
        }
        unread.answers += 1;
    }

    /// An answer was read.
    pub(super) fn answer_is_read(&self) {
        let mut unread = lock(&self.unread);
        unread.answers = unread.answers.saturating_sub(1);
        unread.since = Instant::now();
    }

    /// Why the connection ends now, if it does.
    pub fn ends(&self) -> Option<&'static str> {
        let is_unread = {
            let unread = lock(&self.unread);
            unread.answers > 0 && unread.since.elapsed() > UNREAD_MAX
        };
        let is_stranger = || self.of.is_some() && !self.is_known();
        if lock(&self.cut_at).is_some_and(|at| at <= Instant::now()) {
            Some("too much of what it sent did not open")
        } else if is_unread {
            Some("its answers are not read")
        } else if self.since.elapsed() > STRANGER_MAX && is_stranger() {
            Some("nothing that it sent opened")
        } else {
            None
        }
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        if let Some(of) = &self.of {
            of.connections.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn from(address: &str) -> SocketAddr {
        SocketAddr::new(address.parse().expect("an address"), 7)
    }

    #[test]
    fn an_address_has_so_many_connections_and_others_have_theirs() {
        let peers = Peers::new(Some(2));
        let first = peers.enter(from("10.0.0.1")).expect("room");
        let _second = peers.enter(from("10.0.0.1")).expect("room");
        assert!(peers.enter(from("10.0.0.1")).is_none());
        peers.enter(from("10.0.0.2")).expect("another's room");
        drop(first);
        peers.enter(from("10.0.0.1")).expect("room again");
    }

    #[test]
    fn an_ipv6_network_is_one_address_and_a_mapped_address_is_itself() {
        let peers = Peers::new(Some(1));
        let _first = peers.enter(from("2001:db8::1")).expect("room");
        assert!(peers.enter(from("2001:db8::2")).is_none());
        let _other = peers.enter(from("2001:db8:0:1::1")).expect("another's");
        let _plain = peers.enter(from("10.0.0.1")).expect("room");
        assert!(peers.enter(from("::ffff:10.0.0.1")).is_none());
    }

    #[test]
    fn an_address_without_a_connection_is_forgotten_when_there_are_many() {
        let peers = Peers::new(Some(1));
        let _stays = peers.enter(from("10.0.0.1")).expect("room");
        for address in 0..ADDRESSES_MAX {
            let address = Ipv6Addr::from_bits((address as u128) << 64).to_string();
            peers.enter(from(&address)).expect("room");
        }
        assert!(peers.addresses.lock().expect("not poisoned").len() <= ADDRESSES_MAX);
        assert!(
            peers.enter(from("10.0.0.1")).is_none(),
            "who is connected is remembered"
        );
    }

    #[test]
    fn what_does_not_open_cuts_its_connection_and_not_that_of_an_edge() {
        for (per_address, is_cut) in [(Some(8), true), (None, false)] {
            let peers = Peers::new(per_address);
            let peer = peers.enter(from("10.0.0.1")).expect("room");
            for _ in 0..UNOPENED_BURST.get() {
                peer.unopened();
            }
            std::thread::sleep(CUT_DELAY);
            assert_eq!(peer.ends(), None, "so many are borne with");
            for _ in 0..5 {
                peer.unopened();
            }
            std::thread::sleep(CUT_DELAY);
            assert_eq!(peer.ends().is_some(), is_cut);
        }
    }

    #[test]
    fn an_address_that_has_sent_too_much_that_did_not_open_has_one_more_a_connection() {
        let peers = Peers::new(Some(1));
        for _ in 0..=ADDRESS_UNOPENED_BURST.get() / UNOPENED_BURST.get() {
            let peer = peers.enter(from("10.0.0.1")).expect("room");
            for _ in 0..UNOPENED_BURST.get() {
                peer.unopened();
            }
        }
        let peer = peers.enter(from("10.0.0.1")).expect("room");
        peer.unopened();
        std::thread::sleep(CUT_DELAY);
        assert!(peer.ends().is_some());
        let neighbour = peers.enter(from("10.0.0.2")).expect("room");
        neighbour.unopened();
        std::thread::sleep(CUT_DELAY);
        assert_eq!(neighbour.ends(), None);
    }
}

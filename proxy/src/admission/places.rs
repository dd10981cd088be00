//! Room for strangers: where it is full, whoever has held a place for longest gives way. An honest stranger needs a moment,
//! so that only who takes his time is ever the oldest.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
};

use futures::task::AtomicWaker;

/// A bounded room.
#[derive(Debug)]
pub struct Places {
    size: usize,
    taken: Mutex<Taken>,
}

#[derive(Debug, Default)]
struct Taken {
    /// By when they were taken.
    places: BTreeMap<u64, (usize, Arc<Notice>)>,
    size: usize,
    next: u64,
}

#[derive(Debug, Default)]
struct Notice {
    given: AtomicBool,
    waker: AtomicWaker,
}

/// A place in it, given back with this value.
#[derive(Debug)]
pub struct Place {
    places: Arc<Places>,
    number: Mutex<Option<u64>>,
    notice: Arc<Notice>,
}

impl Places {
    /// Room for so much.
    pub fn new(size: usize) -> Arc<Self> {
        Arc::new(Self {
            size,
            taken: Mutex::default(),
        })
    }

    /// A place of no size yet, and of no age before it has one.
    pub fn place(self: &Arc<Self>) -> Place {
        Place {
            places: Arc::clone(self),
            number: Mutex::default(),
            notice: Arc::default(),
        }
    }
}

impl Place {
    /// Takes so much more; the oldest places give way where it is too much, this one too if it is the oldest.
    pub fn grow(&self, by: usize) {
        if self.has_given_way() {
            return;
        }
        let mut number = self.number.lock().unwrap_or_else(PoisonError::into_inner);
        let mut taken = self.places.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let number = *number.get_or_insert_with(|| {
            taken.next += 1;
            taken.next
        });
        taken.size += by;
        let place = taken.places.entry(number);
        place.or_insert_with(|| (0, Arc::clone(&self.notice))).0 += by;
        let mut gone = Vec::new();
        while taken.size > self.places.size
            && let Some((_, (size, notice))) = taken.places.pop_first()
        {
            taken.size -= size;
            gone.push(notice);
        }
        drop(taken);
        for notice in gone {
            notice.given.store(true, Ordering::Release);
            notice.waker.wake();
        }
    }

    /// Gives everything back; the place begins anew when it grows again.
    pub fn clear(&self) {
        let mut number = self.number.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(number) = number.take() {
            let mut taken = self.places.taken.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some((size, _)) = taken.places.remove(&number) {
                taken.size -= size;
            }
        }
    }

    /// Whether another needed it.
    pub fn has_given_way(&self) -> bool {
        self.notice.given.load(Ordering::Acquire)
    }

    /// Ready when another needed it.
    pub fn poll_given_way(&self, cx: &mut Context<'_>) -> Poll<()> {
        self.notice.waker.register(cx.waker());
        if self.has_given_way() {
            return Poll::Ready(());
        }
        Poll::Pending
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_it_is_full_the_oldest_gives_way_and_what_is_given_back_is_room() {
        let places = Places::new(10);
        let [first, second, third] = [(); 3].map(|()| places.place());
        first.grow(6);
        second.grow(4);
        assert!(!first.has_given_way() && !second.has_given_way());
        third.grow(1);
        assert!(first.has_given_way() && !second.has_given_way() && !third.has_given_way());
        drop(second);
        third.grow(9);
        assert!(!third.has_given_way());
        third.clear();
        let fourth = places.place();
        fourth.grow(10);
        assert!(!fourth.has_given_way());
        fourth.grow(1);
        assert!(fourth.has_given_way(), "the oldest may be who asks");
    }

    #[test]
    fn a_place_that_was_cleared_is_young_again() {
        let places = Places::new(2);
        let (old, young) = (places.place(), places.place());
        old.grow(1);
        young.grow(1);
        old.clear();
        old.grow(1);
        places.place().grow(1);
        assert!(young.has_given_way() && !old.has_given_way());
    }
}

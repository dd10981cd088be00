//! The last unsettled operation of each path kept as `every`.

use std::{
    collections::HashMap,
    hash::{BuildHasher as _, RandomState},
};

use p2p_sync_proto::Position;

/// Several small maps instead of a large one: one that grows holds the lanes' lock, and so a caller, for a moment only.
const MAPS: usize = 64;

#[derive(Debug)]
pub(super) struct Tails {
    maps: Vec<HashMap<Box<str>, Position>>,
    hasher: RandomState,
    /// Of paths.
    len: usize,
}

impl Default for Tails {
    fn default() -> Self {
        Self {
            maps: vec![HashMap::new(); MAPS],
            hasher: RandomState::new(),
            len: 0,
        }
    }
}

impl Tails {
    pub(super) fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The newest operation of a path, if that is not settled.
    pub(super) fn get(&mut self, path: &str) -> Option<Position> {
        self.map(path).get(path).copied()
    }

    /// Notes the newest operation of a path; gives the one before, if that is not settled.
    pub(super) fn replace(&mut self, path: &str, position: Position) -> Option<Position> {
        let map = self.map(path);
        if let Some(tail) = map.get_mut(path) {
            return Some(std::mem::replace(tail, position));
        }
        map.insert(path.into(), position);
        self.len += 1;
        None
    }

    /// Notes that an operation is settled: later ones of its path need not wait for it.
    pub(super) fn settled(&mut self, path: &str, position: Position) {
        let map = self.map(path);
        if map.get(path) == Some(&position) {
            map.remove(path);
            self.len -= 1;
        }
    }

    fn map(&mut self, path: &str) -> &mut HashMap<Box<str>, Position> {
        let hash = self.hasher.hash_one(path);
        &mut self.maps[usize::try_from(hash % MAPS as u64).expect("below MAPS")]
    }
}

impl FromIterator<(String, Position)> for Tails {
    fn from_iter<T: IntoIterator<Item = (String, Position)>>(paths: T) -> Self {
        let mut tails = Self::default();
        for (path, position) in paths {
            tails.replace(&path, position);
        }
        tails
    }
}

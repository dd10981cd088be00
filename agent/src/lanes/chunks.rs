//! Where operations lie until they are on disk: chunks that are used again and again.
//!
//! An operation is freed by another thread than the one that made it, which no allocator likes; so a caller allocates a
//! chunk for some hundred of them, and in a steady flow not even that. What waits to be sent longer has a copy of its
//! own ([`Queued::into_entry`](super::Queued::into_entry)), for a chunk is held by the last of its operations.

use prost::bytes::{Bytes, BytesMut};

const CHUNK_BYTES: usize = 64 * 1024;
/// In turn: what comes in the time of a few commits finds the first one free again.
const CHUNKS: usize = 4;
/// What is larger has an allocation of its own, so that little of a chunk is left unused.
const SHARED_BYTES_MAX: usize = CHUNK_BYTES / 16;

#[derive(Default)]
pub(super) struct Chunks {
    chunks: [BytesMut; CHUNKS],
    turn: usize,
}

impl Chunks {
    /// Has so many bytes written, and gives them.
    pub(super) fn write(&mut self, bytes: usize, write: impl FnOnce(&mut [u8])) -> Bytes {
        if bytes > SHARED_BYTES_MAX {
            let mut own = BytesMut::zeroed(bytes);
            write(&mut own);
            return own.freeze();
        }
        let chunk = self.with_room(bytes);
        chunk.resize(bytes, 0);
        write(chunk);
        chunk.split().freeze()
    }

    fn with_room(&mut self, bytes: usize) -> &mut BytesMut {
        if self.chunks[self.turn].capacity() < bytes {
            self.turn = (self.turn + 1) % CHUNKS;
            let chunk = &mut self.chunks[self.turn];
            // Some of its operations may be under way still: those keep it.
            if !chunk.try_reclaim(CHUNK_BYTES) {
                *chunk = BytesMut::with_capacity(CHUNK_BYTES);
            }
        }
        &mut self.chunks[self.turn]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fill(chunks: &mut Chunks, number: u8) -> Bytes {
        chunks.write(1000, |to| to.fill(number))
    }

    #[test]
    fn a_chunk_is_used_again_when_the_last_of_its_operations_is_gone_and_not_before() {
        let mut chunks = Chunks::default();
        let first = fill(&mut chunks, 1);
        let a_turn = CHUNKS * CHUNK_BYTES / 1000 + CHUNKS;
        for _ in 0..a_turn {
            fill(&mut chunks, 2);
        }
        assert!(first.iter().all(|&byte| byte == 1), "written over");
        let places = |chunks: &mut Chunks| (0..a_turn).map(|_| fill(chunks, 3).as_ptr()).collect::<Vec<_>>();
        let (before, after) = (places(&mut chunks), places(&mut chunks));
        let used_again = after.iter().filter(|place| before.contains(place)).count();
        assert!(used_again > a_turn / 2, "{used_again} of {a_turn}");
    }
}

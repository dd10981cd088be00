//! Cursors: where a reader was, in a form that only the hub reads.
//!
//! A cursor names the timeline and the request it was made for, so that one that does not fit is told instead of
//! skipping what the reader has not seen. It is no secret and proves nothing: a reader may read from any position.

use p2p_sync_proto::{Code, Problem, limits::PATH_BYTES_MAX};

/// Of the layout: version, kind, timeline, length of the subject, subject, position.
const VERSION: u8 = 1;
const HEAD_BYTES: usize = 1 + 1 + 8 + 2;

/// Which request a cursor goes on with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// A scan: the position is the last path.
    Scan = 1,
    /// The changes of a stream: the position is the last sequence.
    Changes = 2,
}

/// The request that a cursor belongs to.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// Which request.
    pub kind: Kind,
    /// The prefix that is scanned, or the stream.
    pub subject: &'a str,
    /// Of the hub, now.
    pub timeline: u64,
}

impl Request<'_> {
    /// The cursor of a position.
    pub fn cursor(&self, position: &[u8]) -> Vec<u8> {
        let subject_bytes = u16::try_from(self.subject.len()).expect("a prefix or stream is checked before it is read");
        let mut cursor = Vec::with_capacity(HEAD_BYTES + self.subject.len() + position.len());
        cursor.extend([VERSION, self.kind as u8]);
        cursor.extend(self.timeline.to_be_bytes());
        cursor.extend(subject_bytes.to_be_bytes());
        cursor.extend(self.subject.as_bytes());
        cursor.extend(position);
        cursor
    }

    /// The position of a cursor; absent for the empty one. `BAD_CURSOR` for one of another request or timeline.
    pub fn position<'c>(&self, cursor: &'c [u8]) -> Result<Option<&'c [u8]>, Problem> {
        if cursor.is_empty() {
            return Ok(None);
        }
        let head = self.cursor(&[]);
        let position = cursor
            .strip_prefix(head.as_slice())
            .filter(|position| position.len() <= PATH_BYTES_MAX);
        position.map(Some).ok_or_else(bad_cursor)
    }
}

/// What a reader is told whose cursor does not fit.
pub fn bad_cursor() -> Problem {
    let sentence = "the cursor is of another request, or of a time before the hub's database was restored: \
                    read again from the beginning, with an empty cursor";
    Problem::new(Code::BadCursor, sentence)
}

#[cfg(test)]
mod tests {
    use super::*;

    const REQUEST: Request<'static> = Request {
        kind: Kind::Changes,
        subject: "prontera",
        timeline: 4,
    };

    #[test]
    fn a_cursor_gives_its_position_back() {
        assert_eq!(REQUEST.position(&REQUEST.cursor(b"at")), Ok(Some(&b"at"[..])));
        assert_eq!(REQUEST.position(b""), Ok(None));
    }

    #[test]
    fn a_cursor_of_another_request_or_timeline_is_refused() {
        let cursor = REQUEST.cursor(&7_u64.to_be_bytes());
        for other in [
            Request {
                kind: Kind::Scan,
                ..REQUEST
            },
            Request {
                subject: "geffen",
                ..REQUEST
            },
            Request {
                subject: "pront",
                ..REQUEST
            },
            Request { timeline: 5, ..REQUEST },
        ] {
            assert_eq!(other.position(&cursor).expect_err("another").code, Code::BadCursor);
        }
        for garbage in [&b"x"[..], &cursor[..11], &[0xff; 400]] {
            assert_eq!(REQUEST.position(garbage).expect_err("garbage").code, Code::BadCursor);
        }
    }
}

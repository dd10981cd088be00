//! How far a planned hand-over is, and what comes next: the successor's copy catches up, the holder is asked, and the map is
//! taken where it does not release it in time.

use std::time::Duration;

use uuid::Uuid;

/// A copy that lacks no more of its map's stream is as good as whole: what is missing comes within the hand-over.
pub const COPY_NEAR: u64 = 256;

/// A hand-over that has begun.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Handover {
    /// Who is to have the map.
    pub successor: Uuid,
    /// How much longer it may catch up.
    pub catch_up_left: Duration,
    /// How much longer the holder has, once it was asked.
    pub left: Option<Duration>,
}

/// What a successor is like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Successor {
    /// It is active and was heard of late.
    pub is_there: bool,
    /// How far its copy is; none where it has told of none.
    pub copy: Option<u64>,
    /// It will never have one.
    pub keeps_no_copies: bool,
    /// It hears what it is told, now, and does not leave: a map that its holder gives up would go on there.
    pub is_ready: bool,
}

/// What comes next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Nothing, for so long.
    Wait(Duration),
    /// The holder is asked.
    Ask,
    /// The map is taken.
    Take,
    /// The holder keeps it.
    CallOff,
}

/// What comes next of a hand-over, with the map's stream at `head`.
pub fn next(handover: &Handover, successor: &Successor, head: u64) -> Next {
    if !successor.is_there {
        return Next::CallOff;
    }
    match handover.left {
        Some(Duration::ZERO) if !successor.is_ready => Next::CallOff,
        Some(Duration::ZERO) => Next::Take,
        Some(left) => Next::Wait(left),
        None if !successor.is_ready && handover.catch_up_left.is_zero() => Next::CallOff,
        None if !successor.is_ready => Next::Wait(handover.catch_up_left),
        None if successor.keeps_no_copies || handover.catch_up_left.is_zero() => Next::Ask,
        None if successor
            .copy
            .is_some_and(|copy| copy.saturating_add(COPY_NEAR) >= head) =>
        {
            Next::Ask
        }
        None => Next::Wait(handover.catch_up_left),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const THERE: Successor = Successor {
        is_there: true,
        copy: None,
        keeps_no_copies: false,
        is_ready: true,
    };
    const BEGUN: Handover = Handover {
        successor: Uuid::nil(),
        catch_up_left: Duration::from_secs(3),
        left: None,
    };

    #[test]
    fn the_holder_is_asked_when_the_copy_is_near_or_its_time_is_over() {
        let head = 10_000;
        let at = |copy| Successor {
            copy: Some(copy),
            ..THERE
        };
        assert_eq!(next(&BEGUN, &THERE, head), Next::Wait(Duration::from_secs(3)));
        assert_eq!(
            next(&BEGUN, &at(head - COPY_NEAR - 1), head),
            Next::Wait(Duration::from_secs(3))
        );
        assert_eq!(next(&BEGUN, &at(head - COPY_NEAR), head), Next::Ask);
        // The copy may be ahead of a head that was read before.
        assert_eq!(next(&BEGUN, &at(head + 5), head), Next::Ask);
        let late = Handover {
            catch_up_left: Duration::ZERO,
            ..BEGUN
        };
        assert_eq!(next(&late, &THERE, head), Next::Ask);
        let none = Successor {
            keeps_no_copies: true,
            ..THERE
        };
        assert_eq!(next(&BEGUN, &none, head), Next::Ask);
    }

    #[test]
    fn a_holder_that_was_asked_has_its_time_and_no_more() {
        let asked = |left| Handover {
            left: Some(left),
            ..BEGUN
        };
        let left = Duration::from_millis(1);
        assert_eq!(next(&asked(left), &THERE, 0), Next::Wait(left));
        assert_eq!(next(&asked(Duration::ZERO), &THERE, 0), Next::Take);
    }

    #[test]
    fn nothing_is_taken_for_a_successor_that_is_not_there() {
        let head = 10_000;
        let deaf = Successor {
            is_ready: false,
            copy: Some(head),
            ..THERE
        };
        assert_eq!(
            next(&BEGUN, &deaf, head),
            Next::Wait(Duration::from_secs(3)),
            "it may hear again"
        );
        let caught_up = Handover {
            catch_up_left: Duration::ZERO,
            ..BEGUN
        };
        assert_eq!(next(&caught_up, &deaf, head), Next::CallOff, "nobody is asked for it");
        let not_released = Handover {
            left: Some(Duration::ZERO),
            ..BEGUN
        };
        assert_eq!(next(&not_released, &deaf, head), Next::CallOff, "and it is not taken");
        let gone = Successor {
            is_there: false,
            ..THERE
        };
        for left in [None, Some(Duration::ZERO), Some(Duration::from_secs(1))] {
            assert_eq!(next(&Handover { left, ..BEGUN }, &gone, 0), Next::CallOff);
        }
    }
}

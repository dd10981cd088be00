//! Reads that must not be older than what their reader knows of.

use uuid::Uuid;

use crate::{
    ids::{Position, read_id},
    reject_code::{Code, Problem},
    v1,
};

/// What a read has to hold; by default whatever there is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AtLeast {
    version: Option<Known>,
    sequence: u64,
}

/// A version that is known of, and who counts its positions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Known {
    /// Whose it is; nil for an edit by the hub's operator.
    pub host_id: Uuid,
    /// 0 where the writer does not know under which one the hub stores it.
    pub tenure: u64,
    /// Compares with positions of the same host alone.
    pub position: Position,
}

impl AtLeast {
    /// What a host asks for; `BAD_REQUEST` where it names nobody's version.
    pub fn of(get: &v1::Get, asker: Uuid) -> Result<Self, Problem> {
        let host_id = if get.at_least_host_id.is_empty() {
            asker
        } else {
            let not_one = || {
                Problem::new(
                    Code::BadRequest,
                    "the id of a host has 16 bytes: give the state's host_id",
                )
            };
            read_id(&get.at_least_host_id).ok_or_else(not_one)?
        };
        let version = get.at_least.map(|version| Known {
            host_id,
            tenure: version.tenure,
            position: Position {
                incarnation: version.incarnation,
                sequence: version.sequence,
            },
        });
        Ok(Self {
            version,
            sequence: get.at_least_sequence,
        })
    }

    /// The version that is to be held.
    pub fn version(&self) -> Option<Known> {
        self.version
    }

    /// The position in the path's stream that is to be held; 0 for none.
    pub fn sequence(&self) -> u64 {
        self.sequence
    }

    /// Whether a state, or that there is none, is surely not older. Where this is false, it may be new enough all the same.
    pub fn is_held_by(&self, state: Option<&v1::State>) -> bool {
        match state {
            None => *self == Self::default(),
            Some(state) => {
                state.stream_sequence >= self.sequence && self.version.is_none_or(|known| known.is_held_by(state))
            }
        }
    }
}

impl Known {
    fn is_held_by(&self, state: &v1::State) -> bool {
        let version = state.version.unwrap_or_default();
        let position = Position {
            incarnation: version.incarnation,
            sequence: version.sequence,
        };
        // Above a tenure that is not known anything may be.
        let is_of_a_later_tenure = self.tenure > 0 && version.tenure > self.tenure;
        let is_later = || read_id(&state.host_id) == Some(self.host_id) && position >= self.position;
        is_of_a_later_tenure || version.tenure == self.tenure && is_later()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ASKER: Uuid = Uuid::from_u128(1);
    const OTHER: Uuid = Uuid::from_u128(2);

    fn version((tenure, incarnation, sequence): (u64, u64, u64)) -> v1::Version {
        v1::Version {
            tenure,
            incarnation,
            sequence,
        }
    }

    fn asked(at_least: (u64, u64, u64), host_id: Option<Uuid>) -> AtLeast {
        let get = v1::Get {
            at_least: Some(version(at_least)),
            at_least_host_id: host_id.map(|id| id.as_bytes().to_vec().into()).unwrap_or_default(),
            ..Default::default()
        };
        AtLeast::of(&get, ASKER).expect("a host's version")
    }

    fn state(of: (u64, u64, u64), host_id: Uuid) -> v1::State {
        v1::State {
            version: Some(version(of)),
            host_id: host_id.as_bytes().to_vec().into(),
            stream_sequence: 10,
            ..Default::default()
        }
    }

    #[test]
    fn a_state_is_surely_not_older_at_a_later_tenure_or_further_on_of_the_same_host() {
        for (known, held, host_id, is_held) in [
            ((3, 7, 5), (3, 7, 5), ASKER, true),
            ((3, 7, 5), (3, 7, 6), ASKER, true),
            ((3, 7, 5), (3, 8, 1), ASKER, true),
            ((3, 7, 5), (4, 1, 1), ASKER, true),
            ((3, 7, 5), (4, 1, 1), OTHER, true),
            ((3, 7, 5), (3, 7, 4), ASKER, false),
            ((3, 7, 5), (3, 6, 9), ASKER, false),
            ((3, 7, 5), (2, 9, 9), ASKER, false),
            // Of two hosts at one tenure the one that came last is newer, and positions do not tell which.
            ((3, 7, 5), (3, 9, 9), OTHER, false),
            // Stored at whatever tenure the path had then.
            ((0, 7, 5), (4, 9, 9), ASKER, false),
            ((0, 7, 5), (4, 9, 9), OTHER, false),
            ((0, 7, 5), (0, 7, 6), ASKER, true),
        ] {
            let state = state(held, host_id);
            assert_eq!(
                asked(known, None).is_held_by(Some(&state)),
                is_held,
                "{known:?} by {held:?} of {host_id}"
            );
        }
        assert!(asked((3, 7, 5), Some(OTHER)).is_held_by(Some(&state((3, 7, 5), OTHER))));
        assert!(!asked((3, 7, 5), None).is_held_by(None), "gone, or not come");
    }

    #[test]
    fn a_position_of_the_stream_is_held_from_there_on() {
        for (at_least_sequence, is_held) in [(0, true), (9, true), (10, true), (11, false)] {
            let get = v1::Get {
                at_least_sequence,
                ..Default::default()
            };
            let asked = AtLeast::of(&get, ASKER).expect("no host is named");
            assert_eq!(
                asked.is_held_by(Some(&state((1, 1, 1), OTHER))),
                is_held,
                "{at_least_sequence}"
            );
            assert_eq!(asked.is_held_by(None), at_least_sequence == 0);
        }
        let get = v1::Get {
            at_least_host_id: vec![1; 15].into(),
            ..Default::default()
        };
        assert_eq!(AtLeast::of(&get, ASKER).expect_err("15 bytes").code, Code::BadRequest);
    }
}

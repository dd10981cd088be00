//! The time that a refusal takes: `tests/run timing` measures the same for longer.

use p2p_sync_tests::timing::compare_all;

/// In each try.
const MEASUREMENTS: usize = 15_000;
/// Of a leak none is within the bound; other tests run beside this one, and what they disturb is not there each time.
const TRIES: usize = 8;

#[test]
fn what_does_not_open_takes_the_same_time_whatever_is_wrong_with_it() {
    let mut compared = compare_all(MEASUREMENTS, TRIES);
    let control = compared.pop().expect("the last");
    assert!(
        control.leaks(),
        "what opens takes longer, and is not told apart: {control:?}"
    );
    for comparison in compared {
        println!("{comparison:?}");
        assert!(!comparison.leaks(), "{comparison:?}");
    }
}

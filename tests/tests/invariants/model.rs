//! The hub's state under random schedules, against a simple model of it.

use p2p_sync_tests::model::{Seeds, run};

/// The full run has 10,000: `P2P_SYNC_MODEL_SEED=1 P2P_SYNC_MODEL_SEEDS=10000`.
const SEEDS: u64 = 200;

#[tokio::test(flavor = "multi_thread")]
async fn invariants_02_03_04_and_08_hold_whatever_is_delayed_repeated_reordered_lost_moved_and_edited() {
    let seeds = Seeds::from_environment(SEEDS);
    println!("{seeds}");
    match run(seeds).await {
        Ok(report) => println!("{report}"),
        Err(failure) => panic!("{failure}"),
    }
}

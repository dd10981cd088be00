//! A host writes the players who are on its maps, and no others.

use std::time::Duration;

use p2p_sync_proto::{Code, v1::SyncDataType};
use p2p_sync_proxy::{
    operation::{Outcome, ValidOp},
    store::{HostStatus, LimboFilter, Store},
};
use uuid::Uuid;

use crate::{
    fixture::{Hub, at, every, message, numbers, put, told},
    groups::{apply, group},
};

pub(crate) const NOT_HERE: &str = "PLAYER_NOT_HERE";
const ACCOUNT: u32 = 9;

/// A character of account 9 comes to a map, or leaves it.
pub(crate) fn moved(event: &str, character: u64, map: &str, sequence: u64, after: Option<u64>) -> ValidOp {
    let op = every(&format!("@char/{character}/PLAYER_PRESENCE"), sequence, after);
    assert_eq!(op.data_type, SyncDataType::PlayerPresence);
    ValidOp {
        tenure: 0,
        account_id: ACCOUNT,
        map: map.to_owned(),
        payload: Some(format!("{{\"event\": \"{event}\", \"n\": {sequence}}}")),
        ..op
    }
}

fn enter(map: &str, sequence: u64) -> ValidOp {
    moved("enter", 7, map, sequence, None)
}

fn leave(sequence: u64) -> ValidOp {
    moved("leave", 7, "", sequence, None)
}

/// What is written of a player, after its coming or going if that is named.
fn of(path: &str, sequence: u64, presence: Option<u64>) -> ValidOp {
    ValidOp {
        tenure: 0,
        presence: presence.map(|before| at(1, before)),
        ..put(path, sequence)
    }
}

fn data(sequence: u64) -> ValidOp {
    of("@char/7/PLAYER_DATA", sequence, None)
}

/// A hub with two hosts, each with a map of its own.
async fn walked() -> (Hub, Uuid, Uuid) {
    let hub = Hub::governed().await;
    let (a, b) = (hub.host().await, hub.host().await);
    hub.store.grant_map("prontera", a, false).await.expect("free");
    hub.store.grant_map("geffen", b, false).await.expect("free");
    (hub, a, b)
}

impl Hub {
    async fn say(&self, host: Uuid, ops: Vec<ValidOp>) -> Vec<&'static str> {
        told(&self.apply(host, ops).await)
    }

    async fn tenure_of(&self, path: &str) -> i64 {
        let sql = format!("SELECT tenure FROM p2p_sync.states WHERE path = '{path}'");
        self.count(&sql).await
    }

    async fn number(&self, path: &str) -> u64 {
        numbers([&self.state(path).await.expect("written").0])[0]
    }
}

#[tokio::test]
async fn invariant_04_a_player_is_written_by_the_host_it_entered_and_others_are_told_what_to_do() {
    let (hub, a, b) = walked().await;
    let committed = hub.apply(a, vec![data(1)]).await;
    let Outcome::Rejected(problem) = &committed.outcomes[0].1 else {
        panic!("{committed:?}");
    };
    assert_eq!(problem.code.label(), NOT_HERE);
    assert!(
        problem
            .sentence
            .starts_with("character 7 had not entered a map of this host"),
        "{problem}"
    );
    assert_eq!(hub.say(a, vec![enter("prontera", 2), data(3)]).await, ["applied"; 2]);
    assert_eq!(
        hub.say(b, vec![data(1), of("@account/9/QUEST_PROGRESS/1", 2, None)])
            .await,
        [NOT_HERE; 2]
    );
    // What was made before it came is as forged as what never came.
    assert_eq!(
        hub.say(
            a,
            vec![
                of("@account/9/QUEST_PROGRESS/1", 4, None),
                of("@account/8/QUEST_PROGRESS/1", 5, None)
            ]
        )
        .await,
        ["applied", NOT_HERE]
    );
    // A character whose account nobody said is nobody's account.
    let unsaid = ValidOp {
        account_id: 0,
        ..moved("enter", 20, "prontera", 10, None)
    };
    assert_eq!(
        hub.say(a, vec![unsaid, of("@account/0/QUEST_PROGRESS/1", 11, None)])
            .await,
        ["applied", NOT_HERE]
    );
    assert_eq!(hub.number("@char/7/PLAYER_DATA").await, 3);
    assert_eq!(hub.tenure_of("@char/7/PLAYER_DATA").await, 1);
    // A host says where its own players are, not whose maps those are.
    assert_eq!(
        hub.say(a, vec![enter("geffen", 7)]).await,
        [Code::NotLeaseHolder.label()]
    );
    assert_eq!(
        hub.say(a, vec![leave(8), moved("leave", 8, "", 9, None)]).await,
        ["applied", NOT_HERE]
    );
    assert_eq!(
        hub.count("SELECT count(*) FROM p2p_sync.presence WHERE map = 'prontera'")
            .await,
        2
    );
}

#[tokio::test]
async fn invariant_04_the_tenure_of_a_player_is_the_hubs_whatever_its_host_says() {
    let (hub, a, b) = walked().await;
    let hostile = |op: ValidOp| ValidOp { tenure: 1 << 60, ..op };
    let committed = hub
        .apply(a, vec![hostile(enter("prontera", 1)), hostile(data(2))])
        .await;
    assert_eq!(told(&committed), ["applied"; 2]);
    assert!(
        committed.changes.iter().all(|change| change.tenure == 1),
        "{committed:?}"
    );
    let own = format!("@host/{a}/HOST_METRICS");
    assert_eq!(
        hub.say(a, vec![hostile(of(&own, 3, None)), leave(4)]).await,
        ["applied"; 2]
    );
    assert_eq!(hub.tenure_of(&own).await, 0);
    assert_eq!(hub.say(b, vec![enter("geffen", 1), data(2)]).await, ["applied"; 2]);
    assert_eq!(hub.tenure_of("@char/7/PLAYER_DATA").await, 2);
    // Late, of before it left: older, whatever its number says.
    assert_eq!(
        hub.say(a, vec![hostile(of("@char/7/PLAYER_DATA", 3, None))]).await,
        ["applied"],
        "settled before"
    );
    let late = ValidOp {
        position: at(1, 3),
        ..hostile(data(3))
    };
    assert_eq!(hub.say(a, vec![late]).await, ["applied"], "settled before");
    assert_eq!(hub.number("@char/7/PLAYER_DATA").await, 2);
    let highest = "SELECT max(tenure) FROM (SELECT tenure FROM p2p_sync.states UNION ALL SELECT tenure FROM p2p_sync.operations) AS _";
    assert_eq!(hub.count(highest).await, 2);
}

#[tokio::test]
async fn invariant_04_what_was_made_before_a_player_left_applies_late_and_what_was_made_after_goes_to_limbo() {
    let (hub, a, b) = walked().await;
    let chat = |sequence| ValidOp {
        keep: p2p_sync_proto::policy::Keep::Every,
        ..of("@char/7/QUEST_PROGRESS/5", sequence, None)
    };
    assert_eq!(hub.say(a, vec![enter("prontera", 1), leave(10)]).await, ["applied"; 2]);
    // A map server saves a player that has left.
    assert_eq!(hub.say(a, vec![data(11)]).await, ["applied"]);
    assert_eq!(hub.say(b, vec![enter("geffen", 1)]).await, ["applied"]);
    assert_eq!(
        hub.say(a, vec![data(9)]).await,
        ["superseded"],
        "by its own of after it left"
    );
    assert_eq!(hub.say(a, vec![data(12)]).await, ["limbo"]);
    assert_eq!(hub.say(b, vec![data(2)]).await, ["applied"]);
    assert_eq!(
        hub.say(a, vec![data(8), chat(7), chat(13)]).await,
        ["superseded", "applied", "limbo"]
    );
    assert_eq!(hub.number("@char/7/PLAYER_DATA").await, 2);
    assert_eq!(hub.tenure_of("@char/7/QUEST_PROGRESS/5").await, 1);
    // A second going of a host that has it no more moves nothing.
    assert_eq!(hub.say(a, vec![leave(20), data(15)]).await, ["limbo"; 2]);
    assert_eq!(
        hub.say(b, vec![data(3), leave(4), data(5)]).await,
        ["superseded", "applied", "applied"]
    );
    // Back again: what it sends from before that is as late as before.
    assert_eq!(
        hub.say(a, vec![enter("prontera", 30), data(31), data(16)]).await,
        ["applied", "applied", "limbo"]
    );
    assert_eq!(hub.tenure_of("@char/7/PLAYER_DATA").await, 3);
    assert_eq!(hub.say(b, vec![data(6)]).await, ["limbo"]);
    assert_eq!(hub.count("SELECT count(*) FROM p2p_sync.rejected_operations").await, 0);
}

#[tokio::test]
async fn invariant_04_a_second_going_moves_the_first_and_a_warp_keeps_the_tenure() {
    let (hub, a, b) = walked().await;
    hub.store.grant_map("payon", a, false).await.expect("free");
    for (sequence, map) in [(1, "prontera"), (2, "payon"), (3, "payon")] {
        assert_eq!(hub.say(a, vec![enter(map, 10 * sequence)]).await, ["applied"]);
    }
    assert_eq!(hub.say(a, vec![leave(40), leave(50)]).await, ["applied"; 2]);
    assert_eq!(hub.say(a, vec![leave(45)]).await, ["applied"]);
    assert_eq!(hub.say(b, vec![enter("geffen", 1)]).await, ["applied"]);
    assert_eq!(hub.say(a, vec![data(49), data(51)]).await, ["applied", "limbo"]);
    assert_eq!(hub.tenure_of("@char/7/PLAYER_DATA").await, 1);
    // It comes and goes at one host: one tenure.
    assert_eq!(
        hub.say(
            b,
            vec![leave(2), enter("geffen", 3), leave(4), enter("geffen", 5), data(6)]
        )
        .await,
        ["applied"; 5]
    );
    assert_eq!(hub.tenure_of("@char/7/PLAYER_DATA").await, 2);
    assert_eq!(
        hub.say(a, vec![enter("prontera", 60)]).await,
        ["not yet"],
        "the host has it again"
    );
    assert_eq!(hub.count("SELECT count(*) FROM p2p_sync.player_tenures").await, 2);
}

#[tokio::test]
async fn invariant_04_a_player_that_another_host_has_is_waited_for_with_all_that_follows() {
    let (hub, a, b) = walked().await;
    assert_eq!(hub.say(a, vec![enter("prontera", 1)]).await, ["applied"]);
    let early = || {
        vec![
            put("@host/00000000-0000-0000-0000-000000000001/HOST_METRICS", 1),
            enter("geffen", 2),
            of("@char/7/PLAYER_DATA", 3, Some(2)),
            moved("leave", 7, "", 4, Some(2)),
            of("@char/7/PLAYER_DATA", 5, Some(4)),
            moved("enter", 7, "geffen", 6, Some(4)),
            ValidOp {
                presence: Some(at(1, 6)),
                ..every("@char/7/QUEST_PROGRESS/1", 7, None)
            },
            every("@char/7/QUEST_PROGRESS/1", 8, Some(7)),
            ValidOp {
                tenure: 1,
                ..put("geffen/NPC_STATE/1", 9)
            },
            // Nobody else has this one, but it says that it follows.
            ValidOp {
                account_id: 0,
                presence: Some(at(1, 6)),
                ..moved("enter", 50, "geffen", 10, None)
            },
        ]
    };
    let waits = [
        "applied", "not yet", "not yet", "not yet", "not yet", "not yet", "not yet", "not yet", "applied", "not yet",
    ];
    for _ in 0..2 {
        let committed = hub.apply(b, early()).await;
        assert_eq!(told(&committed), waits);
    }
    // In a message of its own, or by the other lane.
    assert_eq!(
        hub.say(b, vec![of("@char/7/PLAYER_DATA", 5, Some(4))]).await,
        ["not yet"]
    );
    assert_eq!(hub.say(b, vec![early().remove(1)]).await, ["not yet"]);
    let open = format!(
        "SELECT count(*) FROM p2p_sync.settled_sequences WHERE host_id = '{b}' AND settled = '{{[1,2),[9,10)}}'"
    );
    assert_eq!(hub.count(&open).await, 1);
    assert_eq!(
        hub.count("SELECT count(*) FROM p2p_sync.presence WHERE tenure = 1 AND left_at IS NULL")
            .await,
        1
    );
    assert_eq!(hub.say(a, vec![leave(2)]).await, ["applied"]);
    assert_eq!(
        hub.say(b, early()).await,
        [
            "applied",
            "applied",
            "superseded",
            "applied",
            "applied",
            "applied",
            "applied",
            "applied",
            "applied",
            "applied"
        ]
    );
    assert_eq!(hub.number("@char/7/PLAYER_DATA").await, 5);
    assert_eq!(hub.number("@char/7/QUEST_PROGRESS/1").await, 8);
    assert_eq!(hub.count("SELECT count(*) FROM p2p_sync.rejected_operations").await, 0);
}

#[tokio::test]
async fn invariant_04_an_account_has_one_host_whichever_character_it_plays() {
    const QUEST: &str = "@account/9/QUEST_PROGRESS/1";
    let (hub, a, b) = walked().await;
    let second = |event: &str, map: &str, sequence| moved(event, 8, map, sequence, None);
    assert_eq!(
        hub.say(a, vec![enter("prontera", 1), of(QUEST, 2, None)]).await,
        ["applied"; 2]
    );
    assert_eq!(hub.say(b, vec![second("enter", "geffen", 1)]).await, ["not yet"]);
    assert_eq!(hub.say(a, vec![leave(10)]).await, ["applied"]);
    assert_eq!(
        hub.say(b, vec![second("enter", "geffen", 1), of(QUEST, 2, None)]).await,
        ["applied"; 2]
    );
    assert_eq!(hub.tenure_of(QUEST).await, 2);
    // The account is the second host's, the first character still the first one's to save.
    assert_eq!(
        hub.say(a, vec![data(11), of(QUEST, 12, None), of(QUEST, 9, None)])
            .await,
        ["applied", "limbo", "superseded"]
    );
    assert_eq!(hub.say(a, vec![enter("prontera", 13)]).await, ["not yet"]);
    assert_eq!(hub.say(b, vec![second("leave", "", 3)]).await, ["applied"]);
    assert_eq!(
        hub.say(a, vec![enter("prontera", 13), of(QUEST, 14, None), data(15)])
            .await,
        ["applied"; 3]
    );
    assert_eq!(
        (hub.tenure_of(QUEST).await, hub.tenure_of("@char/7/PLAYER_DATA").await),
        (3, 3)
    );
    // One host, two characters one after the other.
    assert_eq!(
        hub.say(a, vec![second("enter", "prontera", 16), of(QUEST, 17, None), data(18)])
            .await,
        ["applied"; 3]
    );
    assert_eq!(
        (hub.tenure_of(QUEST).await, hub.tenure_of("@char/7/PLAYER_DATA").await),
        (4, 3)
    );
    // It cannot be claimed for another account, nor another's character for this one.
    let other = ValidOp {
        account_id: 10,
        ..enter("prontera", 19)
    };
    assert_eq!(hub.say(a, vec![other]).await, [NOT_HERE]);
    let unsaid = ValidOp {
        account_id: 0,
        ..enter("prontera", 20)
    };
    assert_eq!(hub.say(a, vec![unsaid]).await, ["applied"]);
    assert_eq!(
        hub.count("SELECT count(*) FROM p2p_sync.presence WHERE account_id = 9")
            .await,
        2
    );
}

#[tokio::test]
async fn invariant_04_a_player_of_a_host_whose_lease_is_gone_is_taken_over_and_what_that_sends_goes_to_limbo() {
    for way in ["forced", "released", "run out", "locked", "revoked", "ticket"] {
        let (hub, a, b) = walked().await;
        assert_eq!(hub.say(a, vec![enter("prontera", 1), data(2)]).await, ["applied"; 2]);
        assert_eq!(hub.say(b, vec![enter("geffen", 1)]).await, ["not yet"], "{way}");
        match way {
            "forced" => drop(hub.store.grant_map("prontera", b, true).await.expect("forced")),
            "released" => drop(hub.store.release_map("prontera").await.expect("serves")),
            "run out" => hub
                .sql
                .batch_execute(
                    "UPDATE p2p_sync.host_assignments SET expires_at = alive_at FROM p2p_sync.hub WHERE map = 'prontera'",
                )
                .await
                .expect("updates"),
            "locked" => drop(hub.store.set_host_status(a, HostStatus::Locked).await.expect("serves")),
            "revoked" => drop(hub.store.set_host_status(a, HostStatus::Revoked).await.expect("serves")),
            _ => hub.store.promise_player(7, b).await.expect("known"),
        }
        if matches!(way, "forced" | "released" | "revoked") {
            assert_eq!(hub.say(a, vec![data(3)]).await, ["limbo"], "{way}");
            // Nor can it release what it does not hold, to go on writing below that.
            assert_eq!(hub.say(a, vec![leave(100), data(4)]).await, ["limbo"; 2], "{way}");
        }
        assert_eq!(
            hub.say(b, vec![enter("geffen", 1), data(2)]).await,
            ["applied"; 2],
            "{way}"
        );
        assert_eq!(
            hub.say(a, vec![data(5), leave(6), data(7)]).await,
            ["limbo"; 3],
            "{way}"
        );
        assert_eq!(hub.tenure_of("@char/7/PLAYER_DATA").await, 2);
        let ended = "SELECT count(*) FROM p2p_sync.player_tenures WHERE tenure = 1 AND ended_at IS NOT NULL AND ended_sequence IS NULL";
        assert_eq!(hub.count(ended).await, 1, "{way}");
        assert_eq!(
            hub.count("SELECT count(*) FROM p2p_sync.presence WHERE promised_to IS NOT NULL")
                .await,
            0
        );
        assert_eq!(hub.count("SELECT count(*) FROM p2p_sync.rejected_operations").await, 0);
    }
}

#[tokio::test]
async fn invariant_04_a_ticket_is_for_one_host_and_one_entry() {
    let (hub, a, b) = walked().await;
    let c = hub.host().await;
    hub.store.grant_map("payon", c, false).await.expect("free");
    assert_eq!(
        hub.store.promise_player(7, b).await.expect_err("never seen").code,
        Code::NotFound
    );
    assert_eq!(hub.say(a, vec![enter("prontera", 1)]).await, ["applied"]);
    assert_eq!(
        hub.store
            .promise_player(7, Uuid::nil())
            .await
            .expect_err("no host")
            .code,
        Code::NotFound
    );
    hub.store.promise_player(7, b).await.expect("known");
    assert_eq!(hub.say(c, vec![enter("payon", 1)]).await, ["not yet"]);
    // Another character of the account is the same player.
    assert_eq!(
        hub.say(b, vec![moved("enter", 8, "geffen", 1, None)]).await,
        ["applied"]
    );
    assert_eq!(hub.say(a, vec![data(2)]).await, ["limbo"]);
    assert_eq!(hub.say(c, vec![enter("payon", 1)]).await, ["not yet"]);
    assert_eq!(hub.say(a, vec![enter("prontera", 3)]).await, ["not yet"]);
    // The operator's word alone.
    assert_eq!(hub.store.release_player(8).await, Ok(Some(b)));
    assert_eq!(hub.store.release_player(8).await, Ok(None));
    assert_eq!(hub.say(b, vec![of("@char/8/PLAYER_DATA", 2, None)]).await, ["limbo"]);
    assert_eq!(hub.say(c, vec![enter("payon", 1), data(2)]).await, ["applied"; 2]);
    // Released, it comes anew to its own host.
    assert_eq!(hub.store.release_player(7).await, Ok(Some(c)));
    assert_eq!(
        hub.say(c, vec![data(3), enter("payon", 4), data(5)]).await,
        ["limbo", "applied", "applied"]
    );
    assert_eq!(hub.tenure_of("@char/7/PLAYER_DATA").await, 4);
    let listed = hub.store.players(None).await.expect("serves");
    let listed: Vec<_> = listed
        .iter()
        .map(|one| (one.char_id, one.host_id, one.tenure, one.left_at.is_some()))
        .collect();
    assert_eq!(listed, [(7, c, 4, false), (8, b, 2, true)]);
    assert_eq!(hub.store.players(Some(7)).await.expect("serves").len(), 1);
    let tenures = hub.store.player_tenures(7).await.expect("serves");
    let tenures: Vec<_> = tenures
        .iter()
        .map(|one| (one.tenure, one.host_id, one.released))
        .collect();
    assert_eq!(tenures, [(1, a, None), (3, c, None), (4, c, None)]);
}

#[tokio::test]
async fn invariant_04_a_ticket_ends_with_its_time_and_with_the_next_entry_or_release_of_its_account() {
    let (hub, a, b) = walked().await;
    let second = |event: &str, sequence| moved(event, 8, "prontera", sequence, None);
    let tickets = async || {
        let players = hub.store.players(None).await.expect("serves");
        players.iter().filter(|one| one.promised_to.is_some()).count()
    };
    assert_eq!(
        hub.say(a, vec![second("enter", 1), second("leave", 2), enter("prontera", 3)])
            .await,
        ["applied"; 3]
    );
    // It was written long ago.
    hub.store.promise_player(7, b).await.expect("known");
    let good = "SELECT count(*) FROM p2p_sync.presence WHERE promised_until BETWEEN now() + interval '9 min' \
        AND now() + interval '10 min'";
    assert_eq!((hub.count(good).await, tickets().await), (1, 1));
    let age = "UPDATE p2p_sync.presence SET promised_until = now() WHERE promised_until IS NOT NULL";
    hub.sql.batch_execute(age).await.expect("updates");
    assert_eq!(hub.say(b, vec![enter("geffen", 1)]).await, ["not yet"]);
    assert_eq!(tickets().await, 0);
    // The account has entered since, by another of its characters.
    hub.store.promise_player(8, b).await.expect("known");
    assert_eq!(hub.say(a, vec![enter("prontera", 4)]).await, ["applied"]);
    assert_eq!(hub.say(b, vec![enter("geffen", 1)]).await, ["not yet"]);
    // The operator released it since.
    hub.store.promise_player(8, b).await.expect("known");
    assert_eq!(hub.store.release_player(7).await, Ok(Some(a)));
    let kept = "SELECT count(*) FROM p2p_sync.presence WHERE promised_to IS NOT NULL OR promised_until IS NOT NULL";
    assert_eq!(hub.count(kept).await, 0);
    assert_eq!(hub.say(a, vec![enter("prontera", 5)]).await, ["applied"]);
    assert_eq!(hub.say(b, vec![enter("geffen", 1)]).await, ["not yet"]);
    hub.store.promise_player(7, b).await.expect("known");
    assert_eq!(hub.say(b, vec![enter("geffen", 1)]).await, ["applied"]);
}

#[tokio::test]
async fn invariant_04_a_coming_to_a_map_that_was_lost_goes_to_limbo_with_what_follows_and_frees_the_player() {
    let (hub, a, b) = walked().await;
    hub.store.grant_map("payon", a, false).await.expect("free");
    hub.store.grant_map("payon", b, true).await.expect("forced");
    assert_eq!(hub.say(a, vec![enter("prontera", 1)]).await, ["applied"]);
    let late = vec![enter("payon", 5), data(6), data(4)];
    assert_eq!(hub.say(a, late).await, ["limbo", "limbo", "applied"]);
    assert_eq!(
        hub.say(b, vec![enter("payon", 1)]).await,
        ["applied"],
        "it has left where it was"
    );
    assert_eq!(hub.say(a, vec![leave(7), data(8)]).await, ["limbo"; 2]);
    assert_eq!(hub.say(a, vec![data(3)]).await, ["superseded"], "of before that");
    // A player that was nowhere before.
    let nobody = [
        moved("enter", 20, "payon", 10, None),
        of("@char/20/PLAYER_DATA", 11, None),
    ];
    let nobody: Vec<ValidOp> = nobody.into_iter().map(|op| ValidOp { account_id: 0, ..op }).collect();
    assert_eq!(hub.say(a, nobody).await, ["limbo"; 2]);
    assert_eq!(hub.say(b, vec![leave(2)]).await, ["applied"]);
    assert_eq!(
        hub.say(a, vec![enter("prontera", 12), data(13), data(9)]).await,
        ["applied", "applied", "limbo"]
    );
    assert_eq!(hub.tenure_of("@char/7/PLAYER_DATA").await, 3);
    // And one that never went anywhere else: what is behind the entry in limbo is of a new tenure.
    assert_eq!(
        hub.say(a, vec![enter("payon", 14), enter("prontera", 16), data(17), data(15)])
            .await,
        ["limbo", "applied", "applied", "limbo"]
    );
    assert_eq!(hub.tenure_of("@char/7/PLAYER_DATA").await, 4);
    assert_eq!(hub.count("SELECT count(*) FROM p2p_sync.rejected_operations").await, 0);
}

#[tokio::test]
async fn invariant_04_a_group_goes_the_way_of_its_worst_member_players_included() {
    let (hub, a, b) = walked().await;
    hub.store.grant_map("payon", a, false).await.expect("free");
    hub.store.grant_map("payon", b, true).await.expect("forced");
    assert_eq!(hub.say(a, vec![enter("prontera", 1)]).await, ["applied"]);
    let map = |sequence| ValidOp {
        tenure: 1,
        ..put(&format!("prontera/NPC_STATE/{sequence}"), sequence)
    };
    let lost = |sequence| ValidOp {
        tenure: 1,
        ..put(&format!("payon/NPC_STATE/{sequence}"), sequence)
    };
    let stranger = |sequence| of(&format!("@char/99/QUEST_PROGRESS/{sequence}"), sequence, None);
    let units = vec![
        group(vec![
            map(2),
            of("@char/7/QUEST_PROGRESS/1", 2, None),
            of("@account/9/QUEST_PROGRESS/1", 2, None),
        ]),
        group(vec![of("@char/7/QUEST_PROGRESS/2", 3, None), lost(3)]),
        group(vec![lost(4), stranger(4)]),
        group(vec![map(5), stranger(5)]),
        vec![data(6)],
    ];
    let expected = ["applied", "limbo", NOT_HERE, NOT_HERE, "applied"];
    assert_eq!(told(&apply(&hub, a, units.clone()).await), expected);
    assert_eq!(told(&apply(&hub, a, units).await), expected, "told again");
    assert_eq!(hub.count("SELECT count(*) FROM p2p_sync.states").await, 5);
    assert_eq!(hub.tenure_of("@account/9/QUEST_PROGRESS/1").await, 1);
    // Early with its player.
    assert_eq!(hub.say(a, vec![enter("prontera", 7)]).await, ["applied"]);
    let early = group(vec![
        of("@char/7/QUEST_PROGRESS/1", 3, Some(2)),
        ValidOp {
            tenure: 1,
            ..put("geffen/NPC_STATE/1", 3)
        },
    ]);
    let units = || vec![vec![enter("geffen", 2)], early.clone()];
    assert_eq!(told(&apply(&hub, b, units()).await), ["not yet"; 2]);
    assert_eq!(hub.say(a, vec![leave(8)]).await, ["applied"]);
    assert_eq!(told(&apply(&hub, b, units()).await), ["applied"; 2]);
    // Its player has gone meanwhile.
    let hostile = ValidOp {
        tenure: 77,
        ..of("@char/7/QUEST_PROGRESS/1", 9, None)
    };
    let after = group(vec![hostile, map(9)]);
    assert_eq!(told(&apply(&hub, a, vec![after]).await), ["limbo"]);
    let kept = "SELECT count(*) FROM p2p_sync.limbo_operations WHERE sequence = 9 AND path = '' AND tenure = 1 \
        AND payload -> 0 -> 'tenure' = '0' AND payload -> 1 -> 'tenure' = '1'";
    assert_eq!(hub.count(kept).await, 1);
}

#[tokio::test]
async fn what_is_merged_of_a_player_is_newer_than_what_its_host_wrote() {
    let (hub, a, b) = walked().await;
    assert_eq!(hub.say(a, vec![enter("prontera", 1), leave(2)]).await, ["applied"; 2]);
    assert_eq!(hub.say(b, vec![enter("geffen", 1), data(2)]).await, ["applied"; 2]);
    assert_eq!(
        hub.say(a, vec![data(3), of("@account/9/QUEST_PROGRESS/1", 4, None)])
            .await,
        ["limbo"; 2]
    );
    for row in hub.store.limbo(&LimboFilter::default()).await.expect("serves") {
        assert_eq!(row.tenure, 0);
        hub.store.merge_limbo(row.limbo_id).await.expect("there");
    }
    assert_eq!(hub.number("@char/7/PLAYER_DATA").await, 3);
    assert_eq!(hub.tenure_of("@char/7/PLAYER_DATA").await, 2);
    assert_eq!(hub.tenure_of("@account/9/QUEST_PROGRESS/1").await, 2);
    let aware = ValidOp {
        hub_edit_seen: 1,
        ..data(3)
    };
    assert_eq!(hub.say(b, vec![aware]).await, ["applied"], "not older than the edit");
}

#[tokio::test]
async fn a_coming_that_is_merged_moves_nobody_and_what_comes_after_it_is_no_conflict() {
    let (hub, a, b) = walked().await;
    hub.store.grant_map("payon", a, false).await.expect("free");
    hub.store.grant_map("payon", b, true).await.expect("forced");
    assert_eq!(hub.say(a, vec![enter("payon", 1)]).await, ["limbo"]);
    assert_eq!(hub.say(b, vec![enter("geffen", 1)]).await, ["applied"]);
    let limbo = hub.store.limbo(&LimboFilter::default()).await.expect("serves");
    hub.store.merge_limbo(limbo[0].limbo_id).await.expect("there");
    let stays = "SELECT count(*) FROM p2p_sync.presence WHERE map = 'geffen' AND left_at IS NULL";
    assert_eq!(hub.count(stays).await, 1);
    // That host has not seen the edit, and its player moves all the same: then it has to be told so.
    let after = moved("leave", 7, "", 2, Some(1));
    assert_eq!(hub.say(b, vec![after]).await, ["applied"]);
    assert_eq!(hub.count(stays).await, 0);
    assert_eq!(hub.number("@char/7/PLAYER_PRESENCE").await, 2);
    assert_eq!(hub.count("SELECT count(*) FROM p2p_sync.conflicts").await, 0);
}

#[tokio::test]
async fn without_leases_every_host_writes_every_player_and_what_was_written_under_one_gives_way() {
    let (hub, a, b) = walked().await;
    assert_eq!(hub.say(a, vec![enter("prontera", 1), data(2)]).await, ["applied"; 2]);
    let off = Store::connect(&crate::fixture::config(hub.database.url()))
        .await
        .expect("connects");
    let later = off
        .apply(&message(b, vec![data(3), enter("geffen", 4)]))
        .await
        .expect("serves");
    assert_eq!(told(&later), ["applied"; 2]);
    assert_eq!(hub.number("@char/7/PLAYER_DATA").await, 3);
    assert_eq!(hub.tenure_of("@char/7/PLAYER_DATA").await, 1);
    assert_eq!(
        hub.count("SELECT count(*) FROM p2p_sync.presence WHERE map = 'geffen'")
            .await,
        0,
        "nobody moves"
    );
    // Leases again.
    assert_eq!(hub.say(a, vec![data(5)]).await, ["applied"]);
}

#[tokio::test]
async fn tenures_that_ended_long_ago_are_forgotten_and_the_next_one_is_greater_all_the_same() {
    let (hub, a, b) = walked().await;
    assert_eq!(
        hub.say(a, vec![enter("prontera", 1), data(2), leave(3)]).await,
        ["applied"; 3]
    );
    assert_eq!(
        hub.say(b, vec![moved("enter", 50, "geffen", 1, None)]).await,
        ["applied"]
    );
    let age = "UPDATE p2p_sync.player_tenures SET ended_at = now() - interval '31 days' WHERE ended_at IS NOT NULL";
    hub.sql.batch_execute(age).await.expect("updates");
    assert_eq!(hub.store.maintain().await.expect("serves").player_tenures_purged, 1);
    assert_eq!(hub.say(a, vec![data(4)]).await, [NOT_HERE]);
    assert_eq!(hub.say(a, vec![moved("leave", 50, "", 5, None)]).await, [NOT_HERE]);
    assert_eq!(hub.say(b, vec![moved("leave", 50, "", 2, None)]).await, ["applied"]);
    assert_eq!(hub.say(a, vec![enter("prontera", 6), data(7)]).await, ["applied"; 2]);
    assert_eq!(hub.tenure_of("@char/7/PLAYER_DATA").await, 3);
}

#[tokio::test]
async fn invariant_12_an_account_has_so_many_characters_and_no_more() {
    let (hub, a, _) = walked().await;
    let coming = |characters: std::ops::RangeInclusive<u64>| {
        let enters = characters.map(|character| moved("enter", character, "prontera", character, None));
        enters.collect::<Vec<_>>()
    };
    assert_eq!(hub.say(a, coming(1..=32)).await, ["applied"; 32]);
    assert_eq!(hub.say(a, coming(33..=34)).await, [NOT_HERE; 2]);
    let follows = of("@char/34/PLAYER_DATA", 35, Some(34));
    assert_eq!(hub.say(a, vec![follows]).await, ["limbo"], "no trespass");
    let elsewhere = ValidOp {
        account_id: 10,
        ..moved("enter", 50, "prontera", 36, None)
    };
    assert_eq!(hub.say(a, vec![elsewhere]).await, ["applied"]);
    let full = hub.store.set_player_account(50, ACCOUNT).await.expect_err("32 others");
    assert_eq!(full.code, Code::NotAllowed);
    let again = moved("enter", 32, "prontera", 40, None);
    assert_eq!(hub.say(a, vec![again]).await, ["applied"], "who is known comes again");
}

#[tokio::test]
async fn what_follows_a_coming_that_was_refused_for_its_account_goes_to_limbo_until_the_operator_sets_it_right() {
    const QUEST: &str = "@account/9/QUEST_PROGRESS/1";
    const OTHERS_QUEST: &str = "@account/10/QUEST_PROGRESS/1";
    let (hub, a, b) = walked().await;
    let of_account = |account_id, op: ValidOp| ValidOp { account_id, ..op };
    // Some tenures under the wrong account; the right one is in the game with another character meanwhile.
    let said = async |host, ops: [ValidOp; 2]| hub.say(host, ops.map(|op| of_account(10, op)).into()).await;
    assert_eq!(said(a, [enter("prontera", 1), leave(2)]).await, ["applied"; 2]);
    assert_eq!(said(b, [enter("geffen", 1), leave(2)]).await, ["applied"; 2]);
    assert_eq!(
        said(a, [enter("prontera", 3), of(OTHERS_QUEST, 4, None)]).await,
        ["applied"; 2]
    );
    assert_eq!(
        hub.say(b, vec![moved("enter", 8, "geffen", 5, None), of(QUEST, 6, None)])
            .await,
        ["applied"; 2]
    );
    assert_eq!(said(a, [leave(5), of(OTHERS_QUEST, 6, None)]).await, ["applied"; 2]);
    // The right one.
    let refused = vec![
        enter("geffen", 10),
        of("@char/7/PLAYER_DATA", 11, Some(10)),
        of(QUEST, 12, Some(10)),
        moved("leave", 7, "", 13, Some(10)),
    ];
    let expected = [NOT_HERE, "limbo", "limbo", "limbo"];
    assert_eq!(hub.say(b, refused.clone()).await, expected);
    assert_eq!(hub.say(b, refused).await, expected, "told again");
    // What was in the game goes on, after it comes anew.
    assert_eq!(
        hub.say(b, vec![moved("enter", 8, "geffen", 14, None), of(QUEST, 15, None)])
            .await,
        ["applied"; 2]
    );
    assert_eq!(hub.store.set_player_account(7, 9).await, Ok(None));
    assert_eq!(hub.say(b, vec![of(QUEST, 16, None)]).await, ["applied"]);
    // Nothing of the wrong account is written any more, whenever it was made.
    assert_eq!(
        hub.say(a, vec![of(OTHERS_QUEST, 4, None), data(7)]).await,
        ["applied", "limbo"],
        "settled before"
    );
    let unsent = ValidOp {
        position: at(2, 1),
        ..of(OTHERS_QUEST, 1, None)
    };
    assert_eq!(hub.say(a, vec![unsent]).await, ["limbo"]);
    assert_eq!(
        hub.say(
            b,
            vec![
                moved("leave", 8, "", 17, None),
                enter("geffen", 18),
                data(19),
                of(QUEST, 20, None)
            ]
        )
        .await,
        ["applied"; 4]
    );
    assert_eq!(hub.tenure_of("@char/7/PLAYER_DATA").await, 4);
    assert_eq!(hub.tenure_of(QUEST).await, 4);
    // What is written to the other account from now on is newer than what was.
    assert_eq!(hub.tenure_of(OTHERS_QUEST).await, 3);
    assert_eq!(
        said(b, [moved("enter", 50, "geffen", 21, None), of(OTHERS_QUEST, 22, None)]).await,
        ["applied"; 2]
    );
    assert_eq!(hub.tenure_of(OTHERS_QUEST).await, 4);
    // Taken from the host that has it.
    assert_eq!(hub.store.set_player_account(7, 0).await, Ok(Some(b)));
    assert_eq!(hub.say(b, vec![data(23)]).await, ["limbo"]);
    assert_eq!(
        hub.say(a, vec![of_account(11, enter("prontera", 30)), data(31)]).await,
        ["applied"; 2]
    );
    let never = hub.store.set_player_account(99, 9).await.expect_err("never seen");
    assert_eq!(never.code, Code::NotFound);
}

#[tokio::test]
async fn invariant_10_players_that_another_host_keeps_do_not_stop_all_else() {
    let (hub, a, b) = walked().await;
    assert_eq!(hub.say(a, vec![enter("prontera", 1)]).await, ["applied"]);
    // Settled here and there: as when what names a waiting player lies between all else.
    let many = "INSERT INTO p2p_sync.settled_sequences (host_id, incarnation, settled) \
        SELECT $1, 1, range_agg(int8range(n, n, '[]')) FROM generate_series(10000, 18200, 4) AS n";
    hub.sql.execute(many, &[&b]).await.expect("writes");
    let told = hub.say(b, vec![enter("geffen", 3), data(4)]).await;
    assert_eq!(told, ["limbo"; 2], "it is kept apart, and its gaps close");
    let (c, fresh) = (
        hub.host().await,
        vec![enter("payon", 3), of("@char/7/PLAYER_DATA", 4, Some(3))],
    );
    hub.store.grant_map("payon", c, false).await.expect("free");
    assert_eq!(hub.say(c, fresh).await, ["not yet"; 2], "who has few gaps waits");
}

#[tokio::test]
async fn invariant_10_who_asks_for_players_that_another_host_keeps_holds_nobody_up() {
    const PLAYERS: u64 = 512;
    let (hub, a, b) = walked().await;
    let comes = |character, map, sequence| ValidOp {
        account_id: 0,
        ..moved("enter", character, map, sequence, None)
    };
    let kept = (1..=PLAYERS).map(|character| comes(character, "prontera", character));
    assert_eq!(hub.say(a, kept.collect()).await, ["applied"; 512]);
    let mut another = hub.database.client().await;
    let writes = another.transaction().await.expect("begins");
    let row = "SELECT FROM p2p_sync.map_states WHERE stream = '@player' FOR UPDATE";
    writes.execute(row, &[]).await.expect("locks");
    for _ in 0..2 {
        let mut asks: Vec<ValidOp> = (1..=PLAYERS)
            .map(|character| comes(character, "geffen", 2 * character))
            .collect();
        asks.extend([
            of("@char/7/PLAYER_DATA", 1025, Some(14)),
            moved("leave", 7, "", 1026, Some(14)),
            of("@char/7/PLAYER_DATA", 1027, Some(1026)),
            put("geffen/NPC_STATE/1", 1028),
        ]);
        let told = tokio::time::timeout(Duration::from_secs(5), hub.say(b, asks)).await;
        let told = told.expect("it waits for nobody who writes players");
        assert_eq!(told[..515], ["not yet"; 515]);
        assert_eq!(told[515], "applied");
    }
    drop(writes);
    // What is not to wait does not.
    let others = ValidOp {
        account_id: 10,
        ..enter("geffen", 2001)
    };
    let known = "UPDATE p2p_sync.presence SET account_id = 9 WHERE char_id = 7";
    hub.sql.batch_execute(known).await.expect("updates");
    assert_eq!(
        hub.say(b, vec![others, enter("payon", 2002)]).await,
        [NOT_HERE, Code::NotLeaseHolder.label()]
    );
    assert_eq!(hub.say(a, vec![moved("leave", 7, "", 600, None)]).await, ["applied"]);
    let follows = of("@char/7/PLAYER_DATA", 1025, Some(14));
    assert_eq!(hub.say(b, vec![comes(7, "geffen", 14), follows]).await, ["applied"; 2]);
}

#[tokio::test]
async fn invariant_04_a_character_whose_account_is_learnt_later_begins_a_tenure_of_it() {
    let (hub, a, b) = walked().await;
    let unsaid = |sequence| ValidOp {
        account_id: 0,
        ..moved("enter", 1, "prontera", sequence, None)
    };
    assert_eq!(hub.say(a, vec![unsaid(1)]).await, ["applied"]);
    let other = [moved("enter", 2, "geffen", 1, None), moved("leave", 2, "", 2, None)];
    assert_eq!(hub.say(b, other.to_vec()).await, ["applied"; 2]);
    assert_eq!(
        hub.say(a, vec![moved("enter", 1, "prontera", 2, None)]).await,
        ["applied"]
    );
    let account = |sequence| of("@account/9/QUEST_PROGRESS/1", sequence, None);
    assert_eq!(hub.say(a, vec![account(3)]).await, ["applied"]);
    assert_eq!(
        hub.say(b, vec![account(3)]).await,
        ["limbo"],
        "its time with the account is over"
    );
}

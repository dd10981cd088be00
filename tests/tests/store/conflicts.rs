//! The operator's edits, and what becomes of operations whose writers had not seen them.

use p2p_sync_proto::{Code, policy::Keep};
use p2p_sync_proxy::{
    operation::{Committed, ConflictRule, ValidOp},
    store::{ConflictFilter, ConflictRow, Take},
    version_vector::{Compared, VersionVector},
};
use uuid::Uuid;

use crate::{
    fixture::{Hub, delete, every, message, numbers, path_of, put, told},
    groups::{apply, group},
};

const OPEN: ConflictFilter = ConflictFilter {
    open: true,
    host_id: None,
    before: None,
    conflict_id: None,
    limit: None,
};
const PATH: &str = "prontera/NPC_STATE/1";
const OTHER: &str = "geffen/NPC_STATE/1";

fn ruled(rule: ConflictRule, op: ValidOp) -> ValidOp {
    ValidOp {
        conflict_rule: rule,
        ..op
    }
}

fn seen(edit: u64, op: ValidOp) -> ValidOp {
    ValidOp {
        hub_edit_seen: edit,
        ..op
    }
}

/// The `n` of both values of a conflict's first member, 0 where it is deleted.
fn sides(row: &ConflictRow) -> (u64, u64) {
    let member = &row.members[0];
    let n = |data: Option<&str>| data.map_or(0, |data| numbers([&Some(data.to_owned())])[0]);
    let hub = member.hub.as_ref().expect("something was there");
    (
        n(hub.data.as_deref().map(serde_json::value::RawValue::get)),
        n(member.host.data.as_deref().map(serde_json::value::RawValue::get)),
    )
}

fn edits(committed: &Committed) -> Vec<(u32, Vec<u64>)> {
    let mut edits: Vec<_> = committed.edits.clone().into_iter().collect();
    edits.sort();
    edits
}

impl Hub {
    /// Writes `{"n": n}` as the operator; deletes for `None`.
    async fn edit(&self, path: &str, n: Option<u64>) -> u64 {
        let payload = n.map(|n| format!("{{\"n\": {n}}}"));
        let path = path_of(path);
        let edit = self.store.edit(&path, Keep::Latest, payload.as_deref(), None);
        edit.await.expect("serves")
    }

    async fn n(&self, path: &str) -> u64 {
        numbers([&self.state(path).await.expect("there").0])[0]
    }

    /// All, the oldest first.
    async fn conflicts(&self) -> Vec<ConflictRow> {
        let listed = self.store.conflicts(&ConflictFilter::default()).await;
        listed.expect("serves").into_iter().rev().collect()
    }
}

#[tokio::test]
async fn an_edit_is_the_newest_of_its_path_and_takes_its_turn_in_the_stream() {
    let hub = Hub::governed().await;
    let host = hub.host().await;
    hub.store.grant_map("prontera", host, false).await.expect("free");
    hub.apply(host, vec![put(PATH, 7)]).await;
    assert_eq!(hub.edit(PATH, Some(100)).await, 1);
    assert_eq!(hub.edit("@char/7/PLAYER_DATA", Some(101)).await, 2);
    let state = hub.store.get(&path_of(PATH)).await.expect("serves").expect("there");
    assert_eq!(
        (state.tenure, state.hub_edit, state.host_id, state.account_id),
        (1, 1, Uuid::nil(), 2_000_001),
        "whom it is about stays"
    );
    let changes = hub.store.changes_since("prontera", 1, 10).await.expect("serves");
    assert_eq!(changes, [state]);
    let player = hub.store.changes_since("@player", 0, 10).await.expect("serves");
    assert_eq!((player[0].hub_edit, player.len()), (2, 1));
    assert_eq!(
        told(&hub.apply(host, vec![seen(1, put(PATH, 8))]).await),
        ["applied"],
        "it is of the holder's tenure, not above it"
    );
    let logged = "SELECT count(*) FROM p2p_sync.operations WHERE hub_edit = 1 AND path LIKE 'prontera%'";
    assert_eq!(
        hub.count(logged).await,
        1,
        "the operator's, for this type logs nothing else"
    );
    // A number that someone set by hand is passed by.
    hub.sql
        .batch_execute("UPDATE p2p_sync.states SET hub_edit = 40")
        .await
        .expect("updates");
    assert_eq!(hub.edit(PATH, None).await, 41);
    assert_eq!(hub.edit(OTHER, None).await, 42);
    assert_eq!(hub.state(PATH).await, Some((None, true)));
    let pulse = hub.store.pulse().await.expect("serves");
    assert_eq!(pulse, (1, 42));
}

#[tokio::test]
async fn by_the_rule_hub_the_edit_stays_and_the_host_is_told_of_it_once() {
    let (hub, host) = (Hub::new().await, Uuid::new_v4());
    hub.apply(host, vec![put(PATH, 1)]).await;
    let edit = hub.edit(PATH, Some(100)).await;
    let unaware = message(host, vec![put(PATH, 2), put(OTHER, 3), put(PATH, 4)]);
    let committed = hub.store.apply(&unaware).await.expect("serves");
    assert_eq!(told(&committed), ["CONFLICT", "applied", "CONFLICT"]);
    assert_eq!(edits(&committed), [(0, vec![edit]), (2, vec![edit])]);
    let wire = committed.to_wire();
    assert!(wire.iter().all(|outcome| outcome.hub_edits == [edit]), "{wire:?}");
    let again = hub.store.apply(&unaware).await.expect("serves");
    assert_eq!(edits(&again), edits(&committed), "told again to who did not hear it");
    assert_eq!(hub.n(PATH).await, 100);

    let rows = hub.conflicts().await;
    assert_eq!(rows.len(), 1, "{rows:?}");
    assert_eq!(
        (sides(&rows[0]), rows[0].operations, rows[0].rule.as_str()),
        ((100, 4), 2, "hub")
    );
    assert_eq!(
        (rows[0].host_id, rows[0].hub_edit, rows[0].is_open()),
        (host, edit, false)
    );
    let aware = hub.apply(host, vec![seen(edit, put(PATH, 5))]).await;
    assert_eq!((told(&aware), edits(&aware)), (vec!["applied"], vec![]));
    assert_eq!(
        aware.changes[0].hub_edit, edit,
        "who reads what was written then has seen the edit too"
    );
    assert_eq!(hub.n(PATH).await, 5);
    assert_eq!(hub.conflicts().await.len(), 1);
}

#[tokio::test]
async fn by_the_rules_host_and_newest_the_operation_applies_and_the_edit_is_kept_in_the_record() {
    for rule in [ConflictRule::Host, ConflictRule::Newest] {
        let (hub, host) = (Hub::new().await, Uuid::new_v4());
        hub.apply(host, vec![put(PATH, 1)]).await;
        let edit = hub.edit(PATH, Some(100)).await;
        let ops = vec![ruled(rule, put(PATH, 2)), ruled(rule, put(PATH, 3))];
        let committed = hub.apply(host, ops).await;
        assert_eq!(told(&committed), ["superseded", "applied"]);
        assert_eq!(edits(&committed), [(0, vec![edit]), (1, vec![edit])]);
        let wire = committed.to_wire();
        assert_eq!(wire.len(), 2, "also what was applied is told with it: {wire:?}");
        assert_eq!(committed.changes[0].hub_edit, edit);
        assert_eq!(hub.n(PATH).await, 3);
        // Until it has heard of it, the record keeps the operator's value, not its own.
        hub.apply(host, vec![ruled(rule, put(PATH, 4))]).await;
        let rows = hub.conflicts().await;
        assert_eq!((rows.len(), sides(&rows[0]), rows[0].operations), (1, (100, 4), 3));
        assert!(!rows[0].is_open());
        assert_eq!(hub.n(PATH).await, 4);
        let state = hub.store.get(&path_of(PATH)).await.expect("serves").expect("there");
        assert_eq!(state.hub_edit, edit);
    }
}

#[tokio::test]
async fn by_the_rule_both_the_conflict_is_open_until_it_is_resolved() {
    let (hub, host) = (Hub::new().await, Uuid::new_v4());
    let both = |op| ruled(ConflictRule::Both, op);
    for (take, expected) in [(Take::Hub, 100), (Take::Host, 2), (Take::Data("{\"n\": 77}"), 77)] {
        hub.sql
            .batch_execute("DELETE FROM p2p_sync.states; DELETE FROM p2p_sync.settled_sequences; DELETE FROM p2p_sync.rejected_operations")
            .await
            .expect("deletes");
        hub.apply(host, vec![put(PATH, 1)]).await;
        let edit = hub.edit(PATH, Some(100)).await;
        assert_eq!(told(&hub.apply(host, vec![both(put(PATH, 2))]).await), ["CONFLICT"]);
        assert_eq!(hub.n(PATH).await, 100);
        let open = hub.store.conflicts(&OPEN).await.expect("serves");
        assert_eq!((open.len(), open[0].is_open(), sides(&open[0])), (1, true, (100, 2)));
        // The host goes on, which leaves the question open.
        assert_eq!(
            told(&hub.apply(host, vec![both(seen(edit, put(PATH, 3)))]).await),
            ["applied"]
        );
        hub.store
            .resolve_conflict(open[0].conflict_id, take)
            .await
            .expect("there");
        assert_eq!(hub.n(PATH).await, expected);
        assert!(hub.store.conflicts(&OPEN).await.expect("serves").is_empty());
        // It is an edit: who knows of the one before does not know of this one.
        let unaware = hub.apply(host, vec![both(seen(edit, put(PATH, 4)))]).await;
        assert_eq!(told(&unaware), ["CONFLICT"]);
        assert_eq!(edits(&unaware), [(0, vec![edit + 1])]);
        assert_eq!(hub.n(PATH).await, expected);
        hub.store.conflicts(&OPEN).await.expect("serves");
        hub.sql
            .batch_execute("DELETE FROM p2p_sync.conflicts")
            .await
            .expect("deletes");
    }
    let missing = hub.store.resolve_conflict(-1, Take::Hub).await.expect_err("not there");
    assert_eq!(missing.code, Code::NotFound);
}

#[tokio::test]
async fn deletions_conflict_on_either_side() {
    let (hub, host) = (Hub::new().await, Uuid::new_v4());
    hub.apply(host, vec![put(PATH, 1), put(OTHER, 2)]).await;
    hub.edit(PATH, None).await;
    hub.edit(OTHER, Some(100)).await;
    let committed = hub.apply(host, vec![put(PATH, 3), delete(OTHER, 4)]).await;
    assert_eq!(told(&committed), ["CONFLICT", "CONFLICT"]);
    let rows = hub.conflicts().await;
    assert_eq!(rows.iter().map(sides).collect::<Vec<_>>(), [(100, 0), (0, 3)]);
    for row in &rows {
        hub.store
            .resolve_conflict(row.conflict_id, Take::Host)
            .await
            .expect("there");
    }
    assert_eq!(hub.n(PATH).await, 3);
    assert_eq!(hub.state(OTHER).await, Some((None, true)));
    for row in &rows {
        hub.store
            .resolve_conflict(row.conflict_id, Take::Hub)
            .await
            .expect("again");
    }
    assert_eq!(hub.state(PATH).await, Some((None, true)));
    assert_eq!(hub.n(OTHER).await, 100);
}

/// Both paths in one group, the first unaware, the second as `rule` says.
fn trade(sequence: u64, rules: [ConflictRule; 2]) -> Vec<ValidOp> {
    group(vec![
        ruled(rules[0], put(PATH, sequence)),
        ruled(rules[1], put(OTHER, sequence)),
    ])
}

#[tokio::test]
async fn of_a_group_the_strictest_of_the_rules_that_conflict_decides_for_all() {
    use ConflictRule::{Both, Host, Hub as HubRule, Newest};
    for (rules, edited, expected, recorded) in [
        ([Host, HubRule], [true, true], "CONFLICT", "hub"),
        ([Both, Host], [true, true], "CONFLICT", "both"),
        ([HubRule, Both], [true, true], "CONFLICT", "both"),
        ([Host, Newest], [true, true], "applied", "newest"),
        // Only what conflicts has a say.
        ([Host, HubRule], [true, false], "applied", "host"),
        ([Host, HubRule], [false, true], "CONFLICT", "hub"),
    ] {
        let (hub, host) = (Hub::new().await, Uuid::new_v4());
        apply(&hub, host, vec![trade(1, rules)]).await;
        let mut now = Vec::new();
        for (path, edited) in [PATH, OTHER].into_iter().zip(edited) {
            now.push(if edited { hub.edit(path, Some(100)).await } else { 0 });
        }
        let committed = apply(&hub, host, vec![trade(2, rules)]).await;
        assert_eq!(told(&committed), [expected], "{rules:?} {edited:?}");
        assert_eq!(edits(&committed), [(0, now.clone())], "of each member, in their order");
        let rows = hub.conflicts().await;
        assert_eq!((rows.len(), rows[0].members.len()), (1, 2));
        assert_eq!(rows[0].rule, recorded);
        assert_eq!([rows[0].members[0].conflicts, rows[0].members[1].conflicts], edited);
        let before = edited.map(|edited| if edited { 100 } else { 1 });
        let expected = if expected == "applied" { [2, 2] } else { before };
        assert_eq!(
            [hub.n(PATH).await, hub.n(OTHER).await],
            expected,
            "{rules:?} {edited:?}"
        );
        for change in &committed.changes {
            let member = usize::from(change.path.as_str() == OTHER);
            assert_eq!(change.hub_edit, now[member]);
        }
        // All of it, or none.
        let id = rows[0].conflict_id;
        hub.store.resolve_conflict(id, Take::Host).await.expect("there");
        assert_eq!([hub.n(PATH).await, hub.n(OTHER).await], [2, 2]);
        hub.store.resolve_conflict(id, Take::Hub).await.expect("there");
        assert_eq!([hub.n(PATH).await, hub.n(OTHER).await], before);
        let in_group = "SELECT count(*) FROM p2p_sync.states WHERE in_group AND operation_id = \
            (SELECT operation_id FROM p2p_sync.states LIMIT 1)";
        assert_eq!(hub.count(in_group).await, 2);
    }
}

#[tokio::test]
async fn operations_that_each_count_conflict_too_and_keep_their_order() {
    let (hub, host) = (Hub::new().await, Uuid::new_v4());
    let path = "prontera/CRITICAL_GAME_STATE";
    hub.apply(host, vec![every(path, 1, None)]).await;
    let edit = hub
        .store
        .edit(&path_of(path), Keep::Every, Some("{\"n\": 100}"), None)
        .await
        .expect("serves");
    let host_rule = |op| ruled(ConflictRule::Host, op);
    let ops = vec![host_rule(every(path, 2, Some(1))), seen(edit, every(path, 3, Some(2)))];
    assert_eq!(told(&hub.apply(host, ops).await), ["applied", "applied"]);
    let changes = hub.store.changes_since("prontera", 0, 10).await.expect("serves");
    assert_eq!(numbers(changes.iter().map(|row| &row.payload)), [1, 100, 2, 3]);
    let edits: Vec<u64> = changes.iter().map(|row| row.hub_edit).collect();
    assert_eq!(edits, [0, edit, edit, edit]);
    assert_eq!(sides(&hub.conflicts().await[0]), (100, 2));
}

#[tokio::test]
async fn a_host_that_remembers_an_edit_of_a_path_that_is_forgotten_starts_anew() {
    let (hub, host) = (Hub::new().await, Uuid::new_v4());
    let edit = hub.edit(PATH, None).await;
    hub.sql
        .batch_execute("DELETE FROM p2p_sync.states")
        .await
        .expect("purges");
    let committed = hub.apply(host, vec![seen(edit, put(PATH, 1))]).await;
    assert_eq!(
        (told(&committed), edits(&committed)),
        (vec!["applied"], vec![(0, vec![0])])
    );
    assert_eq!(committed.changes[0].hub_edit, 0);
    assert!(hub.conflicts().await.is_empty());
    // The next edit has a number of its own: who has seen that one has not seen this one.
    let next = hub.edit(PATH, Some(100)).await;
    assert!(next > edit);
    assert_eq!(
        told(&hub.apply(host, vec![seen(edit, put(PATH, 2))]).await),
        ["CONFLICT"]
    );
}

#[tokio::test]
async fn invariant_12_conflicts_are_kept_as_long_as_the_log_but_for_open_ones() {
    let (hub, host) = (Hub::new().await, Uuid::new_v4());
    for (sequence, rule) in (1..).zip([ConflictRule::Hub, ConflictRule::Both]) {
        let path = format!("prontera/NPC_STATE/{sequence}");
        hub.edit(&path, Some(100)).await;
        hub.apply(host, vec![ruled(rule, put(&path, sequence))]).await;
    }
    let age = "UPDATE p2p_sync.conflicts SET last_at = now() - interval '31 days'";
    hub.sql.batch_execute(age).await.expect("ages");
    assert_eq!(hub.store.maintain().await.expect("serves").conflicts_purged, 1);
    let open = hub.store.conflicts(&OPEN).await.expect("serves");
    assert_eq!(open.len(), 1);
    hub.store
        .resolve_conflict(open[0].conflict_id, Take::Host)
        .await
        .expect("there");
    assert_eq!(hub.store.maintain().await.expect("serves").conflicts_purged, 1);
    assert!(hub.conflicts().await.is_empty());
}

#[tokio::test]
async fn a_states_version_vector_has_this_hubs_edits() {
    let hub = Hub::new().await;
    let vector = async || hub.store.present(PATH).await.expect("serves").expect("there").vector;
    hub.apply(Uuid::new_v4(), vec![put(PATH, 1)]).await;
    assert_eq!(vector().await, VersionVector::default());
    let first = hub.edit(PATH, Some(100)).await;
    let before = vector().await;
    assert_eq!(before, VersionVector::of(hub.store.hub_id(), first));
    hub.apply(Uuid::new_v4(), vec![seen(first, put(PATH, 2))]).await;
    assert_eq!(vector().await.compared_with(&before), Compared::Equal);
    hub.edit(PATH, Some(101)).await;
    assert_eq!(vector().await.compared_with(&before), Compared::After);
    let other_hub = "UPDATE p2p_sync.states SET version_vector = version_vector || \
        '{\"00000000-0000-0000-0000-000000000007\": 3}'";
    hub.sql.batch_execute(other_hub).await.expect("updates");
    let both = vector().await;
    hub.edit(PATH, Some(102)).await;
    assert_eq!(
        vector().await.compared_with(&both),
        Compared::After,
        "another hub's edits stay in it"
    );
}

/// Whatever comes in between, a write that does not know of the last edit never takes its place, and one that does is
/// taken.
#[tokio::test]
async fn invariant_03_an_undo_by_the_operator_is_not_overwritten_by_hosts_that_do_not_know_of_it() {
    let (hub, seed) = (Hub::new().await, fastrand::u64(..));
    println!("seed {seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let hosts = [Uuid::new_v4(), Uuid::new_v4()];
    let mut sequences = [0; 2];
    // What each knows of each path; what they are told comes late or is forgotten.
    let paths = [PATH, OTHER, "@char/7/PLAYER_DATA"];
    let mut known = [[0; 3]; 2];
    let (mut edit, mut value) = ([0; 3], [None; 3]);
    for round in 0..400 {
        if random.u8(..) < 60 {
            let path = random.usize(..3);
            let n = 1_000_000 + round;
            edit[path] = hub.edit(paths[path], Some(n)).await;
            value[path] = Some(n);
            continue;
        }
        let host = random.usize(..2);
        let mut written: Vec<usize> = (0..3).filter(|_| random.bool()).collect();
        random.shuffle(&mut written);
        if written.is_empty() {
            continue;
        }
        let mut ops: Vec<Vec<ValidOp>> = Vec::new();
        let grouped = random.bool() && written.len() > 1;
        for &path in &written {
            if !grouped || ops.is_empty() {
                sequences[host] += 1;
            }
            let op = seen(known[host][path], put(paths[path], sequences[host]));
            match ops.first_mut() {
                Some(group) if grouped => group.push(op),
                _ => ops.push(vec![op]),
            }
        }
        let is_aware = |path: &usize| known[host][*path] == edit[*path];
        let all_known = written.iter().all(is_aware);
        let expected: Vec<bool> = if grouped {
            ops = ops.into_iter().map(group).collect();
            vec![all_known]
        } else {
            written.iter().map(is_aware).collect()
        };
        let first_sequence = sequences[host] + 1 - ops.len() as u64;
        let committed = apply(&hub, hosts[host], ops).await;
        let applied: Vec<bool> = told(&committed).into_iter().map(|told| told == "applied").collect();
        assert_eq!(applied, expected, "seed {seed}, round {round}");
        for (at, &path) in written.iter().enumerate() {
            let unit = if grouped { 0 } else { at };
            if applied[unit] {
                value[path] = Some(first_sequence + unit as u64);
            } else if random.bool() {
                let member = if grouped { at } else { 0 };
                known[host][path] = committed.edits[&u32::try_from(unit).expect("few")][member];
            }
            let there = hub.state(paths[path]).await.map(|(payload, _)| numbers([&payload])[0]);
            assert_eq!(there, value[path], "seed {seed}, round {round}");
        }
    }
}

#[tokio::test]
async fn edits_and_writes_of_many_at_once_wait_for_one_another_and_never_in_a_circle() {
    let hub = Hub::new().await;
    let begun = hub.apply(Uuid::new_v4(), vec![put(PATH, 1), put(OTHER, 2)]).await;
    assert_eq!(told(&begun), ["applied", "applied"]);
    let mut tasks = tokio::task::JoinSet::new();
    for writer in 0..4_u64 {
        let store = hub.store.clone();
        tasks.spawn(async move {
            let host = Uuid::new_v4();
            for sequence in 1..=30 {
                let mut trade = trade(sequence, [ConflictRule::Both, ConflictRule::Host]);
                if writer % 2 == 0 {
                    trade.reverse();
                }
                store.apply(&message(host, trade)).await.expect("serves");
            }
        });
        let store = hub.store.clone();
        tasks.spawn(async move {
            for _ in 0..20 {
                let path = path_of(if writer % 2 == 0 { PATH } else { OTHER });
                store
                    .edit(&path, Keep::Latest, Some("{\"n\": 5}"), None)
                    .await
                    .expect("serves");
                for row in store
                    .conflicts(&ConflictFilter::default())
                    .await
                    .expect("serves")
                    .iter()
                    .take(2)
                {
                    let take = if writer < 2 { Take::Hub } else { Take::Host };
                    store.resolve_conflict(row.conflict_id, take).await.expect("there");
                }
            }
        });
    }
    while let Some(done) = tasks.join_next().await {
        done.expect("no deadlock");
    }
    let (_, edits) = hub.store.pulse().await.expect("serves");
    let newest = hub.count("SELECT max(hub_edit) FROM p2p_sync.states").await;
    assert_eq!(newest.unsigned_abs(), edits);
    let distinct = "SELECT count(*) - count(DISTINCT hub_edit) FROM p2p_sync.operations WHERE host_id = \
        '00000000-0000-0000-0000-000000000000'";
    assert_eq!(hub.count(distinct).await, 0, "no number comes twice");
}

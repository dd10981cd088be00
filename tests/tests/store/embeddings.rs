//! What is to be embedded is queued with its operation, taken by one at a time, and goes with its path.

use std::time::Duration;

use p2p_sync_proto::{Position, policy::Keep};
use p2p_sync_proxy::{
    operation::{History, ValidOp},
    store::{Content, EligibleMaps, Embedded, EmbeddingClaim, Release, Search, Spent},
};
use uuid::Uuid;

use crate::fixture::{Hub, delete, every, put, told};

const MODEL: &str = "a model";
const LEASE: Duration = Duration::from_mins(5);

fn embedded(op: ValidOp) -> ValidOp {
    ValidOp { embedded: true, ..op }
}

/// A line of chat, which counts beside the others of its path.
fn line(path: &str, sequence: u64) -> ValidOp {
    embedded(ValidOp {
        keep: Keep::Every,
        history: History::All,
        ..every(path, sequence, (sequence > 1).then(|| sequence - 1))
    })
}

impl Hub {
    async fn embedding() -> Self {
        let hub = Self::new().await;
        hub.store.take_embedding_space(MODEL, 8).await.expect("the first");
        hub
    }

    async fn claim(&self) -> Vec<EmbeddingClaim> {
        let claimed = self.store.claim_embeddings(&EligibleMaps::All, 64, LEASE).await;
        let mut claims = claimed.expect("serves");
        claims.sort_by(|one, other| (&one.path, one.entry).cmp(&(&other.path, other.entry)));
        claims
    }

    async fn embed(&self, claims: &[EmbeddingClaim]) -> bool {
        let vector = [0.5; 8];
        let content = |claim: &EmbeddingClaim| {
            claim.of.as_ref().map(|_| Content {
                text: "a text",
                hash: &[7; 32],
                metadata: None,
                vector: &vector,
            })
        };
        let embedded: Vec<Embedded<'_>> = claims
            .iter()
            .map(|claim| Embedded {
                claim,
                content: content(claim),
            })
            .collect();
        self.store.store_embeddings(MODEL, 8, &embedded).await.expect("serves")
    }

    async fn queued(&self) -> i64 {
        self.count("SELECT count(*) FROM p2p_sync.embedding_queue").await
    }

    /// Paths with vectors, and of which operation.
    async fn vectors(&self) -> Vec<(String, i64)> {
        let rows = self
            .sql
            .query(
                "SELECT path, stream_sequence FROM p2p_sync.embeddings ORDER BY path, entry",
                &[],
            )
            .await
            .expect("reads");
        rows.iter().map(|row| (row.get(0), row.get(1))).collect()
    }
}

#[tokio::test]
async fn an_operation_is_queued_with_its_commit_and_only_where_it_is_to_be_embedded() {
    let (hub, host) = (Hub::embedding().await, Uuid::nil());
    hub.apply(
        host,
        vec![put("prontera/NPC_STATE/1", 1), embedded(put("prontera/NPC_STATE/2", 2))],
    )
    .await;
    let claims = hub.claim().await;
    assert_eq!(claims.len(), 1);
    assert_eq!((claims[0].path.as_str(), claims[0].entry), ("prontera/NPC_STATE/2", 0));
    let source = claims[0].of.as_ref().expect("it is there");
    assert_eq!(
        (source.payload.as_str(), source.map.as_str()),
        ("{\"n\": 2}", "prontera")
    );
    assert!(hub.claim().await.is_empty(), "it is taken");
    assert!(hub.embed(&claims).await);
    assert_eq!((hub.queued().await, hub.vectors().await.len()), (0, 1));
}

#[tokio::test]
async fn what_is_superseded_or_comes_again_is_not_queued() {
    let (hub, host) = (Hub::embedding().await, Uuid::nil());
    let newer = embedded(put("prontera/NPC_STATE/1", 5));
    hub.apply(host, vec![newer.clone()]).await;
    hub.embed(&hub.claim().await).await;
    let older = embedded(put("prontera/NPC_STATE/1", 4));
    assert_eq!(
        told(&hub.apply(host, vec![older, newer]).await),
        ["superseded", "applied"]
    );
    assert_eq!(hub.queued().await, 0);
}

#[tokio::test]
async fn newest_states_take_the_place_of_older_ones_and_lines_count_each() {
    let (hub, host) = (Hub::embedding().await, Uuid::nil());
    for n in 0..3 {
        let chat = line("prontera/CHAT_MESSAGE/7", 2 * n + 2);
        let chat = ValidOp {
            predecessor: None,
            ..chat
        };
        hub.apply(host, vec![embedded(put("prontera/NPC_STATE/1", 2 * n + 1)), chat])
            .await;
    }
    let claims = hub.claim().await;
    assert_eq!(claims.len(), 4, "three lines, and the NPC's newest state");
    assert!(hub.embed(&claims).await);
    assert_eq!(hub.vectors().await.len(), 4);
    let npc = &claims[3];
    let payload = npc.of.as_ref().map(|of| of.payload.as_str());
    assert_eq!(
        (npc.path.as_str(), payload),
        ("prontera/NPC_STATE/1", Some("{\"n\": 5}"))
    );
}

#[tokio::test]
async fn what_changes_while_it_is_embedded_is_stored_and_embedded_again() {
    let (hub, host) = (Hub::embedding().await, Uuid::nil());
    hub.apply(host, vec![embedded(put("prontera/NPC_STATE/1", 1))]).await;
    let older = hub.claim().await;
    hub.apply(host, vec![embedded(put("prontera/NPC_STATE/1", 2))]).await;
    let newer = hub.claim().await;
    assert_eq!(newer.len(), 1, "the newer one need not wait for the older");
    assert!(hub.embed(&newer).await);
    let after_newer = hub.vectors().await;
    assert!(hub.embed(&older).await);
    assert_eq!(
        hub.vectors().await,
        after_newer,
        "an older text takes no newer one's place"
    );
    assert_eq!(hub.queued().await, 0);
}

#[tokio::test]
async fn invariant_03_a_deleted_path_loses_its_vectors_and_none_comes_back() {
    let (hub, host) = (Hub::embedding().await, Uuid::nil());
    let chat = ValidOp {
        predecessor: None,
        ..line("prontera/CHAT_MESSAGE/7", 2)
    };
    hub.apply(host, vec![embedded(put("prontera/NPC_STATE/1", 1)), chat])
        .await;
    hub.embed(&hub.claim().await).await;
    assert_eq!(hub.vectors().await.len(), 2);
    hub.apply(host, vec![embedded(put("prontera/NPC_STATE/1", 3))]).await;
    let before = hub.claim().await;
    let gone = ValidOp {
        keep: Keep::Every,
        ..delete("prontera/CHAT_MESSAGE/7", 5)
    };
    hub.apply(host, vec![embedded(delete("prontera/NPC_STATE/1", 4)), embedded(gone)])
        .await;
    assert_eq!((hub.vectors().await, hub.queued().await), (vec![], 0));
    assert!(hub.embed(&before).await);
    assert_eq!(hub.vectors().await, [], "what was taken before the deletion");
    hub.apply(host, vec![embedded(put("prontera/NPC_STATE/1", 6))]).await;
    assert!(hub.embed(&before).await);
    assert_eq!(hub.vectors().await, [], "also where the path is there again");
    let after = hub.claim().await;
    assert!(hub.embed(&after).await);
    assert_eq!(hub.vectors().await.len(), 1);
}

#[tokio::test]
async fn a_message_that_writes_deletes_and_writes_a_path_leaves_what_came_last() {
    let (hub, host) = (Hub::embedding().await, Uuid::nil());
    let path = "prontera/CHAT_MESSAGE/7";
    let gone = ValidOp {
        predecessor: None,
        keep: Keep::Every,
        ..embedded(delete(path, 2))
    };
    let free = |sequence| ValidOp {
        predecessor: None,
        ..line(path, sequence)
    };
    hub.apply(host, vec![free(1), gone, free(3), free(4)]).await;
    let claims = hub.claim().await;
    let payloads: Vec<&str> = claims
        .iter()
        .filter_map(|claim| Some(claim.of.as_ref()?.payload.as_str()))
        .collect();
    assert_eq!(payloads, ["{\"n\": 3}", "{\"n\": 4}"]);
}

#[tokio::test]
async fn what_a_proxy_took_and_left_is_taken_again_and_what_failed_waits_or_is_set_apart() {
    let (hub, host) = (Hub::embedding().await, Uuid::nil());
    let ops = (1..=3)
        .map(|n| embedded(put(&format!("prontera/NPC_STATE/{n}"), n)))
        .collect();
    hub.apply(host, ops).await;
    let at_once = hub
        .store
        .claim_embeddings(&EligibleMaps::All, 64, Duration::ZERO)
        .await
        .expect("serves");
    assert_eq!(at_once.len(), 3);
    let claims = hub.claim().await;
    assert_eq!(claims.len(), 3, "their time was over");
    let failure = |code| Some((code, "not taken".to_owned()));
    hub.store
        .release_embeddings(&[
            Release {
                claim: &claims[0],
                after: Duration::ZERO,
                failure: None,
            },
            Release {
                claim: &claims[1],
                after: LEASE,
                failure: failure(None),
            },
            Release {
                claim: &claims[2],
                after: LEASE,
                failure: failure(Some(p2p_sync_proto::Code::TextRefused)),
            },
        ])
        .await
        .expect("serves");
    let again = hub.claim().await;
    assert_eq!(
        again.iter().map(|claim| claim.path.as_str()).collect::<Vec<_>>(),
        ["prontera/NPC_STATE/1"]
    );
    let status = hub.store.embedding_queue().await.expect("serves");
    assert_eq!((status.waiting, status.dead), (2, 1));
    assert_eq!(status.dead_letters[0].2, "not taken");
    assert_eq!(hub.store.retry_embeddings().await, Ok(1));
    assert_eq!(hub.claim().await.len(), 1);
    // What is written anew is tried anew.
    hub.apply(host, vec![embedded(put("prontera/NPC_STATE/2", 9))]).await;
    assert_eq!(hub.claim().await[0].attempts, 0);
}

#[tokio::test]
async fn only_eligible_maps_are_taken_from_the_queue() {
    let (hub, host) = (Hub::embedding().await, Uuid::nil());
    hub.apply(host, vec![embedded(put("prontera/NPC_STATE/1", 1))]).await;
    for (maps, count) in [
        (EligibleMaps::None, 0),
        (EligibleMaps::Some(vec!["geffen".to_owned()]), 0),
        (EligibleMaps::Some(vec!["prontera".to_owned()]), 1),
    ] {
        let claims = hub.store.claim_embeddings(&maps, 64, LEASE).await.expect("serves");
        assert_eq!(claims.len(), count, "{maps:?}");
    }
}

#[tokio::test]
async fn an_edit_of_the_operators_is_embedded_as_a_hosts_write_is() {
    let (hub, host) = (Hub::embedding().await, Uuid::nil());
    hub.apply(
        host,
        vec![put("prontera/NPC_STATE/1", 1), put("prontera/MONSTER_DATA/1", 2)],
    )
    .await;
    let path = |text: &str| p2p_sync_proto::Path::parse(text).expect("a path");
    let npc = path("prontera/NPC_STATE/1");
    let edit = hub
        .store
        .edit(&npc, Keep::Latest, Some("{\"n\":9}"), None)
        .await
        .expect("serves");
    hub.store
        .edit(&path("prontera/MONSTER_DATA/1"), Keep::Latest, Some("{}"), None)
        .await
        .expect("serves");
    let types = [npc.parts().data_type as i16];
    let looked = hub
        .store
        .enqueue_edits(0, &EligibleMaps::All, &types)
        .await
        .expect("serves");
    assert_eq!(looked, edit + 1);
    hub.embed(&hub.claim().await).await;
    assert_eq!(hub.vectors().await.len(), 1);
    hub.store.edit(&npc, Keep::Latest, None, None).await.expect("serves");
    hub.store
        .enqueue_edits(looked, &EligibleMaps::All, &types)
        .await
        .expect("serves");
    assert_eq!(hub.vectors().await, []);
}

#[tokio::test]
async fn what_came_before_its_map_was_eligible_is_embedded_when_the_operator_says_so() {
    let (hub, host) = (Hub::embedding().await, Uuid::nil());
    let plain = |op: ValidOp| ValidOp {
        embedded: false,
        predecessor: None,
        ..op
    };
    let chat = |sequence| plain(line("prontera/CHAT_MESSAGE/7", sequence));
    hub.apply(
        host,
        vec![
            plain(put("prontera/NPC_STATE/1", 1)),
            chat(2),
            chat(3),
            put("prontera/ITEM_DROP/1", 4),
        ],
    )
    .await;
    let types = [4, 7];
    let fill = async || {
        hub.store
            .fill_embeddings(&EligibleMaps::All, &types)
            .await
            .expect("serves")
    };
    assert_eq!(fill().await, 3);
    let claims = hub.claim().await;
    hub.embed(&claims).await;
    assert_eq!((claims.len(), hub.vectors().await.len(), fill().await), (3, 3, 0));
    assert_eq!(hub.store.forget_embeddings(Some("prontera"), None).await, Ok(3));
    assert_eq!(fill().await, 3);
}

#[tokio::test]
async fn a_day_has_its_budget_and_a_message_is_paid_for_once() {
    let (hub, host) = (Hub::new().await, Uuid::new_v4());
    let spend = async |tokens, incarnation, sequence| {
        let message = Some(Position { incarnation, sequence });
        hub.store
            .spend_embedding_tokens(host, tokens, Some(100), message)
            .await
            .expect("serves")
    };
    assert_eq!(spend(60, 3, 10).await, Spent::Yes);
    assert_eq!(spend(60, 3, 10).await, Spent::Replay);
    assert_eq!(spend(60, 3, 11).await, Spent::TooMany(40));
    assert_eq!(spend(1, 3, 11).await, Spent::Replay, "also of one that was too much");
    assert_eq!(spend(40, 3, 9).await, Spent::Yes, "overtaken on its way");
    assert_eq!(spend(1, 2, 99).await, Spent::Replay, "of an outbox before");
    hub.store.give_back_embedding_tokens(host, 50).await.expect("serves");
    for sequence in 12..82 {
        assert_eq!(spend(0, 3, sequence).await, Spent::Yes);
    }
    assert_eq!(spend(0, 3, 5).await, Spent::Replay, "older than what is remembered");
    assert_eq!(spend(50, 4, 1).await, Spent::Yes, "a new outbox");
    assert_eq!(spend(1, 4, 2).await, Spent::TooMany(0));
    hub.sql
        .batch_execute("UPDATE p2p_sync.embedding_spend SET day = day - 1")
        .await
        .expect("ages");
    assert_eq!(spend(100, 4, 3).await, Spent::Yes);
    assert_eq!(spend(100, 4, 3).await, Spent::Replay, "a new day forgets no message");
    let queue = hub.store.spend_embedding_tokens(Uuid::nil(), 1 << 40, None, None).await;
    assert_eq!(queue, Ok(Spent::Yes), "without a bound");
}

#[tokio::test]
async fn vectors_of_another_model_are_neither_mixed_nor_searched() {
    let (hub, host) = (Hub::embedding().await, Uuid::nil());
    hub.apply(host, vec![embedded(put("prontera/NPC_STATE/1", 1))]).await;
    let claims = hub.claim().await;
    hub.embed(&claims).await;
    let code = async |model, dimensions| {
        let taken = hub.store.take_embedding_space(model, dimensions).await;
        taken.map_or_else(|problem| problem.code, |()| p2p_sync_proto::Code::None)
    };
    assert_eq!(code(MODEL, 8).await, p2p_sync_proto::Code::None);
    assert_eq!(code(MODEL, 9).await, p2p_sync_proto::Code::EmbeddingsMismatch);
    assert_eq!(code("another", 8).await, p2p_sync_proto::Code::EmbeddingsMismatch);
    let one = Embedded {
        claim: &claims[0],
        content: None,
    };
    assert_eq!(hub.store.store_embeddings("another", 8, &[one]).await, Ok(false));
    let search = |model| Search {
        model,
        vector: &[0.5; 8],
        limit: 5,
        ..Search::default()
    };
    let found = hub
        .store
        .search_embeddings(&search(MODEL))
        .await
        .expect("serves")
        .expect("its own");
    assert!(found.len() == 1 && found[0].similarity > 0.999, "{found:?}");
    assert_eq!(hub.store.search_embeddings(&search("another")).await, Ok(None));
    hub.store.forget_embeddings(None, None).await.expect("serves");
    assert_eq!(
        code("another", 8).await,
        p2p_sync_proto::Code::None,
        "where there are none, any may begin"
    );
}

#[tokio::test]
async fn a_writer_waits_for_nobody_who_embeds() {
    let (hub, host) = (Hub::embedding().await, Uuid::nil());
    hub.apply(host, vec![embedded(put("prontera/NPC_STATE/1", 1))]).await;
    let claims = hub.claim().await;
    // A writer in the middle of its transaction: what was taken is neither written nor waited for.
    let other = hub.database.client().await;
    other
        .batch_execute("BEGIN; UPDATE p2p_sync.embedding_queue SET stream_sequence = stream_sequence + 1")
        .await
        .expect("locks");
    let embed = tokio::time::timeout(Duration::from_secs(5), hub.embed(&claims)).await;
    assert_eq!(embed, Ok(true), "it does not wait");
    assert_eq!(hub.vectors().await, []);
    other.batch_execute("ROLLBACK").await.expect("ends");
    hub.embed(&claims).await;
    assert_eq!(hub.vectors().await.len(), 1);
}

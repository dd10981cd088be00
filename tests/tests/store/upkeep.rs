//! The tables do not grow for ever, and what is forgotten cannot come back.

use p2p_sync_proto::{Code, Problem};
use p2p_sync_proxy::{
    operation::{History, Valid, ValidOp},
    store::{HostStatus, Maintained},
};
use uuid::Uuid;

use crate::fixture::{Hub, at, delete, message, put, refused, told};

#[tokio::test]
async fn the_log_has_tomorrows_partition_and_loses_those_past_their_retention() {
    let (hub, host) = (Hub::new().await, Uuid::nil());
    hub.apply(
        host,
        vec![ValidOp {
            history: History::All,
            ..put("prontera/MAP_STATE", 1)
        }],
    )
    .await;
    assert_eq!(hub.count("SELECT count(*) FROM p2p_sync.operations_default").await, 0);
    hub.sql
        .batch_execute(
            "DO $$ DECLARE old date := (now() AT TIME ZONE 'UTC')::date - 31; kept date := old + 1; BEGIN \
             EXECUTE format('CREATE TABLE p2p_sync.operations_%s PARTITION OF p2p_sync.operations FOR VALUES FROM (%L) TO (%L)', \
                 to_char(old, 'YYYYMMDD'), old::timestamp AT TIME ZONE 'UTC', kept::timestamp AT TIME ZONE 'UTC'); \
             EXECUTE format('CREATE TABLE p2p_sync.operations_%s PARTITION OF p2p_sync.operations FOR VALUES FROM (%L) TO (%L)', \
                 to_char(kept, 'YYYYMMDD'), kept::timestamp AT TIME ZONE 'UTC', (kept + 1)::timestamp AT TIME ZONE 'UTC'); \
             END $$; \
             DROP TABLE p2p_sync.operations_default; \
             CREATE TABLE p2p_sync.operations_default PARTITION OF p2p_sync.operations DEFAULT",
        )
        .await
        .expect("makes old partitions");
    let old_message = "INSERT INTO p2p_sync.operations SELECT stream, 7, now() - interval '31 days', gen_random_uuid(), in_group, path, \
            data_type, true, tenure, incarnation, sequence, host_id, account_id, map, deleted, payload, made_at_ms, superseded, \
            origin_hub, hub_edit FROM p2p_sync.operations";
    hub.sql.batch_execute(old_message).await.expect("an old message");
    let partitions = "SELECT count(*) FROM pg_inherits WHERE inhparent = 'p2p_sync.operations'::regclass";
    assert_eq!(
        hub.count(partitions).await,
        5,
        "the default one, two old ones, today and tomorrow"
    );
    assert_eq!(
        hub.store.maintain().await.expect("serves"),
        Maintained {
            partitions_dropped: 1,
            ..Maintained::default()
        }
    );
    assert_eq!(hub.count(partitions).await, 4);
    assert_eq!(hub.store.maintain().await.expect("serves"), Maintained::default());
    assert_eq!(hub.count("SELECT count(*) FROM p2p_sync.operations").await, 1);
    let floor = "SELECT floor FROM p2p_sync.stream_floors WHERE stream = 'prontera'";
    assert_eq!(
        hub.count(floor).await,
        7,
        "who was not told of the old message begins anew"
    );
}

#[tokio::test]
async fn invariant_03_tombstones_are_forgotten_only_when_no_outbox_can_bring_older_state() {
    let hub = Hub::new().await;
    let (host, outbox) = (hub.host().await, Uuid::new_v4());
    hub.store.hello(host, outbox, 1, 1).await.expect("hello");
    let problem = Problem::new(Code::InvalidJson, "at 7: a comma");
    let batch = Valid {
        refused: vec![refused(1, Some(at(1, 2)), problem)],
        ..message(host, vec![delete("prontera/NPC_STATE/1", 5)])
    };
    hub.store.apply(&batch).await.expect("serves");
    hub.store.hello(host, outbox, 2, 1).await.expect("hello");
    hub.sql
        .batch_execute(
            "UPDATE p2p_sync.states SET received_at = now() - interval '31 days'; \
             UPDATE p2p_sync.rejected_operations SET received_at = now() - interval '31 days'; \
             UPDATE p2p_sync.settled_sequences SET opened_at = now() - interval '31 days'",
        )
        .await
        .expect("ages");
    let expected = Maintained {
        partitions_dropped: 0,
        hosts_closed: 1,
        tombstones_purged: 1,
        rejections_purged: 1,
        verdicts_purged: 0,
        player_tenures_purged: 0,
        invitations_purged: 0,
        metrics_purged: 0,
        conflicts_purged: 0,
        embeddings_purged: 0,
    };
    assert_eq!(hub.store.maintain().await.expect("serves"), expected);
    assert_eq!(
        told(&hub.apply(host, vec![put("prontera/NPC_STATE/1", 4)]).await),
        ["OUTBOX_TOO_OLD"]
    );
    assert_eq!(hub.state("prontera/NPC_STATE/1").await, None);
    let floor = "SELECT floor FROM p2p_sync.stream_floors WHERE stream = 'prontera'";
    assert_eq!(
        hub.count(floor).await,
        1,
        "who was not told of the deletion begins anew"
    );
    let current = ValidOp {
        position: at(2, 1),
        ..put("prontera/NPC_STATE/1", 1)
    };
    assert_eq!(told(&hub.apply(host, vec![current]).await), ["applied"]);
}

#[tokio::test]
async fn an_outbox_that_was_in_use_until_now_keeps_its_backlog_however_old_it_is() {
    let hub = Hub::new().await;
    let (host, outbox) = (hub.host().await, Uuid::new_v4());
    hub.store.hello(host, outbox, 1, 1).await.expect("hello");
    hub.sql
        .execute(
            "UPDATE p2p_sync.settled_sequences SET opened_at = now() - interval '91 days'",
            &[],
        )
        .await
        .expect("ages");
    hub.store.hello(host, outbox, 2, 1).await.expect("hello");
    assert_eq!(hub.store.maintain().await.expect("serves").hosts_closed, 0);
    assert_eq!(
        told(&hub.apply(host, vec![put("prontera/NPC_STATE/1", 1)]).await),
        ["applied"]
    );
}

#[tokio::test]
async fn invariant_12_a_host_opens_no_more_incarnations_than_are_kept() {
    let hub = Hub::new().await;
    let (host, outbox) = (hub.host().await, Uuid::new_v4());
    hub.sql
        .execute(
            "INSERT INTO p2p_sync.settled_sequences (host_id, incarnation) SELECT $1, generate_series(1, 4096)",
            &[&host],
        )
        .await
        .expect("inserts");
    hub.store.hello(host, outbox, 4096, 1).await.expect("it is one of them");
    let refusal = hub.store.hello(host, outbox, 4097, 1).await.expect_err("one more");
    assert_eq!(refusal.code, Code::TooManyGaps);
    hub.store
        .hello(host, outbox, 4097, 4097)
        .await
        .expect("the others are drained");
    assert_eq!(hub.count("SELECT count(*) FROM p2p_sync.settled_sequences").await, 2);
}

#[tokio::test]
async fn what_is_old_goes_however_much_there_is_of_it_and_whatever_else_fails() {
    let hub = Hub::new().await;
    let host = hub.host().await;
    hub.sql
        .batch_execute(&format!(
            "INSERT INTO p2p_sync.states (path, stream, stream_sequence, data_type, keeps_every, tenure, incarnation, sequence, \
                    host_id, operation_id, in_group, account_id, map, deleted, received_at, origin_hub) \
                SELECT 'prontera/NPC_STATE/' || n, 'prontera', n, 4, false, 0, 1, n, '{host}', gen_random_uuid(), false, 0, \
                        'prontera', true, now() - interval '31 days', gen_random_uuid() FROM generate_series(1, 25000) AS n; \
             INSERT INTO p2p_sync.security_validations (host_id, verdict, rule, received_at) \
                SELECT '{host}', 'refused', 'a rule', now() - interval '31 days' FROM generate_series(1, 25000); \
             CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RAISE ''kept''; END'; \
             CREATE TRIGGER fail BEFORE DELETE ON p2p_sync.states EXECUTE FUNCTION fail()"
        ))
        .await
        .expect("inserts");
    hub.store.maintain().await.expect_err("one of them fails");
    let of = async |table: &str| hub.count(&format!("SELECT count(*) FROM p2p_sync.{table}")).await;
    assert_eq!((of("states").await, of("security_validations").await), (25_000, 0));
    hub.sql
        .batch_execute("DROP TRIGGER fail ON p2p_sync.states")
        .await
        .expect("drops");
    assert_eq!(hub.store.maintain().await.expect("serves").tombstones_purged, 25_000);
    assert_eq!(of("states").await, 0);
}

#[tokio::test]
async fn a_host_is_enrolled_once_and_locked_or_revoked_by_its_id() {
    let hub = Hub::new().await;
    let host = hub.host().await;
    let row = hub.store.add_host(host, 8, "another name", "k2").await.expect("serves");
    assert_eq!(
        (row.account_id, row.name.as_str(), row.generation, row.status),
        (7, "a host", 1, HostStatus::Active)
    );
    assert_eq!(
        hub.store.set_host_status(host, HostStatus::Revoked).await,
        Ok(Some(HostStatus::Revoked))
    );
    assert_eq!(
        hub.store.set_host_status(Uuid::nil(), HostStatus::Revoked).await,
        Ok(None)
    );
    let hosts = hub.store.hosts().await.expect("serves");
    assert_eq!(
        hosts.iter().map(|host| host.status).collect::<Vec<_>>(),
        [HostStatus::Revoked]
    );
    assert_eq!(hub.store.host(Uuid::nil()).await, Ok(None));
}

//! What hosts report of themselves: its history, and what scores are made of.

use p2p_sync_proxy::{operation::ValidOp, store::StateRow};
use uuid::Uuid;

use crate::fixture::{Hub, put, told};

fn report(host: Uuid, sequence: u64, payload: &str) -> ValidOp {
    ValidOp {
        tenure: 0,
        map: String::new(),
        payload: Some(payload.to_owned()),
        ..put(&format!("@host/{host}/HOST_METRICS"), sequence)
    }
}

impl Hub {
    async fn report(&self, by: Uuid, of: Uuid, sequence: u64, payload: &str) {
        assert_eq!(
            told(&self.apply(by, vec![report(of, sequence, payload)]).await),
            ["applied"]
        );
    }

    async fn past(&self, table: &str, of: Uuid) {
        let column = if table == "states" {
            "path LIKE '%' || $1 || '%'"
        } else {
            "host_id::text = $1"
        };
        let sql = format!("UPDATE p2p_sync.{table} SET received_at = received_at - interval '2 min' WHERE {column}");
        self.sql.execute(&sql, &[&of.to_string()]).await.expect("updates");
    }
}

#[tokio::test]
async fn reports_are_kept_one_a_minute_of_each_host_with_whose_word_they_are() {
    let hub = Hub::governed().await;
    let (a, b) = (hub.host().await, hub.host().await);
    hub.report(a, a, 1, r#"{"cpu_percent": 10, "players": 3}"#).await;
    hub.report(b, b, 1, r#"{"cpu_percent": 20}"#).await;
    for _ in 0..3 {
        hub.store.record_metrics().await.expect("serves");
    }
    let all = "SELECT count(*) FROM p2p_sync.host_metrics";
    assert_eq!(hub.count(all).await, 2);
    hub.report(a, a, 2, r#"{"cpu_percent": 11}"#).await;
    hub.store.record_metrics().await.expect("serves");
    assert_eq!(hub.count(all).await, 2, "within the minute");
    hub.past("host_metrics", a).await;
    hub.store.record_metrics().await.expect("serves");
    let kept = hub.store.metrics(a, 5).await.expect("serves");
    assert_eq!(kept.len(), 2);
    let newest: serde_json::Value = serde_json::from_str(&kept[0].metrics).expect("JSON");
    assert_eq!(
        newest,
        serde_json::json!({"cpu_percent": 11, "players": 3}),
        "what was left out is as it was"
    );
    assert_eq!(kept[0].reported_by, a);
    // One in the hub's role says it of another.
    hub.past("host_metrics", b).await;
    hub.report(a, b, 3, r#"{"latency_ms": 7.5}"#).await;
    hub.store.record_metrics().await.expect("serves");
    let kept = hub.store.metrics(b, 1).await.expect("serves");
    assert_eq!(kept[0].reported_by, a);
    hub.sql
        .batch_execute("UPDATE p2p_sync.host_metrics SET received_at = received_at - interval '8 days'")
        .await
        .expect("updates");
    let done = hub.store.maintain().await.expect("serves");
    assert_eq!(done.metrics_purged, 4);
}

#[tokio::test]
async fn scores_are_made_of_the_last_report_and_what_it_leaves_out_of_those_before() {
    let hub = Hub::governed().await;
    let a = hub.host().await;
    hub.store.renew_leases(a, 1, 1).await.expect("serves");
    let word = async || hub.store.world().await.expect("serves").hosts[0].facts.word;
    assert_eq!(word().await.cpu_percent, None);
    hub.report(a, a, 1, r#"{"cpu_percent": 10, "disconnects": 2, "maps_max": 5}"#)
        .await;
    assert_eq!((word().await.cpu_percent, word().await.maps_max), (Some(10.0), Some(5)));
    hub.store.record_metrics().await.expect("serves");
    hub.report(a, a, 2, r#"{"players": 4, "cpu_percent": "much"}"#).await;
    let now = word().await;
    assert_eq!(
        (now.cpu_percent, now.disconnects),
        (None, Some(2.0)),
        "what is no number is not known"
    );
    for _ in 0..3 {
        hub.past("host_metrics", a).await;
        hub.past("states", a).await;
    }
    assert_eq!(word().await.disconnects, None, "it is long ago");
    let state: StateRow = hub
        .store
        .get(&crate::fixture::path_of(&format!("@host/{a}/HOST_METRICS")))
        .await
        .expect("serves")
        .expect("kept");
    assert!(state.payload.expect("a report").contains("players"), "a state as any");
}

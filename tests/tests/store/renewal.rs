//! Credentials that were given out when their host was locked.

use p2p_sync_proto::Code;
use p2p_sync_proxy::store::HostStatus;
use uuid::Uuid;

use crate::fixture::Hub;

#[tokio::test]
async fn what_was_given_before_a_lock_is_good_after_it_and_given_again_to_who_asks_first() {
    let hub = Hub::new().await;
    let host = hub.host().await;
    let [lost, other, copy] = [(); 3].map(|()| Uuid::new_v4());
    let ask = async |request: Uuid| hub.store.renew_credential(host, 1, request, "k2", true).await;
    let given = ask(lost).await.expect("serves");
    assert_eq!(given, Some(("k2".to_owned(), 2)));
    assert_eq!(ask(other).await.expect_err("a copy").code, Code::Locked);
    assert_eq!(ask(lost).await, Ok(None), "it is locked");

    let unlock = async || hub.store.set_host_status(host, HostStatus::Active).await;
    unlock().await.expect("serves");
    let row = hub.store.host(host).await.expect("serves").expect("there");
    assert_eq!(row.next_key_id.as_deref(), Some("k2"), "the host may hold it");
    // The master key that is current by then changes nothing about it.
    let again = hub.store.renew_credential(host, 1, other, "k3", false).await;
    assert_eq!(again.expect("serves"), given);
    assert_eq!(ask(copy).await.expect_err("a copy").code, Code::Locked);

    unlock().await.expect("serves");
    assert_eq!(hub.store.promote_credential(host, 2).await, Ok(true));
    assert_eq!(ask(copy).await, Ok(None), "nobody knows whose request it was");
    let row = hub.store.host(host).await.expect("serves").expect("there");
    assert_eq!((row.status, row.generation), (HostStatus::Active, 2));
}

//! Tools reach the hub over TLS with the certificate that hosts see.

use reqwest::Method;
use serde_json::json;
use tokio_rustls::rustls::{RootCertStore, pki_types::CertificateDer};

use crate::world::{MODEL, World, client};

#[tokio::test(flavor = "multi_thread")]
async fn off_loopback_tools_are_served_over_tls_by_the_hubs_certificate() {
    let plain = World::not_started(&[("admin_address", "0.0.0.0".to_owned())]).await;
    let told = plain.hub.fails(&["serve"]);
    assert!(told.contains("admin_address: the proxy speaks plaintext"), "{told}");

    let names = vec!["127.0.0.1".to_owned(), "localhost".to_owned()];
    let signed = rcgen::generate_simple_self_signed(names).expect("a certificate");
    let folder = tempfile::tempdir().expect("a folder can be made");
    let (cert, key) = (folder.path().join("hub.pem"), folder.path().join("hub.key"));
    std::fs::write(&cert, signed.cert.pem()).expect("writable");
    p2p_sync_proto::secret_file::replace(&key, signed.signing_key.serialize_pem().as_bytes()).expect("writable");
    let settings = [
        ("admin_address", "0.0.0.0".to_owned()),
        ("tls_cert", cert.display().to_string()),
        ("tls_key", key.display().to_string()),
    ];
    let mut world = World::lexical(&settings).await;
    let port = world.hub.admin_url().rsplit(':').next().expect("a port").to_owned();
    assert!(world.hub.admin_url().starts_with("https://"));
    let mut roots = RootCertStore::empty();
    roots
        .add(CertificateDer::from(signed.cert.der().to_vec()))
        .expect("a certificate");
    world.client = client(roots);
    let body = json!({"model": MODEL, "input": "x"}).to_string();
    let url = format!("https://127.0.0.1:{port}/v1/embeddings");
    let request = |client: &reqwest::Client| {
        let request = client
            .request(Method::POST, &url)
            .header("authorization", format!("Bearer {}", world.token()));
        request.body(body.clone()).send()
    };
    let response = request(&world.client).await.expect("served");
    assert_eq!(response.status().as_u16(), 200);
    assert_eq!(response.version(), reqwest::Version::HTTP_11);
    request(&client(RootCertStore::empty()))
        .await
        .expect_err("an unknown certificate");
}

//! The token is the tools' and the hub's alone.

use reqwest::Method;
use serde_json::json;

use crate::world::{MODEL, World};

fn assert_shows_none(what: &str, text: &str, right: &str) {
    for part in right
        .as_bytes()
        .windows(16)
        .filter(|part| !part.starts_with(b"p2padmin"))
    {
        let part = str::from_utf8(part).expect("ASCII");
        assert!(!text.contains(part), "a part of the token stands in {what}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn invariant_11_the_admin_token_stands_in_no_log_no_answer_and_no_error() {
    let mut world = World::not_started(&[("log_level", "trace".to_owned())]).await;
    world.hub.start();
    let right = world.token();
    let mut told = String::new();
    for (shown, path, body) in [
        (
            right.clone(),
            "/v1/embeddings",
            json!({"model": MODEL, "input": "x"}).to_string(),
        ),
        (
            right.clone(),
            "/v1/embeddings",
            format!("{{\"model\": \"{MODEL}\", \"input\": "),
        ),
        (right.clone(), "/v1/embeddings", "x".repeat(2 * 1024 * 1024)),
        (right.clone(), "/v1/nothing", String::new()),
        (right[..right.len() - 1].to_owned(), "/v1/embeddings", String::new()),
        (format!("{right}x"), "/v1/embeddings", String::new()),
        (format!("x {right}"), "/v1/embeddings", String::new()),
    ] {
        let answer = world.ask_as(Some(&shown), Method::POST, path, &body).await;
        told += &format!("{:?} {}", answer.headers, answer.body);
    }
    let check = world.hub.command(&["check"]);
    assert!(check.contains("admin: ok (127.0.0.1:0)"), "{check}");
    // A file that is no token's, and one that others may read.
    let file = world.token_file();
    std::fs::write(&file, format!("{right} {right}\n")).expect("ours");
    told += &world.hub.fails(&["serve"]);
    std::fs::write(&file, format!("{right}\n")).expect("ours");
    let permissions = std::os::unix::fs::PermissionsExt::from_mode(0o644);
    std::fs::set_permissions(&file, permissions).expect("ours");
    let refused = world.hub.fails(&["serve"]);
    assert!(
        refused.contains("E110 LOOSE_FILE_MODE") && refused.contains("chmod 600"),
        "{refused}"
    );
    world.hub.stop();
    for (what, text) in [
        ("answers", &told),
        ("what check says", &check),
        ("an error", &refused),
        ("the log", &world.hub.log()),
    ] {
        assert_shows_none(what, text, &right);
    }
    assert!(world.hub.log().contains("a tool asked"), "what tools ask is logged");
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_token_nothing_is_served_and_the_operator_is_told_what_to_do() {
    let world = World::not_started(&[]).await;
    std::fs::remove_file(world.token_file()).expect("made");
    let told = world.hub.fails(&["serve"]);
    assert!(
        told.contains("E104 MISSING_VALUE") && told.contains("p2p-sync-proxy keys admin-token"),
        "{told}"
    );
    std::fs::write(world.token_file(), "hunter2\n").expect("writable");
    let permissions = std::os::unix::fs::PermissionsExt::from_mode(0o600);
    std::fs::set_permissions(world.token_file(), permissions).expect("ours");
    let told = world.hub.fails(&["serve"]);
    assert!(told.contains("E103 BAD_VALUE") && !told.contains("hunter"), "{told}");
}

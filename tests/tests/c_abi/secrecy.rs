//! What a map server passes leaves the process sealed alone.

use std::path::Path;

use p2p_sync_proto::v1::SyncDataType;
use p2p_sync_tests::faulty_link::FaultyLink;

use crate::{
    puppet::{APPLIED, Puppet, REJECTED, SPOOLED, number_of},
    world::{World, until},
};

fn contains(bytes: &[u8], needle: &[u8]) -> bool {
    bytes.windows(needle.len()).any(|window| window == needle)
}

fn random_word() -> String {
    (0..16).map(|_| fastrand::lowercase()).collect()
}

/// Panics where a word stands in a file below a folder; gives how many bytes there are.
fn assert_sealed_below(folder: &Path, words: &[&String]) -> usize {
    let mut seen = 0;
    for entry in std::fs::read_dir(folder).expect("the folder is there").flatten() {
        let path = entry.path();
        if path.is_dir() {
            seen += assert_sealed_below(&path, words);
            continue;
        }
        let bytes = std::fs::read(&path).expect("readable");
        for word in words {
            assert!(!contains(&bytes, word.as_bytes()), "plaintext in {}", path.display());
        }
        seen += bytes.len();
    }
    seen
}

#[test]
fn invariant_09_nothing_that_a_map_server_passes_is_on_the_wire_or_in_its_outbox() {
    let mut world = World::not_started();
    let link = FaultyLink::to(&world.endpoint());
    link.record();
    let mut puppet = Puppet::at(&world, &link.endpoint(), "");
    let [text, map, entity, key, value, message] = [(); 6].map(|()| random_word());
    let words = [&text, &map, &entity, &key, &value, &message];
    let item = number_of(SyncDataType::ItemDrop);
    let payload = format!(r#"{{"event":"{text}"}}"#);

    let spooled = puppet.id(&["put_notified", &item, "0", &map, &entity, &payload]);
    until("it is on disk", || {
        puppet.tell(&["result", &spooled])["state"] == SPOOLED
    });
    assert!(
        assert_sealed_below(&puppet.outbox(), &words) > 4096,
        "the outbox holds something"
    );

    world.hub.start();
    assert_eq!(puppet.settled(&spooled)["state"], APPLIED);
    let refused = format!(r#"{{"event":"{text}","amount":-1}}"#);
    let rejected = puppet.id(&["put_notified", &item, "0", &map, &entity, &refused]);
    assert_eq!(puppet.settled(&rejected)["state"], REJECTED);
    let member = format!(r#"{{"drop_id":1,"event":"{text}"}}"#);
    let group = puppet.id(&["group", &item, "0", &map, &member, &item, "0", "prontera", &member]);
    assert_eq!(puppet.settled(&group)["state"], APPLIED);
    puppet.wait_for_link();
    assert_eq!(puppet.tell(&["cache_set", &key, &value, "60"])["ok"], true);
    assert_eq!(puppet.tell(&["publish", &key, &message])["ok"], true);
    let question = format!(r#"{{"entity":"{entity}"}}"#);
    let asked = puppet.id(&["get", &item, "0", &map, &question]);
    let answer = puppet.settled(&asked);
    assert!(
        contains(answer["data"].as_str().expect("text").as_bytes(), text.as_bytes()),
        "{answer}"
    );
    // Asks the hub, behind what was told it before.
    let asked = puppet.id(&["cache_ask", &key]);
    puppet.settled(&asked);
    puppet.tell(&["final"]);

    let wire = link.recorded();
    assert!(
        contains(&wire, puppet.host_id().as_bytes()),
        "the messages are in the recording"
    );
    for word in words {
        assert!(
            !contains(&wire, word.as_bytes()),
            "plaintext between map server and hub"
        );
    }
    assert_sealed_below(&puppet.outbox(), &words);
}

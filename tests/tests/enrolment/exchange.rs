//! The exchange itself, by hosts that are not ours: at once, again, late, and with what was made up.

use std::{net::Ipv4Addr, time::Duration};

use p2p_sync_proto::{
    Code,
    identity::Identity,
    keys::{Credential, KeyId, MasterKey},
    token::Token,
    v1,
};
use p2p_sync_tests::raw_peer::{RawPeer, framed, outcome};
use tokio::task::JoinSet;
use uuid::Uuid;

use crate::{
    holder::{connect, exchange, request, sealed, send},
    world::{World, run, until},
};

fn invite(world: &World, more: &[&str]) -> Token {
    let endpoint = world.endpoint();
    let command = [
        &["hosts", "invite", "--account", "7", "--endpoint", &endpoint][..],
        more,
    ]
    .concat();
    let told = world.hub.command(&command);
    assert_eq!(told.lines().count(), 1, "the token is alone on standard output: {told}");
    Token::parse(&told).expect("a token")
}

#[test]
fn a_thousand_machines_with_one_token_at_once_are_one_host() {
    // As through an edge: from one address so many would be told to go.
    let world = World::with(&[("max_connections_per_address", "0".to_owned())]);
    let token = invite(&world, &["--maps", "prontera,geffen", "--name", "a volunteer"]);
    // Whoever has come as far as to write waits for this: so they meet, on a machine of any speed.
    let gate = world.client();
    run(gate.batch_execute("BEGIN; LOCK TABLE p2p_sync.hosts IN SHARE MODE")).expect("a superuser may");
    let (winners, used) = run(async {
        let mut channels = Vec::new();
        for _ in 0..50 {
            channels.push(connect(&world.endpoint()).await);
        }
        let mut tasks = JoinSet::new();
        for number in 0..1000 {
            let (channel, token) = (channels[number % 50].clone(), token.clone());
            tasks.spawn(async move {
                let identity = Identity::generate();
                // On a busy machine some wait in vain for the database, as they are told, and try again.
                let reply = loop {
                    let reply = exchange(&channel, &token, &identity).await.expect("its seal opens");
                    if reply.code() != Code::HubUnavailable {
                        break reply;
                    }
                };
                (identity, reply)
            });
        }
        tokio::time::sleep(Duration::from_millis(700)).await;
        gate.batch_execute("COMMIT").await.expect("it began");
        let (won, lost): (Vec<_>, Vec<_>) = tasks
            .join_all()
            .await
            .into_iter()
            .partition(|(_, reply)| reply.code() == Code::None);
        (
            won,
            lost.iter().filter(|(_, reply)| reply.code() == Code::TokenUsed).count(),
        )
    });
    assert_eq!((winners.len(), used), (1, 999));
    assert_eq!(world.count("SELECT count(*) FROM p2p_sync.hosts"), 1);
    let (identity, reply) = &winners[0];
    let host_id = Credential::parse(&reply.credential).expect("whole").host_id;
    assert_eq!(reply.maps, ["geffen", "prontera"]);
    let rows = world.rows(
        "SELECT account_id, name, public_key, generation FROM p2p_sync.hosts WHERE host_id = $1",
        &[&host_id],
    );
    assert_eq!(
        (rows[0].get::<_, i64>(0), rows[0].get::<_, &str>(1)),
        (7, "a volunteer")
    );
    assert_eq!(rows[0].get::<_, Vec<u8>>(2), identity.public_key());
    let held =
        "SELECT count(*) FROM p2p_sync.host_assignments WHERE host_id IS NOT NULL AND map IN ('prontera', 'geffen')";
    assert_eq!(world.count(held), 2, "granted with the host");

    // Who lost the reply gets it again, word for word; and not for anybody else.
    run(async {
        let channel = connect(&world.endpoint()).await;
        let again = exchange(&channel, &token, identity).await.expect("its seal opens");
        assert_eq!((again.code(), &again.credential), (Code::None, &reply.credential));
        assert_eq!(again.maps, reply.maps);
        let other = exchange(&channel, &token, &Identity::generate())
            .await
            .expect("its seal opens");
        assert_eq!(other.code(), Code::TokenUsed);
        assert!(
            other.credential.is_empty() && other.message.contains("ask the operator"),
            "{other:?}"
        );
    });
    assert_eq!(world.count("SELECT count(*) FROM p2p_sync.hosts"), 1);
}

#[test]
fn invariant_10_whoever_repeats_a_token_that_enrols_nobody_is_cut() {
    let world = World::with(&[("max_connections_per_address", "64".to_owned())]);
    let token = invite(&world, &[]);
    world.hub.command(&["hosts", "uninvite", "1"]);
    let hub = world
        .endpoint()
        .trim_start_matches("http://")
        .parse()
        .expect("an address");
    run(async {
        let mut peer = RawPeer::connect(hub, Ipv4Addr::LOCALHOST, 65_535)
            .await
            .expect("it listens");
        let identity = Identity::generate();
        for _ in 0..1000 {
            let request = framed(&sealed(&token, &request(&token, &identity)));
            let Ok(mut call) = peer.call("/p2p_sync.v1.Enrol/Exchange").await else {
                return;
            };
            // It may end here as well as at the answer.
            let _ = call.body.send_data(request, true);
            let Ok(answer) = call.answer.await else { return };
            if outcome::<v1::Sealed>(answer).await.is_err() {
                return;
            }
        }
        panic!("it goes on as it likes");
    });
}

#[test]
fn a_token_that_ended_says_so_and_one_that_was_made_up_gets_the_one_answer() {
    let world = World::new();
    let short = invite(&world, &["--expires", "1s"]);
    let (withdrawn, gone, good) = (invite(&world, &[]), invite(&world, &[]), invite(&world, &[]));
    world.hub.command(&["hosts", "uninvite", "2"]);
    let told = world.hub.fails(&["hosts", "uninvite", "2"]);
    assert!(told.contains("E221 NOT_FOUND: no invitation 2 is open"), "{told}");
    world.rows("DELETE FROM p2p_sync.invitations WHERE invitation_id = 3", &[]);
    until("the first one has expired", || {
        world.hub.command(&["hosts", "invitations"]).contains("1 expired ")
    });
    let listed = world.hub.command(&["hosts", "invitations"]);
    assert!(
        listed.contains("2 revoked ") && listed.contains("4 open until "),
        "{listed}"
    );

    let code = |token: &Token| {
        run(async {
            let channel = connect(&world.endpoint()).await;
            exchange(&channel, token, &Identity::generate())
                .await
                .expect("its seal opens")
                .code()
        })
    };
    assert_eq!(code(&short), Code::TokenExpired);
    assert_eq!(code(&withdrawn), Code::Revoked);
    assert_eq!(code(&gone), Code::NotFound);

    // A proof of another key, and none.
    let identity = Identity::generate();
    let mut unproven = request(&good, &identity);
    unproven.proof = Identity::generate().prove_enrolment(good.token_id).into();
    let reply = run(async { send(&connect(&world.endpoint()).await, &good, sealed(&good, &unproven)).await });
    assert_eq!(reply.expect("its seal opens").code(), Code::BadRequest);

    // Made up: an id that was never given out under another secret, a key that the hub does not have, and a host's own key.
    let other = MasterKey::generate(KeyId::parse("k1").expect("valid"));
    let unknown = MasterKey::generate(KeyId::parse("k9").expect("valid"));
    let forged = |master: &MasterKey, token_id| Token {
        key_id: master.id().clone(),
        secret: master.token_secret(token_id),
        token_id,
        ..good.clone()
    };
    let mut answers = Vec::new();
    for token in [
        forged(&other, good.token_id),
        forged(&other, Uuid::new_v4()),
        forged(&unknown, good.token_id),
        Token {
            token_id: Uuid::new_v4(),
            ..good.clone()
        },
    ] {
        let status = run(async {
            let channel = connect(&world.endpoint()).await;
            exchange(&channel, &token, &identity)
                .await
                .expect_err("it does not open")
        });
        answers.push((status.code(), status.message().to_owned()));
    }
    let mut changed = sealed(&good, &request(&good, &identity));
    changed.lane = 7;
    let status = run(async {
        send(&connect(&world.endpoint()).await, &good, changed)
            .await
            .expect_err("another lane")
    });
    answers.push((status.code(), status.message().to_owned()));
    assert!(answers[0].1.starts_with("E301 NOT_OPENED: "), "{answers:?}");
    assert!(answers.iter().all(|answer| *answer == answers[0]), "{answers:?}");
    assert_eq!(world.count("SELECT count(*) FROM p2p_sync.hosts"), 0);
    assert_eq!(code(&good), Code::None, "none of that used it up");
}

#[test]
fn what_the_database_holds_enrols_nobody_and_a_map_of_another_is_not_taken_away() {
    let mut world = World::new();
    let first = invite(&world, &["--maps", "prontera"]);
    let second = invite(&world, &["--maps", "prontera,izlude"]);
    let rows = world.rows("SELECT i::text FROM p2p_sync.invitations AS i", &[]);
    let id = first.token_id.simple().to_string();
    for row in &rows {
        let text: String = row.get(0);
        assert!(
            !text.contains(&id) && !text.contains(&first.token_id.to_string()),
            "{text}"
        );
    }
    let (one, two) = run(async {
        let channel = connect(&world.endpoint()).await;
        let one = exchange(&channel, &first, &Identity::generate()).await.expect("opens");
        (
            one,
            exchange(&channel, &second, &Identity::generate()).await.expect("opens"),
        )
    });
    assert_eq!((one.code(), two.code()), (Code::None, Code::None));
    assert_eq!((one.maps.join(","), one.maps_taken.len()), ("prontera".to_owned(), 0));
    assert_eq!(
        (two.maps.join(","), two.maps_taken.join(",")),
        ("izlude".to_owned(), "prontera".to_owned())
    );
    // Two machines of one account.
    assert_eq!(
        world.count("SELECT count(*) FROM p2p_sync.hosts WHERE account_id = 7"),
        2
    );

    // What is kept for a while is forgotten then.
    world.rows(
        "UPDATE p2p_sync.invitations SET expires_at = now() - interval '31 days'",
        &[],
    );
    world.hub.stop();
    world.hub.start();
    until("it is forgotten", || {
        world.count("SELECT count(*) FROM p2p_sync.invitations") == 0
    });
}

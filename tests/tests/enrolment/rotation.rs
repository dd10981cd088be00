//! Master keys that are replaced while hosts work, and credentials that are renewed, copied and repeated.

use std::{
    path::Path,
    sync::atomic::{AtomicU64, Ordering},
    thread,
    time::Duration,
};

use p2p_sync_proto::{
    Code,
    envelope::Lane,
    ids::new_id,
    keys::{Credential, Direction},
    message::{self, Label},
    v1::{self, critical_client::CriticalClient, rotate_client::RotateClient, session_client::SessionClient},
};
use p2p_sync_tests::{faulty_link::FaultyLink, stack::Agent};
use prost::Message;
use tonic::{Status, transport::Channel};
use uuid::Uuid;

use crate::{
    holder::connect,
    tls_world::chat,
    world::{PATIENCE, PROGRAM, World, run, until},
};

fn settings() -> [(&'static str, String); 2] {
    [
        ("retry_delay_max_ms", "200".to_owned()),
        ("connect_timeout_ms", "1000".to_owned()),
    ]
}

fn enrolled(world: &World, name: &str, endpoint: &str) -> Agent {
    let token = world
        .hub
        .command(&["hosts", "invite", "--account", "7", "--endpoint", endpoint]);
    Agent::enrolled(Path::new(PROGRAM), &world.folder.path().join(name), &token, &settings())
}

fn generation(world: &World, host_id: Uuid) -> i64 {
    let sql = "SELECT generation FROM p2p_sync.hosts WHERE host_id = $1";
    world.rows(sql, &[&host_id])[0].get(0)
}

fn status(world: &World, host_id: Uuid) -> String {
    let sql = "SELECT concat_ws(': ', status, lock_reason) FROM p2p_sync.hosts WHERE host_id = $1";
    world.rows(sql, &[&host_id])[0].get(0)
}

/// As if the minute were over in which what was sealed before a renewal is let in.
fn end_overlap(world: &World) {
    world.rows(
        "UPDATE p2p_sync.hosts SET renewed_at = renewed_at - interval '1 hour'",
        &[],
    );
    // What proxies believe of a host.
    thread::sleep(Duration::from_millis(2100));
}

fn kept(agent: &Agent) -> String {
    std::fs::read_to_string(agent.config().with_file_name("p2p_sync_credential")).expect("kept")
}

#[test]
fn through_rotations_outages_and_kills_every_operation_applies_once_and_old_keys_retire() {
    let world = World::new();
    let link = FaultyLink::to(&world.endpoint());
    let mut agent = enrolled(&world, "host", &link.endpoint());
    let host_id = agent.host_id();
    agent.start();
    let mut tag = 0;
    let mut submit = |agent: &mut Agent, count: u64| {
        for _ in 0..count {
            tag += 1;
            assert!(agent.submit(tag, &chat(tag)));
            thread::sleep(Duration::from_millis(1));
        }
    };
    submit(&mut agent, 50);
    let rounds = 8;
    for round in 0..rounds {
        world.hub.command(&["keys", "rotate"]);
        submit(&mut agent, 30);
        match round % 4 {
            // The link breaks in the middle of what is sent, and of the renewal.
            0 => {
                link.cut();
            }
            1 => {
                link.swallow();
                submit(&mut agent, 30);
                link.heal();
            }
            // Killed, sooner and later after it has heard of the new key: between all that is written and sent.
            _ => {
                link.delay(Duration::from_millis(20));
                link.cut();
                for _ in 0..4 {
                    submit(&mut agent, 10);
                    thread::sleep(Duration::from_millis(fastrand::u64(..350)));
                    agent.kill();
                    agent.start();
                }
                link.heal();
            }
        }
        submit(&mut agent, 30);
        until("the credential is renewed", || {
            if generation(&world, host_id) >= round + 2 {
                return true;
            }
            thread::sleep(Duration::from_millis(200));
            // Heard at the beginning of a session, else with the next renewal of leases.
            link.cut();
            false
        });
    }
    assert!(agent.flush(PATIENCE), "{}", agent.log());
    let sql = "SELECT key_id, generation, next_key_id FROM p2p_sync.hosts";
    let row = &world.rows(sql, &[])[0];
    assert_eq!((row.get::<_, &str>(0), row.get::<_, i64>(1)), ("k9", rounds + 1));
    assert!(row.get::<_, Option<&str>>(2).is_none());

    world.assert_log_is_in_order_without_duplicates();
    let held = world.held();
    let ledger = agent.ledger();
    let told = ledger
        .said
        .iter()
        .filter(|(_, said)| said.spooled || said.state == "APPLIED");
    let lost = told
        .clone()
        .filter(|(id, _)| !held.logged.contains_key(&id.parse().expect("an id")))
        .count();
    assert_eq!((lost, ledger.count("REJECTED")), (0, 0), "of {}", told.count());
    drop(ledger);

    until("the former credential is forgotten", || {
        !kept(&agent).contains("former_credential")
    });
    assert!(!kept(&agent).contains("renewal_request"));
    for key in 1..9 {
        world.hub.command(&["keys", "retire", &format!("k{key}")]);
    }
    assert!(world.hub.command(&["keys", "list"]).starts_with("k9 current since=20"));
    thread::sleep(Duration::from_secs(3));
    submit(&mut agent, 20);
    link.cut();
    submit(&mut agent, 20);
    assert!(agent.flush(PATIENCE), "{}", agent.log());
    agent.stop();
    agent.start();
    submit(&mut agent, 20);
    assert!(agent.flush(PATIENCE), "{}", agent.log());
    assert!(!world.hub.log().contains("is locked"), "{}", world.hub.log());
}

#[test]
fn a_renewal_interrupts_nothing_and_a_pasted_credential_is_renewed_beside_the_configuration() {
    let mut world = World::new();
    let credential = world.hub.add_host(1);
    let folder = world.folder.path().join("host");
    let mut agent = Agent::new(Path::new(PROGRAM), &folder, &world.endpoint(), &credential, &settings());
    let host_id = agent.host_id();
    agent.start();
    assert!(agent.submit(1, &chat(1)) && agent.flush(PATIENCE));
    // Waits in the outbox while the key changes.
    world.hub.stop();
    for tag in 2..50 {
        assert!(agent.submit(tag, &chat(tag)));
    }
    world.hub.command(&["keys", "rotate"]);
    world.hub.start();
    assert!(agent.flush(PATIENCE), "{}", agent.log());
    until("the credential is renewed", || generation(&world, host_id) == 2);
    until("the outbox is its own", || !kept(&agent).contains("former_credential"));
    let ups = agent.log().matches("the link is down").count();

    // While it runs, with nothing but the hub's word: nothing breaks off.
    world.hub.command(&["keys", "new"]);
    world.hub.command(&["keys", "rotate"]);
    let mut tag = 49;
    until("the credential is renewed again", || {
        tag += 1;
        assert!(agent.submit(tag, &chat(tag)));
        generation(&world, host_id) == 3
    });
    assert!(agent.flush(PATIENCE), "{}", agent.log());
    assert_eq!(agent.log().matches("the link is down").count(), ups, "{}", agent.log());
    assert_eq!(agent.ledger().count("APPLIED"), usize::try_from(tag).expect("few"));

    // The file's goes before the pasted one, which is of generation 1.
    end_overlap(&world);
    agent.stop();
    agent.start();
    assert!(
        agent.submit(9999, &chat(9999)) && agent.flush(PATIENCE),
        "{}",
        agent.log()
    );
    assert_eq!(status(&world, host_id), "active");
    // Without it the machine is as a restored backup is: the hub has passed that credential.
    agent.stop();
    std::fs::remove_file(agent.config().with_file_name("p2p_sync_credential")).expect("there");
    std::fs::remove_dir_all(folder.join("outbox")).expect("there");
    agent.start();
    until("the host is locked", || status(&world, host_id).starts_with("locked: "));
}

#[test]
fn a_copy_of_a_machine_locks_the_host_and_the_original_goes_on_when_it_is_unlocked() {
    let world = World::new();
    let mut original = enrolled(&world, "host", &world.endpoint());
    let host_id = original.host_id();
    original.start();
    assert!(original.submit(1, &chat(1)) && original.flush(PATIENCE));
    original.stop();
    let folder = original.config().parent().expect("a folder").to_owned();
    let copied = world.folder.path().join("copy");
    let copy = std::process::Command::new("cp")
        .arg("-r")
        .arg(&folder)
        .arg(&copied)
        .status();
    assert!(copy.expect("cp runs").success());
    world.hub.command(&["keys", "rotate"]);
    original.start();
    until("the original has renewed", || generation(&world, host_id) == 2);
    end_overlap(&world);
    assert_eq!(status(&world, host_id), "active");

    let config = copied.join("p2p_data_sync.conf");
    let mut copy = std::process::Command::new(PROGRAM)
        .args(["agent", "run", "--config"])
        .arg(&config)
        .stderr(std::process::Stdio::null())
        .spawn()
        .expect("the program runs");
    until("the host is locked", || status(&world, host_id).starts_with("locked: "));
    copy.kill().expect("it runs");
    copy.wait().expect("it is ours");
    let shown = world.hub.command(&["hosts", "show", &host_id.to_string()]);
    let reason =
        "locked: its credential of generation 1 came into use again after it was renewed: there is a copy of it";
    assert!(shown.contains(reason), "{shown}");
    assert!(original.submit(2, &chat(2)) && !original.flush(Duration::from_secs(3)));

    world.hub.command(&["hosts", "unlock", &host_id.to_string()]);
    assert!(original.flush(PATIENCE), "{}", original.log());
    assert!(
        !world
            .hub
            .command(&["hosts", "show", &host_id.to_string()])
            .contains("locked")
    );
}

/// A host that seals by hand, under any credential that it was given.
struct Hand {
    channel: Channel,
    credential: Credential,
    sent: AtomicU64,
}

impl Hand {
    fn new(world: &World, credential: &str) -> Self {
        Self {
            channel: run(connect(&world.endpoint())),
            credential: Credential::parse(credential).expect("the hub gave it"),
            // The hub tells one message of a host that comes twice by its number, whichever credential sealed it.
            sent: AtomicU64::new(fastrand::u64(1..1 << 40)),
        }
    }

    fn seal(&self, lane: Lane, body: &impl Message) -> v1::Sealed {
        let number = self.sent.fetch_add(1, Ordering::Relaxed);
        let label = Label::from_credential(&self.credential, 7, number, new_id(), lane);
        message::seal(&self.credential.to_hub, Direction::ToHub, &label, body)
    }

    fn open<M: Message + Default>(&self, sealed: &v1::Sealed) -> M {
        let label = Label::read(sealed).expect("a label");
        message::open(&self.credential.to_host, Direction::ToHost, &label, sealed).expect("sealed for this host")
    }

    fn hello(&self, opening: u128, incarnation: u64) -> v1::Sealed {
        let hello = v1::HelloRequest {
            protocol_version: p2p_sync_proto::PROTOCOL_VERSION,
            opening_id: Uuid::from_u128(opening).as_bytes().to_vec().into(),
            incarnation,
            oldest_incarnation: incarnation,
            ..Default::default()
        };
        self.seal(Lane::Hello, &hello)
    }

    fn request(&self, id: u128) -> v1::Sealed {
        let request_id = Uuid::from_u128(id).as_bytes().to_vec().into();
        self.seal(Lane::Rotate, &v1::RotateRequest { request_id })
    }

    fn say(&self, hello: v1::Sealed) -> Result<v1::HelloReply, Status> {
        let answer = run(SessionClient::new(self.channel.clone()).hello(hello))?;
        Ok(self.open(answer.get_ref()))
    }

    fn renew(&self, request: v1::Sealed) -> Result<v1::RotateReply, Status> {
        let answer = run(RotateClient::new(self.channel.clone()).renew(request))?;
        Ok(self.open(answer.get_ref()))
    }

    fn send(&self, batch: v1::Sealed) -> Result<v1::BatchReply, Status> {
        let answer = run(CriticalClient::new(self.channel.clone()).apply(batch))?;
        Ok(self.open(answer.get_ref()))
    }

    /// Says hello until it is told to renew, then does; gives the credential.
    fn renewed(&self, opening: u128, incarnation: u64, request: v1::Sealed) -> String {
        until("it is told", || {
            let reply = self.say(self.hello(opening, incarnation)).expect("admitted");
            assert_eq!(reply.code(), Code::None, "{reply:?}");
            // A host says so many a second and no more.
            std::thread::sleep(Duration::from_millis(150));
            reply.renew_credential
        });
        let reply = self.renew(request).expect("admitted");
        assert_eq!(reply.code(), Code::None, "{reply:?}");
        reply.credential
    }
}

fn turned_away<T: std::fmt::Debug>(answer: Result<T, Status>) {
    let status = answer.expect_err("turned away");
    assert!(status.message().starts_with("E301 NOT_OPENED: "), "{status:?}");
}

#[test]
fn a_renewal_is_repeated_alike_and_messages_from_before_it_that_are_repeated_lock_nobody() {
    let world = World::new();
    let first = Hand::new(&world, &world.hub.add_host(1));
    let host_id = first.credential.host_id;
    let never_sent = [first.hello(6, 6), first.hello(70, 6)];
    let batch = first.seal(Lane::Critical, &v1::OperationBatch::default());
    let (hello, request) = (first.hello(7, 7), first.request(1));
    assert!(!first.say(hello.clone()).expect("admitted").renew_credential);
    assert_eq!(
        first.renew(request.clone()).expect("admitted").code(),
        Code::BadRequest,
        "none is due"
    );
    first.send(batch.clone()).expect("admitted");

    world.hub.command(&["keys", "rotate"]);
    let given = first.renewed(7, 7, first.request(1));
    // The reply was lost: again, in a message of its own; and the same message again is told as what it is.
    assert_eq!(first.renew(request.clone()).expect("admitted").code(), Code::Replay);
    assert_eq!(first.renew(first.request(1)).expect("admitted").credential, given);
    assert_eq!(generation(&world, host_id), 1, "not before it is used");
    let second = Hand::new(&world, &given);
    assert_eq!(
        (second.credential.generation, second.credential.key_id.as_str()),
        (2, "k2")
    );
    let told = world.hub.fails(&["keys", "retire", "k1"]);
    assert!(
        told.contains("E312 NOT_ALLOWED: 1 hosts and 0 open invitations use k1"),
        "{told}"
    );
    assert!(!second.say(second.hello(7, 7)).expect("admitted").renew_credential);
    assert_eq!(generation(&world, host_id), 2);

    // What was on its way comes in; the renewal is told the same still.
    let on_its_way = first.seal(Lane::Critical, &v1::OperationBatch::default());
    first.send(on_its_way).expect("for a minute");
    first.say(first.hello(7, 7)).expect("for a minute");
    assert_eq!(first.renew(first.request(1)).expect("for a minute").credential, given);
    end_overlap(&world);
    for _ in 0..3 {
        turned_away(first.say(hello.clone()));
        for withheld in &never_sent {
            turned_away(first.say(withheld.clone()));
        }
        turned_away(first.send(batch.clone()));
        turned_away(first.renew(request.clone()));
        thread::sleep(Duration::from_millis(1100));
    }
    assert_eq!(status(&world, host_id), "active", "a repetition proves nothing");
    second
        .send(second.seal(Lane::Critical, &v1::OperationBatch::default()))
        .expect("admitted");

    // A new outbox under the old credential does.
    turned_away(first.say(first.hello(8, 8)));
    until("the host is locked", || {
        status(&world, host_id).starts_with("locked: its credential of generation 1 ")
    });
    until("it is shut out", || second.say(second.hello(7, 7)).is_err());
}

#[test]
fn two_renewals_of_one_credential_lock_the_host_before_and_after_the_first_is_used() {
    let world = World::new();
    let hands = [(); 2].map(|()| Hand::new(&world, &world.hub.add_host(1)));
    world.hub.command(&["keys", "rotate"]);
    for (hand, is_used) in hands.iter().zip([false, true]) {
        let host_id = hand.credential.host_id;
        let given = hand.renewed(7, 7, hand.request(1));
        if is_used {
            let second = Hand::new(&world, &given);
            second.say(second.hello(7, 7)).expect("admitted");
        }
        let reply = hand.renew(hand.request(2)).expect("its seal opens");
        assert_eq!(
            (reply.code(), reply.credential.as_str()),
            (Code::Locked, ""),
            "{reply:?}"
        );
        let locked = "locked: its credential was renewed from two places: there is a copy of it";
        assert_eq!(status(&world, host_id), locked);
        turned_away(hand.say(hand.hello(7, 7)));
        let second = Hand::new(&world, &given);
        turned_away(second.say(second.hello(7, 7)));
    }
}

#[test]
fn a_key_is_retired_only_when_nobody_needs_it_and_a_bad_keyring_is_not_taken() {
    let world = World::new();
    let invite = ["hosts", "invite", "--account", "7", "--endpoint", &world.endpoint()];
    let token = world.hub.command(&invite);
    let host = Hand::new(&world, &world.hub.add_host(1));
    assert!(
        world
            .hub
            .fails(&["keys", "retire", "k1"])
            .contains("E103 BAD_VALUE: k1 is the current key")
    );
    assert_eq!(world.hub.command(&["keys", "new"]), "k2");
    let (told, _) = crate::tls_world::run("proxy", &["check"], world.hub.config(), &[]);
    assert!(told.contains("keyring: ok (current: k1; waiting: k2)"), "{told}");
    assert_eq!(world.hub.command(&["keys", "rotate"]), "k2");
    assert!(
        world
            .hub
            .fails(&["keys", "rotate", "k1"])
            .contains("k1 came before the current key k2")
    );
    let listed = world.hub.command(&["keys", "list"]);
    let [first, second] = [" hosts=1 invitations=1", " hosts=0 invitations=0"];
    let mut lines = listed.lines();
    assert!(
        lines
            .next()
            .is_some_and(|line| line.starts_with("k1 passed since=20") && line.ends_with(first)),
        "{listed}"
    );
    assert!(
        lines
            .next()
            .is_some_and(|line| line.starts_with("k2 current since=20") && line.ends_with(second)),
        "{listed}"
    );
    let told = world.hub.fails(&["keys", "retire", "k1"]);
    assert!(
        told.contains("E312 NOT_ALLOWED: 1 hosts and 1 open invitations use k1"),
        "{told}"
    );

    // A token of the key before is good still, and makes a host of the present one.
    until("the hub has read its keyring", || {
        world.hub.log().contains("the keyring is read")
    });
    let agent = Agent::enrolled(
        Path::new(PROGRAM),
        &world.folder.path().join("host"),
        &token,
        &settings(),
    );
    assert!(
        world
            .hub
            .command(&["hosts", "list"])
            .contains(&format!("{} active account=7 key=k2 generation=1", agent.host_id()))
    );

    let keyring = world.hub.config().with_file_name("keyring");
    let whole = std::fs::read_to_string(&keyring).expect("readable");
    std::fs::write(&keyring, whole.replace(" current", "")).expect("ours");
    until("it is told", || {
        world
            .hub
            .log()
            .contains("the keyring is not taken, and the keys that were there stay")
    });
    host.say(host.hello(7, 7)).expect("the keys stay");
    std::fs::write(&keyring, whole).expect("ours");

    // By force the host is shut out, in messages too that the hub has opened a moment ago.
    world.hub.command(&["keys", "retire", "k1", "--force"]);
    until("it is shut out", || host.say(host.hello(7, 7)).is_err());
}

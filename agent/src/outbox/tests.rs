use p2p_sync_proto::keys::{KeyId, MasterKey};

use super::*;

fn record(path: &str) -> Record {
    let operation = Operation {
        path: path.to_owned(),
        ..Operation::default()
    };
    Record {
        operation: operation.encode_to_vec().into(),
        critical: false,
        every: true,
    }
}

fn at(incarnation: u64) -> Position {
    Position {
        incarnation,
        sequence: 1,
    }
}

/// What opens: the operations' bytes.
fn read(outbox: &Outbox) -> Vec<Bytes> {
    let (page, _) = outbox.read(at(0), 100, u64::MAX).expect("readable");
    let records = page
        .into_iter()
        .map(|(_, _, record)| record.expect("not damaged").operation);
    records.collect()
}

#[test]
fn what_was_sealed_before_a_renewal_opens_after_it_wherever_that_was_cut_off() {
    let folder = tempfile::tempdir().expect("a folder");
    let master = MasterKey::generate(KeyId::parse("k1").expect("valid"));
    let [first, second, third] = [1, 2, 3].map(|generation| master.credential(Uuid::from_u128(1), generation));
    let open = |credential: &Credential, former: &[Credential]| {
        Outbox::open(folder.path(), credential, former).map(|(outbox, _)| outbox)
    };
    let mut outbox = open(&first, &[]).expect("made");
    let made = at(outbox.incarnation());
    outbox.commit(&[Change::Insert(made, record("one"))]).expect("written");
    drop(outbox);

    // Killed before the key was wrapped anew: the former credential opens it, and not the new one alone.
    assert_eq!(
        open(&second, &[]).err().expect("sealed by the first").code,
        Code::OutboxUnreadable
    );
    let mut outbox = open(&second, std::slice::from_ref(&first)).expect("by the former one");
    assert_eq!(read(&outbox).len(), 1);
    // From then on it is the new one's.
    drop(outbox);
    assert_eq!(
        open(&first, &[]).err().expect("not any more").code,
        Code::OutboxUnreadable
    );

    // Wrapped anew while it is open.
    outbox = open(&second, &[]).expect("its own");
    let keys = Arc::new(Keys::new(&second));
    keys.renew(Arc::new(third.clone()));
    assert!(!keys.is_wrapped());
    let wrap = Change::Wrap(keys.clone(), keys.newest());
    let made = at(outbox.incarnation());
    outbox
        .commit(&[Change::Insert(made, record("two")), wrap])
        .expect("written");
    assert!(keys.is_wrapped());
    drop(outbox);
    assert!(open(&second, &[]).is_err());
    assert_eq!(read(&open(&third, &[]).expect("its own")).len(), 2);
}

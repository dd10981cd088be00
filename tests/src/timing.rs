//! Whether the time that a refusal takes tells why: two kinds of messages that do not open, measured in turns, and Welch's t
//! over them, as `dudect` does it (Reparaz, Balasch, Verbauwhede 2017).
//!
//! A machine that is busy adds long measurements to both kinds, which hide what is short. So the t is taken over all of
//! them and over what is left when the longest are cut off at several places, and the largest counts. It may be large once
//! by chance or by a neighbour on the machine; what leaks is large each time.

use std::{
    hint::black_box,
    path::{Path, PathBuf},
    pin::pin,
    process::ExitCode,
    task::{Context, Poll, Waker},
    time::Instant,
};

use clap::Parser;
use p2p_sync_proto::{
    envelope::Lane,
    ids::new_id,
    keys::{Credential, Direction, KeyId, MasterKey, SECRET_BYTES},
    message::{self, Label},
    v1::{OperationBatch, Sealed},
};
use p2p_sync_proxy::{
    config::{Config, Overrides},
    keyring::Keyring,
    open::Opener,
    store::Store,
};
use prost::{Message as _, bytes::Bytes};
use serde_json::json;
use uuid::Uuid;

use crate::services::database;

/// Beyond this, by convention, the two kinds differ.
pub const T_MAX: f64 = 4.5;
/// Different messages of a kind.
const POOL: usize = 64;
/// Octets of the messages' content.
const CONTENT: usize = 1000;
/// Where the longest measurements are cut off: the share that is left.
const CROPS: [f64; 8] = [1.0, 0.99, 0.95, 0.9, 0.8, 0.7, 0.5, 0.3];

/// What was measured of two kinds.
#[derive(Clone, Debug)]
pub struct Comparison {
    /// The kinds.
    pub name: &'static str,
    /// The largest t of each try; no more tries are made after one that is within [`T_MAX`].
    pub t: Vec<f64>,
    /// Measurements in each try.
    pub measurements: usize,
}

impl Comparison {
    /// Whether each try told the two kinds apart.
    pub fn leaks(&self) -> bool {
        self.t.iter().all(|t| t.abs() > T_MAX)
    }
}

/// Measures whether the time that a refusal takes tells why a message does not open.
///
/// Fails when it does in each try, and when the control, of which one kind opens, does not.
#[derive(Debug, Parser)]
#[command(name = "timing", version)]
pub struct Options {
    /// Measurements in a try.
    #[arg(long, default_value_t = 500_000)]
    measurements: usize,
    /// Tries, of which one within the bound is enough.
    #[arg(long, default_value_t = 5)]
    tries: usize,
    /// Where to write the figures.
    #[arg(long)]
    json: Option<PathBuf>,
}

/// Measures, and prints what was found.
pub fn run(options: &Options) -> ExitCode {
    let compared = compare_all(options.measurements, options.tries);
    println!("{:60} {:>8}  tries", "kinds", "|t|");
    for comparison in &compared {
        let least = comparison.t.iter().map(|t| t.abs()).fold(f64::INFINITY, f64::min);
        println!("{:60} {least:>8.2}  {}", comparison.name, comparison.t.len());
    }
    if let Some(file) = &options.json {
        let figures: Vec<_> = compared
            .iter()
            .map(|one| json!({"kinds": one.name, "t": one.t, "measurements": one.measurements, "t_max": T_MAX}))
            .collect();
        if let Err(error) = std::fs::write(file, json!(figures).to_string()) {
            eprintln!("timing: {} cannot be written: {error}", file.display());
            return ExitCode::FAILURE;
        }
    }
    let (control, others) = compared.split_last().expect("the control is the last");
    if control.leaks() && !others.iter().any(Comparison::leaks) {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// Compares all kinds of messages that do not open, in at most so many tries; the last comparison is one that has to leak,
/// for one kind of it opens.
pub fn compare_all(measurements: usize, tries: usize) -> Vec<Comparison> {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime can be made");
    // What opens would be looked up in it; no forgery comes so far.
    let database = runtime.block_on(database());
    let text = format!("pg_connection_string = {}\n", database.url());
    let config = Config::resolve(&text, Path::new(""), &Overrides::default(), |_| None).expect("valid");
    let store = runtime
        .block_on(Store::connect(&config.store))
        .expect("Postgres serves");
    let _inside = runtime.enter();
    let subject = Subject::new(store);
    let compare = |name, one: Kind<'_>, other: Kind<'_>, open: &dyn Fn(&Sealed) -> bool| {
        let mut t = Vec::new();
        while t.len() < tries && t.iter().all(|t: &f64| t.abs() > T_MAX) {
            let [one, other] = Subject::pools([one, other]);
            t.push(largest_t(&measure(&one, &other, measurements, open)));
        }
        Comparison { name, t, measurements }
    };
    let by_envelope = |sealed: &Sealed| subject.open_envelope(sealed);
    let by_opener = |sealed: &Sealed| subject.open(sealed);
    let spoil = |sealed: &mut Sealed, from_end: usize| {
        let mut body = sealed.body.to_vec();
        let at = body.len() - from_end;
        body[at] ^= fastrand::u8(1..);
        sealed.body = body.into();
    };
    let good = || subject.sealed(&subject.host);
    let bad_tag = || {
        let mut sealed = good();
        spoil(&mut sealed, fastrand::usize(1..=32));
        sealed
    };
    // Behind the tag's 32 octets the last one of the ciphertext decides what the padding is.
    let bad_padding = || {
        let mut sealed = good();
        spoil(&mut sealed, fastrand::usize(33..=48));
        sealed
    };
    let early = || {
        let mut sealed = good();
        spoil(&mut sealed, 32);
        sealed
    };
    let late = || {
        let mut sealed = good();
        spoil(&mut sealed, 1);
        sealed
    };
    let unknown_key = || subject.sealed(&subject.unknown_key);
    let unknown_host = || subject.sealed(&subject.other_master(Uuid::new_v4()));
    vec![
        compare(
            "envelope: a bad tag, a bad padding",
            &bad_tag,
            &bad_padding,
            &by_envelope,
        ),
        compare(
            "envelope: a tag that is wrong at its begin, at its end",
            &early,
            &late,
            &by_envelope,
        ),
        compare("opener: a bad tag, a bad padding", &bad_tag, &bad_padding, &by_opener),
        compare(
            "opener: a bad tag, an unknown key id",
            &bad_tag,
            &unknown_key,
            &by_opener,
        ),
        compare(
            "opener: a bad tag, an unknown host",
            &bad_tag,
            &unknown_host,
            &by_opener,
        ),
        compare("control: one that opens, a bad tag", &good, &bad_tag, &by_envelope),
    ]
}

type Kind<'a> = &'a dyn Fn() -> Sealed;

/// What messages are sealed by, and opened by.
struct Subject {
    opener: Opener,
    host: Credential,
    unknown_key: Credential,
    other: MasterKey,
    content: OperationBatch,
}

impl Subject {
    fn new(store: Store) -> Self {
        let id = |text| KeyId::parse(text).expect("a key id");
        let secret = |byte| [byte; SECRET_BYTES];
        let keyring = format!("k1 {} 1700000000 current\n", "5a".repeat(SECRET_BYTES));
        let keyring = Keyring::parse(&keyring, "the test").expect("a keyring");
        let host = keyring.current().credential(Uuid::from_u128(7), 1);
        let subject = Self {
            opener: Opener::new(keyring, store),
            host,
            unknown_key: MasterKey::from_bytes(id("k9"), secret(0xa5)).credential(Uuid::from_u128(7), 1),
            other: MasterKey::from_bytes(id("k1"), secret(0xc3)),
            content: OperationBatch {
                operations: vec![
                    std::iter::repeat_with(|| fastrand::u8(..))
                        .take(CONTENT)
                        .collect::<Vec<u8>>()
                        .into(),
                ],
                withdrawn: vec![],
            },
        };
        // This host was heard: the hub may remember of it what it will.
        let heard = subject.sealed(&subject.host);
        let opening = subject.opener.open::<OperationBatch>(Lane::Critical, &heard);
        // Where it is asked of the database whether the host is admitted, its seal was found right.
        assert!(pin!(opening).poll(&mut Context::from_waker(Waker::noop())).is_pending());
        subject
    }

    fn other_master(&self, host_id: Uuid) -> Credential {
        self.other.credential(host_id, 1)
    }

    fn sealed(&self, credential: &Credential) -> Sealed {
        let label = Label::from_credential(credential, 1, fastrand::u64(..), new_id(), Lane::Critical);
        message::seal(&credential.to_hub, Direction::ToHub, &label, &self.content)
    }

    /// Messages of both kinds, each as it comes from the wire. Where they lie in memory is left to chance, for that makes a
    /// difference too.
    fn pools(kinds: [Kind<'_>; 2]) -> [Vec<Sealed>; 2] {
        let mut made: Vec<(usize, Vec<u8>)> = (0..2 * POOL)
            .map(|number| (number % 2, kinds[number % 2]().encode_to_vec()))
            .collect();
        fastrand::shuffle(&mut made);
        let mut pools = [Vec::with_capacity(POOL), Vec::with_capacity(POOL)];
        for (kind, bytes) in &made {
            pools[*kind].push(Sealed::decode(Bytes::copy_from_slice(bytes)).expect("it was encoded"));
        }
        pools
    }

    fn open_envelope(&self, sealed: &Sealed) -> bool {
        let label = Label::read(sealed).expect("a label");
        message::open::<OperationBatch>(&self.host.to_hub, Direction::ToHub, &label, sealed).is_ok()
    }

    /// A refusal is there at once: nothing is asked of the database before the seal is found right.
    fn open(&self, sealed: &Sealed) -> bool {
        let opening = pin!(self.opener.open::<OperationBatch>(Lane::Critical, sealed));
        match opening.poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(opened) => opened.is_ok(),
            Poll::Pending => true,
        }
    }
}

/// Nanoseconds of both kinds, measured in random turns.
fn measure(one: &[Sealed], other: &[Sealed], count: usize, open: &dyn Fn(&Sealed) -> bool) -> [Vec<f64>; 2] {
    let mut taken = [Vec::with_capacity(count), Vec::with_capacity(count)];
    for round in 0..count + count / 10 {
        let kind = usize::from(fastrand::bool());
        let sealed = &[one, other][kind][fastrand::usize(..POOL)];
        let begun = Instant::now();
        black_box(open(black_box(sealed)));
        let nanoseconds = begun.elapsed().as_secs_f64() * 1e9;
        // The first ones warm everything up.
        if round >= count / 10 {
            taken[kind].push(nanoseconds);
        }
    }
    taken
}

/// Welch's t that is furthest from 0, over all measurements and over the shorter ones.
fn largest_t(taken: &[Vec<f64>; 2]) -> f64 {
    let mut all: Vec<f64> = taken.concat();
    all.sort_unstable_by(f64::total_cmp);
    let of = |share: f64| {
        #[expect(
            clippy::cast_precision_loss,
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss
        )]
        let at = (all.len() as f64 * share) as usize;
        let longest = all[at.min(all.len()) - 1];
        let [one, other] = taken
            .each_ref()
            .map(|kind| Moments::of(kind.iter().copied().filter(|&n| n <= longest)));
        welch(&one, &other)
    };
    CROPS
        .into_iter()
        .map(of)
        // Where one kind is always shorter, none of the other is left.
        .filter(|t| t.is_finite())
        .max_by(|a, b| a.abs().total_cmp(&b.abs()))
        .expect("one crop leaves everything")
}

/// Count, mean and variance.
struct Moments {
    count: f64,
    mean: f64,
    variance: f64,
}

impl Moments {
    /// By Welford's way, which loses no digits.
    fn of(values: impl Iterator<Item = f64>) -> Self {
        let (mut count, mut mean, mut squares) = (0.0, 0.0, 0.0);
        for value in values {
            count += 1.0;
            let off = value - mean;
            mean += off / count;
            squares += off * (value - mean);
        }
        Self {
            count,
            mean,
            variance: squares / (count - 1.0),
        }
    }
}

fn welch(one: &Moments, other: &Moments) -> f64 {
    (one.mean - other.mean) / (one.variance / one.count + other.variance / other.count).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn t_is_what_a_table_says_and_outliers_are_cut_off() {
        let one = Moments::of(
            [
                27.5, 21.0, 19.0, 23.6, 17.0, 17.9, 16.9, 20.1, 21.9, 22.6, 23.1, 19.6, 19.0, 21.7, 21.4,
            ]
            .into_iter(),
        );
        let other = Moments::of(
            [
                27.1, 22.0, 20.8, 23.4, 23.4, 23.5, 25.8, 22.0, 24.8, 20.2, 21.9, 22.1, 22.9, 30.5, 35.0,
            ]
            .into_iter(),
        );
        assert!((welch(&one, &other) + 2.83).abs() < 0.02, "{}", welch(&one, &other));
        let steady = |mean: f64| (0..1000).map(move |n| mean + f64::from(n % 7));
        let noise = |n: u32| f64::from(n) * 1e6;
        let same = [
            steady(100.0).chain((0..10).map(noise)).collect(),
            steady(100.0).collect(),
        ];
        let apart = [
            steady(100.0).chain((0..10).map(noise)).collect(),
            steady(101.0).collect(),
        ];
        assert!(largest_t(&same).abs() < T_MAX && largest_t(&apart).abs() > T_MAX);
    }
}

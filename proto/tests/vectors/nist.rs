//! The CBC vectors of NIST's AES Algorithm Validation Suite (AESAVS) for 256-bit keys: known answers, multi-block
//! messages and the Monte Carlo test.

use aes::Aes256;
use cbc::{
    Decryptor, Encryptor,
    cipher::{Block, BlockModeDecrypt, BlockModeEncrypt, KeyIvInit, block_padding::NoPadding},
};
use p2p_sync_proto::envelope::open_with;

use crate::{ASSOCIATED_DATA, octets, read, seal_key, sealed_around};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Section {
    Encrypt,
    Decrypt,
}

#[derive(Default)]
struct Record {
    count: u32,
    key: Vec<u8>,
    iv: Vec<u8>,
    plaintext: Vec<u8>,
    ciphertext: Vec<u8>,
}

/// Reads a response file, whose records begin at each `COUNT`.
fn records(file: &str) -> Vec<(Section, Record)> {
    let text = read(&format!("nist/{file}"));
    let mut section = None;
    let mut records: Vec<(Section, Record)> = Vec::new();
    for line in text
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
    {
        let Some((name, value)) = line.split_once(" = ") else {
            section = Some(match line {
                "[ENCRYPT]" => Section::Encrypt,
                "[DECRYPT]" => Section::Decrypt,
                _ => panic!("{file}: {line} is no section"),
            });
            continue;
        };
        if name == "COUNT" {
            let count = value.parse().expect("a number");
            records.push((
                section.expect("a section before its records"),
                Record {
                    count,
                    ..Record::default()
                },
            ));
            continue;
        }
        let (_, record) = records.last_mut().expect("a record begins with COUNT");
        match name {
            "KEY" => record.key = octets(value),
            "IV" => record.iv = octets(value),
            "PLAINTEXT" => record.plaintext = octets(value),
            "CIPHERTEXT" => record.ciphertext = octets(value),
            _ => panic!("{file}: {name} is no field"),
        }
    }
    records
}

fn encryptor(key: &[u8], iv: &[u8]) -> Encryptor<Aes256> {
    Encryptor::new_from_slices(key, iv).expect("a 256-bit key and a block")
}

fn decryptor(key: &[u8], iv: &[u8]) -> Decryptor<Aes256> {
    Decryptor::new_from_slices(key, iv).expect("a 256-bit key and a block")
}

/// Holds every record of a file against encryption, and against the envelope's opening: the vectors have no padding,
/// so a block of it is chained behind them first.
#[track_caller]
fn check(file: &str, record_count: usize) {
    let records = records(file);
    assert_eq!(records.len(), record_count, "{file} is not whole");
    for (section, record) in records {
        let at = format!("{file} {section:?} {}", record.count);
        let encrypted = encryptor(&record.key, &record.iv).encrypt_padded_vec::<NoPadding>(&record.plaintext);
        assert_eq!(encrypted, record.ciphertext, "{at}");

        let last_block = record.ciphertext.last_chunk::<16>().expect("at least a block");
        let padding = encryptor(&record.key, last_block).encrypt_padded_vec::<NoPadding>(&[16; 16]);
        let sealed = sealed_around(&record.iv, &[record.ciphertext, padding].concat());
        let opened = open_with(&seal_key(&record.key), ASSOCIATED_DATA, &sealed).expect(&at);
        assert_eq!(*opened, record.plaintext, "{at}");
    }
}

#[test]
fn known_answers_of_the_s_box_under_plaintexts() {
    check("CBCGFSbox256.rsp", 10);
}

#[test]
fn known_answers_of_the_s_box_under_keys() {
    check("CBCKeySbox256.rsp", 32);
}

#[test]
fn known_answers_of_every_bit_of_the_key() {
    check("CBCVarKey256.rsp", 512);
}

#[test]
fn known_answers_of_every_bit_of_the_text() {
    check("CBCVarTxt256.rsp", 256);
}

#[test]
fn multi_block_messages() {
    check("CBCMMT256.rsp", 20);
}

/// One round of AESAVS section 6.4.2: 1,000 chained steps, each fed what came out two steps before (first the IV).
/// Gives the last two outputs.
fn monte_carlo_round(iv: &[u8], text: &[u8], mut step: impl FnMut(&mut Block<Aes256>)) -> [Vec<u8>; 2] {
    let mut previous = Block::<Aes256>::try_from(iv).expect("a block");
    let mut current = Block::<Aes256>::try_from(text).expect("a block");
    step(&mut current);
    for _ in 1..1000 {
        let mut next = previous;
        step(&mut next);
        previous = current;
        current = next;
    }
    [previous.to_vec(), current.to_vec()]
}

#[test]
fn monte_carlo_of_200_000_steps_arrives_where_aesavs_says() {
    let records = records("CBCMCT256.rsp");
    assert_eq!(records.len(), 200);
    for section in [Section::Encrypt, Section::Decrypt] {
        let rounds: Vec<_> = records
            .iter()
            .filter(|(of, _)| *of == section)
            .map(|(_, record)| record)
            .collect();
        assert_eq!(rounds.len(), 100);
        // What each round must begin with; the first round's key, IV and text are the seed.
        let mut expected: Option<[Vec<u8>; 3]> = None;
        for round in rounds {
            let at = format!("{section:?} {}", round.count);
            let (input, output) = match section {
                Section::Encrypt => (&round.plaintext, &round.ciphertext),
                Section::Decrypt => (&round.ciphertext, &round.plaintext),
            };
            if let Some(expected) = expected {
                assert_eq!(
                    expected,
                    [round.key.clone(), round.iv.clone(), input.clone()],
                    "start of {at}"
                );
            }
            let mut encryptor = encryptor(&round.key, &round.iv);
            let mut decryptor = decryptor(&round.key, &round.iv);
            let [before_last, last] = monte_carlo_round(&round.iv, input, |block| match section {
                Section::Encrypt => encryptor.encrypt_block(block),
                Section::Decrypt => decryptor.decrypt_block(block),
            });
            assert_eq!(&last, output, "{at}");
            let outputs = before_last.iter().chain(&last);
            let key = round.key.iter().zip(outputs).map(|(old, out)| old ^ out).collect();
            expected = Some([key, last, before_last]);
        }
    }
}

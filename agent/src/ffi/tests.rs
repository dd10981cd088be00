//! What holds for every export alike.

use std::{
    ffi::c_char,
    ptr::{null, null_mut},
};

use p2p_sync_proto::{Code, v1::SyncDataType};

use super::{
    boundary::{injected_panic, p2p_sync_last_error},
    cache::*,
    code::*,
    events::*,
    group::*,
    lifecycle::*,
    operation::*,
    question::*,
    status::*,
    text::p2p_sync_text,
};

const HEADER: &str = include_str!("../../include/p2p_sync.h");
const TEXT: p2p_sync_text = p2p_sync_text::EMPTY;

type Call = fn() -> p2p_sync_code;

/// Every export that gives a code, called with nothing.
fn exports() -> Vec<(&'static str, Call)> {
    // SAFETY (each): every pointer is null, which every export refuses or allows.
    vec![
        ("p2p_sync_code_label", || unsafe {
            p2p_sync_code_label(0, null_mut(), 0, null_mut())
        }),
        ("p2p_sync_start", || unsafe { p2p_sync_start(null(), null_mut()) }),
        ("p2p_sync_shutdown", || p2p_sync_shutdown(0, 0)),
        ("p2p_sync_submit", || unsafe { p2p_sync_submit(0, null(), null_mut()) }),
        ("p2p_sync_submit_critical", || unsafe {
            p2p_sync_submit_critical(0, null(), null_mut(), null_mut())
        }),
        ("p2p_sync_submit_group", || unsafe {
            p2p_sync_submit_group(0, null(), 0, 0, null_mut())
        }),
        ("p2p_sync_get_result", || unsafe {
            p2p_sync_get_result(0, null(), null_mut())
        }),
        ("p2p_sync_wait", || unsafe { p2p_sync_wait(0, null(), 1, null_mut()) }),
        ("p2p_sync_json_string", || unsafe {
            p2p_sync_json_string(0, TEXT, null_mut(), 0, null_mut())
        }),
        ("p2p_sync_ask", || unsafe { p2p_sync_ask(0, null(), null_mut()) }),
        ("p2p_sync_wait_for_answer", || unsafe {
            p2p_sync_wait_for_answer(0, null(), null_mut())
        }),
        ("p2p_sync_get_data", || unsafe {
            p2p_sync_get_data(0, null(), null_mut(), 0, null_mut())
        }),
        ("p2p_sync_subscribe", || unsafe {
            p2p_sync_subscribe(0, null(), null_mut())
        }),
        ("p2p_sync_unsubscribe", || p2p_sync_unsubscribe(0, 0)),
        ("p2p_sync_process", || unsafe {
            p2p_sync_process(0, 0, None, null_mut(), null_mut())
        }),
        ("p2p_sync_next_event", || unsafe {
            p2p_sync_next_event(0, null_mut(), null_mut(), 0, null_mut())
        }),
        ("p2p_sync_cache_set", || unsafe { p2p_sync_cache_set(0, TEXT, TEXT, 0) }),
        ("p2p_sync_cache_get", || unsafe {
            p2p_sync_cache_get(0, TEXT, 0, null_mut(), 0, null_mut())
        }),
        ("p2p_sync_cache_delete", || unsafe { p2p_sync_cache_delete(0, TEXT) }),
        ("p2p_sync_cache_exists", || unsafe {
            p2p_sync_cache_exists(0, TEXT, 0, null_mut())
        }),
        ("p2p_sync_publish", || unsafe { p2p_sync_publish(0, TEXT, TEXT) }),
        ("p2p_sync_get_status", || unsafe { p2p_sync_get_status(0, null_mut()) }),
        ("p2p_sync_get_status_json", || unsafe {
            p2p_sync_get_status_json(0, null_mut(), 0, null_mut())
        }),
        ("p2p_sync_flush", || unsafe { p2p_sync_flush(0, 0, null_mut()) }),
        ("p2p_sync_get_lease", || unsafe {
            p2p_sync_get_lease(0, TEXT, null_mut())
        }),
    ]
}

#[test]
fn a_panic_in_any_export_is_a_code_and_a_sentence() {
    const PANICKED: i32 = p2p_sync_error::P2P_SYNC_ERR_PANICKED as i32;
    for (name, call) in exports() {
        injected_panic::arm();
        assert_eq!(call(), PANICKED, "{name}");
        let mut sentence = [0 as c_char; 64];
        // SAFETY: the buffer is as long as said.
        let code = unsafe { p2p_sync_last_error(sentence.as_mut_ptr(), sentence.len(), null_mut()) };
        assert_eq!((code, sentence[0] != 0), (PANICKED, true), "{name}");
    }
    injected_panic::arm();
    assert!(p2p_sync_version().is_null());
    injected_panic::arm();
    assert_eq!(p2p_sync_abi_version(), 0);
    injected_panic::arm();
    // SAFETY: nulls are allowed.
    assert_eq!(unsafe { p2p_sync_last_error(null_mut(), 0, null_mut()) }, PANICKED);
}

#[test]
fn nothing_is_refused_with_a_code_in_every_export() {
    for (name, call) in exports() {
        let code = call();
        assert!((600..700).contains(&code), "{name} gave {code}");
    }
}

#[test]
fn the_exports_tested_here_are_those_of_the_header() {
    let without_code = ["p2p_sync_version", "p2p_sync_abi_version", "p2p_sync_last_error"];
    let mut tested: Vec<&str> = exports()
        .into_iter()
        .map(|(name, _)| name)
        .chain(without_code)
        .collect();
    let declared = HEADER
        .lines()
        .filter(|line| !line.starts_with("//") && !line.starts_with("typedef"));
    let mut declared: Vec<&str> = declared
        .filter_map(|line| line.split_once('(')?.0.rsplit([' ', '*']).next())
        .filter(|name| name.starts_with("p2p_sync_"))
        .collect();
    tested.sort_unstable();
    declared.sort_unstable();
    assert_eq!(tested, declared);
}

#[test]
fn the_numbers_of_the_header_are_those_of_the_wire() {
    let numbers = HEADER.lines().filter_map(|line| {
        let (name, number) = line
            .trim()
            .strip_prefix("P2P_SYNC_")?
            .strip_suffix(',')?
            .split_once(" = ")?;
        Some((name, number.parse::<i32>().ok()?))
    });
    let (errors, others): (Vec<_>, Vec<_>) = numbers.partition(|(name, _)| name.starts_with("ERR_"));
    for (name, number) in &errors {
        let code = Code::try_from(*number).expect("known");
        assert_eq!(name.strip_prefix("ERR_"), Some(code.label()));
    }
    let on_the_wire = (1..700).filter(|number| Code::try_from(*number).is_ok()).count();
    assert_eq!(errors.len(), on_the_wire);
    for data_type in p2p_sync_proto::policy::TYPES {
        assert!(others.contains(&(SyncDataType::as_str_name(&data_type), data_type as i32)));
    }
}

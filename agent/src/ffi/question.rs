//! Questions to the hub: asked without waiting, answered in a result.

use std::ffi::c_char;

use p2p_sync_proto::{Code, Problem};

use super::{
    boundary::guarded,
    code::{self, p2p_sync_code},
    handle::{p2p_sync_agent, running},
    operation::{get_id, p2p_sync_id, p2p_sync_result, put_id, result_of},
    text::{Versioned, bad_argument, null_argument, p2p_sync_text, put_text, read_struct, struct_size, write_struct},
};
use crate::{Question, maps::read_host};

/// What a question asks for.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum p2p_sync_question_kind {
    /// State, by type, map and account, or as `text` says: a JSON object with `path`, with `prefix`, `limit` and `cursor`, or
    /// with `entity` and `char_id`, or the members that the type has; and with `kept`, `at_least` and `at_least_sequence` where
    /// it says from where the answer comes and how old it may be. `p2p_sync_request.schema.json` beside this header says which.
    P2P_SYNC_ASK_STATE = 1,
    /// The value that the hub's cache holds under the key `text`.
    P2P_SYNC_ASK_CACHE = 2,
    /// The embedding of `text`: a JSON array of numbers.
    P2P_SYNC_ASK_EMBEDDING = 3,
    /// What lies nearest to the embedding `text`, a JSON array of numbers: at most `limit` hits, of `map` alone unless it is
    /// empty. Or `text` is a JSON object with `embedding` or `text`, and `maps`, `types`, `since_ms`, `until_ms`,
    /// `min_similarity` and `limit` where it is to be narrowed.
    P2P_SYNC_ASK_SIMILAR = 4,
    /// Whether the hub's cache holds a value under the key `text`: `true` or `false`.
    P2P_SYNC_ASK_CACHE_EXISTS = 5,
    /// What lies nearest to the words `text`: at most `limit` hits, of `map` alone unless it is empty.
    P2P_SYNC_ASK_SIMILAR_TEXT = 6,
    /// Who holds `map` and who stands by for it; an empty one: all maps that this host holds, stands by for, or may be given.
    /// Here and with the following: `{"maps":[{"map","host_id","tenure","expires_in_ms","backups","assistants","successor",
    /// "stream_head"}]}`.
    P2P_SYNC_ASK_MAPS = 7,
    /// For `map`, which nobody holds; LEASE_GRANTED says when it is this host's.
    P2P_SYNC_ASK_ASSIGN_MAP = 8,
    /// To have `map`, which is this host's, handed over while it goes on: to the host with the id `text`, or, where that is
    /// empty, the best there is. LEASE_HANDING_OVER says when to end it.
    P2P_SYNC_ASK_MIGRATE_MAP = 9,
    /// To have `map` no more: answered when what was submitted before is settled, as far as there is time (10 s, or the hub's
    /// of a map that is handed over), and the hub has the map. It may not be written from this call on.
    P2P_SYNC_ASK_RELEASE_MAP = 10,
}

/// A question. Zero-initialise it, then set `struct_size`. Texts are UTF-8, read during the call and not kept.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct p2p_sync_question {
    /// `sizeof(p2p_sync_question)`.
    pub struct_size: usize,
    /// Of `p2p_sync_question_kind`.
    pub kind: i32,
    /// Of `p2p_sync_type`; for `P2P_SYNC_ASK_STATE`.
    pub data_type: i32,
    /// For `P2P_SYNC_ASK_STATE`.
    pub account_id: u32,
    /// `P2P_SYNC_NOTIFY` or 0.
    pub flags: u32,
    /// For `P2P_SYNC_ASK_STATE`, `P2P_SYNC_ASK_SIMILAR`, `P2P_SYNC_ASK_SIMILAR_TEXT` and what asks of maps.
    pub map: p2p_sync_text,
    /// As the kind says.
    pub text: p2p_sync_text,
    /// As the kind says; 0: as many as the hub gives.
    pub limit: u32,
}

// SAFETY: `#[repr(C)]`, size first, null pointers and zeroes are valid.
unsafe impl Versioned for p2p_sync_question {
    const BYTES_MIN: usize = 64;
}

/// Asks the hub something and gives the question's id. Any thread; never waits.
///
/// `p2p_sync_get_result` and `p2p_sync_wait` tell how far it is: APPLIED when answered (`p2p_sync_get_data`), REJECTED
/// with the hub's code, or with HUB_UNAVAILABLE when it did not answer within 5 s (a release: 2 minutes). `id` is written on success alone.
/// QUEUE_FULL while 256 questions are unanswered, and with `P2P_SYNC_NOTIFY` while 16 MiB of answers wait to be taken as
/// events; BAD_REQUEST, SHUT_DOWN.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn p2p_sync_ask(
    agent: p2p_sync_agent,
    question: *const p2p_sync_question,
    id: *mut p2p_sync_id,
) -> p2p_sync_code {
    guarded(|| {
        // SAFETY: the caller's word.
        let question = unsafe { read_struct(question, "question") }?;
        if id.is_null() {
            return Err(null_argument("id"));
        }
        // SAFETY: the caller's word.
        let asked = unsafe { question_of(&question) }?;
        let notify = question.flags & super::operation::P2P_SYNC_NOTIFY != 0;
        let taken = running(agent)?.door.ask(asked, notify)?;
        // SAFETY: not null, and the caller's to be written.
        unsafe { put_id(taken, id) };
        Ok(())
    })
}

/// Waits for the answer to a question, at most `critical_timeout_ms`. Any thread.
///
/// Without an answer by then `result->state` is UNKNOWN and the call succeeds: the question goes on. After one such timeout,
/// and while the link does not answer, these calls give what is there at once, until the hub answers a question again.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn p2p_sync_wait_for_answer(
    agent: p2p_sync_agent,
    id: *const p2p_sync_id,
    result: *mut p2p_sync_result,
) -> p2p_sync_code {
    guarded(|| {
        // SAFETY: the caller's word.
        let id = unsafe { get_id(id) }?;
        // SAFETY: the caller's word.
        unsafe { struct_size(result, "result") }?;
        let settled = running(agent)?.door.wait_for_answer(id);
        // SAFETY: the caller's word.
        unsafe { write_struct(&result_of(&settled), result, "result") }
    })
}

/// The data that came back to a question: UTF-8, mostly JSON, NUL-terminated. Any thread; never waits.
///
/// `size`, if not null, is given its length without the NUL, fitting or not. NOT_FOUND where no data came back or it is
/// no longer kept, BUFFER_TOO_SMALL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn p2p_sync_get_data(
    agent: p2p_sync_agent,
    id: *const p2p_sync_id,
    buffer: *mut c_char,
    capacity: usize,
    size: *mut usize,
) -> p2p_sync_code {
    guarded(|| {
        // SAFETY: the caller's word.
        let id = unsafe { get_id(id) }?;
        let settled = running(agent)?.door.result(id);
        let none = || Problem::new(Code::NotFound, "no data came back for this id, or it is no longer kept");
        let data = settled.data.ok_or_else(none)?;
        // SAFETY: the caller's word.
        unsafe { put_text(&data, buffer, capacity, size) }
    })
}

/// # Safety
/// The question's texts are readable.
unsafe fn question_of(question: &p2p_sync_question) -> Result<Question, Problem> {
    use p2p_sync_question_kind::{
        P2P_SYNC_ASK_ASSIGN_MAP, P2P_SYNC_ASK_CACHE, P2P_SYNC_ASK_CACHE_EXISTS, P2P_SYNC_ASK_EMBEDDING,
        P2P_SYNC_ASK_MAPS, P2P_SYNC_ASK_MIGRATE_MAP, P2P_SYNC_ASK_RELEASE_MAP, P2P_SYNC_ASK_SIMILAR,
        P2P_SYNC_ASK_SIMILAR_TEXT, P2P_SYNC_ASK_STATE,
    };
    // SAFETY: the caller's word.
    let (map, text) = unsafe { (question.map.utf8("question.map")?, question.text.utf8("question.text")?) };
    let is = |kind: p2p_sync_question_kind| question.kind == kind as i32;
    if question.flags & !super::operation::P2P_SYNC_NOTIFY != 0 {
        return Err(bad_argument("question.flags has a bit that means nothing here"));
    }
    if is(P2P_SYNC_ASK_STATE) {
        Ok(Question::Read {
            data_type: code::data_type(question.data_type)?,
            account_id: question.account_id,
            map: map.to_owned(),
            request: text.to_owned(),
        })
    } else if is(P2P_SYNC_ASK_CACHE) {
        Ok(Question::CacheGet { key: text.to_owned() })
    } else if is(P2P_SYNC_ASK_CACHE_EXISTS) {
        Ok(Question::CacheExists { key: text.to_owned() })
    } else if is(P2P_SYNC_ASK_EMBEDDING) {
        Ok(Question::CreateEmbedding { text: text.to_owned() })
    } else if is(P2P_SYNC_ASK_SIMILAR) {
        Ok(Question::SearchEmbeddings {
            embedding: text.to_owned(),
            limit: question.limit,
            map: map.to_owned(),
        })
    } else if is(P2P_SYNC_ASK_SIMILAR_TEXT) {
        Ok(Question::SearchTexts {
            text: text.to_owned(),
            limit: question.limit,
            map: map.to_owned(),
        })
    } else if is(P2P_SYNC_ASK_MAPS) {
        Ok(Question::ListMaps { map: map.to_owned() })
    } else if is(P2P_SYNC_ASK_ASSIGN_MAP) {
        Ok(Question::AssignMap { map: map.to_owned() })
    } else if is(P2P_SYNC_ASK_MIGRATE_MAP) {
        Ok(Question::MigrateMap {
            map: map.to_owned(),
            to: read_host(text)?,
        })
    } else if is(P2P_SYNC_ASK_RELEASE_MAP) {
        Ok(Question::ReleaseMap { map: map.to_owned() })
    } else {
        Err(bad_argument("question.kind is none of p2p_sync_question_kind"))
    }
}

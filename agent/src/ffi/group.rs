//! Several operations that take effect together or not at all.

use p2p_sync_proto::{Code, Problem, limits::GROUP_MEMBERS_MAX};

use super::{
    boundary::guarded,
    code::p2p_sync_code,
    handle::{p2p_sync_agent, running},
    operation::{P2P_SYNC_NOTIFY, Texts, p2p_sync_id, p2p_sync_operation, put_id},
    text::{bad_argument, null_argument, read_struct, struct_size},
};

/// Takes `count` operations (1 to 64, each of another path) as one: the hub applies all of them in one transaction, or
/// none. Any thread; never waits.
///
/// `operations` is an array whose elements lie `operations[0].struct_size` bytes apart, and all have that `struct_size`
/// (BAD_STRUCT_SIZE). `flags` is `P2P_SYNC_NOTIFY` or 0; of the operations' own flags NOTIFY has no place here. The group
/// travels by the critical lane if one of them does. `id` is written on success alone. Refuses as `p2p_sync_submit`; one
/// that is refused refuses the group.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn p2p_sync_submit_group(
    agent: p2p_sync_agent,
    operations: *const p2p_sync_operation,
    count: usize,
    flags: u32,
    id: *mut p2p_sync_id,
) -> p2p_sync_code {
    guarded(|| {
        if id.is_null() {
            return Err(null_argument("id"));
        }
        if flags & !P2P_SYNC_NOTIFY != 0 {
            return Err(bad_argument("flags has a bit that means nothing here"));
        }
        if !(1..=GROUP_MEMBERS_MAX).contains(&count) {
            return Err(bad_argument(&format!(
                "count is {count}: a group has 1 to {GROUP_MEMBERS_MAX} operations"
            )));
        }
        // SAFETY: the caller's word.
        let stride = unsafe { struct_size(operations, "operations") }?;
        let running = running(agent)?;
        let mut given = Vec::with_capacity(count);
        for index in 0..count {
            // SAFETY: the array has `count` elements, `stride` bytes apart, by the caller's word.
            let element = unsafe { operations.byte_add(index * stride) };
            // SAFETY: as above. A size of its own would reach beyond the element.
            if unsafe { struct_size(element, "operations") }? != stride {
                let sentence = format!(
                    "operations[{index}].struct_size is not that of the first, {stride}: set all of them to sizeof the struct"
                );
                return Err(Problem::new(Code::BadStructSize, sentence));
            }
            // SAFETY: as above; its size is the stride.
            let operation = unsafe { read_struct(element, "operations") }?;
            // SAFETY: the caller's word.
            given.push((operation, unsafe { Texts::of(&operation, &running) }?));
        }
        let members = given.iter().map(|(operation, texts)| texts.submission(operation));
        let members = members.collect::<Result<Vec<_>, Problem>>()?;
        let taken = running.door.submit_group(&members, flags & P2P_SYNC_NOTIFY != 0)?;
        // SAFETY: not null, and the caller's to be written.
        unsafe { put_id(taken, id) };
        Ok(())
    })
}

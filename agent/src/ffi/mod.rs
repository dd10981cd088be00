//! The C ABI, `include/p2p_sync.h`: one file for each subject; `tests/header.rs` has their order in the header.
//!
//! This is the one place for `unsafe`. The rules: every export runs inside [`boundary`], so that no panic crosses and a
//! forked child gets no further; a caller's pointer is checked for null before it is touched, its struct is read and
//! written through [`text::read_struct`] and [`text::write_struct`] alone; outputs are written on success alone, `size`s
//! excepted; nothing of the caller's is kept after the call but the log callback.
#![allow(unsafe_code, reason = "see above")]
#![allow(non_camel_case_types, reason = "the names are C's")]
#![allow(clippy::doc_markdown, reason = "these comments are read in the C header")]
#![allow(
    clippy::missing_safety_doc,
    clippy::not_unsafe_ptr_arg_deref,
    reason = "what a caller has to keep to is said once, at the head of the C header"
)]

mod boundary;
mod cache;
mod code;
mod events;
mod group;
mod handle;
mod lifecycle;
mod log;
mod operation;
mod question;
mod status;
mod text;

pub use boundary::*;
pub use cache::*;
pub use code::*;
pub use events::*;
pub use group::*;
pub use handle::*;
pub use lifecycle::*;
pub use log::*;
pub use operation::*;
pub use question::*;
pub use status::*;
pub use text::*;

#[cfg(test)]
mod tests;

//! The contract between a host and the hub: the generated messages, the limits, the reject codes, paths and type
//! policies, and the envelope, sealing and opening side by side.
//!
//! Both sides depend on this crate and on nothing of each other.

pub mod at_least;
pub mod body;
pub mod cache;
pub mod certificate;
pub mod envelope;
pub mod group;
pub mod identity;
pub mod ids;
pub mod json;
pub mod keys;
pub mod limits;
pub mod message;
pub mod operation;
pub mod path;
pub mod policy;
pub mod presence;
pub mod reject_code;
pub mod secret_file;
mod secret_text;
pub mod settings;
pub mod terminal;
pub mod token;

pub use ids::Position;
pub use path::{Path, Scope};
pub use policy::{Policies, Policy};
pub use reject_code::{Code, Problem};

/// The messages and services of package `p2p_sync.v1`, generated from `proto/`.
#[allow(missing_docs, clippy::pedantic, unreachable_pub)]
pub mod v1 {
    tonic::include_proto!("p2p_sync.v1");

    /// The descriptors of all protos, for the reflection service.
    pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
}

/// The protocol this build speaks.
pub const PROTOCOL_VERSION: u32 = 1;
/// The versions before its own that a hub serves too.
pub const OLDER_VERSIONS_SERVED: u32 = 2;

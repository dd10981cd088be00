//! The host's side: takes operations from a map server, keeps them in a durable outbox and brings them to the hub.
//!
//! [`Agent`] is the whole of it: [`Agent::start`] with a [`Config`], then [`Agent::submit`], which never waits, or
//! [`Agent::submit_critical`], which waits at most its timeout.

mod agent;
pub mod cli;
pub mod config;
mod lanes;
mod link;
mod local_api;
mod outbox;
mod pending;
mod resend;
mod results;
mod shared;
mod spooler;
mod withdrawn;

pub use agent::{Agent, Status};
pub use config::Config;
pub use lanes::{Priority, Submission};
pub use outbox::DeadLetter;
pub use results::{Event, OperationState, Settled};

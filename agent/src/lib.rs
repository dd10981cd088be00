//! The host's side: takes operations from a map server, keeps them in a durable outbox and brings them to the hub.
//!
//! [`Agent`] keeps an outbox of its own; [`Attached`] hands over to a standalone one, with the same calls; [`ffi`] gives
//! either to C. [`Agent::start`] takes a [`Config`]; then [`Agent::submit`] never waits, and [`Agent::submit_critical`]
//! waits at most its timeout.

mod agent;
mod attach_lines;
#[cfg(unix)]
mod attached;
pub mod cli;
mod clients;
mod clock;
pub mod config;
mod copies;
mod counters;
mod credential_file;
#[cfg(unix)]
mod door;
mod duties;
mod edits;
mod events;
#[cfg(unix)]
pub mod ffi;
mod follower;
mod hand_over;
mod keys;
mod lanes;
mod leases;
mod leave;
mod link;
mod local_api;
pub mod log_queue;
mod maps;
mod metrics;
mod near_cache;
mod outbox;
mod pending;
mod questions;
mod read;
mod replica;
mod resend;
mod results;
mod shared;
mod similar;
mod spooler;
mod subscriptions;
mod text;
mod threads;
mod unsaid;
mod watch;
mod withdrawn;

pub use agent::{Agent, Status};
#[cfg(unix)]
pub use attached::Attached;
pub use config::Config;
pub use copies::CopyStatus;
pub use counters::Counts;
pub use duties::{DutyRole, DutyStatus};
pub use events::AgentEvent;
pub use lanes::{Priority, Submission};
pub use leases::{LeaseState, LeaseStatus};
pub use outbox::DeadLetter;
pub use questions::Question;
pub use results::{Event, OperationState, Settled};
pub use subscriptions::Subscription;

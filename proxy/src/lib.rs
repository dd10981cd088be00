//! The hub's side: opens what hosts send, validates it, stores it in Postgres, caches and publishes it.
//!
//! [`pipeline`] shows the order of the stages; [`app`] puts everything together; [`cli`] is the program.

pub mod admin;
pub mod admission;
pub mod app;
pub mod cache;
pub mod cli;
pub mod config;
pub mod cursor;
pub mod embed;
pub mod host_cache;
pub mod hosts;
pub mod ingress;
pub mod keyring;
pub mod listener;
pub mod open;
pub mod operation;
pub mod pipeline;
pub mod publish;
pub mod pull;
pub mod redis_client;
pub mod reload;
pub mod replay;
pub mod secret;
pub mod store;
pub mod streams;
pub mod tls;
pub mod validate;
pub mod verdicts;
pub mod version_vector;

//! Whole systems: what starts hubs, agents, edges, Postgres and Redis, the recording they are fed with, the demo and the
//! runs that measure.

mod attached_program;
pub mod demo;
#[cfg(target_os = "linux")]
pub mod edge;
pub mod embedding_server;
pub mod embeddings;
#[cfg(target_os = "linux")]
pub mod enqueue;
#[cfg(target_os = "linux")]
pub mod fanout;
pub mod faulty_link;
#[cfg(target_os = "linux")]
pub mod isolation;
#[cfg(target_os = "linux")]
pub mod load;
mod map_host;
#[cfg(target_os = "linux")]
pub mod map_server;
#[cfg(target_os = "linux")]
pub mod migrations;
pub mod model;
pub mod raw_peer;
pub mod recording;
#[cfg(target_os = "linux")]
pub mod search;
#[cfg(target_os = "linux")]
pub mod services;
pub mod stack;
pub mod subscriber;
#[cfg(target_os = "linux")]
mod times;
#[cfg(target_os = "linux")]
pub mod timing;

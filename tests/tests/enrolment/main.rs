//! How machines become hosts, and how their credentials are renewed: whole systems, both programs as people run them.

#[path = "../tls/authority.rs"]
#[allow(dead_code)]
mod authority;
mod exchange;
mod holder;
mod rotation;
#[path = "../tls/world.rs"]
#[allow(dead_code)]
mod tls_world;
mod token;
#[path = "../invariants/world.rs"]
#[allow(dead_code)]
mod world;

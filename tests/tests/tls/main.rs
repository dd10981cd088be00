//! TLS between hosts and hub, on real parts: certificates of a CA of the test's own, both programs, and nginx or
//! Envoy before them.

mod authority;
mod door;
mod edge;
mod envoy;
mod renewal;
mod trust;
mod world;

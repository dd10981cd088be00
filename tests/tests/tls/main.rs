//! TLS between hosts and hub, on real parts: certificates of a CA of the test's own, both programs, and nginx before them.

mod authority;
mod door;
mod edge;
mod renewal;
mod trust;
mod world;

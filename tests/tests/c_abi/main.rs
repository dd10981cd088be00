//! The library as C and C++ programs use it: they are compiled here, with what a map server is compiled with, linked
//! against an installed library, run, fed and killed. The programs are in `tests/c`. A number in a test's name is the
//! invariant's.

mod callers;
mod compiled;
mod guide;
mod keeping;
mod misuse;
mod puppet;
mod secrecy;
mod telling;
mod texts;
mod vectors;
mod waiting;
#[path = "../invariants/world.rs"]
#[allow(dead_code, reason = "the agents of the other tests are in their own process")]
mod world;

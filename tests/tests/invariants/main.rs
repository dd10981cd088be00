//! What must never happen, one test or more for each: a real hub and real agents over a real Postgres and a real Redis,
//! verified by SQL. The number in a test's name is the invariant's.

mod address;
mod attached;
mod bounds;
mod clock;
mod conflicts;
mod crash;
mod following;
mod forgery;
mod full;
mod groups;
mod handing_over;
mod host_cache;
mod isolation;
mod leases;
mod maps;
mod model;
mod order;
mod presence;
mod promotion;
mod reading;
mod redis_forms;
mod repetition;
mod secrecy;
mod subscribing;
mod timing;
mod waiting;
mod wire;
mod world;

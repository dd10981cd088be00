//! The store over a real Postgres: what it promises about order, repetition, refusal and outage.

mod conflicts;
mod embeddings;
mod feed;
mod fixture;
mod followers;
mod groups;
mod handovers;
mod leases;
mod limbo;
mod maps;
mod metrics;
mod order;
mod outage;
mod presence;
mod refusal;
mod renewal;
mod repetition;
mod schema;
mod streams;
mod upkeep;
mod verdicts;

//! Embeddings: providers behind HTTP with all their troubles, a real sentence model inside the process, and a hub that embeds
//! what happens and lets hosts search it.

mod background;
mod calls;
mod model;
mod reembed;
mod remote;
mod secrecy;
mod world;

//! Embeddings: providers behind HTTP with all their troubles, and a real sentence model inside the process.

mod model;
mod remote;
mod secrecy;

//! The admin listener: tools embed, search and keep texts over REST, by a token, at a real hub.

mod budget;
mod door;
mod entries;
mod openai;
mod search;
mod secrecy;
mod tls;
mod world;

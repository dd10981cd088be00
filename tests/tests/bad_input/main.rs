//! Bad input, through the doors that people and programs use: each is refused with its number, its label and a sentence
//! that says what to do.

mod door;
mod forger;
mod hub;
mod local;
mod messages;
mod operations;
#[cfg(feature = "servers")]
mod servers;
mod settings;
#[cfg(feature = "servers")]
mod trust;

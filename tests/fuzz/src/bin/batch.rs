//! The target of this name, as libFuzzer's entry.

#![cfg_attr(fuzzing, no_main)]

p2p_sync_fuzz::entry!(p2p_sync_fuzz::batch::read);

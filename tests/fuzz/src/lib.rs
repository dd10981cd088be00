//! What strangers send and people write, made up by a fuzzer and read by the real readers.
//!
//! A target takes any bytes. It fails by a panic: one of the readers' own, or an assertion here that what was read holds
//! what was promised of it. `tests/fuzz/run` runs them under libFuzzer; the kept corpus is run by the ordinary tests too.

pub mod batch;
pub mod envelope;
pub mod group;
pub mod json;
pub mod path;
pub mod settings;

/// A program of one target: libFuzzer's, or, in other builds, one that reads the files that it is given, to look at what made
/// it crash.
#[macro_export]
macro_rules! entry {
    ($target:path) => {
        #[cfg(fuzzing)]
        libfuzzer_sys::fuzz_target!(|input: &[u8]| $target(input));

        #[cfg(not(fuzzing))]
        fn main() {
            for file in std::env::args_os().skip(1) {
                $target(&std::fs::read(file).expect("a file that can be read"));
            }
        }
    };
}

/// Reads one made-up input.
pub type Target = fn(&[u8]);

/// All targets by their names.
pub const TARGETS: [(&str, Target); 6] = [
    ("envelope", envelope::read),
    ("batch", batch::read),
    ("json", json::read),
    ("settings", settings::read),
    ("group", group::read),
    ("path", path::read),
];

/// The first byte says which way an input goes, the rest is the input.
fn way(input: &[u8]) -> Option<(u8, &[u8])> {
    input.split_first().map(|(way, rest)| (*way, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_kept_of_earlier_runs_is_read_without_a_panic() {
        for (name, target) in TARGETS {
            let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR"))
                .join("corpus")
                .join(name);
            let mut inputs = 0;
            for file in std::fs::read_dir(folder).expect("every target has a corpus").flatten() {
                target(&std::fs::read(file.path()).expect("readable"));
                inputs += 1;
            }
            assert!(inputs > 0, "{name} has an empty corpus");
        }
    }
}

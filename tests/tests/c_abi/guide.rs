//! The guides: the C++ they show compiles without a warning, and the JSON they show is taken.

use std::fmt::Write as _;

use p2p_sync_proto::{json, policy::parse_type};
use serde_json::{Value, value::RawValue};

use crate::compiled::{CXX_FLAGS, assert_compiles, library};

const GUIDES: [(&str, &str); 2] = [
    ("agent/INTEGRATION.md", include_str!("../../../agent/INTEGRATION.md")),
    ("README.md", include_str!("../../../README.md")),
];
/// What stands around statements that are shown alone.
const FUNCTION: &str = "void shown_{line}([[maybe_unused]] rathena::P2PDataSync& sync, [[maybe_unused]] int char_id, \
                        [[maybe_unused]] const std::string& name, [[maybe_unused]] const std::string& text) {";

/// A fenced block of a guide.
struct Block {
    guide: &'static str,
    /// Of the guide, where its text begins.
    line: usize,
    text: String,
}

/// All blocks of a language, in the order in which they are read.
fn blocks(language: &str) -> Vec<Block> {
    let mut found = Vec::new();
    for (guide, text) in GUIDES {
        let mut lines = (1..).zip(text.lines());
        while let Some((line, fence)) = lines.next() {
            let Some(of) = fence.strip_prefix("```") else { continue };
            let inside = lines.by_ref().map(|(_, line)| line);
            let text = inside
                .take_while(|line| *line != "```")
                .fold(String::new(), |all, line| all + line + "\n");
            if of == language {
                let line = line + 1;
                found.push(Block { guide, line, text });
            }
        }
    }
    found
}

#[test]
fn the_code_that_the_guides_show_compiles_without_a_warning() {
    let blocks = blocks("cpp");
    assert!(blocks.len() >= 5, "only {} blocks of C++ were found", blocks.len());
    let mut source = String::new();
    for Block { guide, line, text } in &blocks {
        // Later blocks use what earlier ones declare, as a reader does.
        let is_whole = text
            .lines()
            .any(|line| line.starts_with("#include") || line.starts_with("static "));
        let (before, behind) = if is_whole {
            (String::new(), "")
        } else {
            (FUNCTION.replace("{line}", &line.to_string()), "}")
        };
        write!(source, "{before}\n#line {line} \"{guide}\"\n{text}{behind}\n").expect("a text takes any");
    }
    let folder = tempfile::tempdir().expect("a folder can be made");
    let file = folder.path().join("guide.cpp").display().to_string();
    std::fs::write(&file, source).expect("writable");
    let include = format!("-I{}", library().join("include").display());
    for compiler in ["g++", "clang++"] {
        let mut arguments = CXX_FLAGS.to_vec();
        // The server calls what is shown.
        arguments.extend([
            "-fsyntax-only",
            "-Wno-unused-function",
            &include,
            "-include",
            "guide.hpp",
        ]);
        assert_compiles(compiler, &arguments, &[&file]);
    }
}

#[test]
fn the_json_that_the_guides_show_is_taken() {
    for Block { guide, line, text } in blocks("json") {
        if let Err(problem) = json::check(&text) {
            panic!("{guide}:{line}: {problem}");
        }
    }
    let mut shown = 0;
    for Block { guide, line, text } in blocks("jsonl") {
        for (line, text) in (line..).zip(text.lines()) {
            let operation: std::collections::BTreeMap<&str, &RawValue> =
                serde_json::from_str(text).unwrap_or_else(|error| panic!("{guide}:{line}: {error}"));
            let told: Value = serde_json::from_str(operation["type"].get()).expect("JSON");
            let taken = parse_type(told.as_str().unwrap_or_default()).and(json::check(operation["data"].get()));
            if let Err(problem) = taken {
                panic!("{guide}:{line}: {problem}");
            }
            shown += 1;
        }
    }
    assert!(shown >= 13, "only {shown} payloads were found");
}

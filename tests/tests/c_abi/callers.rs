//! The headers: code written for them compiles without a warning, by both compilers, alone and beside a server's names.

use crate::compiled::{C_FLAGS, CXX_FLAGS, Link, assert_compiles, cxx_program, library, run_to_end};

const CXX_COMPILERS: [&str; 2] = ["g++", "clang++"];

fn include() -> String {
    format!("-I{}", library().join("include").display())
}

/// Compiles callers.cpp with further flags by both compilers.
fn assert_callers_compile(flags: &[&str]) {
    let include = include();
    for compiler in CXX_COMPILERS {
        let mut arguments = CXX_FLAGS.to_vec();
        arguments.extend([include.as_str(), "-c", "-o", "/dev/null"]);
        arguments.extend(flags);
        assert_compiles(compiler, &arguments, &["callers.cpp"]);
    }
}

#[test]
fn code_written_for_the_calls_compiles_without_a_warning() {
    // Some warnings need the optimiser, and some its absence.
    assert_callers_compile(&["-O0"]);
    assert_callers_compile(&["-O2"]);
}

#[test]
fn code_written_for_the_calls_compiles_with_the_header_in_the_folder_common() {
    assert_callers_compile(&["-fsyntax-only", "-DINCLUDED_AS_COMMON"]);
}

#[test]
fn code_written_for_the_calls_compiles_beside_a_servers_own_types_and_macros() {
    assert_callers_compile(&["-fsyntax-only", "-include", "server_types.h"]);
    assert_callers_compile(&["-fsyntax-only", "-include", "server_types.h", "-DINCLUDED_AS_COMMON"]);
}

#[test]
fn the_c_header_compiles_as_pedantic_c11_and_as_cxx() {
    let include = include();
    for compiler in ["gcc", "clang"] {
        let mut arguments = C_FLAGS.to_vec();
        arguments.extend([include.as_str(), "-fsyntax-only"]);
        assert_compiles(compiler, &arguments, &["abuse.c", "endings.c", "lines.c"]);
        let alone = library().join("include/p2p_sync.h").display().to_string();
        assert_compiles(
            compiler,
            &["-std=c11", "-pedantic", "-fsyntax-only", "-x", "c"],
            &[&alone],
        );
        assert_compiles(
            compiler,
            &["-std=c++17", "-pedantic", "-fsyntax-only", "-x", "c++"],
            &[&alone],
        );
    }
}

#[test]
fn without_an_agent_every_call_is_refused_with_a_sentence() {
    for link in [Link::Shared, Link::Static] {
        run_to_end(&cxx_program("callers", &["callers.cpp"], link), &[]);
    }
}

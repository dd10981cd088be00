//! C and C++ programs, compiled as a map server is and linked against the library that `agent/install` has installed.

use std::{
    collections::hash_map::DefaultHasher,
    hash::{Hash as _, Hasher as _},
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

/// Where the sources are.
const SOURCES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/c");
const WARNINGS: [&str; 3] = ["-Wall", "-Wextra", "-Werror"];
/// As the map server's own sources are compiled.
pub(crate) const CXX_FLAGS: [&str; 2] = ["-std=c++17", "-fno-strict-aliasing"];
pub(crate) const C_FLAGS: [&str; 3] = ["-std=c11", "-pedantic", "-D_GNU_SOURCE"];
/// What the static library needs of the system.
const SYSTEM_LIBRARIES: [&str; 6] = ["-lgcc_s", "-lpthread", "-ldl", "-lm", "-lrt", "-lutil"];
/// A program that says nothing for so long hangs.
const RUN_TIMEOUT: Duration = Duration::from_mins(8);

/// The folder that `agent/install --prefix` was given.
pub(crate) fn library() -> PathBuf {
    let prefix = std::env::var_os("P2P_SYNC_TEST_LIBRARY").unwrap_or_else(|| {
        panic!(
            "P2P_SYNC_TEST_LIBRARY is not set: run tests/run, which installs the library for these tests, or run \
             agent/install --prefix DIR and set it to DIR"
        )
    });
    let prefix = PathBuf::from(prefix);
    assert!(
        prefix.join("lib/libp2p_sync.a").is_file(),
        "P2P_SYNC_TEST_LIBRARY is {}, where agent/install has installed nothing",
        prefix.display()
    );
    prefix
}

/// How a program is linked with the library.
#[derive(Clone, Copy, Hash)]
pub(crate) enum Link {
    Static,
    Shared,
}

/// Compiles sources of `tests/c` with a compiler and its flags, warnings being errors; gives what it said.
pub(crate) fn compile(compiler: &str, arguments: &[&str], sources: &[&str]) -> Output {
    let mut command = Command::new(compiler);
    command
        .current_dir(SOURCES)
        .args(WARNINGS)
        .args(arguments)
        .args(sources);
    let output = command.output();
    output.unwrap_or_else(|error| panic!("{compiler} does not run: {error} (Debian: apt-get install g++ clang)"))
}

/// Panics with what the compiler said unless it made something without a warning.
pub(crate) fn assert_compiles(compiler: &str, arguments: &[&str], sources: &[&str]) {
    let output = compile(compiler, arguments, sources);
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success() && told.trim().is_empty(),
        "{compiler} {arguments:?} {sources:?} says:\n{told}"
    );
}

/// A C++ program of `tests/c`, ready to run.
pub(crate) fn cxx_program(name: &str, sources: &[&str], link: Link) -> PathBuf {
    program(name, &variable_or("CXX", "g++"), &CXX_FLAGS, sources, link)
}

/// A C program of `tests/c`, ready to run.
pub(crate) fn c_program(name: &str, sources: &[&str], link: Link) -> PathBuf {
    program(name, &variable_or("CC", "gcc"), &C_FLAGS, sources, link)
}

/// Compiles and links a program unless that was done before with the same sources, flags and library: each test is a
/// process of its own. `P2P_SYNC_TEST_CFLAGS` has more flags, such as a sanitizer's.
fn program(name: &str, compiler: &str, flags: &[&str], sources: &[&str], link: Link) -> PathBuf {
    let prefix = library();
    let more = variable_or("P2P_SYNC_TEST_CFLAGS", "");
    let lib = prefix.join("lib");
    let include = format!("-I{}", prefix.join("include").display());
    let mut arguments: Vec<String> = flags.iter().map(ToString::to_string).collect();
    arguments.extend(["-O2".to_owned(), "-g".to_owned(), include]);
    arguments.extend(more.split_whitespace().map(ToOwned::to_owned));
    let mut libraries = match link {
        Link::Static => vec![lib.join("libp2p_sync.a").display().to_string()],
        Link::Shared => vec![
            format!("-L{}", lib.display()),
            "-lp2p_sync".to_owned(),
            format!("-Wl,-rpath,{}", lib.display()),
        ],
    };
    libraries.extend(SYSTEM_LIBRARIES.map(ToOwned::to_owned));

    let mut hasher = DefaultHasher::new();
    (compiler, &arguments, link).hash(&mut hasher);
    for folder in [Path::new(SOURCES), &prefix.join("include"), &lib] {
        hash_files(folder, &mut hasher);
    }
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("c_abi");
    std::fs::create_dir_all(&folder).expect("the target folder can be written");
    let finished = folder.join(format!("{name}-{:016x}", hasher.finish()));
    if !finished.is_file() {
        // Tests run at once: the first to finish is kept.
        let unfinished = tempfile::Builder::new()
            .prefix(name)
            .tempfile_in(&folder)
            .expect("writable");
        let unfinished = unfinished.into_temp_path();
        let to = unfinished.display().to_string();
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let mut behind: Vec<&str> = sources.to_vec();
        behind.extend(libraries.iter().map(String::as_str));
        behind.extend(["-o", &to]);
        assert_compiles(compiler, &arguments, &behind);
        std::fs::rename(&unfinished, &finished).expect("the same folder");
    }
    finished
}

/// Sources and headers by their content, libraries by when they were made.
fn hash_files(folder: &Path, hasher: &mut DefaultHasher) {
    let mut files: Vec<PathBuf> = std::fs::read_dir(folder)
        .unwrap_or_else(|error| panic!("{} cannot be read: {error}", folder.display()))
        .map(|entry| entry.expect("readable").path())
        .filter(|path| path.is_file())
        .collect();
    files.sort();
    for file in files {
        if file.extension().is_some_and(|extension| extension == "a") || file.to_string_lossy().contains(".so") {
            let data = file.metadata().expect("it is there");
            (data.len(), data.modified().ok()).hash(hasher);
        } else {
            std::fs::read(&file).expect("readable").hash(hasher);
        }
    }
}

/// Runs a program to its end, and panics with what it said unless it succeeds; gives its standard output.
pub(crate) fn run_to_end(program: &Path, arguments: &[&str]) -> String {
    let mut command = Command::new(program);
    command.args(arguments).stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = command.spawn().expect("it was just compiled");
    let pid = child.id();
    let (done, is_done) = std::sync::mpsc::sync_channel(1);
    let reading = thread::spawn(move || {
        let output = child.wait_with_output();
        let _ = done.send(());
        output
    });
    if is_done.recv_timeout(RUN_TIMEOUT).is_err()
        && let Some(pid) = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw)
    {
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::ABORT);
    }
    let output = reading
        .join()
        .expect("reading does not panic")
        .expect("it is our child");
    let (told, complained) = (
        String::from_utf8_lossy(&output.stdout).into_owned(),
        String::from_utf8_lossy(&output.stderr),
    );
    assert!(
        output.status.success(),
        "{} ended with {}:\n{told}{complained}",
        program.display(),
        output.status
    );
    told
}

/// Waits for a child's end and gives whether it succeeded; one that does not end is killed.
pub(crate) fn ends_well(child: &mut Child, timeout: Duration) -> bool {
    let begun = Instant::now();
    while begun.elapsed() < timeout {
        if let Some(status) = child.try_wait().expect("it is our child") {
            return status.success();
        }
        thread::sleep(Duration::from_millis(5));
    }
    let _ = (child.kill(), child.wait());
    false
}

pub(crate) fn variable_or(name: &str, otherwise: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| otherwise.to_owned())
}

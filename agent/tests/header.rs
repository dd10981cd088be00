//! The committed C header is what the source says.

use std::path::Path;

/// In the header's order.
const SOURCES: [&str; 12] = [
    "code",
    "text",
    "handle",
    "log",
    "lifecycle",
    "boundary",
    "operation",
    "group",
    "question",
    "events",
    "cache",
    "status",
];

#[test]
fn the_c_header_is_what_the_source_says() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"));
    let config = cbindgen::Config::from_file(folder.join("cbindgen.toml")).expect("readable");
    let builder = SOURCES.iter().fold(cbindgen::Builder::new(), |builder, source| {
        builder.with_src(folder.join(format!("src/ffi/{source}.rs")))
    });
    let bindings = builder
        .with_config(config)
        .generate()
        .expect("cbindgen understands the source");
    let mut header = Vec::new();
    bindings.write(&mut header);
    let header = String::from_utf8(header).expect("text");
    let committed = folder.join("include/p2p_sync.h");
    if std::env::var_os("P2P_SYNC_WRITE_HEADER").is_some() {
        std::fs::write(&committed, &header).expect("writable");
    }
    let is = std::fs::read_to_string(&committed).unwrap_or_default();
    assert!(
        is == header,
        "include/p2p_sync.h is not what src/ffi says: run this test with P2P_SYNC_WRITE_HEADER=1 and commit it"
    );
}

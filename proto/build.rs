//! Compiles the protos with protox, so that no system `protoc` is needed.

use std::{env, fs, path::PathBuf};

use prost::Message as _;

const PROTOS: [&str; 8] = [
    "p2p_sync/v1/envelope.proto",
    "p2p_sync/v1/operation.proto",
    "p2p_sync/v1/reject_code.proto",
    "p2p_sync/v1/pull.proto",
    "p2p_sync/v1/subscribe.proto",
    "p2p_sync/v1/enrol.proto",
    "p2p_sync/v1/lease.proto",
    "p2p_sync/v1/services.proto",
];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    let descriptors = protox::compile(PROTOS, ["proto"])?;
    let descriptor_file = PathBuf::from(env::var("OUT_DIR")?).join("descriptors.bin");
    fs::write(descriptor_file, descriptors.encode_to_vec())?;
    tonic_prost_build::configure()
        .bytes(".")
        // Their credential must not show.
        .skip_debug(["p2p_sync.v1.EnrolReply", "p2p_sync.v1.RotateReply"])
        .compile_fds(descriptors)?;
    Ok(())
}

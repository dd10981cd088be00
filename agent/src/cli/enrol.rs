//! `enrol`: makes this machine a host.

use std::{
    io::{Read as _, stdin},
    path::Path,
    process::ExitCode,
};

use p2p_sync_proto::{Code, Problem, identity::Identity, settings::Problems, token::Token};
use zeroize::Zeroizing;

use crate::{Config, credential_file::CredentialFile, link};

/// Of what is pasted.
const TOKEN_BYTES_MAX: u64 = 16 * 1024;

/// Written where there is no configuration, so that the next command finds one.
const CONFIGURATION: &str =
    "// p2p-sync: what is not here has its default; the shipped conf/p2p_data_sync.conf describes each key.\n";

/// Exchanges a token, `-` for one on standard input, for a credential, which is kept in the credential file.
///
/// The key pair is on disk before the hub hears of it, so that whatever is lost on the way the same command goes on.
pub(super) fn enrol(file: &Path, token: &str) -> Result<ExitCode, Problems> {
    let one = |problem: Problem| Problems(vec![problem]);
    let token = read(token).map_err(one)?;
    let config = Config::for_enrolment(file, &token)?;
    super::start_logging(config.debug);
    let mut kept = CredentialFile::read(&config.credential_file)
        .map_err(one)?
        .unwrap_or_else(|| CredentialFile::new(&config.credential_file));
    if let Some(credential) = &kept.credential {
        let sentence = format!(
            "this machine is enrolled already, as host {}. To make it a new one, drain its outbox and move {} and the outbox away",
            credential.host_id,
            config.credential_file.display()
        );
        return Err(one(Problem::new(Code::BadValue, sentence)));
    }
    kept.endpoint.clone_from(&token.endpoint);
    kept.ca_pin = token.ca_pin;
    let identity = kept.identity.get_or_insert_with(Identity::generate).clone();
    kept.save().map_err(one)?;
    let runtime = link::runtime(1).map_err(one)?;
    let enrolled = runtime
        .block_on(link::exchange(&config, &token, &identity))
        .map_err(one)?;
    let host_id = enrolled.credential.host_id;
    kept.credential = Some(enrolled.credential);
    kept.save().map_err(one)?;
    write_configuration(file);
    let maps = match enrolled.maps.as_slice() {
        [] => "no map yet".to_owned(),
        maps => maps.join(", "),
    };
    println!(
        "enrolled as host {host_id}, which may write {maps}. Start it: p2p-sync-agent run, or the map server itself."
    );
    if !enrolled.maps_taken.is_empty() {
        println!(
            "Another host holds {} still: ask the operator.",
            enrolled.maps_taken.join(", ")
        );
    }
    Ok(ExitCode::SUCCESS)
}

fn read(token: &str) -> Result<Token, Problem> {
    let mut text = Zeroizing::new(String::with_capacity(1024));
    if token == "-" {
        let failed = |error| Problem::new(Code::BadToken, format!("standard input cannot be read: {error}"));
        stdin()
            .take(TOKEN_BYTES_MAX)
            .read_to_string(&mut text)
            .map_err(failed)?;
    } else {
        text.push_str(token);
    }
    Token::parse(&text).map_err(|error| Problem::new(Code::BadToken, error.to_string()))
}

/// Leaves what is there alone.
fn write_configuration(file: &Path) {
    let made = || {
        if let Some(folder) = file.parent() {
            std::fs::create_dir_all(folder)?;
        }
        std::fs::File::create_new(file)
            .and_then(|mut file| std::io::Write::write_all(&mut file, CONFIGURATION.as_bytes()))
    };
    match made() {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
            eprintln!(
                "{} could not be written ({error}): give --config with a file of yours",
                file.display()
            );
        }
        _ => {}
    }
}

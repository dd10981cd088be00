//! What people write and paste: both programs' settings, `types.toml`, the keyring, credentials; and certificates, which
//! strangers write.

use std::{path::Path, sync::LazyLock};

use p2p_sync_agent::Config as AgentConfig;
use p2p_sync_proto::{certificate::Validity, keys::Credential};
use p2p_sync_proxy::{
    config::{Config as HubConfig, Overrides},
    keyring::Keyring,
    validate::types_file::Rules,
};

use crate::way;

static RULES: LazyLock<Rules> = LazyLock::new(Rules::builtin);

/// See the module.
pub fn read(input: &[u8]) {
    let Some((way, rest)) = way(input) else { return };
    if way % 6 == 5 {
        if let Some(validity) = Validity::read(rest) {
            let _shown = (validity.to_string(), validity.days_left(std::time::SystemTime::now()));
        }
        return;
    }
    let Ok(text) = std::str::from_utf8(rest) else { return };
    match way % 6 {
        0 => hub(text),
        1 => agent(text),
        2 => types(text),
        3 => keyring(text),
        _ => credential(text),
    }
}

fn hub(text: &str) {
    match HubConfig::resolve(text, Path::new("/nonexistent"), &Overrides::default(), |_| None) {
        Ok(config) => assert!(config.store.critical_connections > 0 && config.store.bulk_connections > 0),
        Err(problems) => assert!(!problems.0.is_empty() && !problems.to_string().is_empty()),
    }
}

fn agent(text: &str) {
    match AgentConfig::parse(text, Path::new("/nonexistent"), |_| None) {
        Ok(config) => assert!(config.queue_ops_max > 0 && config.batch_ops > 0),
        Err(problems) => assert!(!problems.0.is_empty() && !problems.to_string().is_empty()),
    }
}

#[cfg(fuzzing)]
fn types(text: &str) {
    let schema = r#"{"type": "object", "properties": {"hp": {"type": "integer"}, "max_hp": {"type": "integer"}}}"#;
    if let Err(problems) = RULES.clone().overlaid_by(text, schema) {
        assert!(!problems.0.is_empty() && !problems.to_string().is_empty());
    }
}

/// Only a fuzzer reads types without their files.
#[cfg(not(fuzzing))]
fn types(_text: &str) {
    assert!(RULES.policies.version > 0);
}

fn keyring(text: &str) {
    match Keyring::parse(text, "the fuzzer") {
        Ok(keyring) => assert_eq!(
            keyring
                .get(keyring.current().id())
                .map(p2p_sync_proto::keys::MasterKey::id),
            Some(keyring.current().id())
        ),
        Err(problem) => assert!(!problem.sentence.is_empty()),
    }
}

fn credential(text: &str) {
    if let Ok(credential) = Credential::parse(text) {
        let again = Credential::parse(&credential.to_text()).expect("its own text");
        assert_eq!(
            (again.host_id, again.generation),
            (credential.host_id, credential.generation)
        );
        assert_eq!(again.key_id, credential.key_id);
    }
}

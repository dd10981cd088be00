//! Which provider, and how it is reached.

use std::{path::PathBuf, time::Duration};

use crate::secret::Secret;

/// How texts become vectors.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Who makes them.
    pub provider: ProviderSettings,
    /// Of the vectors.
    pub dimensions: usize,
    /// How long one call may take, repetitions included.
    pub timeout: Duration,
}

/// Who makes vectors.
#[derive(Clone, Debug)]
pub enum ProviderSettings {
    /// Nobody.
    Off,
    /// The letters and words themselves.
    Lexical,
    /// A sentence model inside this process.
    Local(LocalSettings),
    /// A server.
    Remote(RemoteSettings),
}

/// A sentence model inside this process.
#[derive(Clone, Debug)]
pub struct LocalSettings {
    /// Where `model.safetensors`, `tokenizer.json` and `config.json` lie.
    pub dir: PathBuf,
    /// What the model is called; empty: as its folder.
    pub name: String,
    /// How many texts are worked on at one time.
    pub threads: usize,
}

/// A server that speaks `OpenAI`'s protocol.
#[derive(Clone, Debug)]
pub struct RemoteSettings {
    /// Whose manners it has.
    pub service: Service,
    /// Without a slash at the end.
    pub base_url: String,
    /// Empty: none is sent.
    pub api_key: Secret,
    /// By the provider's name for it.
    pub model: String,
}

/// Whose manners a server has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Service {
    /// `<base>/embeddings`, the key as a bearer token.
    OpenAi,
    /// `<base>/openai/deployments/<deployment>/embeddings?api-version=<version>`, the key in `api-key`.
    Azure {
        /// As the resource's owner named it.
        deployment: String,
        /// Of the protocol: a date.
        api_version: String,
    },
}

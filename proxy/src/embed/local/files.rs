//! A published sentence model's folder, as sentence-transformers writes it.

use std::{fs, path::Path};

use p2p_sync_proto::Problem;
use serde::{Deserialize, de::DeserializeOwned};
use tokenizers::{Tokenizer, TruncationParams};

use super::misconfigured;

/// A folder's files, read.
pub(super) struct Files {
    pub(super) config: Config,
    pub(super) tokens_max: usize,
    pub(super) pooling: Pooling,
    pub(super) tokenizer: Tokenizer,
    pub(super) weights: Vec<u8>,
}

/// `config.json`: what the weights do not say of themselves.
#[derive(Debug, Deserialize)]
pub(super) struct Config {
    pub(super) model_type: String,
    pub(super) num_attention_heads: usize,
    pub(super) num_hidden_layers: usize,
    pub(super) max_position_embeddings: usize,
    pub(super) hidden_act: String,
    #[serde(default = "layer_norm_eps")]
    pub(super) layer_norm_eps: f32,
    #[serde(default)]
    pub(super) position_embedding_type: Option<String>,
}

/// BERT's own.
fn layer_norm_eps() -> f32 {
    1e-12
}

/// How the vectors of a text's tokens become one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pooling {
    /// Their mean.
    Mean,
    /// The first one's.
    First,
}

/// `sentence_bert_config.json`.
#[derive(Deserialize)]
struct Sentence {
    max_seq_length: Option<usize>,
}

/// One of `modules.json`.
#[derive(Deserialize)]
struct Module {
    r#type: String,
}

/// `1_Pooling/config.json`.
#[derive(Deserialize)]
struct PoolingFile {
    #[serde(default)]
    pooling_mode_cls_token: bool,
    #[serde(default)]
    pooling_mode_mean_tokens: bool,
}

impl Files {
    /// Reads the folder. `model.safetensors`, `tokenizer.json` and `config.json` have to be there; without the others, the
    /// mean of all tokens is taken and as many are read as the model has positions.
    pub(super) fn read(dir: &Path) -> Result<Self, Problem> {
        let config: Config = needed(dir, "config.json")?;
        let sentence: Option<Sentence> = json(dir, "sentence_bert_config.json")?;
        let modules: Option<Vec<Module>> = json(dir, "modules.json")?;
        let pooling: Option<PoolingFile> = json(dir, "1_Pooling/config.json")?;
        let known = ["Transformer", "Pooling", "Normalize"];
        let unknown = modules.unwrap_or_default().into_iter().find(|module| {
            let kind = module.r#type.rsplit('.').next();
            !known.iter().any(|known| kind == Some(known))
        });
        if let Some(module) = unknown {
            let reason = format!("modules.json has a {}, which is not served", module.r#type);
            return Err(unusable(dir, &reason));
        }
        let pooling = match pooling {
            None => Pooling::Mean,
            Some(file) => match (file.pooling_mode_mean_tokens, file.pooling_mode_cls_token) {
                (true, false) => Pooling::Mean,
                (false, true) => Pooling::First,
                _ => {
                    return Err(unusable(
                        dir,
                        "1_Pooling/config.json asks for neither the mean nor the first token alone",
                    ));
                }
            },
        };
        let positions = config.max_position_embeddings;
        let asked = sentence.and_then(|file| file.max_seq_length);
        let tokens_max = asked.map_or(positions, |asked| asked.min(positions));
        let mut tokenizer = Tokenizer::from_bytes(bytes(dir, "tokenizer.json")?)
            .map_err(|error| broken(dir, "tokenizer.json", &error))?;
        let truncation = TruncationParams {
            max_length: tokens_max,
            ..TruncationParams::default()
        };
        tokenizer.with_padding(None);
        tokenizer
            .with_truncation(Some(truncation))
            .map_err(|error| broken(dir, "tokenizer.json", &error))?;
        Ok(Self {
            config,
            tokens_max,
            pooling,
            tokenizer,
            weights: bytes(dir, "model.safetensors")?,
        })
    }
}

fn bytes(dir: &Path, name: &str) -> Result<Vec<u8>, Problem> {
    fs::read(dir.join(name)).map_err(|error| {
        misconfigured(format!(
            "{} cannot be read ({error}): embedding_model_dir has to be a folder with model.safetensors, tokenizer.json and \
             config.json, as they are published",
            dir.join(name).display()
        ))
    })
}

fn needed<T: DeserializeOwned>(dir: &Path, name: &str) -> Result<T, Problem> {
    serde_json::from_slice(&bytes(dir, name)?).map_err(|error| broken(dir, name, &error))
}

fn json<T: DeserializeOwned>(dir: &Path, name: &str) -> Result<Option<T>, Problem> {
    if dir.join(name).exists() {
        needed(dir, name).map(Some)
    } else {
        Ok(None)
    }
}

fn broken(dir: &Path, name: &str, error: &dyn std::fmt::Display) -> Problem {
    unusable(dir, &format!("{name} cannot be used ({error})"))
}

/// A folder whose model is not one that is served.
pub(super) fn unusable(dir: &Path, reason: &str) -> Problem {
    misconfigured(format!(
        "embedding_model_dir {}: {reason}; a sentence model of the BERT family is needed, such as all-MiniLM-L6-v2",
        dir.display()
    ))
}

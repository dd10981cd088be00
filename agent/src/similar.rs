//! Searching among the hub's embeddings: what is asked, and the hits as JSON, one way for all who search.

use p2p_sync_proto::{Code, Path, Problem, path::HUB_EMBEDDINGS, policy::parse_type, v1};
use serde::Deserialize;
use serde_json::{Value, json};

/// What is searched for, as JSON says it.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Sought {
    /// In f64, so that what is too large for the wire is told by the hub as what it is.
    embedding: Vec<f64>,
    text: String,
    limit: Option<u32>,
    maps: Vec<String>,
    types: Vec<String>,
    since_ms: u64,
    until_ms: u64,
    min_similarity: Option<f32>,
}

/// Asks what `search` says: an embedding, a JSON array of numbers; or a JSON object with `embedding` or `text`, and what
/// narrows it. `limit` holds where that says none, and `map`, unless it is empty, is one of the maps.
pub(crate) fn search(search: &str, limit: u32, map: &str) -> Result<v1::SearchEmbeddings, Problem> {
    let bad = |error: serde_json::Error| {
        let sentence = format!(
            "a search is a JSON array of numbers, or a JSON object with \"embedding\" or \"text\" and, where it is to be \
             narrowed, \"maps\", \"types\", \"since_ms\", \"until_ms\", \"min_similarity\" and \"limit\": {error}"
        );
        Problem::new(Code::BadRequest, sentence)
    };
    let sought = if search.trim_start().starts_with('{') {
        serde_json::from_str(search).map_err(bad)?
    } else {
        Sought {
            embedding: serde_json::from_str(search).map_err(bad)?,
            ..Sought::default()
        }
    };
    let types: Result<_, Problem> = sought
        .types
        .iter()
        .map(|name| parse_type(name).map(Into::into))
        .collect();
    Ok(v1::SearchEmbeddings {
        embedding: sought.embedding.into_iter().map(narrowed).collect(),
        text: sought.text,
        limit: sought.limit.unwrap_or(limit),
        maps: with(sought.maps, map),
        types: types?,
        since_ms: sought.since_ms,
        until_ms: sought.until_ms,
        similarity_min: sought.min_similarity,
    })
}

/// Asks for what lies near to a text.
pub(crate) fn near_to(text: &str, limit: u32, map: &str) -> v1::SearchEmbeddings {
    v1::SearchEmbeddings {
        text: text.to_owned(),
        limit,
        maps: with(Vec::new(), map),
        ..Default::default()
    }
}

#[expect(
    clippy::cast_possible_truncation,
    reason = "the wire's precision; what is beyond it becomes infinite"
)]
fn narrowed(number: f64) -> f32 {
    number as f32
}

fn with(mut maps: Vec<String>, map: &str) -> Vec<String> {
    if !map.is_empty() && !maps.iter().any(|known| known == map) {
        maps.push(map.to_owned());
    }
    maps
}

/// An embedding as JSON: the shortest digits that read back as the same numbers.
pub(crate) fn embedding_json(embedding: &v1::Embedding) -> String {
    serde_json::to_string(&embedding.values).unwrap_or_default()
}

/// Hits as JSON, the nearest first.
pub(crate) fn hits_json(hits: &v1::Hits) -> Value {
    Value::Array(hits.hits.iter().map(hit_json).collect())
}

fn hit_json(hit: &v1::Hit) -> Value {
    let path = Path::parse(&hit.path).ok();
    let id = path.as_ref().and_then(|path| path.parts().entity);
    // What a tool keeps at the hub has no path of an operation's.
    let id = id.or_else(|| hit.path.strip_prefix(HUB_EMBEDDINGS));
    let metadata: Value = serde_json::from_str(&hit.metadata).unwrap_or_default();
    json!({
        "path": hit.path,
        "id": id,
        "type": hit.data_type().as_str_name(),
        "map": hit.map,
        "account_id": hit.account_id,
        "text": hit.text,
        "similarity": hit.similarity,
        "received_at_ms": hit.received_at_ms,
        "stream_sequence": hit.stream_sequence,
        "metadata": metadata,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_array_is_an_embedding_and_an_object_says_more() {
        let plain = search(" [0.5, -1]", 7, "prontera").expect("an embedding");
        assert_eq!(
            (plain.embedding, plain.limit, plain.maps),
            (vec![0.5, -1.0], 7, vec!["prontera".to_owned()])
        );
        let text = r#"{"text":"caravan","maps":["geffen"],"types":["CHAT_MESSAGE"],"since_ms":5,"min_similarity":0.25,"limit":3}"#;
        let told = search(text, 7, "").expect("a search");
        let expected = v1::SearchEmbeddings {
            text: "caravan".to_owned(),
            limit: 3,
            maps: vec!["geffen".to_owned()],
            types: vec![v1::SyncDataType::ChatMessage.into()],
            since_ms: 5,
            similarity_min: Some(0.25),
            ..Default::default()
        };
        assert_eq!(told, expected);
    }

    #[test]
    fn what_is_no_search_is_refused_with_what_it_may_have() {
        for (text, code) in [
            ("caravan", Code::BadRequest),
            (r#"{"txt":"caravan"}"#, Code::BadRequest),
            (r#"["a"]"#, Code::BadRequest),
            (r#"{"text":"x","types":["CHATTER"]}"#, Code::UnknownType),
        ] {
            assert_eq!(search(text, 0, "").expect_err(text).code, code);
        }
    }

    #[test]
    fn a_hit_has_the_id_within_its_map() {
        let hit = v1::Hit {
            path: "prontera/VECTOR_EMBEDDING/npc:kafra".to_owned(),
            data_type: v1::SyncDataType::VectorEmbedding.into(),
            similarity: 0.5,
            metadata: r#"{"by":7}"#.to_owned(),
            ..Default::default()
        };
        let told = hit_json(&hit);
        assert_eq!(
            (&told["id"], &told["type"]),
            (&json!("npc:kafra"), &json!("VECTOR_EMBEDDING"))
        );
        assert_eq!(told["metadata"], json!({"by": 7}));
        let path = "@hub/VECTOR_EMBEDDING/lore:1".to_owned();
        assert_eq!(hit_json(&v1::Hit { path, ..hit })["id"], "lore:1", "of a tool's own");
        let numbers = v1::Embedding {
            values: vec![0.1, -0.012_345_678],
        };
        assert_eq!(embedding_json(&numbers), "[0.1,-0.012345678]");
    }
}

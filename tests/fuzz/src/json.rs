//! Payloads: the bounds of JSON, the schemas and rules that are shipped.

use std::sync::LazyLock;

use p2p_sync_proto::{
    json::check_bytes,
    limits::{JSON_DEPTH_MAX, JSON_NODES_MAX},
    v1::SyncDataType,
};
use p2p_sync_proxy::validate::types_file::Rules;
use serde_json::Value;

use crate::way;

static RULES: LazyLock<Rules> = LazyLock::new(Rules::builtin);

/// See the module.
pub fn read(input: &[u8]) {
    let Some((way, payload)) = way(input) else { return };
    let parsed = serde_json::from_slice::<Value>(payload);
    let (text, facts) = match check_bytes(payload) {
        Ok(checked) => checked,
        Err(problem) => {
            assert!(!problem.sentence.is_empty());
            return;
        }
    };
    let value = parsed.expect("what is within the bounds is JSON");
    let (depth, nodes) = extent(&value);
    assert!(depth <= JSON_DEPTH_MAX && nodes <= JSON_NODES_MAX);
    if let Value::Object(members) = &value {
        for (key, member) in members {
            let told = facts.member(key);
            match member {
                Value::String(text) => assert_eq!(told.as_deref(), Some(text.as_str())),
                Value::Number(_) => assert!(told.is_none_or(|number| number.parse::<i128>().is_ok())),
                _ => assert_eq!(told, None),
            }
        }
    } else {
        assert_eq!(facts.member("char_id"), None);
    }
    let data_type = SyncDataType::try_from(i32::from(way % 13)).expect("there are 13 types");
    if let Err(problem) = RULES.of(data_type).check(text) {
        assert!(!problem.sentence.is_empty());
    }
}

fn extent(value: &Value) -> (usize, usize) {
    let of = |children: &mut dyn Iterator<Item = &Value>| {
        children.map(extent).fold((1, 1), |(depth, nodes), (deep, more)| {
            (depth.max(deep + 1), nodes + more)
        })
    };
    match value {
        Value::Array(items) => of(&mut items.iter()),
        Value::Object(members) => of(&mut members.values()),
        _ => (0, 1),
    }
}

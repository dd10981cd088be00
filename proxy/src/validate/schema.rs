//! JSON Schema: compiled once, never fetching anything.

use std::{fmt, sync::Arc};

use jsonschema::{Draft, Validator, error::ValidationErrorKind};
use p2p_sync_proto::{Code, Problem};
use serde_json::Value;

/// A compiled JSON Schema of draft 2020-12. Clones share it.
#[derive(Clone)]
pub struct Schema {
    validator: Arc<Validator>,
    members: Arc<[String]>,
}

impl fmt::Debug for Schema {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Schema")
    }
}

impl Schema {
    /// Compiles a schema's text. The error completes a sentence. A reference to another file or to the network does
    /// not compile: what is accepted must not depend on what can be reached.
    pub fn compile(text: &str) -> Result<Self, String> {
        let schema: Value = serde_json::from_str(text).map_err(|error| format!("is not JSON: {error}"))?;
        let validator = jsonschema::options()
            .with_draft(Draft::Draft202012)
            .offline()
            .build(&schema)
            .map_err(|error| format!("is not a JSON Schema of draft 2020-12: {error}"))?;
        let properties = schema.get("properties").and_then(Value::as_object);
        let members = properties.map(|members| members.keys().cloned().collect());
        Ok(Self {
            validator: Arc::new(validator),
            members: members.unwrap_or_default(),
        })
    }

    /// The members of the outermost object that the schema describes.
    pub fn members(&self) -> impl Iterator<Item = &str> {
        self.members.iter().map(String::as_str)
    }

    /// Checks a payload; `SCHEMA_VIOLATION` with the JSON pointer to the first member that does not fit, or
    /// `IMPOSSIBLE_VALUE` where it is a number out of its bounds: that is no mistake of form.
    ///
    /// The sentence leaves the payload's values out, for it is logged and shown to others than the sender.
    pub fn check(&self, payload: &Value) -> Result<(), Problem> {
        self.validator.validate(payload).map_err(|violation| {
            let code = match violation.kind() {
                ValidationErrorKind::Minimum { .. }
                | ValidationErrorKind::Maximum { .. }
                | ValidationErrorKind::ExclusiveMinimum { .. }
                | ValidationErrorKind::ExclusiveMaximum { .. } => Code::ImpossibleValue,
                _ => Code::SchemaViolation,
            };
            let pointer = violation.instance_path().as_str();
            let place = if pointer.is_empty() { "the payload" } else { pointer };
            Problem::new(code, format!("{place}: {}", violation.masked()))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_violation_is_told_by_its_pointer_without_the_value() {
        let schema =
            Schema::compile(r#"{"properties": {"at": {"properties": {"hp": {"minimum": 0}}}}}"#).expect("valid");
        assert_eq!(schema.check(&serde_json::json!({"at": {"hp": 5}, "more": 1})), Ok(()));
        let problem = schema
            .check(&serde_json::json!({"at": {"hp": -777}}))
            .expect_err("negative");
        assert_eq!(problem.code, Code::ImpossibleValue);
        assert!(problem.sentence.starts_with("/at/hp: "), "{problem}");
        assert!(!problem.sentence.contains("777"), "{problem}");
    }

    #[test]
    fn a_mistake_of_form_is_told_from_a_number_out_of_its_bounds() {
        let schema = Schema::compile(
            r#"{"type": "object", "required": ["id"], "properties": {"id": {"type": "integer", "maximum": 9}}}"#,
        )
        .expect("valid");
        let code = |payload| schema.check(&payload).expect_err("does not fit").code;
        for payload in [
            serde_json::json!([]),
            serde_json::json!({}),
            serde_json::json!({"id": "7"}),
        ] {
            assert_eq!(code(payload), Code::SchemaViolation);
        }
        assert_eq!(code(serde_json::json!({"id": 10})), Code::ImpossibleValue);
        assert_eq!(schema.members().collect::<Vec<_>>(), ["id"]);
    }

    #[test]
    fn nothing_is_fetched() {
        for reference in ["https://example.com/s.json", "file:///etc/hostname", "other.json"] {
            Schema::compile(&format!(r#"{{"$ref": "{reference}"}}"#)).expect_err(reference);
        }
    }
}

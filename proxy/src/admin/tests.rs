//! `openapi.json` says what is served. That each answer is as it says is held by the tests with a real hub.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::*;

const SOURCES: [&str; 4] = [
    include_str!("openai.rs"),
    include_str!("search.rs"),
    include_str!("entries.rs"),
    include_str!("health.rs"),
];

fn document() -> Value {
    serde_json::from_str(OPENAPI).expect("JSON")
}

/// What a `$ref` names, or the value itself.
fn resolved<'d>(document: &'d Value, value: &'d Value) -> &'d Value {
    match value["$ref"].as_str() {
        Some(reference) => {
            let pointer = reference.strip_prefix('#').expect("within the document");
            document
                .pointer(pointer)
                .unwrap_or_else(|| panic!("{reference} names nothing"))
        }
        None => value,
    }
}

/// The schema, with what it refers to beside it.
fn validator(document: &Value, schema: &Value) -> jsonschema::Validator {
    let whole = json!({"allOf": [schema], "components": document["components"]});
    jsonschema::draft202012::new(&whole).expect("a schema of JSON Schema 2020-12")
}

/// Everything that has a schema and examples: how it is called, and the value of a media type or parameter.
fn described(document: &Value) -> Vec<(String, &Value)> {
    let mut all = Vec::new();
    for (path, item) in document["paths"].as_object().expect("paths") {
        for parameter in item["parameters"].as_array().into_iter().flatten() {
            all.push((format!("a parameter of {path}"), resolved(document, parameter)));
        }
        for (method, operation) in item
            .as_object()
            .expect("methods")
            .iter()
            .filter(|(key, _)| *key != "parameters")
        {
            let content = |what: &Value| resolved(document, what)["content"]["application/json"].is_object();
            if content(&operation["requestBody"]) {
                let body = &operation["requestBody"]["content"]["application/json"];
                all.push((format!("{method} {path}"), body));
            }
            for (status, response) in operation["responses"].as_object().expect("responses") {
                if content(response) {
                    let body = &resolved(document, response)["content"]["application/json"];
                    all.push((format!("{status} of {method} {path}"), body));
                }
            }
        }
    }
    all
}

#[test]
fn each_example_is_as_its_schema_says() {
    let document = document();
    let mut seen = 0;
    for (what, described) in described(&document) {
        let validator = validator(&document, &described["schema"]);
        let several = described["examples"]
            .as_object()
            .into_iter()
            .flatten()
            .map(|(_, example)| &example["value"]);
        for example in several.chain(described.get("example")) {
            seen += 1;
            let wrong: Vec<String> = validator.iter_errors(example).map(|error| error.to_string()).collect();
            assert!(wrong.is_empty(), "{what}: {wrong:?}");
        }
    }
    assert!(seen > 30, "{seen} examples were looked at");
}

#[test]
fn what_is_served_is_described_and_nothing_else() {
    let document = document();
    let described: BTreeSet<&str> = document["paths"]
        .as_object()
        .expect("paths")
        .keys()
        .map(String::as_str)
        .collect();
    let routes = SOURCES.iter().flat_map(|source| source.split(".route(").skip(1));
    let served: BTreeSet<&str> = routes
        .filter_map(|rest| rest.trim_start().strip_prefix('"')?.split('"').next())
        .collect();
    assert_eq!(served, described);
    let ours = include_str!("mod.rs").split(".route(").count() - 1;
    assert_eq!(ours, 0, "a subject has a file, which is among SOURCES");
}

#[test]
fn the_codes_that_are_described_are_codes() {
    let document = document();
    let codes = document.pointer("/components/schemas/Refusal/properties/error/properties/code/enum");
    let codes = codes.and_then(Value::as_array).expect("codes");
    for code in codes {
        let name = code.as_str().expect("a name");
        assert!(Code::from_str_name(name).is_some(), "{name}");
    }
}

#[test]
fn a_token_stands_behind_bearer_in_either_case_and_nowhere_else() {
    assert_eq!(bearer("Bearer abc"), Some("abc"));
    assert_eq!(bearer("bearer  abc "), Some("abc"));
    assert_eq!(bearer("Basic abc"), None);
    assert_eq!(bearer("abc"), None);
    assert_eq!(bearer("Bearer"), None);
}

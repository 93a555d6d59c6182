//! The JSON Schema of the report's form. Reports themselves are held against it in the tests, so that neither can change alone.

use serde_json::{Map, Value, json};

use super::SCHEMA;

/// A field: its name, its schema, what it says.
type Field = (&'static str, Value, &'static str);

/// Of a single report.
pub(super) fn report() -> Value {
    let mut schema = whole();
    schema["$schema"] = DIALECT.into();
    schema["title"] = "A run of the conformance suite".into();
    schema
}

/// Of reports side by side.
pub(super) fn set() -> Value {
    let mut schema = object(&[
        ("schema", json!({"const": SCHEMA}), "The version of this form, and of each report."),
        ("reports", json!({"type": "array", "items": whole()}), "One for each endpoint."),
    ]);
    schema["$schema"] = DIALECT.into();
    schema["title"] = "Runs of the conformance suite, side by side".into();
    schema
}

const DIALECT: &str = "https://json-schema.org/draft/2020-12/schema";

fn whole() -> Value {
    object(&[
        ("schema", json!({"const": SCHEMA}), "The version of this form."),
        ("suite", text(), "The version of the suite."),
        ("started", text(), "When it began (RFC 3339, UTC)."),
        ("duration_ms", count(), "How long it took."),
        ("platform", text(), "Operating system and architecture of the machine that ran the suite."),
        ("endpoint", endpoint(), "What was tested."),
        (
            "record",
            json!({"type": "object", "additionalProperties": true}),
            "Its capability record: native, {\"emulated\": price}, {\"refused\": what would give it}, or the field's own values.",
        ),
        ("settings", settings(), "How it was run: what it takes to run it again."),
        (
            "totals",
            counters(&["pass", "fail", "refused_and_verified", "inconclusive", "not_run"]),
            "How many cases ended how.",
        ),
        ("cases", json!({"type": "array", "items": case()}), "The cases, in the order of the list."),
    ])
}

fn endpoint() -> Value {
    optional(
        object(&[
            ("name", text(), "What the harness calls it."),
            ("scheme", text(), "The scheme of the adapter."),
            ("mode", text(), "The mode of the adapter."),
            ("url", text(), "The URL with its settings, without credentials."),
            ("server", text(), "Product and version of the server."),
            ("client", text(), "Product and version of the client library, where the harness knows it."),
            ("emulated", text(), "What stands in for the product, where it is not the product itself."),
        ]),
        &["client", "emulated"],
    )
}

fn settings() -> Value {
    object(&[
        ("seed", count(), "What everything random started from."),
        ("parallelism", count(), "How many cases ran at once."),
        ("filter", texts(), "The patterns of the cases that were chosen; empty for all."),
        ("level", level(), "The highest level."),
        ("lease_ms", count(), "The lease that cases waited for."),
        ("quiet_ms", count(), "How long nothing had to happen before an absence counted."),
        ("patience_ms", count(), "How long something might take that had to happen."),
        ("case_timeout_ms", count(), "How long one case might take."),
    ])
}

fn case() -> Value {
    let anomaly = object(&[
        ("name", text(), "Its class: lost, phantom, unjustified-duplicate, …."),
        ("group", text(), "The group it was seen in; empty where it concerns none."),
        ("id", text(), "The message."),
        ("detail", text(), "What was expected and what was found."),
    ]);
    let outcomes = ["pass", "fail", "refused_and_verified", "inconclusive", "not_run"];
    optional(
        object(&[
            ("name", text(), "Its name."),
            ("theme", text(), "Its theme."),
            ("level", level(), "What it takes to run it."),
            ("proves", text(), "The sentence of the contract that it proves."),
            ("needs", texts(), "The fields of the record that it needs."),
            ("outcome", json!({"enum": outcomes}), "What became of it."),
            ("detail", text(), "Why it did not pass, or what is refused."),
            ("duration_ms", count(), "How long it took."),
            (
                "counts",
                json!({"type": "object", "additionalProperties": count()}),
                "What its history is made of: published_ok, published_failed, published_unknown, delivered, \
                 duplicates_justified, duplicates_unjustified, acked, nacked, settle_failed, letters_read, faults, \
                 faults_met, recovery_ms.",
            ),
            ("anomalies", json!({"type": "array", "items": anomaly}), "What the checker found."),
            ("schedule", schedule(), "The faults of a case that failed."),
            (
                "history_file",
                text(),
                "Where its history lies, from the report's folder; the timeline is beside it as .html.",
            ),
        ]),
        &["schedule", "history_file"],
    )
}

fn schedule() -> Value {
    let shrunk = object(&[
        ("faults", numbers(), "The fewest faults with which it failed again; none where it did not fail again."),
        ("runs", count(), "How many more runs there were."),
        ("failed", count(), "In how many of them it failed in the same way."),
        ("is_minimal", json!({"type": "boolean"}), "Whether runs without any one of those faults passed."),
    ]);
    optional(
        object(&[
            ("faults", texts(), "All that the seed draws, in their order; they are numbered from 1."),
            ("only", numbers(), "Those that were to happen, where not all were."),
            ("shrunk", shrunk, "What it could be shrunk to, where that was tried."),
        ]),
        &["only", "shrunk"],
    )
}

fn numbers() -> Value {
    json!({"type": "array", "items": {"type": "integer", "minimum": 1}})
}

fn text() -> Value {
    json!({"type": "string"})
}

fn texts() -> Value {
    json!({"type": "array", "items": text()})
}

fn count() -> Value {
    json!({"type": "integer", "minimum": 0})
}

fn level() -> Value {
    json!({"enum": ["conformance", "reliability", "long"]})
}

fn counters(names: &[&'static str]) -> Value {
    let fields: Vec<Field> = names.iter().map(|name| (*name, count(), "")).collect();
    object(&fields)
}

/// All fields are required. Readers take fields that they do not know: new ones do not raise the version.
fn object(fields: &[Field]) -> Value {
    let mut properties = Map::new();
    for (name, schema, says) in fields {
        let mut schema = schema.clone();
        if !says.is_empty() {
            schema["description"] = (*says).into();
        }
        properties.insert((*name).to_owned(), schema);
    }
    let required: Vec<&str> = fields.iter().map(|(name, ..)| *name).collect();
    json!({"type": "object", "properties": properties, "required": required})
}

fn optional(mut schema: Value, names: &[&str]) -> Value {
    if let Some(required) = schema["required"].as_array_mut() {
        required.retain(|name| names.iter().all(|other| name != other));
    }
    schema
}

/// Everything in which a value differs from a schema of this file; also fields that the schema does not know.
#[cfg(test)]
pub(super) fn differences(value: &Value, schema: &Value, at: &str, found: &mut Vec<String>) {
    let mut wrong = |why: String| found.push(format!("{at}: {why}"));
    if let Some(only) = schema.get("const") {
        if value != only {
            wrong(format!("expected {only}, found {value}"));
        }
        return;
    }
    if let Some(allowed) = schema.get("enum").and_then(Value::as_array) {
        if !allowed.contains(value) {
            wrong(format!("expected one of {allowed:?}, found {value}"));
        }
        return;
    }
    match (schema["type"].as_str(), value) {
        (Some("string"), Value::String(_)) => {}
        (Some("integer"), Value::Number(number)) if number.is_u64() => {}
        (Some("array"), Value::Array(items)) => {
            for (index, item) in items.iter().enumerate() {
                differences(item, &schema["items"], &format!("{at}[{index}]"), found);
            }
        }
        (Some("object"), Value::Object(fields)) => {
            let missing = schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str);
            missing.filter(|name| !fields.contains_key(*name)).for_each(|name| wrong(format!("`{name}` is missing")));
            for (name, field) in fields {
                let known = schema["properties"].get(name).or_else(|| schema.get("additionalProperties"));
                match known {
                    None => found.push(format!("{at}: `{name}` is not in the schema")),
                    Some(Value::Bool(_)) => {}
                    Some(known) => differences(field, known, &format!("{at}.{name}"), found),
                }
            }
        }
        (Some("boolean"), Value::Bool(_)) => {}
        (expected, _) => wrong(format!("expected {expected:?}, found {value}")),
    }
}

//! README.md says what the code says. `UPDATE=1 cargo test -p anybroker --test readme` rewrites what is generated.
#![cfg(all(feature = "memory", feature = "embedded"))]

use std::fmt::Write;
use std::fs;
use std::path::PathBuf;

use anybroker::{Bus, Capabilities};
use serde_json::Value;

const BEGIN: &str = "<!-- guarantees:begin -->\n";
const END: &str = "<!-- guarantees:end -->";

#[tokio::test]
async fn the_guarantee_matrix_is_what_the_brokers_declare() {
    let folder = tempfile::tempdir().expect("a folder");
    let embedded = format!("embedded://{}", folder.path().join("broker.db").display());
    let endpoints = [
        ("memory", anybroker::connect("memory://").await.expect("memory")),
        ("embedded", anybroker::connect(embedded).await.expect("embedded")),
    ];
    let readme = fs::read_to_string(readme()).expect("README.md");
    let (before, rest) = readme.split_once(BEGIN).expect("the begin marker");
    let (found, after) = rest.split_once(END).expect("the end marker");
    let matrix = matrix(&endpoints);
    if std::env::var_os("UPDATE").is_some() {
        fs::write(self::readme(), format!("{before}{BEGIN}{matrix}{END}{after}")).expect("README.md is writable");
    } else {
        assert!(found == matrix, "the matrix in README.md is out of date; it should be:\n{matrix}");
    }
}

#[test]
fn the_example_is_the_one_that_is_compiled() {
    let readme = fs::read_to_string(readme()).expect("README.md");
    let library = include_str!("../src/lib.rs");
    let documented: Vec<&str> = library
        .lines()
        .map_while(|line| line.strip_prefix("//!"))
        .map(|line| line.strip_prefix(' ').unwrap_or(line))
        .skip_while(|line| !line.starts_with("```"))
        .skip(1)
        .take_while(|line| *line != "```")
        .filter(|line| !line.starts_with("# "))
        .collect();
    let example = documented.join("\n");
    assert!(documented.len() >= 8, "{example}");
    assert!(readme.contains(&format!("```rust\n{example}\n```")), "README.md should contain:\n{example}");
}

fn readme() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../README.md"))
}

/// A row for each field of the record, notes below.
fn matrix(endpoints: &[(&str, Bus)]) -> String {
    let records: Vec<&Capabilities> = endpoints.iter().map(|(_, bus)| bus.capabilities()).collect();
    let mut notes: Vec<String> = Vec::new();
    let mut table = String::new();
    let names: Vec<String> = endpoints.iter().map(|(name, _)| format!(" {name} |")).collect();
    writeln!(table, "\n| |{}\n|---|{}", names.concat(), "---|".repeat(names.len())).expect("a text");
    let columns: Vec<_> = records.iter().map(|record| rows(record)).collect();
    for (index, (name, _)) in columns[0].iter().enumerate() {
        // A limit that nobody has is no news.
        if columns.iter().all(|column| column[index].1.is_null()) {
            continue;
        }
        write!(table, "| `{name}` |").expect("a text");
        for column in &columns {
            write!(table, " {} |", cell(&column[index].1, &mut notes)).expect("a text");
        }
        table.push('\n');
    }
    table.push('\n');
    for (index, note) in notes.iter().enumerate() {
        writeln!(table, "{}. {note}", index + 1).expect("a text");
    }
    if !notes.is_empty() {
        table.push('\n');
    }
    table
}

/// The fields of the record, those of nested ones by path.
fn rows(record: &Capabilities) -> Vec<(String, Value)> {
    let mut rows = Vec::new();
    for (name, value) in record.fields() {
        match (name, value) {
            ("limits" | "lag", Value::Object(fields)) => {
                rows.extend(fields.into_iter().map(|(field, value)| (format!("{name}.{field}"), value)));
            }
            (_, value) => rows.push((name.to_owned(), value)),
        }
    }
    rows
}

fn cell(value: &Value, notes: &mut Vec<String>) -> String {
    match value {
        Value::Null => "none".into(),
        Value::Bool(yes) => if *yes { "yes" } else { "no" }.into(),
        Value::String(word) => word.replace('_', " "),
        // `{"emulated": "the price"}`, `{"refused": "the remedy"}`; `{"lanes": 12}`.
        Value::Object(tagged) if tagged.len() == 1 => {
            let (level, note) = tagged.iter().next().expect("one");
            match note {
                Value::String(note) => {
                    let known = notes.iter().position(|other| other == note);
                    let index = known.unwrap_or_else(|| {
                        notes.push(note.clone());
                        notes.len() - 1
                    });
                    format!("{level} ({})", index + 1)
                }
                other => format!("{level}: {other}"),
            }
        }
        other => other.to_string(),
    }
}

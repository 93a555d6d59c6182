//! README.md says what the code says. `UPDATE=1 cargo test -p anybroker --test readme` rewrites what is generated.
#![cfg(all(feature = "memory", feature = "embedded"))]

use std::fmt::Write;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anybroker::Capabilities;
use serde_json::Value;

const BEGIN: &str = "<!-- guarantees:begin -->\n";
const END: &str = "<!-- guarantees:end -->";

/// An endpoint whose record is kept in `docs/capabilities`, and where it is.
struct Endpoint {
    name: &'static str,
    built: bool,
    /// The variable with the URL of a server; without one, the URL itself.
    place: Place,
    /// Added to the URL.
    setting: &'static str,
}

enum Place {
    Url(&'static str),
    File,
    Server(&'static str),
}

const ENDPOINTS: &[Endpoint] = &[
    Endpoint { name: "memory", built: true, place: Place::Url("memory://"), setting: "" },
    Endpoint { name: "embedded", built: true, place: Place::File, setting: "" },
    server("kafka", cfg!(feature = "kafka"), "ANYBROKER_TEST_KAFKA_URL", ""),
    server("kafka-in-place", cfg!(feature = "kafka"), "ANYBROKER_TEST_KAFKA_URL", "nack=in_place"),
    server("rabbitmq", cfg!(feature = "rabbitmq"), "ANYBROKER_TEST_RABBITMQ_URL", ""),
    server("rabbitmq-classic", cfg!(feature = "rabbitmq"), "ANYBROKER_TEST_RABBITMQ_URL", "queue=classic"),
    server("rabbitmq-stream", cfg!(feature = "rabbitmq"), "ANYBROKER_TEST_RABBITMQ_URL", "queue=stream"),
    server("jetstream", cfg!(feature = "nats"), "ANYBROKER_TEST_NATS_URL", ""),
    server("sqs", cfg!(feature = "sqs"), "ANYBROKER_TEST_SQS_URL", ""),
    server("sqs-fifo", cfg!(feature = "sqs"), "ANYBROKER_TEST_SQS_URL", "mode=fifo"),
    server("sqs-fifo-total", cfg!(feature = "sqs"), "ANYBROKER_TEST_SQS_URL", "mode=fifo&message_group=one"),
    server("sqs-sns", cfg!(feature = "sqs"), "ANYBROKER_TEST_LOCALSTACK_URL", ""),
    server("sqs-sns-fifo", cfg!(feature = "sqs"), "ANYBROKER_TEST_LOCALSTACK_URL", "mode=fifo"),
    server("pulsar", cfg!(feature = "pulsar"), "ANYBROKER_TEST_PULSAR_URL", ""),
];

const fn server(name: &'static str, built: bool, variable: &'static str, setting: &'static str) -> Endpoint {
    Endpoint { name, built, place: Place::Server(variable), setting }
}

/// The records of servers are those of the versions that the tests run; where no server runs, they are taken as they are
/// kept.
#[tokio::test]
async fn what_is_kept_of_each_endpoint_is_what_it_declares() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut wrong = Vec::new();
    for endpoint in ENDPOINTS {
        let name = endpoint.name;
        let mut url = match endpoint.place {
            Place::Url(url) => url.to_owned(),
            Place::File => format!("embedded://{}", folder.path().join("broker.db").display()),
            Place::Server(variable) => match std::env::var(variable) {
                Ok(url) if endpoint.built => url,
                Ok(_) => {
                    println!("{name}: not run, its feature is off");
                    continue;
                }
                Err(_) => {
                    println!("{name}: not run, {variable} is not set");
                    assert!(std::env::var_os("ANYBROKER_TEST_REQUIRE_BROKERS").is_none(), "{variable} is not set");
                    continue;
                }
            },
        };
        if !endpoint.setting.is_empty() {
            url = format!("{url}{}{}", if url.contains('?') { '&' } else { '?' }, endpoint.setting);
        }
        let bus = anybroker::connect(url).await.unwrap_or_else(|error| panic!("{name}: {error}"));
        let declared = serde_json::to_string_pretty(bus.capabilities()).expect("JSON") + "\n";
        bus.close(Duration::from_secs(10)).await.expect("a close");
        if std::env::var_os("UPDATE").is_some() {
            fs::create_dir_all(record(name).parent().expect("a folder")).expect("docs is writable");
            fs::write(record(name), declared).expect("docs is writable");
        } else if fs::read_to_string(record(name)).ok() != Some(declared) {
            wrong.push(name);
        }
    }
    assert!(
        wrong.is_empty(),
        "the records of {wrong:?} in docs/capabilities are out of date: see the top of this file"
    );
    let endpoints: Vec<_> =
        ENDPOINTS.iter().filter_map(|endpoint| Some((endpoint.name, kept(endpoint.name)?))).collect();
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

fn record(name: &str) -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/capabilities")).join(format!("{name}.json"))
}

fn kept(name: &str) -> Option<Capabilities> {
    let text = fs::read_to_string(record(name)).ok()?;
    Some(serde_json::from_str(&text).unwrap_or_else(|error| panic!("docs/capabilities/{name}.json: {error}")))
}

/// Names of brokers in refusals, and the modes that are meant.
const MEANT: &[(&str, &[&str])] = &[
    ("the embedded broker", &["embedded"]),
    ("Kafka", &["kafka", "kafka-in-place"]),
    ("RabbitMQ", &["rabbitmq", "rabbitmq-classic", "rabbitmq-stream"]),
    ("JetStream", &["jetstream"]),
    ("NATS", &["jetstream"]),
    ("SQS FIFO", &["sqs-fifo", "sqs-fifo-total", "sqs-sns-fifo"]),
    ("SQS", &["sqs", "sqs-fifo", "sqs-fifo-total", "sqs-sns", "sqs-sns-fifo"]),
    ("Pulsar", &["pulsar"]),
];

/// Who follows the advice of a refusal must not be refused there as well.
#[test]
fn a_refusal_recommends_only_what_another_broker_has() {
    let records: Vec<(&str, Value)> = ENDPOINTS
        .iter()
        .filter_map(|endpoint| Some((endpoint.name, serde_json::to_value(kept(endpoint.name)?).expect("JSON"))))
        .collect();
    let has = |mode: &&str, field: &str| {
        let record = records.iter().find(|(name, _)| name == mode);
        record.is_some_and(|(_, record)| record[field].get("refused").is_none())
    };
    let (mut wrong, mut met) = (Vec::new(), 0);
    for (endpoint, record) in &records {
        for (field, value) in record.as_object().expect("an object") {
            let Some(advice) = value.get("refused").and_then(Value::as_str) else { continue };
            let mut rest = advice.to_owned();
            for (broker, modes) in MEANT {
                if !rest.contains(broker) {
                    continue;
                }
                rest = rest.replace(broker, "");
                if modes.iter().any(|mode| mode == endpoint) {
                    continue;
                }
                met += 1;
                if !modes.iter().any(|mode| has(mode, field)) {
                    wrong.push(format!("{endpoint}.{field}: \"{advice}\", and {broker} refuses it too"));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(met > 10, "only {met} refusals name another broker");
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
fn matrix(endpoints: &[(&str, Capabilities)]) -> String {
    let records: Vec<&Capabilities> = endpoints.iter().map(|(_, record)| record).collect();
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

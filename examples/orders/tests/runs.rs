//! The service on every broker that needs no server: the totals are those of the file, whatever carried the events.
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anybroker::{Config, ErrorKind, RedriveOptions};
use orders::service::{self, Settings, Summary};
use orders::totals::{Sums, Totals};
use serde_json::Value;
use tokio_util::sync::CancellationToken;

const FILE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/data/orders.jsonl");

#[tokio::test(flavor = "multi_thread")]
async fn totals_and_dead_letters_are_the_same_on_memory_and_on_embedded() {
    let folder = tempfile::tempdir().unwrap();
    for (name, config) in [("memory", memory()), ("embedded", embedded(folder.path()))] {
        let summary = run(config, &folder.path().join(format!("{name}.db"))).await;
        assert_eq!(summary.totals, expected(), "{name}");
        assert_eq!(letters(&summary), expected_letters(), "{name}");
        let fed = summary.fed.as_ref().unwrap();
        assert_eq!((fed.lines, fed.unreadable.len(), fed.failed.len()), (3060, 12, 0), "{name}");
        assert!(summary.duplicates >= 60, "{name}: each order that came twice, {}", summary.duplicates);
        let retried: u64 = summary.worked.subscriptions.iter().map(|part| part.counts.retried).sum();
        assert!(retried > 100, "{name}: a flaky gateway, {retried}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn totals_are_the_same_on_brokers_that_are_awkward() {
    let folder = tempfile::tempdir().unwrap();
    for profile in ["kafka", "rabbitmq", "jetstream", "sqs", "pulsar"] {
        let mut config = memory().with("memory.profile", profile).with("memory.seed", 7);
        if profile == "sqs" {
            // A standard queue has no order per key. The service can do without it, but has to say so.
            let refused = anybroker::connect_with(config.clone()).await.unwrap_err();
            assert_eq!(refused.kind(), ErrorKind::Unsupported);
            config = config.with("require", "groups,nack_delay,dead_letter,redrive").with("subscribe.order", "none");
        }
        let summary = run(config, &folder.path().join(format!("{profile}.db"))).await;
        assert_eq!(summary.totals, expected(), "{profile}");
    }
}

/// Real servers: the features of this crate bring their adapters in, `cargo xtask brokers up` names their URLs.
const SERVERS: &[(&str, bool, &str)] = &[
    ("kafka", cfg!(feature = "kafka"), "ANYBROKER_TEST_KAFKA_URL"),
    ("nats", cfg!(feature = "nats"), "ANYBROKER_TEST_NATS_URL"),
    ("pulsar", cfg!(feature = "pulsar"), "ANYBROKER_TEST_PULSAR_URL"),
    ("rabbitmq", cfg!(feature = "rabbitmq"), "ANYBROKER_TEST_RABBITMQ_URL"),
    // Three groups take SNS: LocalStack emulates it.
    ("sqs", cfg!(feature = "sqs"), "ANYBROKER_TEST_LOCALSTACK_URL"),
];

#[tokio::test(flavor = "multi_thread")]
async fn totals_are_the_same_on_every_server_that_runs() {
    let folder = tempfile::tempdir().unwrap();
    for (name, built, variable) in SERVERS {
        let Ok(url) = std::env::var(variable) else {
            println!("{name}: not run, {variable} is not set");
            assert!(std::env::var_os("ANYBROKER_TEST_REQUIRE_BROKERS").is_none(), "{variable} is not set");
            continue;
        };
        if !built {
            println!("{name}: not run, its feature is off");
            continue;
        }
        let file = format!(concat!(env!("CARGO_MANIFEST_DIR"), "/config/{}.toml"), name);
        // What the file says goes before what a URL says: the settings of this URL are set as such.
        let settings: Vec<_> = url.split_once('?').into_iter().flat_map(|(_, query)| query.split('&')).collect();
        let mut config = Config::from_file(&file).unwrap().with("url", url.as_str());
        let section = url.split_once(':').unwrap().0;
        for (key, value) in settings.iter().filter_map(|setting| setting.split_once('=')) {
            config = config.with(format!("{section}.{key}"), value);
        }
        let summary = run(config, &folder.path().join(name)).await;
        assert_eq!(summary.totals, expected(), "{name}");
        let fed = summary.fed.as_ref().unwrap();
        assert_eq!((fed.lines, fed.unreadable.len(), fed.failed.len()), (3060, 12, 0), "{name}");
        println!("{name}: the same totals as everywhere");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_run_on_the_same_broker_changes_no_total_and_a_redriven_letter_counts_once() {
    let folder = tempfile::tempdir().unwrap();
    let totals = folder.path().join("totals.db");
    run(embedded(folder.path()), &totals).await;
    let again = run(embedded(folder.path()), &totals).await;
    assert_eq!(again.totals, expected());

    let bus = anybroker::connect_with(embedded(folder.path())).await.unwrap();
    let mut options = RedriveOptions::default();
    options.filter.error_type = Some("SERVICE_UNAVAILABLE".into());
    let report = bus.dead_letters("orders", "payments").unwrap().redrive(&options).await.unwrap();
    assert_eq!((report.matched, report.moved), (20, 20), "ten letters of each run");
    bus.close(Duration::from_secs(60)).await.unwrap();

    let resumed = Settings { orders: None, all_banks: true, ..settings(embedded(folder.path()), &totals) };
    let resumed = service::run(resumed, CancellationToken::new()).await.unwrap();
    let (before, after) = (again.totals.all(), resumed.totals.all());
    assert_eq!(after.paid, before.paid + 10, "each order is paid once, although it was redriven twice");
    assert_eq!(Sums { paid: before.paid, paid_cents: before.paid_cents, ..after }, before);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_is_stopped_goes_on_where_it_was() {
    let folder = tempfile::tempdir().unwrap();
    let totals = folder.path().join("totals.db");
    let stop = CancellationToken::new();
    let running = tokio::spawn(service::run(settings(embedded(folder.path()), &totals), stop.clone()));
    // Not before it works, and well before it is done.
    while !Totals::read(&totals).is_ok_and(|totals| totals.all().orders > 0) {
        assert!(!running.is_finished(), "it ended before it did anything");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    stop.cancel();
    let stopped = running.await.unwrap().unwrap();
    assert_ne!(stopped.totals, expected(), "it was stopped in the middle");
    assert!(stopped.interrupted);
    assert_eq!(run(embedded(folder.path()), &totals).await.totals, expected());
}

#[test]
fn the_file_of_orders_is_what_the_generator_writes() {
    let written = Command::new(env!("CARGO_BIN_EXE_generate-orders")).output().unwrap();
    assert!(written.stdout == std::fs::read(FILE).unwrap(), "run the generator again, or take its change back");
}

async fn run(config: Config, totals: &Path) -> Summary {
    let summary = service::run(settings(config, totals), CancellationToken::new()).await.unwrap();
    assert!(!summary.interrupted);
    summary
}

fn settings(config: Config, totals: &Path) -> Settings {
    Settings { config, orders: Some(PathBuf::from(FILE)), totals: totals.to_owned(), all_banks: false }
}

/// The configurations that people copy, on another path.
fn embedded(folder: &Path) -> Config {
    let url = format!("embedded://{}", folder.join("broker.db").display());
    Config::from_file(concat!(env!("CARGO_MANIFEST_DIR"), "/config/embedded.toml")).unwrap().with("url", url)
}

fn memory() -> Config {
    Config::from_file(concat!(env!("CARGO_MANIFEST_DIR"), "/config/memory.toml")).unwrap()
}

fn letters(summary: &Summary) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    for (destination, group, letters) in &summary.dead_letters {
        for letter in letters {
            let class = letter.error_type.as_deref().unwrap_or_default();
            *counts.entry(format!("{destination} {group} {} {class}", letter.reason)).or_default() += 1;
        }
    }
    counts
}

fn expected_letters() -> BTreeMap<String, usize> {
    [
        ("orders payments rejected CARD_DECLINED", 33),
        ("orders payments rejected VALIDATION_ERROR", 21),
        ("orders payments rejected SCHEMA_MISMATCH", 15),
        ("orders payments attempts_exhausted SERVICE_UNAVAILABLE", 10),
        ("orders inventory rejected UNKNOWN_SKU", 6),
        ("orders inventory rejected SCHEMA_MISMATCH", 15),
        ("orders totals rejected SCHEMA_MISMATCH", 15),
    ]
    .into_iter()
    .map(|(name, count)| (name.to_owned(), count))
    .collect()
}

/// The totals as the file has them, added up without any of the service's code.
fn expected() -> Totals {
    let mut countries: BTreeMap<String, Sums> = BTreeMap::new();
    let mut seen = BTreeSet::new();
    for line in std::fs::read_to_string(FILE).unwrap().lines() {
        let Ok(order) = serde_json::from_str::<Value>(line) else { continue };
        let Some((total, units)) = total_and_units(&order) else { continue };
        if !seen.insert(order["order_id"].as_str().unwrap().to_owned()) {
            continue;
        }
        let sums = countries.entry(order["country"].as_str().unwrap().to_owned()).or_default();
        sums.orders += 1;
        sums.ordered_cents += total;
        let card = &order["card"];
        let expired = card["expires"].as_str().unwrap() < &order["placed_at"].as_str().unwrap()[..7];
        if !expired && !["tok_declined", "tok_bank_down"].contains(&card["token"].as_str().unwrap()) {
            sums.paid += 1;
            sums.paid_cents += total;
        }
        if order["items"].as_array().unwrap().iter().all(|item| item["sku"] != "CUP-GOLD") {
            sums.reserved += 1;
            sums.reserved_units += units;
        }
    }
    Totals { countries: countries.into_iter().collect() }
}

fn total_and_units(order: &Value) -> Option<(u64, u64)> {
    order["card"].as_object()?;
    let (mut total, mut units) = (0, 0);
    for item in order["items"].as_array()? {
        let quantity = item["quantity"].as_u64()?;
        total += quantity * item["unit_price_cents"].as_u64()?;
        units += quantity;
    }
    Some((total, units))
}

//! The conformance suite on a running server.
#![allow(clippy::unwrap_used)]

mod common;

use std::time::Duration;

use anybroker_conformance::{Options, UrlHarness};
use anybroker_conformance_native::channel;
use anybroker_testing::{judge, judge_faults};
use common::{try_connect, url};

/// Answers that are lost make unknown outcomes, and order meets every other fault.
const SHARE: [&str; 2] = ["faults/answers-that-are-lost-*", "faults/a-mixed-schedule-keeps-*"];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_default_mode_passes_every_case() {
    suite("rabbitmq", "", &[]).await;
}

/// A share of the cases, of all themes that the type of queue has to do with; `cargo xtask conform` runs all of them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_record_of_classic_queues_claims_holds_and_what_it_refuses_is_refused() {
    let share = ["ordering/*", "redelivery/*", "time/*", "dead-letter/*"];
    suite("rabbitmq-classic", "queue=classic", &share).await;
}

/// A share of the cases: what a log gives that queues do not, and what it does otherwise; `cargo xtask conform` runs all of
/// them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_record_of_streams_claims_holds_and_what_it_refuses_is_refused() {
    let share = ["groups/*", "settle/*", "lease/*", "dead-letter/*redrive*"];
    suite("rabbitmq-stream", "queue=stream", &share).await;
}

/// None are all.
async fn suite(name: &'static str, settings: &'static str, cases: &[&str]) {
    let Some(url) = url() else { return };
    let (fresh, strict) = (url.clone(), url.clone());
    let harness = UrlHarness::new(name, move || {
        let url = fresh.clone();
        Box::pin(async move { try_connect(&url, settings).await })
    })
    .with_strict(move || {
        let url = strict.clone();
        Box::pin(async move { try_connect(&url, &format!("{settings}&create_destinations=false")).await })
    })
    .with_native(
        channel(&url, |name| (name == "queue" && settings == "queue=stream").then(|| "stream".to_owned())).unwrap(),
    )
    .with_lease(Duration::from_secs(1))
    .with_quiet(Duration::from_millis(500));
    judge(harness, Options::default().with_parallelism(12), cases).await;
}

/// A share of them, with one seed; `cargo xtask faults rabbitmq` runs all of them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn faults_of_connections_break_no_promise() {
    let Some(url) = url() else { return };
    judge_faults(behind_proxies(&url), 3, &SHARE).await;
}

/// Clients go through proxies where a case wants that.
fn behind_proxies(url: &str) -> UrlHarness {
    UrlHarness::behind_proxies("rabbitmq", url, |url| Box::pin(async move { try_connect(&url, "").await }))
        .unwrap()
        .with_lease(Duration::from_secs(1))
        .with_quiet(Duration::from_secs(1))
}

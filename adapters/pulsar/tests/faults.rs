//! The suite's cases about faults, with proxies between the running server and its clients.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

mod common;

use std::sync::Arc;
use std::time::Duration;

use anybroker_conformance::{CaseReport, Level, Options, Outcome, UrlHarness, run};
use common::{try_connect, url};

/// A share of them; the seed fixes what happens, not when.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lost_answers_and_a_mixed_schedule_break_no_promise() {
    let cases = ["faults/answers-that-are-lost-*", "faults/a-mixed-schedule-keeps-*"];
    suite(cases.iter().fold(Options::default().with_seed(1), |options, case| options.with_filter(*case))).await;
}

/// All of them, on a seed that the report prints; `ANYBROKER_TEST_SEED` repeats it, `ANYBROKER_TEST_CASES` chooses cases.
#[ignore = "minutes: cargo test -p anybroker-pulsar --test faults -- --ignored"]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn faults_of_connections_break_no_promise() {
    let cases = std::env::var("ANYBROKER_TEST_CASES").unwrap_or_else(|_| "faults/*".into());
    let mut options = Options::default().with_filter(cases).with_parallelism(3);
    if let Ok(seed) = std::env::var("ANYBROKER_TEST_SEED") {
        options = options.with_seed(seed.parse().unwrap());
    }
    suite(options).await;
}

async fn suite(options: Options) {
    let Some(url) = url() else { return };
    // A standalone broker sends its clients through the address that they came by, whatever it advertises
    // (`proxy_through_service_url`, TopicLookupBase.java): a proxy may listen anywhere.
    let connect = |url: String| Box::pin(async move { try_connect(&url, "").await }) as _;
    let harness = UrlHarness::behind_proxies("pulsar", &url, connect)
        .unwrap()
        .with_lease(Duration::from_secs(1))
        .with_quiet(Duration::from_secs(1))
        .with_patience(Duration::from_secs(60));
    let report = run(Arc::new(harness), options.with_level(Level::Reliability)).await.unwrap();
    println!("{}", report.text());
    if let Some(directory) = std::env::var_os("ANYBROKER_TEST_REPORT") {
        report.write_dir(directory.as_ref()).unwrap();
    }
    let left_out = |case: &&CaseReport| case.outcome == Outcome::NotRun && !case.name.contains("a-server-");
    assert_eq!(report.cases.iter().find(left_out).map(|case| case.name), None, "a case about connections was not run");
    assert!(report.is_green(), "{}", report.summary());
}

//! The suite's cases about faults, with proxies between the running server and its clients.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

mod common;

use std::sync::Arc;
use std::time::Duration;

use anybroker_conformance::{CaseReport, Level, Options, Outcome, UrlHarness, run};
use common::{try_connect, url};

/// What is run with every change, with one seed; that fixes what happens, not when.
const SHARE: &[&str] = &["faults/answers-that-are-lost-*", "faults/a-mixed-schedule-keeps-*"];

/// A share of them; `cargo xtask faults pulsar` runs all of them, seed after seed. `ANYBROKER_TEST_CASES` and
/// `ANYBROKER_TEST_SEED` choose others.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn faults_of_connections_break_no_promise() {
    let Some(url) = url() else { return };
    // A standalone broker sends its clients through the address that they came by, whatever it advertises
    // (`proxy_through_service_url`, TopicLookupBase.java): a proxy may listen anywhere.
    let connect = |url: String| Box::pin(async move { try_connect(&url, "").await }) as _;
    let harness = UrlHarness::behind_proxies("pulsar", &url, connect)
        .unwrap()
        .with_lease(Duration::from_secs(1))
        .with_quiet(Duration::from_secs(1))
        .with_patience(Duration::from_secs(60));
    let seed = std::env::var("ANYBROKER_TEST_SEED").map_or(1, |seed| seed.parse().unwrap());
    let options = Options::default().with_level(Level::Reliability).with_parallelism(3).with_seed(seed);
    let options = match std::env::var("ANYBROKER_TEST_CASES") {
        Ok(chosen) => options.with_filter(chosen),
        Err(_) => SHARE.iter().fold(options, |options, case| options.with_filter(*case)),
    };
    let report = run(Arc::new(harness), options).await.unwrap();
    println!("{}", report.text());
    let left_out = |case: &&CaseReport| case.outcome == Outcome::NotRun && !case.name.contains("a-server-");
    assert_eq!(report.cases.iter().find(left_out).map(|case| case.name), None, "a case about connections was not run");
    assert!(report.is_green(), "{}", report.summary());
}

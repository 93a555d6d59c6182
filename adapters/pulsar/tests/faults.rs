//! The suite's cases about faults, with proxies between the running server and its clients.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

mod common;

use std::sync::Arc;
use std::time::Duration;

use anybroker_conformance::{CaseReport, Level, Options, Outcome, UrlHarness, run};
use common::{try_connect, url};

/// What is run with every change, with one seed; that fixes what happens, not when.
const SHARE: &[&str] = &["faults/answers-that-are-lost-*", "faults/a-mixed-schedule-keeps-*"];

/// A share of them, or with `ANYBROKER_TEST_SEED` all of them, or those that `ANYBROKER_TEST_CASES` names.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn faults_of_connections_break_no_promise() {
    let seed = std::env::var("ANYBROKER_TEST_SEED").ok().map(|seed| seed.parse().unwrap());
    let cases = match std::env::var("ANYBROKER_TEST_CASES") {
        Ok(cases) => vec![cases],
        Err(_) if seed.is_some() => vec!["faults/*".to_owned()],
        Err(_) => SHARE.iter().map(|case| (*case).to_owned()).collect(),
    };
    let options = Options::default().with_seed(seed.unwrap_or(1)).with_parallelism(3);
    suite(cases.into_iter().fold(options, Options::with_filter)).await;
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

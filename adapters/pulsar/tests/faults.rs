//! The suite's cases about faults, with proxies between the running server and its clients.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

mod common;

use std::time::Duration;

use anybroker_conformance::UrlHarness;
use anybroker_testing::judge_faults;
use common::{try_connect, url};

/// What is run with every change.
const SHARE: &[&str] = &["faults/answers-that-are-lost-*", "faults/a-mixed-schedule-keeps-*"];

/// A share of them; `cargo xtask faults pulsar` runs all of them, seed after seed.
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
    judge_faults(harness, 3, SHARE).await;
}

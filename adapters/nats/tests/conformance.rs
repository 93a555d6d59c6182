//! The conformance suite on a running server.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

mod common;

use std::sync::Arc;
use std::time::Duration;

use anybroker_conformance::mutants::mutants_in_faults;
use anybroker_conformance::{Level, Options, Outcome, UrlHarness, run};
use anybroker_conformance_native::channel;
use anybroker_testing::{judge, judge_faults};
use common::{try_connect, url};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_default_mode_passes_every_case() {
    let Some(url) = url() else { return };
    let (fresh, strict) = (url.clone(), url.clone());
    let harness = UrlHarness::new("nats", move || {
        let url = fresh.clone();
        Box::pin(async move { try_connect(&url, "").await })
    })
    .with_strict(move || {
        let url = strict.clone();
        Box::pin(async move { try_connect(&url, "create_destinations=false").await })
    })
    .with_native(channel(&url, |_| None).unwrap())
    .with_lease(Duration::from_secs(1))
    .with_quiet(Duration::from_millis(500));
    judge(harness, Options::default(), &[]).await;
}

/// The cases that run with every change.
const SHARE: [&str; 2] = ["faults/a-black-hole-*", "faults/a-mixed-schedule-keeps-*"];

/// A share of them, with one seed; `cargo xtask faults nats` runs all of them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn faults_of_connections_break_no_promise() {
    let Some(url) = url() else { return };
    judge_faults(behind_proxies(&url), 3, &SHARE).await;
}

/// One of them also shows that a schedule is shrunk; the other one takes its whole patience to fail.
const SHRUNK: &str = "unknown-publish-is-not-done";

/// Those cases can fail: adapters that are wrong in faults only are found.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn mutants_that_are_wrong_in_faults_only_are_killed_by_the_cases_named_for_them() {
    let Some(url) = url() else { return };
    let mut survivors = Vec::new();
    for mutant in mutants_in_faults() {
        let options = Options::default().with_level(Level::Reliability).with_filter(mutant.killed_by).with_seed(1);
        let options = options.with_shrinking(if mutant.name == SHRUNK { 2 } else { 0 });
        let report = run(Arc::new(mutant.harness(Arc::new(behind_proxies(&url)))), options).await.unwrap();
        let case = report.case(mutant.killed_by).unwrap();
        println!("{} {:?}: {}", mutant.name, case.outcome, case.detail.chars().take(160).collect::<String>());
        if case.outcome != Outcome::Fail || case.anomalies.is_empty() {
            survivors.push(mutant.name);
            continue;
        }
        let schedule = case.schedule.as_ref().unwrap();
        if let Some(shrunk) = &schedule.shrunk {
            println!("of {} faults it takes {:?}", schedule.faults.len(), shrunk.faults);
            assert!(!shrunk.faults.is_empty() && shrunk.failed > 0, "{schedule:?}");
        }
    }
    assert!(survivors.is_empty(), "{survivors:?}");
}

/// Clients go through proxies where a case wants that.
fn behind_proxies(url: &str) -> UrlHarness {
    UrlHarness::behind_proxies("nats", url, |url| Box::pin(async move { try_connect(&url, "").await }))
        .unwrap()
        .with_lease(Duration::from_secs(1))
        .with_quiet(Duration::from_secs(1))
}

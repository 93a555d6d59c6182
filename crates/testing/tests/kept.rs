//! A suite that fails leaves what it saw behind.

#![allow(clippy::unwrap_used, reason = "test code")]

use std::time::Duration;

use anybroker_conformance::{Options, ReportSet, UrlHarness};
use anybroker_memory::Memory;
use anybroker_testing::judge;

#[test]
fn the_report_of_a_suite_that_fails_is_kept_with_its_histories_where_the_failure_says() {
    let suite = || {
        // Each client has a broker of its own, so that none sees what another one published.
        let harness = UrlHarness::new("apart", || Box::pin(async { Ok(Memory::new().bus()) }));
        let harness = harness.with_quiet(Duration::from_millis(100)).with_patience(Duration::from_secs(1));
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        runtime.block_on(judge(harness, Options::default(), &["delivery/a-fresh-client-*"]));
    };
    let told = std::panic::catch_unwind(suite).unwrap_err();
    let told = told.downcast_ref::<String>().unwrap();
    let (_, folder) = told.rsplit_once("of each: ").unwrap_or_else(|| panic!("{told}"));
    let folder = std::path::Path::new(folder);
    assert!(folder.ends_with("the_report_of_a_suite_that_fails_is_kept_with_its_histories_where_the_failure_says"));
    let kept = ReportSet::read(&folder.join("report.json")).unwrap();
    let case = kept.reports[0].failures().next().unwrap();
    let history = folder.join(case.history_file.as_ref().unwrap());
    assert!(std::fs::read_to_string(&history).unwrap().contains("publish_invoke"), "{}", history.display());
    assert!(history.with_extension("html").is_file());
}

//! The cases about clusters pass on three nodes in name only, and each finds what is wrong with others.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "test code")]

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use anybroker_conformance::mutants::{Mutant, mutants_in_clusters, unmutated_cluster};
use anybroker_conformance::{CaseReport, Harness, Level, Options, Outcome, UrlHarness, cases, run};
use anybroker_memory::Memory;
use futures_util::StreamExt;

/// How long nodes are away, too.
const PATIENCE: Duration = Duration::from_secs(5);

fn memory() -> Arc<dyn Harness> {
    let memory = Memory::builder().build();
    let harness = UrlHarness::new("memory", move || {
        let memory = memory.clone();
        Box::pin(async move { Ok(memory.bus()) })
    });
    Arc::new(harness.with_quiet(Duration::from_millis(100)).with_patience(PATIENCE))
}

async fn on(mutant: Mutant, case: &'static str) -> CaseReport {
    let options = Options::default().with_level(Level::Long).with_filter(case);
    let mut cases = run(Arc::new(mutant.harness(memory())), options).await.unwrap().cases;
    assert_eq!(cases.len(), 1, "{case}");
    cases.remove(0)
}

fn of_clusters() -> BTreeSet<&'static str> {
    cases().iter().filter(|case| case.theme() == "cluster").map(|case| case.name).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_nodes_without_a_fault_pass_every_case() {
    let mut runs = futures_util::stream::iter(of_clusters()).map(|case| on(unmutated_cluster(), case)).buffered(5);
    while let Some(case) = runs.next().await {
        assert_eq!(case.outcome, Outcome::Pass, "{}: {}", case.name, case.detail);
        assert!(case.counts.faults_met > 0 && case.counts.published_ok > 1_000, "{}: {:?}", case.name, case.counts);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_flaw_of_a_cluster_is_found_by_the_case_named_for_it() {
    let killed_by: BTreeSet<_> = mutants_in_clusters().iter().map(|mutant| mutant.killed_by).collect();
    assert_eq!(killed_by, of_clusters(), "each case kills one");
    let runs =
        mutants_in_clusters().into_iter().map(|mutant| async move { (mutant, on(mutant, mutant.killed_by).await) });
    let mut runs = futures_util::stream::iter(runs).buffered(5);
    let mut survivors = Vec::new();
    while let Some((mutant, case)) = runs.next().await {
        let detail: String = case.detail.chars().take(240).collect();
        println!("{:45} {:?} {detail}", mutant.name, case.outcome);
        if case.outcome != Outcome::Fail {
            survivors.push(mutant.name);
        }
    }
    assert!(survivors.is_empty(), "{survivors:#?}");
}

#[tokio::test]
async fn where_there_are_no_nodes_the_cases_are_not_run_and_say_why() {
    // What memory refuses is not asked for.
    for case in cases().iter().filter(|case| case.theme() == "cluster" && case.needs.is_empty()) {
        let options = Options::default().with_level(Level::Long).with_filter(case.name);
        let report = run(memory(), options).await.unwrap();
        assert_eq!(report.cases[0].outcome, Outcome::NotRun, "{}", report.text());
        assert!(report.cases[0].detail.contains("no server in its hands"), "{}", report.text());
    }
}

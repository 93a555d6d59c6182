//! Every mutant of the reference is killed by the case that is named for it, and the reference passes all.

#![allow(clippy::unwrap_used, clippy::print_stdout)]

use std::sync::Arc;
use std::time::Duration;

use anybroker_conformance::mutants::{Mutant, mutants, unmutated};
use anybroker_conformance::{CaseReport, Harness, Level, Options, Outcome, UrlHarness, cases, run};
use anybroker_memory::{Memory, MemoryBuilder};
use futures_util::StreamExt;

fn memory(patience: Duration) -> Arc<dyn Harness> {
    let clients = |builder: MemoryBuilder| {
        let memory = builder.build();
        move || -> futures_util::future::BoxFuture<'static, anybroker_core::Result<anybroker_core::Bus>> {
            let memory = memory.clone();
            Box::pin(async move { Ok(memory.bus()) })
        }
    };
    let harness = UrlHarness::new("memory", clients(Memory::builder()))
        .with_strict(clients(Memory::builder().create_destinations(false)))
        .with_lease(Duration::from_millis(500))
        .with_quiet(Duration::from_millis(100))
        .with_patience(patience);
    Arc::new(harness)
}

async fn on(mutant: Mutant, patience: Duration, options: Options) -> Vec<CaseReport> {
    run(Arc::new(mutant.harness(memory(patience))), options).await.unwrap().cases
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_wrapper_without_a_fault_passes_every_case() {
    let reports = on(unmutated(), Duration::from_secs(30), Options::default().with_parallelism(16)).await;
    let failed: Vec<_> = reports
        .iter()
        .filter(|case| matches!(case.outcome, Outcome::Fail | Outcome::Inconclusive))
        .map(|case| format!("{}: {}", case.name, case.detail))
        .collect();
    assert!(failed.is_empty(), "{failed:#?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_mutant_is_killed_by_the_case_named_for_it() {
    // What a mutant has lost does not come: the case that waits for it waits so long.
    const PATIENCE: Duration = Duration::from_secs(5);
    let mut survivors = Vec::new();
    let mut runs = futures_util::stream::iter(mutants())
        .map(|mutant| async move {
            let options = Options::default().with_level(Level::Long).with_filter(mutant.killed_by);
            (mutant, on(mutant, PATIENCE, options).await)
        })
        .buffered(8);
    let mut count = 0;
    while let Some((mutant, reports)) = runs.next().await {
        count += 1;
        assert_eq!(reports.len(), 1, "{}: there is no case `{}`", mutant.name, mutant.killed_by);
        let case = &reports[0];
        let killed = case.outcome == Outcome::Fail;
        let detail: String = case.detail.chars().take(160).collect();
        println!("{} {:30} {}\n      {detail}", if killed { "killed  " } else { "SURVIVED" }, mutant.name, case.name);
        if !killed {
            survivors.push(format!("{} ({}) survives {}: {:?}", mutant.name, mutant.fault, case.name, case.outcome));
        }
    }
    println!("{count} mutants, {} survivors", survivors.len());
    assert!(survivors.is_empty(), "{survivors:#?}");
    assert!(count >= 12);
}

#[test]
fn every_case_has_a_name_and_a_promise_of_its_own() {
    let mut names: Vec<_> = cases().iter().map(|case| case.name).collect();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), cases().len());
    for case in cases() {
        let (theme, rest) = case.name.split_once('/').unwrap();
        assert!(!theme.is_empty() && !rest.is_empty() && case.proves.ends_with('.'), "{}", case.name);
    }
}

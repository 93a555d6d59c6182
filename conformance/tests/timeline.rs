//! The page of a failed case tells what is wrong, with the whole story of the message concerned.

#![allow(clippy::unwrap_used, reason = "test code")]

use std::sync::Arc;
use std::time::Duration;

use anybroker_conformance::mutants::{Mutant, mutants};
use anybroker_conformance::{Harness, Options, Report, ReportSet, UrlHarness, run};
use anybroker_memory::Memory;

fn mutant(name: &str) -> Mutant {
    mutants().into_iter().find(|mutant| mutant.name == name).unwrap()
}

async fn on(mutant: Mutant) -> Report {
    let memory = Memory::new();
    let harness = UrlHarness::new("memory", move || {
        let memory = memory.clone();
        Box::pin(async move { Ok(memory.bus()) })
    });
    let harness = harness.with_lease(Duration::from_millis(500)).with_quiet(Duration::from_millis(100));
    let harness: Arc<dyn Harness> = Arc::new(harness.with_patience(Duration::from_secs(5)));
    run(Arc::new(mutant.harness(harness)), Options::default().with_filter(mutant.killed_by)).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_timeline_of_a_broker_that_delivers_twice_shows_both_deliveries_of_that_message() {
    let report = on(mutant("double-deliver")).await;
    let case = report.failures().next().unwrap();
    let message = &case.anomalies.first().unwrap_or_else(|| panic!("{}", case.detail)).id;
    let page = case.timeline().unwrap();
    let story = page.split("<h2>").find(|part| part.contains(message.as_str()) && part.contains("<table>")).unwrap();
    assert!(story.contains("publishes it to") && story.contains("publish is confirmed"), "{story}");
    assert!(story.matches("gets it as delivery").count() >= 2, "{story}");
    // In the drawing it is the one that stands out.
    assert!(page.contains("focus c0") && page.contains("class='way c0'"));
    assert!(!page.contains("<script") && !page.contains("src=") && !page.contains("href="));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_summary_for_a_terminal_tells_what_befell_the_message() {
    let report = on(mutant("double-deliver")).await;
    let message = report.failures().next().unwrap().anomalies[0].id.clone();
    let summary = report.summary();
    let (_, story) = summary.split_once(&format!(" {message}\n")).unwrap_or_else(|| panic!("{summary}"));
    let told: Vec<&str> = story.lines().take_while(|line| line.contains(" ms  client ")).collect();
    assert!(told[0].contains("publishes it to"), "{summary}");
    assert_eq!(told.iter().filter(|line| line.contains("gets it as delivery")).count(), 2, "{summary}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_that_was_nacked_and_never_came_again_stands_out() {
    let report = on(mutant("drop-on-nack")).await;
    let page = report.failures().next().unwrap().timeline().unwrap();
    assert!(page.contains("<svg") && page.contains("client 0") && page.contains("settles delivery"));
    assert!(page.contains("class='d nack focus"), "the nacked delivery stands out");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_written_report_links_each_failed_case_to_its_timeline() {
    let folder = std::env::temp_dir().join(format!("anybroker-timeline-{}", std::process::id()));
    let report = on(mutant("double-deliver")).await;
    report.write_dir(&folder).unwrap();
    let read = ReportSet::read(&folder.join("report.json")).unwrap();
    let file = read.reports[0].failures().next().unwrap().history_file.clone().unwrap();
    let page = file.replace(".jsonl", ".html");
    assert!(folder.join(&file).is_file() && folder.join(&page).is_file(), "{page}");
    assert!(report.html().contains(&format!("href='{page}'")));
    std::fs::remove_dir_all(&folder).unwrap();
}

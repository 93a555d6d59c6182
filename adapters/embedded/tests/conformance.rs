//! The conformance suite on the embedded broker.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "test code")]

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anybroker_conformance::{Options, UrlHarness, run};
use anybroker_core::{Bus, BusOptions, Clock, Config, ManualClock, Registry, Result};
use anybroker_embedded::{EmbeddedBroker, EmbeddedDriver, Settings};

async fn connect(path: PathBuf, query: &'static str) -> Result<Bus> {
    let url = format!("embedded://{}?{query}", path.display());
    Registry::new().with(EmbeddedDriver).connect(Config::from_url(url)).await
}

/// Every client is a connection of its own to one file, as those of several processes are.
fn harness(path: &Path, query: &'static str, strict: &'static str) -> UrlHarness {
    let (path, strict_path) = (path.to_owned(), path.to_owned());
    UrlHarness::new(format!("embedded ({query})"), move || Box::pin(connect(path.clone(), query)))
        .with_strict(move || Box::pin(connect(strict_path.clone(), strict)))
        .with_lease(Duration::from_millis(500))
        .with_quiet(Duration::from_millis(150))
        .with_patience(Duration::from_secs(30))
}

async fn must_be_green(harness: UrlHarness, options: Options) {
    let report = run(Arc::new(harness), options).await.unwrap();
    println!("{}", report.text());
    assert!(report.is_green(), "{}", report.summary());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_passes_every_case_with_synced_commits() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("events.db");
    let harness = harness(&path, "durability=synced", "durability=synced&create_destinations=false");
    must_be_green(harness, Options::default().with_parallelism(8)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_passes_every_case_with_grouped_commits() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("events.db");
    let harness = harness(&path, "durability=grouped", "durability=grouped&create_destinations=false");
    must_be_green(harness, Options::default().with_parallelism(8)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_passes_on_a_clock_that_is_turned_by_hand() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("events.db");
    let clock = ManualClock::new();
    let open = move |path: PathBuf, clock: ManualClock, create: bool| async move {
        let mut settings = Settings::new(path);
        settings.create_destinations = create;
        let clock: Arc<dyn Clock> = Arc::new(clock);
        let broker = EmbeddedBroker::open_with_clock(settings, clock).await?;
        Ok(Bus::new(Arc::new(broker), BusOptions::default()))
    };
    let (loose, strict) = ((path.clone(), clock.clone()), (path, clock.clone()));
    let harness =
        UrlHarness::new("embedded on a manual clock", move || Box::pin(open(loose.0.clone(), loose.1.clone(), true)))
            .with_strict(move || Box::pin(open(strict.0.clone(), strict.1.clone(), false)))
            .with_lease(Duration::from_secs(30))
            .with_quiet(Duration::from_millis(100))
            .with_patience(Duration::from_secs(30))
            .with_clock(clock);
    must_be_green(harness, Options::default()).await;
}

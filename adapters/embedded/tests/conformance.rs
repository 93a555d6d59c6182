//! The conformance suite on the embedded broker.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "test code")]

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anybroker_conformance::{Level, Options, Outcome, ServerControl, UrlHarness, run};
use anybroker_core::{Bus, BusOptions, Clock, Config, ManualClock, Registry, Result};
use anybroker_embedded::{EmbeddedBroker, EmbeddedDriver, Settings};
use async_trait::async_trait;
use rusqlite::Connection;

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

/// Somebody who holds the file: nobody else can write until he lets go of it, as while a server is frozen.
struct Holder {
    path: PathBuf,
    held: Mutex<Option<Connection>>,
}

#[async_trait]
impl ServerControl for Holder {
    async fn kill(&self) -> std::result::Result<(), String> {
        Err("there is no server; processes that have the file open are killed in tests/crash.rs".into())
    }

    async fn restart(&self) -> std::result::Result<(), String> {
        self.kill().await
    }

    async fn pause(&self) -> std::result::Result<(), String> {
        let path = self.path.clone();
        let begin = move || {
            let mut connection = Connection::open(path)?;
            // At once when a commit ends: what is published meanwhile must not be all there is.
            connection.busy_handler(Some(|_| {
                std::thread::yield_now();
                true
            }))?;
            connection.execute_batch("BEGIN IMMEDIATE")?;
            Ok(connection)
        };
        let begun = tokio::task::spawn_blocking(begin).await.unwrap();
        let connection = begun.map_err(|error: rusqlite::Error| error.to_string())?;
        *self.held.lock().unwrap() = Some(connection);
        Ok(())
    }

    async fn resume(&self) -> std::result::Result<(), String> {
        let connection = self.held.lock().unwrap().take().ok_or("nobody holds the file")?;
        connection.execute_batch("ROLLBACK").map_err(|error| error.to_string())
    }
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

/// Longer than a publish may take. Of the cases about a server no other has a meaning here; those about killed
/// processes are run by `anybroker conform`, and `crash.rs` kills more of them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_that_somebody_holds_for_a_while_loses_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("events.db");
    let holder = Arc::new(Holder { path: path.clone(), held: Mutex::default() });
    let harness =
        harness(&path, "durability=synced", "durability=synced&create_destinations=false").with_server(holder);
    let options = Options::default().with_level(Level::Reliability).with_filter("faults/a-server-that-is-frozen*");
    let report = run(Arc::new(harness), options).await.unwrap();
    println!("{}", report.text());
    let outcomes: Vec<Outcome> = report.cases.iter().map(|case| case.outcome).collect();
    assert_eq!(outcomes, [Outcome::Pass], "{}", report.summary());
    let counts = &report.cases[0].counts;
    assert_eq!(counts.faults_met, 1, "{counts:?}");
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
    let harness = || {
        let (loose, strict) = ((path.clone(), clock.clone()), (path.clone(), clock.clone()));
        UrlHarness::new("embedded on a manual clock", move || Box::pin(open(loose.0.clone(), loose.1.clone(), true)))
            .with_strict(move || Box::pin(open(strict.0.clone(), strict.1.clone(), false)))
            .with_lease(Duration::from_secs(30))
            .with_quiet(Duration::from_millis(100))
            .with_patience(Duration::from_secs(30))
            .with_clock(clock.clone())
    };
    must_be_green(harness(), Options::default()).await;
    // On this clock minutes take no time.
    must_be_green(harness(), Options::default().with_level(Level::Long).with_filter("long/*")).await;
}

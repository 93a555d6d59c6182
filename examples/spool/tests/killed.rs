//! Publishers and members in processes of their own, which the suite kills.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "test code")]

use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use anybroker_conformance::{CHILD_JOB, Level, Options, UrlHarness, run, run_child};
use anybroker_core::{Bus, Config, Registry, Result};
use spool::SpoolDriver;

async fn connect(folder: PathBuf) -> Result<Bus> {
    Registry::new().with(SpoolDriver).connect(Config::from_url(format!("spool://{}", folder.display()))).await
}

const FOLDER: &str = "SPOOL_TEST_FOLDER";

/// What the suite kills: this program again, with the name of this test.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_process_of_the_suite() {
    let Some(folder) = std::env::var_os(FOLDER).filter(|_| std::env::var_os(CHILD_JOB).is_some()) else { return };
    run_child(move || Box::pin(connect(PathBuf::from(&folder)))).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn publishers_and_members_that_are_killed_lose_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let (path, named) = (folder.path().to_owned(), folder.path().to_owned());
    let harness = UrlHarness::new("spool", move || Box::pin(connect(path.clone())))
        .with_lease(Duration::from_secs(1))
        .with_quiet(Duration::from_millis(300))
        .with_child(move || {
            let mut own = Command::new(std::env::current_exe().unwrap());
            own.args(["--exact", "a_process_of_the_suite", "--nocapture"]).env(FOLDER, &named);
            own
        });
    let options = Options::default().with_level(Level::Reliability).with_filter("faults/a-*-whose-process-is-killed-*");
    let options = options.with_filter("faults/a-member-that-stands-still-*");
    let report = run(Arc::new(harness), options).await.unwrap();
    println!("{}", report.text());
    assert!(report.is_green() && report.totals.pass == 4, "{}", report.text());
}

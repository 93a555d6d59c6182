//! What the record claims holds, what it refuses is refused.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "test code")]

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anybroker_conformance::{Options, UrlHarness, run};
use anybroker_core::{Bus, Config, Registry, Result};
use spool::SpoolDriver;

/// Every client is a connection of its own, as those of several processes are.
async fn connect(folder: PathBuf, settings: &'static str) -> Result<Bus> {
    let url = format!("spool://{}?{settings}", folder.display());
    Registry::new().with(SpoolDriver).connect(Config::from_url(url)).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_record_claims_holds_and_what_it_refuses_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (loose, strict) = (folder.path().to_owned(), folder.path().to_owned());
    let harness = UrlHarness::new("spool", move || Box::pin(connect(loose.clone(), "create_destinations=true")))
        .with_strict(move || Box::pin(connect(strict.clone(), "create_destinations=false")))
        .with_lease(Duration::from_secs(1))
        .with_quiet(Duration::from_millis(300));
    let report = run(Arc::new(harness), Options::default().with_parallelism(4)).await.unwrap();
    println!("{}", report.text());
    assert!(report.is_green(), "{}", report.summary());
    assert!(report.totals.refused_and_verified >= 5, "{}", report.summary());
}

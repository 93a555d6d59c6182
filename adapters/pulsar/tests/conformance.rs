//! The conformance suite on a running server.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

mod common;

use std::time::Duration;

use anybroker_conformance::{Options, UrlHarness};
use anybroker_conformance_native::channel;
use anybroker_testing::judge;
use common::{try_connect, url};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_default_mode_passes_every_case() {
    let Some(url) = url() else { return };
    let (fresh, strict) = (url.clone(), url.clone());
    let harness = UrlHarness::new("pulsar", move || {
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

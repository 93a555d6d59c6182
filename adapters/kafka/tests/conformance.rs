//! The conformance suite on a running server: what the record claims holds, what it refuses is refused.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "test code")]

mod common;

use std::time::Duration;

use anybroker_conformance::{Options, UrlHarness};
use anybroker_conformance_native::channel;
use anybroker_testing::judge;
use common::{try_connect, url};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_record_claims_holds_and_what_it_refuses_is_refused() {
    suite("", "create_destinations=false").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn failures_that_are_held_in_place_keep_what_the_record_claims() {
    suite("nack=in_place", "nack=in_place&create_destinations=false").await;
}

async fn suite(settings: &'static str, strict_settings: &'static str) {
    let Some(url) = url() else { return };
    let strict = url.clone();
    let name = url.clone();
    let native = channel(&url, |_| None).unwrap();
    let harness = UrlHarness::new(name, move || Box::pin(try_connect(url.clone(), settings)))
        .with_strict(move || Box::pin(try_connect(strict.clone(), strict_settings)))
        .with_native(native)
        .with_lease(Duration::from_secs(2))
        .with_patience(Duration::from_secs(60));
    judge(harness, Options::default().with_parallelism(16), &[]).await;
}

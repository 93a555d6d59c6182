//! Clients that lose their permissions while they work, and get them back, on a server of this test's own.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "test code")]

mod common;

use std::sync::Arc;
use std::time::Duration;

use anybroker_conformance::UrlHarness;
use anybroker_testing::{OwnServer, judge_server};
use common::{try_connect, url};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_that_are_locked_out_are_told_so_and_go_on_when_they_are_let_in_again() {
    if url().is_none() {
        return;
    }
    let Some(server) = OwnServer::start("kafka", "locked-out") else { return };
    let url = server.url.clone();
    let harness = UrlHarness::new("kafka", move || Box::pin(try_connect(url.clone(), "")))
        .with_server(Arc::new(server))
        .with_lease(Duration::from_secs(2))
        .with_patience(Duration::from_secs(60));
    judge_server(harness, &["faults/clients-that-are-locked-out-*"]).await;
}

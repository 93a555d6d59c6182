//! Clients that lose their permissions while they work, and get them back, on a server of this test's own.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "test code")]

mod common;

use std::sync::Arc;
use std::time::Duration;

use anybroker_conformance::UrlHarness;
use anybroker_testing::{OwnServer, judge_server};
use common::{try_connect, url};

/// The token of the role that `cargo xtask brokers lock-out pulsar` locks out: `suite`, signed with the key of those servers
/// (`crates/xtask/src/brokers/pulsar.rs`).
const TOKEN: &str = "token=eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJzdWl0ZSJ9.TaFAJX6hEdCgSEvkT-DSpuv7C0bXkz9CmKbV37t_oys";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_that_are_locked_out_are_told_so_and_go_on_when_they_are_let_in_again() {
    if url().is_none() {
        return;
    }
    let Some(server) = OwnServer::start("pulsar", "locked-out") else { return };
    let url = server.url.clone();
    let harness = UrlHarness::new("pulsar", move || {
        let url = url.clone();
        Box::pin(async move { try_connect(&url, TOKEN).await })
    })
    .with_server(Arc::new(server))
    .with_lease(Duration::from_secs(1))
    .with_quiet(Duration::from_secs(1));
    judge_server(harness, &["faults/clients-that-are-locked-out-*"]).await;
}

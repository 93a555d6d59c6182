//! Many messages while the server is killed and every connection is cut.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

mod common;

use std::sync::Arc;

use anybroker_conformance::{UrlHarness, Volume, volume};
use anybroker_core::{Bus, Result};
use common::process::Server;
use common::try_connect;
use futures_util::future::BoxFuture;

/// The cut alone; with `ANYBROKER_TEST_VOLUME=1` a hundred thousand, and the kill before it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_messages_survive_a_cut_and_a_kill_and_keep_the_order_of_their_keys() {
    let is_large = std::env::var("ANYBROKER_TEST_VOLUME").is_ok_and(|value| value == "1");
    let much = if is_large { Volume::default() } else { Volume { messages: 24_000, ..Volume::default() } };
    disturbed("", much, is_large).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn classic_queues_lose_nothing_in_a_kill_and_a_cut_and_keep_the_order_of_keys() {
    disturbed("queue=classic", Volume { messages: 24_000, ..Volume::default() }, true).await;
}

async fn disturbed(settings: &'static str, much: Volume, kills: bool) {
    let Some(server) = Server::start("volume") else { return };
    let url = server.url.clone();
    let connect = move |url: String| -> BoxFuture<'static, Result<Bus>> {
        Box::pin(async move { try_connect(&url, settings).await })
    };
    let mut harness = UrlHarness::behind_proxies("rabbitmq", &url, connect).unwrap();
    let server = Arc::new(server);
    if kills {
        harness = harness.with_server(Arc::<Server>::clone(&server));
    }
    let report = volume(&harness, &much).await.unwrap();
    println!("{report}");
    assert!(report.is_green(), "{report:?}");
    assert!(report.cut >= 12, "connections went past the proxy: {}", report.cut);
}

//! Many messages while the server is killed and every connection is cut.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

mod common;

use std::sync::Arc;

use anybroker_conformance::{UrlHarness, Volume, volume};
use anybroker_core::{Bus, Result};
use common::{own_server, try_connect};
use futures_util::future::BoxFuture;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_thousand_messages_survive_a_kill_and_a_cut_and_keep_the_order_of_their_keys() {
    disturbed("", Volume::default()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn classic_queues_lose_nothing_in_a_kill_and_a_cut_and_keep_the_order_of_keys() {
    disturbed("queue=classic", Volume { messages: 24_000, ..Volume::default() }).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_thousand_messages_in_a_stream_survive_a_kill_and_a_cut_and_keep_the_order_of_their_keys() {
    disturbed("queue=stream", Volume::default()).await;
}

async fn disturbed(settings: &'static str, much: Volume) {
    let Some(server) = own_server("volume") else { return };
    let url = server.url.clone();
    let connect = move |url: String| -> BoxFuture<'static, Result<Bus>> {
        Box::pin(async move { try_connect(&url, settings).await })
    };
    let harness = UrlHarness::behind_proxies("rabbitmq", &url, connect).unwrap().with_server(Arc::new(server));
    let report = volume(&harness, &much).await.unwrap();
    println!("{report}");
    assert!(report.is_green(), "{report:?}");
    assert!(report.cut >= 12, "connections went past the proxy: {}", report.cut);
}

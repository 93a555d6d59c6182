//! Many messages while every connection is cut. No kill: what ElasticMQ has is in its memory, and gone with its
//! process, as the record says (`survives_process_kill`).
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "test code")]

mod common;

use std::time::Duration;

use anybroker_conformance::{UrlHarness, Volume, routes_of, url_through, volume};
use common::{try_connect, url};

/// `ANYBROKER_TEST_VOLUME` is the number of messages: emulator and debug build take a millisecond of processor time for each.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_messages_survive_a_cut_of_every_connection() {
    let Some(url) = url() else { return };
    let (direct, through) = (url.clone(), url.clone());
    let harness = UrlHarness::new("sqs", move || Box::pin(try_connect(direct.clone(), "")))
        .with_proxies(routes_of(&url).unwrap(), move |addresses| {
            Box::pin(try_connect(url_through(&through, &addresses), ""))
        })
        .with_patience(Duration::from_secs(60));
    let messages = std::env::var("ANYBROKER_TEST_VOLUME").map_or(16_000, |count| count.parse().unwrap());
    let report = volume(&harness, &Volume { messages, ..Volume::default() }).await.unwrap();
    println!("{report}");
    assert!(report.is_green(), "{report:?}");
    assert!(report.cut >= 12, "connections went past the proxy: {}", report.cut);
}

//! A hundred thousand messages while every connection is cut. No kill: what ElasticMQ has is in its memory, and gone with its
//! process, as the record says (`survives_process_kill`).
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "test code")]

mod common;

use std::time::Duration;

use anybroker_conformance::{UrlHarness, Volume, routes_of, url_through, volume};
use common::{try_connect, url};

#[ignore = "young, not shown to pass yet, and takes minutes: cargo test -p anybroker-sqs --test volume -- --ignored --nocapture"]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_thousand_messages_survive_a_cut_of_every_connection() {
    let Some(url) = url() else { return };
    let (direct, through) = (url.clone(), url.clone());
    let harness = UrlHarness::new("sqs", move || Box::pin(try_connect(direct.clone(), "")))
        .with_proxies(routes_of(&url).unwrap(), move |addresses| {
            Box::pin(try_connect(url_through(&through, &addresses), ""))
        })
        .with_patience(Duration::from_secs(60));
    let report = volume(&harness, &Volume::default()).await.unwrap();
    println!("{report}");
    assert!(report.is_green(), "{report:?}");
    assert!(report.cut >= 12, "connections went past the proxy: {}", report.cut);
}

//! The suite's cases about faults, with a proxy between the running server and its clients.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "test code")]

mod common;

use std::pin::pin;
use std::time::Duration;

use anybroker_conformance::{Route, UrlHarness, url_through};
use anybroker_core::{Delivery, Effect, ErrorKind};
use anybroker_testing::judge_faults;
use common::{LONG, Server, connect, numbered, publish, receive, try_connect, unique, url};
use futures_util::poll;
use tokio::sync::Mutex;

const SHARE: [&str; 2] = ["faults/answers-that-are-lost-*", "faults/a-mixed-schedule-keeps-*"];

/// There is one address that a proxy can stand at.
static ALONE: Mutex<()> = Mutex::const_new(());

/// A share of them, with one seed; `cargo xtask faults kafka` runs all of them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn faults_of_connections_break_no_promise() {
    let (Some(url), Some(server)) = (url(), Server::find()) else { return };
    let _alone = ALONE.lock().await;
    // Clients go to the address that the server advertises, so that the proxy has to listen there: one for all of them.
    let listen = ([127, 0, 0, 1], server.port("advertised.listeners", "PROXIED")).into();
    let route = Route::advertised(listen, format!("127.0.0.1:{}", server.port("listeners", "PROXIED")));
    let direct = url.clone();
    let harness = UrlHarness::new("kafka", move || Box::pin(try_connect(direct.clone(), "")))
        .with_proxies(vec![route], move |addresses| Box::pin(try_connect(url_through(&url, &addresses), "")))
        .with_lease(Duration::from_secs(2))
        .with_quiet(Duration::from_secs(1))
        .with_patience(Duration::from_secs(60));
    judge_faults(harness, 8, &SHARE).await;
}

/// The copy that brings it back is on its way when its partition is lost: source and copy come, which the answer must not deny.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_nack_that_is_stored_after_its_partition_was_lost_does_not_answer_that_nothing_was_done() {
    let Some(url) = url() else { return };
    let _alone = ALONE.lock().await;
    let other = connect(&url, "partitions=1").await;
    // What it stores waits for others of its batch for longer than it takes to give the partition up.
    let bus = connect(&url, "partitions=1&linger=10s").await;
    let name = unique("late-nack");
    let mut subscriber = bus.subscribe(bus.subscription(name.as_str(), "g")).await.unwrap();
    publish(&other, numbered(&name, 0..1)).await;
    let mut nack = pin!(receive(&mut subscriber, 1).await.remove(0).nack(Duration::ZERO));
    assert!(poll!(nack.as_mut()).is_pending());
    subscriber.close(LONG).await.unwrap();
    let Err(error) = nack.await else {
        println!("not shown: giving the partition up took this machine longer than the retry waited");
        return;
    };
    assert_eq!((error.error().kind(), error.error().effect()), (ErrorKind::StaleDelivery, Effect::Unknown));
    let mut subscriber = other.subscribe(other.subscription(name.as_str(), "g")).await.unwrap();
    let mut attempts: Vec<u32> = receive(&mut subscriber, 2).await.iter().map(Delivery::attempt).collect();
    attempts.sort_unstable();
    assert_eq!(attempts, [1, 2]);
}

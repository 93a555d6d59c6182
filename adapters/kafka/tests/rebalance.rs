//! Partitions that go and come back.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::HashSet;
use std::time::Duration;

use anybroker_core::{Message, ack};
use common::{LONG, connect, number, publish, receive, unique, url};
use tokio::time::Instant;

/// A full member pauses what it fetches from. A partition that is taken from it meanwhile must not come back paused.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_partition_that_was_taken_from_a_full_member_is_read_again_when_it_comes_back() {
    let Some(url) = url() else { return };
    let bus = connect(&url, "partitions=2&revoke_wait=300ms").await;
    let name = unique("full");
    let spec = || bus.subscription(name.as_str(), "g").with_max_in_flight(10);
    let mut first = bus.subscribe(spec()).await.unwrap();
    let message = |number: u32| Message::new(name.as_str(), number.to_string()).with_key(number.to_string());
    publish(&bus, (0..60).map(message).collect()).await;
    // Full until the other one has a partition, which takes longer than it fetches in vain.
    let held = receive(&mut first, 10).await;
    let mut second = bus.subscribe(spec()).await.unwrap();
    let others = receive(&mut second, 1).await;
    let mut settled = HashSet::new();
    for (number, outcome) in held.iter().map(number).collect::<Vec<_>>().into_iter().zip(ack(held).await) {
        if outcome.is_ok() {
            settled.insert(number);
        }
    }
    // It reads what it kept, and so goes on fetching, before the other one comes back.
    let next = receive(&mut first, 1).await;
    settled.extend(next.iter().map(number));
    drop(ack(next));
    drop(others);
    second.close(LONG).await.unwrap();
    let deadline = Instant::now() + LONG;
    while settled.len() < 60 {
        assert!(Instant::now() < deadline, "{} of 60 came", settled.len());
        let came = first.receive(10, Duration::from_millis(500)).await.unwrap();
        settled.extend(came.iter().map(number));
        for outcome in ack(came).await {
            outcome.unwrap();
        }
    }
    first.close(LONG).await.unwrap();
}

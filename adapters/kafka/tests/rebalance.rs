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

/// It fetches nothing, and the poll that hands it the partition may bring a record all the same.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_member_misses_nothing_of_a_partition_that_comes_to_it() {
    const MESSAGES: u32 = 200;
    let Some(url) = url() else { return };
    let bus = connect(&url, "partitions=8&revoke_wait=100ms").await;
    let name = unique("comes");
    let spec = || bus.subscription(name.as_str(), "g").with_max_in_flight(3);
    let mut first = bus.subscribe(spec()).await.unwrap();
    let message = |number: u32| Message::new(name.as_str(), number.to_string()).with_key(number.to_string());
    publish(&bus, (0..MESSAGES).map(message).collect()).await;
    for _ in 0..3 {
        // It takes some of the partitions, and gives them back to the first one, which nobody receives from.
        let mut second = bus.subscribe(spec()).await.unwrap();
        drop(receive(&mut second, 1).await);
        second.close(LONG).await.unwrap();
    }
    let mut settled = HashSet::new();
    let deadline = Instant::now() + LONG;
    while settled.len() < MESSAGES as usize {
        let missing = || (0..MESSAGES).filter(|number| !settled.contains(number)).collect::<Vec<_>>();
        assert!(Instant::now() < deadline, "missing: {:?}", missing());
        let came = first.receive(10, Duration::from_millis(500)).await.unwrap();
        settled.extend(came.iter().map(number));
        // What was lost to another member comes again.
        drop(ack(came).await);
    }
    first.close(LONG).await.unwrap();
}

//! Members that come and go all the time.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

mod common;

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anybroker_core::{ErrorKind, ack};
use common::{LONG, connect, number, numbered, publish, receive, unique, url};
use parking_lot::Mutex;
use tokio::time::Instant;

/// Each close meets a rebalance that another member began. librdkafka ends the whole process when a consumer is closed at
/// certain moments of one (librdkafka #4792, open as of 2.12.1): there is no error that could be asserted on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn members_that_leave_in_the_middle_of_rebalances_lose_nothing_and_end_nothing_else() {
    const MEMBERS: usize = 6;
    const MESSAGES: u32 = 500;
    let Some(url) = url() else { return };
    let length = std::env::var("ANYBROKER_TEST_CHURN").map_or(8, |seconds| seconds.parse().unwrap());
    let bus = connect(&url, "partitions=4&session_timeout=6s").await;
    let name = unique("churn");
    let mut first = bus.subscribe(bus.subscription(name.as_str(), "g")).await.unwrap();
    publish(&bus, numbered(&name, 0..1)).await;
    drop(ack(receive(&mut first, 1).await).await);
    first.close(LONG).await.unwrap();
    publish(&bus, numbered(&name, 1..MESSAGES)).await;
    let seen = Arc::new(Mutex::new(HashSet::from([0])));
    let closes = Arc::new(AtomicUsize::new(0));
    let end = Instant::now() + Duration::from_secs(length);
    let members: Vec<_> = (0..MEMBERS)
        .map(|member| {
            let (bus, name, seen, closes) = (bus.clone(), name.clone(), Arc::clone(&seen), Arc::clone(&closes));
            tokio::spawn(async move {
                let mut stays = Duration::from_millis(7 * (member as u64 + 1));
                while Instant::now() < end {
                    let mut subscriber = bus.subscribe(bus.subscription(name.as_str(), "g")).await.unwrap();
                    let deliveries = subscriber.receive(5, stays).await.unwrap();
                    seen.lock().extend(deliveries.iter().map(number));
                    drop(ack(deliveries).await);
                    if let Err(error) = subscriber.close(LONG).await {
                        // The group went on without it: what it acked comes again elsewhere.
                        assert_eq!(error.kind(), ErrorKind::StaleDelivery, "{error:?}");
                    }
                    closes.fetch_add(1, Ordering::Relaxed);
                    stays = (stays * 2).min(Duration::from_millis(400));
                }
            })
        })
        .collect();
    for member in members {
        member.await.unwrap();
    }
    println!("{} members have come and gone", closes.load(Ordering::Relaxed));
    let mut last = bus.subscribe(bus.subscription(name.as_str(), "g")).await.unwrap();
    let deadline = Instant::now() + LONG * 2;
    while seen.lock().len() < MESSAGES as usize {
        assert!(Instant::now() < deadline, "{} of {MESSAGES} were seen", seen.lock().len());
        let deliveries = last.receive(100, Duration::from_secs(1)).await.unwrap();
        seen.lock().extend(deliveries.iter().map(number));
        drop(ack(deliveries).await);
    }
    last.close(LONG).await.unwrap();
    bus.close(LONG).await.unwrap();
}

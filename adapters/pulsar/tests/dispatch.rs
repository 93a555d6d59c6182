//! A message is with one member at a time, also while others come back.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use anybroker_core::{ErrorKind, ack};
use common::{LONG, connect, number, numbered, unique, url};
use parking_lot::Mutex;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::Instant;

const MEMBERS: usize = 3;
const BATCHES: u32 = 1_000;
const BATCH: u32 = 10;
const MESSAGES: usize = (BATCHES * BATCH) as usize;
/// Longer than brokers keep entries in memory (managedLedgerCacheEvictionTimeThresholdMillis, a second): what comes back is read
/// from the disk, which takes its time.
const LEASE: Duration = Duration::from_millis(1_500);

/// The broker's setting.
const SETTING: &str = "dispatcherDispatchMessagesInSubscriptionThread";

/// What is known of one message: how often it came, and how often that may be.
#[derive(Clone, Copy, Default)]
struct Seen {
    times: u32,
    ended: u32,
}

/// By default a broker dispatches a message that comes back, while others are published, to two members now and then. The
/// setting that prevents it is in the README, and the project's own brokers have it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_whose_lease_has_ended_goes_to_one_member_while_others_are_published() {
    let Some(url) = url() else { return };
    if !is_set(&url).await {
        let text = format!("the broker has not {SETTING}=false");
        println!("not run: {text}");
        let is_required = std::env::var("ANYBROKER_TEST_REQUIRE_BROKERS").is_ok_and(|value| value == "1");
        assert!(!is_required, "{text}");
        return;
    }
    let bus = connect(&url, "").await;
    let name = unique("comes-back");
    let seen = Arc::new(Mutex::new(vec![Seen::default(); MESSAGES]));
    let (acked, is_done) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
    let mut members = Vec::new();
    for _ in 0..MEMBERS {
        let bus = connect(&url, "").await;
        let spec = bus.subscription(name.as_str(), "g").with_max_in_flight(400).with_lease(LEASE);
        let mut member = bus.subscribe(spec).await.unwrap();
        let (seen, acked, is_done) = (Arc::clone(&seen), Arc::clone(&acked), Arc::clone(&is_done));
        members.push(tokio::spawn(async move {
            let mut held = Vec::new();
            while !is_done.load(Ordering::Relaxed) {
                let mut now = Vec::new();
                for delivery in member.receive(100, Duration::from_millis(20)).await.unwrap() {
                    let mut seen = seen.lock();
                    let own = &mut seen[number(&delivery) as usize];
                    own.times += 1;
                    // One in ten is kept until its lease has ended, the first time.
                    if own.times == 1 && number(&delivery).is_multiple_of(10) {
                        own.ended += 1;
                        held.push(delivery);
                    } else {
                        now.push(delivery);
                    }
                }
                for outcome in ack(now).await {
                    let Err(error) = outcome else {
                        acked.fetch_add(1, Ordering::Relaxed);
                        continue;
                    };
                    // A machine that stood still.
                    assert!(matches!(error.error().kind(), ErrorKind::StaleDelivery | ErrorKind::Timeout), "{error:?}");
                    seen.lock()[number(&error.into_delivery()) as usize].ended += 1;
                }
            }
            member.close(LONG).await.unwrap();
            bus.close(LONG).await.unwrap();
        }));
    }
    let begun = Instant::now();
    for batch in 0..BATCHES {
        let confirms = bus.submit(numbered(&name, batch * BATCH..(batch + 1) * BATCH), &Default::default()).await;
        confirms.await.into_iter().for_each(|outcome| assert!(outcome.is_ok(), "{outcome:?}"));
    }
    let published = begun.elapsed();
    let deadline = Instant::now() + LONG;
    while acked.load(Ordering::Relaxed) < MESSAGES {
        assert!(Instant::now() < deadline, "{} of {MESSAGES} are acked", acked.load(Ordering::Relaxed));
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    is_done.store(true, Ordering::Relaxed);
    for member in members {
        member.await.unwrap();
    }
    let seen = std::mem::take(&mut *seen.lock());
    let too_often: Vec<_> = (0..MESSAGES).filter(|number| seen[*number].times > seen[*number].ended + 1).collect();
    println!(
        "{MESSAGES} messages published in {published:?}, all acked in {:?}; too often: {too_often:?}",
        begun.elapsed()
    );
    assert!(too_often.is_empty(), "{too_often:?}");
    bus.delete(name.as_str(), None).await.unwrap();
    bus.close(LONG).await.unwrap();
}

async fn is_set(url: &str) -> bool {
    let admin = url.split("http://").nth(1).unwrap();
    let mut stream = tokio::net::TcpStream::connect(admin).await.unwrap();
    // In one piece.
    let request = format!("GET /admin/v2/brokers/configuration/runtime HTTP/1.0\r\nHost: {admin}\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    answer.contains(&format!("\"{SETTING}\":\"false\""))
}

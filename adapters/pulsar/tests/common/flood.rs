//! Many messages while connections are cut and the broker is killed.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use anybroker_core::{Bus, Effect, Message, Order, PublishOptions, PublishOrder, SubscriptionEvent, ack};
use parking_lot::Mutex;
use tokio::time::Instant;

use super::common::{LONG, connect, unique};
use super::server::{Proxy, Server};

const PUBLISHERS: usize = 8;
const CONSUMERS: usize = 4;
const MESSAGES: usize = 100_000;
const EACH: usize = MESSAGES / PUBLISHERS;
const BATCH: usize = 250;
/// Of each publisher.
const KEYS: usize = 16;
const CUTS: usize = 8;

/// Which random numbers a run has: printed, and given again to repeat it.
fn seed() -> u64 {
    let given = std::env::var("ANYBROKER_TEST_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed = given.unwrap_or_else(|| uuid::Uuid::now_v7().as_u128() as u64);
    println!("ANYBROKER_TEST_SEED={seed}");
    seed
}

/// SplitMix64.
fn next(seed: &mut u64) -> u64 {
    *seed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut mixed = *seed;
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

/// What the consumers have seen.
#[derive(Default)]
struct Seen {
    /// How often each number came.
    times: Vec<u32>,
    distinct: usize,
    /// Of each key: the number that came last for the first time.
    last: HashMap<Vec<u8>, usize>,
    reordered: Vec<(usize, usize)>,
    phantoms: Vec<String>,
}

impl Seen {
    fn take(&mut self, key: &[u8], body: &[u8]) {
        let text = String::from_utf8_lossy(body);
        let Some(number) = text.parse().ok().filter(|number| *number < MESSAGES && key_of(*number) == key) else {
            self.phantoms.push(text.into_owned());
            return;
        };
        self.times[number] += 1;
        if self.times[number] == 1 {
            self.distinct += 1;
            let last = self.last.entry(key.to_vec()).or_insert(number);
            if *last > number {
                self.reordered.push((*last, number));
            }
            *last = number;
        }
    }
}

/// A key belongs to one publisher, which publishes its numbers in order.
fn key_of(number: usize) -> Vec<u8> {
    format!("{}.{}", number / EACH, number % KEYS).into_bytes()
}

/// 100,000 messages by 8 publishers to 4 consumers; all connections are cut again and again at random, and the broker is killed
/// in the middle. Nothing that was confirmed is lost, nothing comes that was not published, keys keep their order.
pub(crate) async fn survives(server: &Server, proxy: &Proxy) {
    let begun = Instant::now();
    let mut seed = seed();
    let settings = "partitions=4&publish_timeout=5s";
    let bus = connect(&server.proxied_url(), settings).await;
    let name = unique("flood");
    let seen = Arc::new(Mutex::new(Seen { times: vec![0; MESSAGES], ..Seen::default() }));
    let (confirmed, is_done) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
    let deadline = Instant::now() + Duration::from_secs(400);
    let mut consumers = Vec::new();
    for _ in 0..CONSUMERS {
        let bus = connect(&server.proxied_url(), settings).await;
        let spec = bus.subscription(name.as_str(), "g").with_order(Order::Key);
        let mut member = bus.subscribe(spec).await.unwrap();
        let (seen, is_done) = (Arc::clone(&seen), Arc::clone(&is_done));
        consumers.push(tokio::spawn(async move {
            let (mut events, mut count) = (Vec::new(), 0);
            while !is_done.load(Ordering::Relaxed) && Instant::now() < deadline {
                let received = member.receive_all(500, Duration::from_millis(500)).await.unwrap();
                events.extend(received.events);
                count += received.deliveries.len();
                {
                    let mut seen = seen.lock();
                    for delivery in &received.deliveries {
                        seen.take(delivery.message().key().unwrap_or_default(), delivery.message().bytes());
                    }
                    is_done.fetch_or(seen.distinct == MESSAGES, Ordering::Relaxed);
                }
                // An ack that a fault swallowed leaves the message with the broker, which brings it again.
                drop(ack(received.deliveries).await);
            }
            member.close(LONG).await.unwrap();
            bus.close(LONG).await.unwrap();
            (events, count)
        }));
    }
    let publishers: Vec<_> = (0..PUBLISHERS)
        .map(|publisher| {
            let (bus, name, confirmed) = (bus.clone(), name.clone(), Arc::clone(&confirmed));
            tokio::spawn(async move {
                let mut unknown = 0;
                for start in (publisher * EACH..(publisher + 1) * EACH).step_by(BATCH) {
                    let message =
                        |number: usize| Message::new(name.as_str(), number.to_string()).with_key(key_of(number));
                    let batch = (start..start + BATCH).map(message).collect();
                    unknown += until_confirmed(&bus, batch, deadline).await;
                    confirmed.fetch_add(BATCH, Ordering::Relaxed);
                }
                unknown
            })
        })
        .collect();

    let mut recovered = Vec::new();
    for number in 0..CUTS {
        // At a random share of the work, so that the faults fall into it however fast the machine is.
        let share = MESSAGES / CUTS;
        let at = number * share + usize::try_from(next(&mut seed) % share as u64).unwrap();
        while confirmed.load(Ordering::Relaxed) < at {
            assert!(Instant::now() < deadline, "{} of {at} confirmed", confirmed.load(Ordering::Relaxed));
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let fault = Instant::now();
        if number == CUTS / 2 {
            server.does("kill").await;
            server.does("restart").await;
            println!("killed and ready again after {:?}", fault.elapsed());
        } else {
            proxy.cut();
        }
        let (before, came) = (confirmed.load(Ordering::Relaxed), seen.lock().distinct);
        while confirmed.load(Ordering::Relaxed) < (before + 1).min(MESSAGES)
            || seen.lock().distinct < (came + 1).min(MESSAGES)
        {
            assert!(Instant::now() < deadline, "nothing works after fault {number}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        recovered.push(fault.elapsed());
    }
    let mut unknown = 0;
    for publisher in publishers {
        unknown += publisher.await.unwrap();
    }
    // What is not lost comes soon.
    let soon = Instant::now() + Duration::from_secs(60);
    while !is_done.load(Ordering::Relaxed) && Instant::now() < soon {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    is_done.store(true, Ordering::Relaxed);
    let (mut deliveries, mut degraded, mut recovered_members) = (0, 0, 0);
    for consumer in consumers {
        let (events, count) = consumer.await.unwrap();
        recovered_members += usize::from(events.contains(&SubscriptionEvent::Recovered));
        degraded += events.iter().filter(|event| matches!(event, SubscriptionEvent::Degraded { .. })).count();
        deliveries += count;
    }
    let seen = std::mem::take(&mut *seen.lock());
    let lost = seen.times.iter().filter(|times| **times == 0).count();
    let twice = seen.times.iter().filter(|times| **times > 1).count();
    println!(
        "{MESSAGES} messages, {PUBLISHERS} publishers, {CONSUMERS} consumers: {lost} lost, {} phantoms, {} reordered; \
         {} connections cut, {unknown} unknown publishes, {deliveries} deliveries, {twice} messages came more than once, \
         degraded {degraded} times; works again after {recovered:?}; {:?} in all",
        seen.phantoms.len(),
        seen.reordered.len(),
        proxy.connections_cut(),
        begun.elapsed()
    );
    assert_eq!(lost, 0);
    assert_eq!(recovered_members, CONSUMERS, "who stands by is told, too");
    assert!(seen.phantoms.is_empty(), "{:?}", &seen.phantoms[..seen.phantoms.len().min(20)]);
    assert!(seen.reordered.is_empty(), "{:?}", &seen.reordered[..seen.reordered.len().min(20)]);
    assert!(proxy.connections_cut() >= CUTS, "the connections go past the proxy: {}", proxy.connections_cut());
    bus.delete(name.as_str(), None).await.unwrap();
    bus.close(LONG).await.unwrap();
}

/// Publishes what has no confirmation again, in its order; answers how many had an unknown outcome.
async fn until_confirmed(bus: &Bus, mut batch: Vec<Message>, deadline: Instant) -> usize {
    let options = PublishOptions::default().with_order(PublishOrder::Key);
    let mut unknown = 0;
    while !batch.is_empty() {
        assert!(Instant::now() < deadline, "{} messages are not confirmed", batch.len());
        let outcomes = bus.submit(batch.clone(), &options).await.await;
        unknown += outcomes.iter().filter(|outcome| is_unknown(outcome)).count();
        let mut outcomes = outcomes.into_iter();
        batch.retain(|_| outcomes.next().is_none_or(|outcome| outcome.is_err()));
    }
    unknown
}

fn is_unknown<T>(outcome: &anybroker_core::Result<T>) -> bool {
    outcome.as_ref().is_err_and(|error| error.effect() == Effect::Unknown)
}

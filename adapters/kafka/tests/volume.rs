//! A hundred thousand messages, while the broker is killed and every connection is cut.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

mod common;
#[path = "common/proxy.rs"]
mod proxy;

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anybroker_core::{Bus, Effect, Message, Order, PublishOptions, ack};
use common::{LONG, Server, number, try_connect, unique, xtask};
use proxy::Proxy;
use tokio::task::JoinHandle;

const PUBLISHERS: u32 = 8;
const MEMBERS: usize = 4;
const EACH: u32 = 12_500;
const KEYS: u32 = 16;
/// What is on its way at the kill may take until the broker is back, and some.
const PATIENCE: Duration = Duration::from_secs(120);

#[derive(Default)]
struct Story {
    handed_over: AtomicU32,
    /// The disturbances so far: publishers wait for them, so that they come in the middle.
    was_killed: AtomicBool,
    was_cut: AtomicBool,
    handed_over_at: Mutex<HashMap<u32, Instant>>,
    is_over: AtomicBool,
    published: Mutex<Published>,
    received: Mutex<Received>,
}

#[derive(Default)]
struct Published {
    stored: HashSet<u32>,
    unknown: HashSet<u32>,
    /// When a batch was handed over, and when its confirms came.
    times: Vec<(Instant, Instant)>,
}

#[derive(Default)]
struct Received {
    seen: HashSet<u32>,
    acked: HashSet<u32>,
    /// The last first delivery of each key.
    last: HashMap<u32, u32>,
    out_of_order: Vec<(u32, u32)>,
    again: u32,
    /// When a message was handed over, and when it came.
    times: Vec<(Instant, Instant)>,
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_thousand_messages_survive_a_kill_and_a_cut_and_keep_the_order_of_their_keys() {
    let Some(server) = Server::find() else { return };
    let Some(broker) = xtask() else { return };
    let port = server.port("advertised.listeners", "PROXIED");
    let proxy = Proxy::start(port, server.port("listeners", "PROXIED")).await;
    let url = format!("kafka://127.0.0.1:{port}");
    let connect = || try_connect(url.clone(), "partitions=8");
    let (name, story) = (unique("volume"), Arc::new(Story::default()));
    let mut members = Vec::new();
    for _ in 0..MEMBERS {
        members.push(member(connect().await.unwrap(), name.clone(), Arc::clone(&story)));
    }
    let mut publishers = Vec::new();
    for publisher in 0..PUBLISHERS {
        publishers.push(publish(connect().await.unwrap(), name.clone(), publisher, Arc::clone(&story)));
    }
    reached(&story, PUBLISHERS * EACH / 3).await;
    let (killed, back) = tokio::task::spawn_blocking({
        let story = Arc::clone(&story);
        move || {
            broker("kill");
            let killed = Instant::now();
            story.was_killed.store(true, Ordering::Release);
            broker("restart");
            (killed, Instant::now())
        }
    })
    .await
    .unwrap();
    reached(&story, PUBLISHERS * EACH / 3 * 2).await;
    let cut = Instant::now();
    proxy.cut();
    story.was_cut.store(true, Ordering::Release);
    for publisher in publishers {
        publisher.await.unwrap();
    }
    let deadline = Instant::now() + PATIENCE;
    loop {
        let lost = {
            let (published, received) = (story.published.lock().unwrap(), story.received.lock().unwrap());
            published.stored.difference(&received.acked).count()
        };
        if lost == 0 {
            break;
        }
        assert!(Instant::now() < deadline, "{lost} are lost");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    story.is_over.store(true, Ordering::Release);
    for member in members {
        member.await.unwrap();
    }
    let (published, received) = (story.published.lock().unwrap(), story.received.lock().unwrap());
    let (stored, unknown) = (published.stored.len(), published.unknown.len());
    let is_phantom = |one: &&u32| !published.stored.contains(one) && !published.unknown.contains(one);
    let phantoms = received.seen.iter().filter(is_phantom).count();
    println!(
        "{stored} stored, {unknown} unknown, {} not done; {} acked, {} came again, {phantoms} phantoms, {} out of order",
        (PUBLISHERS * EACH) as usize - stored - unknown,
        received.acked.len(),
        received.again,
        received.out_of_order.len()
    );
    println!(
        "the broker was away for {:.1?}; of what was published after its return: a confirm in {:.1?}, a delivery in {:.1?}",
        back - killed,
        first_after(&published.times, back),
        first_after(&received.times, back)
    );
    println!(
        "{} connections cut; of what was published afterwards: a confirm in {:.1?}, a delivery in {:.1?}",
        proxy.connections_cut(),
        first_after(&published.times, cut),
        first_after(&received.times, cut)
    );
    assert_eq!((phantoms, &received.out_of_order[..]), (0, &[][..]));
    assert!(proxy.connections_cut() > 0, "nothing was cut");
    assert!(stored > 90_000, "{stored} stored");
}

/// How long after `moment` the first came of what was handed over after it.
fn first_after(times: &[(Instant, Instant)], moment: Instant) -> Duration {
    let after = times.iter().filter(|(handed_over, _)| *handed_over >= moment).map(|(_, came)| *came);
    after.min().map_or(Duration::MAX, |came| came - moment)
}

async fn reached(story: &Story, count: u32) {
    let deadline = Instant::now() + PATIENCE;
    while story.handed_over.load(Ordering::Acquire) < count {
        assert!(Instant::now() < deadline, "publishers do not go on");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Numbered messages of keys of its own; small batches with pauses until what it waits for has happened, so that some are
/// on their way when it does.
fn publish(bus: Bus, name: String, publisher: u32, story: Arc<Story>) -> JoinHandle<()> {
    tokio::spawn(async move {
        let options = PublishOptions::default().with_timeout(PATIENCE);
        let mut next = 0;
        while next < EACH {
            let awaited = if next < EACH / 3 * 2 { &story.was_killed } else { &story.was_cut };
            let is_early = next < EACH / 3 || awaited.load(Ordering::Acquire);
            let count = if is_early { 100 } else { 10 }.min(EACH - next);
            if !is_early {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            let numbers: Vec<u32> = (next..next + count).map(|index| index * PUBLISHERS + publisher).collect();
            next += count;
            let message =
                |number: &u32| Message::new(name.as_str(), number.to_string()).with_key(key(*number).to_string());
            let begun = Instant::now();
            story.handed_over_at.lock().unwrap().extend(numbers.iter().map(|number| (*number, begun)));
            let confirms = bus.submit(numbers.iter().map(message).collect(), &options).await;
            story.handed_over.fetch_add(count, Ordering::AcqRel);
            let outcomes = confirms.await;
            let mut published = story.published.lock().unwrap();
            published.times.push((begun, Instant::now()));
            for (number, outcome) in numbers.into_iter().zip(outcomes) {
                match outcome {
                    Ok(_) => published.stored.insert(number),
                    Err(error) if error.effect() == Effect::Unknown => published.unknown.insert(number),
                    Err(_) => false,
                };
            }
        }
        bus.close(LONG).await.unwrap();
    })
}

/// Keys belong to one publisher each.
fn key(number: u32) -> u32 {
    number % (PUBLISHERS * KEYS)
}

fn member(bus: Bus, name: String, story: Arc<Story>) -> JoinHandle<()> {
    tokio::spawn(async move {
        let mut subscriber = bus.subscribe(bus.subscription(name.as_str(), "g").with_order(Order::Key)).await.unwrap();
        while !story.is_over.load(Ordering::Acquire) {
            let deliveries = subscriber.receive(500, Duration::from_millis(200)).await.unwrap();
            if deliveries.is_empty() {
                continue;
            }
            let numbers: Vec<u32> = deliveries.iter().map(number).collect();
            {
                let handed_over_at = story.handed_over_at.lock().unwrap();
                let received = &mut *story.received.lock().unwrap();
                let now = Instant::now();
                received.times.extend(numbers.iter().map(|number| (handed_over_at[number], now)));
                for &number in &numbers {
                    if !received.seen.insert(number) {
                        received.again += 1;
                    } else if let Some(before) = received.last.insert(key(number), number)
                        && before > number
                    {
                        received.out_of_order.push((before, number));
                    }
                }
            }
            for (number, outcome) in numbers.into_iter().zip(ack(deliveries).await) {
                // What is stale comes again.
                if outcome.is_ok() {
                    story.received.lock().unwrap().acked.insert(number);
                }
            }
        }
        subscriber.close(LONG).await.unwrap();
        bus.close(LONG).await.unwrap();
    })
}

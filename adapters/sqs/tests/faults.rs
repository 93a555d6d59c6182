//! Cut connections, and queues that others have set up.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "test code")]

mod common;
#[path = "common/proxy.rs"]
mod proxy;

use std::collections::BTreeMap;
use std::time::Duration;

use anybroker_core::{
    Effect, ErrorKind, Message, Order, PublishOptions, PublishOrder, Reason, SubscriptionEvent, TopologyMode, Verdict,
    ack,
};
use aws_sdk_sqs::types::QueueAttributeName as Attribute;
use common::{LONG, bare, connect, host, localstack_url, number, numbered, publish, receive, unique, url};
use proxy::Proxy;
use tokio::time::Instant;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_that_are_cut_lose_nothing() {
    let Some(url) = url() else { return };
    cut(&url, "", 0x5175).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_to_fifo_queues_that_are_cut_lose_nothing_and_keep_the_order_of_each_key() {
    let Some(url) = url() else { return };
    cut(&url, "mode=fifo", 0xf1f0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_to_topics_that_are_cut_lose_nothing() {
    let Some(url) = localstack_url() else { return };
    cut(&url, "", 0x705).await;
}

/// Keys of the messages that are published while connections are cut.
const KEYS: u32 = 5;

/// Publishes and consumes while connections are cut, at times that follow from the seed (or `ANYBROKER_SEED`).
async fn cut(url: &str, settings: &'static str, seed: u64) {
    let seed = std::env::var("ANYBROKER_SEED").map_or(seed, |text| text.parse().unwrap());
    println!("ANYBROKER_SEED={seed}");
    let mut random = Random(seed);
    let is_ordered = settings == "mode=fifo";
    let proxy = Proxy::to(host(url)).await;
    let through = url.replace(&host(url), &proxy.address().to_string());
    let bus = connect(&through, settings).await;
    let name = unique("cut");
    // What a cut answer has leased to nobody comes back by lease.
    let spec = bus.subscription(name.as_str(), "g").with_lease(Duration::from_secs(3));
    let spec = if is_ordered { spec.with_order(Order::Key) } else { spec };
    let mut subscriber = bus.subscribe(spec).await.unwrap();
    let count = 600;
    let publishing = async {
        let options = PublishOptions::default();
        let options = if is_ordered { options.with_order(PublishOrder::Key) } else { options };
        let mut unknown = 0;
        for batch in 0..count / 30 {
            let messages = numbered(&name, batch * 30..batch * 30 + 30);
            let mut left: Vec<Message> =
                messages.into_iter().enumerate().map(|(n, message)| message.with_key(key(n))).collect();
            let mut is_cut = random.next().is_multiple_of(3);
            // What is not known to be stored is sent again, with its id.
            while !left.is_empty() {
                let confirms = bus.submit(left.clone(), &options).await;
                if std::mem::take(&mut is_cut) {
                    tokio::time::sleep(Duration::from_micros(random.next() % 20_000)).await;
                    proxy.cut();
                }
                let outcomes = confirms.await;
                unknown +=
                    outcomes.iter().filter_map(|o| o.as_ref().err()).filter(|e| e.effect() == Effect::Unknown).count();
                left =
                    left.into_iter().zip(&outcomes).filter(|(_, o)| o.is_err()).map(|(message, _)| message).collect();
            }
        }
        unknown
    };
    let receiving = async {
        let (mut seen, mut events) = (BTreeMap::<u32, u32>::new(), Vec::new());
        let mut newest: BTreeMap<u32, u32> = BTreeMap::new();
        let mut deadline = Instant::now() + LONG * 2;
        while seen.len() < count as usize {
            assert!(Instant::now() < deadline, "{} of {count} arrived", seen.len());
            let received = subscriber.receive_all(50, Duration::from_secs(1)).await.unwrap();
            events.extend(received.events);
            for delivery in &received.deliveries {
                let number = number(delivery);
                let times = seen.entry(number).or_default();
                *times += 1;
                if *times == 1 {
                    // As long as something new comes, it goes on.
                    deadline = Instant::now() + LONG * 2;
                    let before = newest.insert(number % KEYS, number);
                    assert!(!is_ordered || before.is_none_or(|before| before < number), "{number} after {before:?}");
                }
            }
            for outcome in ack(received.deliveries).await {
                // Dropped with its error it comes back, and is acked then.
                drop(outcome);
            }
        }
        (seen, events)
    };
    let (unknown, (seen, events)) = tokio::join!(publishing, receiving);
    assert_eq!(seen.len(), count as usize);
    assert!(proxy.connections_cut() > 0, "nothing was cut");
    let degraded = events.iter().filter(|event| matches!(event, SubscriptionEvent::Degraded { .. })).count();
    let twice = seen.values().filter(|times| **times > 1).count();
    println!(
        "{count} messages, {} connections cut, {unknown} unknown publishes, {twice} seen more than once, degraded {degraded} times: 0 lost",
        proxy.connections_cut()
    );
    subscriber.close(LONG).await.unwrap();
    bus.delete(name.as_str(), None).await.unwrap();
}

/// The key of the message at that place of a batch; thirty is a multiple of their number.
fn key(place: usize) -> String {
    format!("key-{}", place % KEYS as usize)
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_queue_with_a_redrive_policy_of_its_own_is_refused() {
    let Some(url) = url() else { return };
    let (bus, bare) = (connect(&url, "").await, bare(&url));
    let name = unique("policy");
    bus.subscribe(bus.subscription(name.as_str(), "g")).await.unwrap().close(LONG).await.unwrap();
    let description = bus.describe(name.as_str()).await.unwrap();
    let group = &description.groups[0];
    let of = |queue: &str| format!("http://{}/000000000000/{queue}", host(&url));
    let (queue, letters) = (of(&group.physical), of(&group.dead_letters));
    let arn = bare.get_queue_attributes().queue_url(&letters).attribute_names(Attribute::QueueArn);
    let arn = arn.send().await.unwrap().attributes.unwrap().remove(&Attribute::QueueArn).unwrap();
    let policy = format!(r#"{{"maxReceiveCount":"3","deadLetterTargetArn":"{arn}"}}"#);
    let set = bare.set_queue_attributes().queue_url(&queue).attributes(Attribute::RedrivePolicy, policy);
    set.send().await.unwrap();
    for mode in [TopologyMode::Declare, TopologyMode::Verify] {
        let spec = bus.subscription(name.as_str(), "g").with_topology(mode);
        let error = bus.subscribe(spec).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::AlreadyExists, "{error}");
        assert!(error.to_string().contains("maxReceiveCount"), "{error}");
    }
    bus.delete(name.as_str(), None).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_others_send_is_read_and_what_sqs_has_buried_is_a_letter() {
    let Some(url) = url() else { return };
    let (bus, bare) = (connect(&url, "").await, bare(&url));
    let name = unique("foreign");
    let mut subscriber = bus.subscribe(bus.subscription(name.as_str(), "g")).await.unwrap();
    let description = bus.describe(name.as_str()).await.unwrap();
    let group = &description.groups[0];
    let of = |queue: &str| format!("http://{}/000000000000/{queue}", host(&url));
    bare.send_message().queue_url(of(&group.physical)).message_body("plain").send().await.unwrap();
    let delivery = receive(&mut subscriber, 1).await.remove(0);
    assert_eq!(delivery.message().bytes(), b"plain");
    delivery.ack().await.unwrap();
    bare.send_message().queue_url(of(&group.dead_letters)).message_body("moved").send().await.unwrap();
    let letters = bus.dead_letters(name.as_str(), "g").unwrap().peek(&Default::default(), 10).await.unwrap();
    assert_eq!((letters.len(), &letters[0].reason), (1, &Reason::BrokerLimit));
    assert_eq!(letters[0].message.bytes(), b"moved");
    subscriber.close(LONG).await.unwrap();
    bus.delete(name.as_str(), None).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fifo_queues_behind_a_topic_keep_the_order_of_each_group() {
    let Some(url) = localstack_url() else { return };
    let bus = connect(&url, "mode=fifo").await;
    let name = unique("topic");
    // A topic without a group would drop it.
    assert_eq!(bus.send(Message::new(name.as_str(), "x")).await.unwrap_err().kind(), ErrorKind::NotFound);
    let mut members = Vec::new();
    for group in ["a", "b"] {
        let spec = bus.subscription(name.as_str(), group).with_order(Order::Key);
        members.push(bus.subscribe(spec).await.unwrap());
    }
    publish(&bus, (0..30_u32).map(|n| Message::new(name.as_str(), n.to_string()).with_key("k")).collect()).await;
    for member in &mut members {
        let mut seen = Vec::new();
        while seen.len() < 30 {
            let deliveries = receive(member, 1).await;
            seen.extend(deliveries.iter().map(number));
            assert!(ack(deliveries).await.iter().all(Result::is_ok));
        }
        assert_eq!(seen, (0..30).collect::<Vec<_>>());
    }
    // A failure of one group, and its redrive, are nothing to the other.
    publish(&bus, vec![Message::new(name.as_str(), "99").with_key("k")]).await;
    receive(&mut members[0], 1).await.remove(0).dead_letter(Verdict::new(Reason::Rejected)).await.unwrap();
    receive(&mut members[1], 1).await.remove(0).ack().await.unwrap();
    let report = bus.dead_letters(name.as_str(), "a").unwrap().redrive(&Default::default()).await.unwrap();
    assert_eq!(report.moved, 1);
    let again = receive(&mut members[0], 1).await.remove(0);
    assert_eq!((number(&again), again.attempt()), (99, 1));
    again.ack().await.unwrap();
    common::nothing(&mut members[1]).await;
    for member in members {
        member.close(LONG).await.unwrap();
    }
    bus.delete(name.as_str(), None).await.unwrap();
}

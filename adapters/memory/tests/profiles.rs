//! The profiles: each is as awkward as its record says. (That they keep what it promises, the conformance suite proves.)

#![allow(clippy::unwrap_used, reason = "test code")]

mod common;

use std::collections::BTreeSet;
use std::time::Duration;

use anybroker_core::{
    AckLevel, Bus, Delivery, Effect, ErrorKind, ManualClock, Message, Order, Subscriber, SubscriptionEvent,
    TopologySpec,
};
use anybroker_memory::{Memory, Profile};
use common::*;

fn as_profile(profile: Profile) -> (Bus, ManualClock) {
    built(Memory::builder().profile(profile))
}

async fn member(bus: &Bus) -> Subscriber {
    bus.subscribe(bus.subscription("orders", "g").with_lease(secs(30))).await.unwrap()
}

/// Events and deliveries, until something comes that is not empty.
async fn events(subscriber: &mut Subscriber) -> (Vec<SubscriptionEvent>, Vec<Delivery>) {
    let received = subscriber.receive_all(1_000, NOW).await.unwrap();
    (received.events, received.deliveries)
}

#[tokio::test]
async fn kafka_forgets_acks_above_a_hole_when_the_member_goes() {
    let (bus, _clock) = as_profile(Profile::Kafka);
    let mut subscriber = member(&bus).await;
    publish_keyed(&bus, "orders", &[("k", "1"), ("k", "2"), ("k", "3"), ("k", "4")]).await;
    events(&mut subscriber).await.1.into_iter().for_each(drop);
    let mut out = ready(&mut subscriber).await;
    assert_eq!(texts(&out), ["1", "2", "3", "4"]);
    assert!(out.iter().all(|delivery| delivery.facts().deliveries.is_none()), "hand-overs are not counted");
    let hole = pick(&mut out, "2");
    for outcome in anybroker_core::ack(out).await {
        assert_eq!(outcome.unwrap(), AckLevel::Recorded);
    }
    assert!(ready(&mut subscriber).await.is_empty(), "what was acked does not come again while the member is there");
    subscriber.close(SOON).await.unwrap();
    drop(hole);
    let mut next = member(&bus).await;
    assert_eq!(done(&mut next).await, ["2", "3", "4"]);
    next.close(SOON).await.unwrap();
    assert!(ready(&mut member(&bus).await).await.is_empty(), "without a hole everything is committed");
}

#[tokio::test]
async fn kafka_moves_lanes_to_a_member_that_joins_once_they_are_settled() {
    let (bus, clock) = as_profile(Profile::Kafka);
    let mut first = member(&bus).await;
    let assigned = |events: &[SubscriptionEvent]| {
        events.iter().filter(|event| matches!(event, SubscriptionEvent::Assigned { .. })).count()
    };
    assert_eq!(assigned(&events(&mut first).await.0), 4);
    let keys: Vec<String> = (0..40).map(|key| key.to_string()).collect();
    let messages: Vec<_> = keys.iter().map(|key| (key.as_str(), key.as_str())).collect();
    publish_keyed(&bus, "orders", &messages).await;
    let mut out = ready(&mut first).await;
    assert_eq!(out.len(), 40);

    let mut second = member(&bus).await;
    assert!(ready(&mut second).await.is_empty(), "its lanes are still being settled");
    let told = events(&mut first).await.0;
    let revoking: Vec<_> = told
        .iter()
        .filter_map(|event| match event {
            SubscriptionEvent::Revoking { lane, .. } => Some(lane.index),
            _ => None,
        })
        .collect();
    assert_eq!(revoking.len(), 2, "{told:?}");
    let held = out.iter().position(|delivery| delivery.lane().index == revoking[0]).unwrap();
    let held = out.remove(held);
    ack_all(out).await;
    assert_eq!(assigned(&events(&mut second).await.0), 1, "one of the two is settled, the other is not");

    // Whoever does not settle in time loses the lane all the same, and what it holds of it is stale.
    clock.advance(Duration::from_millis(500));
    let (told, again) = events(&mut second).await;
    assert_eq!(assigned(&told), 1);
    assert!(texts(&again).contains(&text(&held)), "the unsettled message, and what was acked above it, comes again");
    assert!(again.iter().all(|delivery| delivery.attempt() == 1 && delivery.lane().epoch > held.lane().epoch));
    assert_eq!(held.ack().await.unwrap_err().error().kind(), ErrorKind::StaleDelivery);
    let lost = |event: &SubscriptionEvent| matches!(event, SubscriptionEvent::Lost { .. });
    assert_eq!(events(&mut first).await.0.iter().filter(|event| lost(event)).count(), 2);
}

#[tokio::test]
async fn kafka_takes_all_lanes_from_a_member_that_holds_a_delivery_too_long() {
    let (bus, clock) = as_profile(Profile::Kafka);
    let mut first = member(&bus).await;
    let mut second = member(&bus).await;
    let keys: Vec<String> = (0..40).map(|key| key.to_string()).collect();
    let messages: Vec<_> = keys.iter().map(|key| (key.as_str(), key.as_str())).collect();
    publish_keyed(&bus, "orders", &messages).await;
    let (_, held) = events(&mut first).await;
    let (_, other) = events(&mut second).await;
    assert_eq!(held.len() + other.len(), 40);
    ack_all(other).await;
    clock.advance(secs(30));
    let mut seen = 0;
    for _ in 0..3 {
        let (_, more) = events(&mut second).await;
        seen += more.len();
        ack_all(more).await;
    }
    assert_eq!(seen, held.len());
    assert!(bus.capabilities().total_order.note().is_some());
}

#[tokio::test]
async fn rabbitmq_and_sqs_keep_nothing_for_groups_to_come() {
    for profile in [Profile::RabbitMq, Profile::Sqs] {
        let (bus, _clock) = as_profile(profile);
        let unroutable = bus.send(Message::new("orders", "1")).await.unwrap_err();
        assert_eq!((unroutable.kind(), unroutable.effect()), (ErrorKind::NotFound, Effect::NotDone));
        bus.declare(&TopologySpec::group("orders", "other")).await.unwrap();
        publish(&bus, "orders", &["2"]).await;
        let mut late = member(&bus).await;
        publish(&bus, "orders", &["3"]).await;
        assert_eq!(done(&mut late).await, ["3"]);
    }
}

#[tokio::test]
async fn rabbitmq_loses_a_channel_now_and_then_where_there_is_a_seed() {
    let bus = Memory::builder().profile(Profile::RabbitMq).seed(3).build().bus();
    let mut subscriber = member(&bus).await;
    publish(&bus, "orders", &["held"]).await;
    let held = one(&mut subscriber).await;
    let mut lost = None;
    for _ in 0..300 {
        publish(&bus, "orders", &["other"]).await;
        let (events, deliveries) = events(&mut subscriber).await;
        for delivery in deliveries {
            if text(&delivery) == "held" {
                lost = Some(delivery);
            } else {
                assert_eq!(delivery.ack().await.unwrap(), AckLevel::Sent);
            }
        }
        if lost.is_some() {
            let kinds = ["Degraded", "Recovered", "Lost", "Assigned"];
            let shown: Vec<String> = events.iter().map(|event| format!("{event:?}")).collect();
            assert!(kinds.iter().zip(&shown).all(|(kind, event)| event.starts_with(kind)), "{shown:?}");
            break;
        }
    }
    let again = lost.unwrap();
    assert_eq!((again.attempt(), again.facts().deliveries), (2, Some(2)), "counted, although no handler failed");
    assert_eq!(held.ack().await.unwrap_err().error().kind(), ErrorKind::StaleDelivery);
    again.ack().await.unwrap();
}

#[tokio::test]
async fn jetstream_accepts_a_late_ack_although_somebody_else_has_the_message() {
    let (bus, clock) = as_profile(Profile::JetStream);
    let mut first = member(&bus).await;
    let mut second = member(&bus).await;
    publish(&bus, "orders", &["1", "2"]).await;
    let mut late = ready(&mut first).await;
    clock.advance(secs(30));
    let again = second.receive(1, NOW).await.unwrap().remove(0);
    assert_eq!((text(&again), again.attempt()), ("1".into(), 2), "an ended ack wait counts");
    ack_all(vec![pick(&mut late, "1"), pick(&mut late, "2")]).await;
    again.ack().await.unwrap();
    clock.advance(secs(30));
    assert!(ready(&mut second).await.is_empty());
    assert_eq!(bus.lag("orders", "g").await.unwrap().total(), Some(0));
}

#[tokio::test]
async fn jetstream_stores_an_id_once_by_default() {
    let (bus, _clock) = as_profile(Profile::JetStream);
    let message = Message::new("orders", "1").with_id("order-1");
    assert!(!bus.send(message.clone()).await.unwrap().duplicate);
    assert!(bus.send(message).await.unwrap().duplicate);
}

#[tokio::test]
async fn sqs_brings_ten_at_most_and_counts_every_receive_but_never_beyond_the_last_attempt() {
    let (bus, _clock) = as_profile(Profile::Sqs);
    let mut subscriber = bus.subscribe(bus.subscription("orders", "g").with_max_attempts(3)).await.unwrap();
    publish(&bus, "orders", &["x"; 25]).await;
    let out = ready(&mut subscriber).await;
    assert_eq!(out.len(), 10);
    ack_all(out).await;
    ack_all(ready(&mut subscriber).await).await;
    ack_all(ready(&mut subscriber).await).await;
    publish(&bus, "orders", &["y"]).await;
    for attempt in [1, 2, 3, 3, 3] {
        let delivery = one(&mut subscriber).await;
        assert_eq!(delivery.attempt(), attempt);
        delivery.release().await.unwrap();
    }
    let refused = bus.subscribe(bus.subscription("orders", "g").with_order(Order::Key)).await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Unsupported);
}

#[tokio::test]
async fn sqs_takes_a_late_ack_until_the_message_is_received_again() {
    let (bus, clock) = as_profile(Profile::Sqs);
    let mut subscriber = member(&bus).await;
    publish(&bus, "orders", &["1", "2"]).await;
    let mut late = ready(&mut subscriber).await;
    clock.advance(secs(30));
    pick(&mut late, "1").ack().await.unwrap();
    let again = one(&mut subscriber).await;
    assert_eq!(text(&again), "2");
    assert_eq!(late.remove(0).ack().await.unwrap_err().error().kind(), ErrorKind::StaleDelivery);
    again.ack().await.unwrap();
}

#[tokio::test]
async fn pulsar_forgets_attempts_when_the_consumer_goes() {
    let (bus, _clock) = as_profile(Profile::Pulsar);
    let mut subscriber = member(&bus).await;
    publish(&bus, "orders", &["1"]).await;
    one(&mut subscriber).await.nack(NOW).await.unwrap();
    let second = one(&mut subscriber).await;
    assert_eq!(second.attempt(), 2);
    subscriber.close(SOON).await.unwrap();
    drop(second);
    assert_eq!(one(&mut member(&bus).await).await.attempt(), 1);
}

/// Whatever goes wrong by itself: everything is acked in the end, and the same seed does the same again.
#[tokio::test]
async fn with_any_seed_nothing_is_lost_on_any_profile() {
    for profile in [Profile::Kafka, Profile::RabbitMq, Profile::JetStream, Profile::Sqs, Profile::Pulsar] {
        for seed in 1..=5 {
            let first = disturbed(profile, seed).await;
            assert_eq!(first, disturbed(profile, seed).await, "{profile:?} with seed {seed}");
        }
    }
}

/// Runs two members over a thousand messages, and tells which deliveries there were.
async fn disturbed(profile: Profile, seed: u64) -> Vec<String> {
    const MESSAGES: usize = 1_000;
    let (bus, clock) = built(Memory::builder().profile(profile).seed(seed).disturb_every(20));
    let mut members = [member(&bus).await, member(&bus).await];
    let mut acked = BTreeSet::new();
    let mut seen = Vec::new();
    let mut held = Vec::new();
    for round in 0..20_000 {
        if round < MESSAGES {
            // An id of its own for each, the same in every run: lanes go by it where there is no key.
            let message = Message::new("orders", round.to_string()).with_id(format!("m{round}"));
            bus.send(message).await.unwrap();
        }
        let came = members[round % 2].receive(2, NOW).await.unwrap();
        seen.extend(came.iter().map(|delivery| format!("{}:{}", text(delivery), delivery.attempt())));
        held.extend(came);
        // Everything is held for a while, so that there is something to be lost.
        while held.len() > 10 || (round > MESSAGES && !held.is_empty()) {
            let delivery = held.remove(0);
            let number: usize = text(&delivery).parse().unwrap();
            match delivery.ack().await {
                Ok(_) => drop(acked.insert(number)),
                Err(error) => assert_eq!(error.error().kind(), ErrorKind::StaleDelivery),
            }
        }
        clock.advance(Duration::from_millis(10));
        if round > MESSAGES && bus.lag("orders", "g").await.unwrap().total() == Some(0) {
            assert_eq!(acked.len(), MESSAGES, "{profile:?} with seed {seed}");
            return seen;
        }
    }
    panic!("{profile:?} with seed {seed}: not done, {:?}", bus.lag("orders", "g").await.unwrap());
}

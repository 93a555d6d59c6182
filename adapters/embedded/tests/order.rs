//! Order per key and in total, and what a failure does to it.

#![allow(clippy::unwrap_used, reason = "test code")]

mod common;

use anybroker_core::{Bus, DeadLetter, DeadLetterFilter, ErrorKind, OnFailure, Order, Reason, Subscriber, Verdict};
use anybroker_embedded::Durability;
use common::*;

async fn ordered(bus: &Bus, order: Order, on_failure: OnFailure) -> Subscriber {
    let spec = bus.subscription("orders", "g").with_order(order).with_on_failure(on_failure).with_max_attempts(3);
    bus.subscribe(spec).await.unwrap()
}

async fn letters(bus: &Bus) -> Vec<DeadLetter> {
    bus.dead_letters("orders", "g").unwrap().page(None, 100).await.unwrap().letters
}

async fn rejected(delivery: anybroker_core::Delivery) {
    delivery.dead_letter(Verdict::new(Reason::Rejected)).await.unwrap();
}

#[tokio::test]
async fn the_unsettled_deliveries_of_a_key_belong_to_one_member() {
    let (bus, _clock, _place) = manual().await;
    let mut first = ordered(&bus, Order::Key, OnFailure::GoPast).await;
    let mut second = ordered(&bus, Order::Key, OnFailure::GoPast).await;
    publish_keyed(&bus, "orders", &[("a", "a1"), ("b", "b1"), ("a", "a2"), ("a", "a3")]).await;
    let a1 = first.receive(1, NOW).await.unwrap();
    assert_eq!(texts(&a1), ["a1"]);
    let b1 = ready(&mut second).await;
    assert_eq!(texts(&b1), ["b1"], "a2 and a3 are the first member's");
    let rest = first.receive(1, NOW).await.unwrap();
    assert_eq!(texts(&rest), ["a2"]);
    ack_all(a1).await;
    assert!(ready(&mut second).await.is_empty(), "a2 is still out");
    ack_all(rest).await;
    assert_eq!(texts(&ready(&mut second).await), ["a3"], "a key without deliveries goes to whoever asks");
}

#[tokio::test]
async fn messages_without_a_key_have_no_order_to_keep() {
    let (bus, _clock, _place) = manual().await;
    let mut first = ordered(&bus, Order::Key, OnFailure::Block).await;
    let mut second = ordered(&bus, Order::Key, OnFailure::Block).await;
    publish(&bus, "orders", &["1", "2", "3"]).await;
    let _one = first.receive(1, NOW).await.unwrap();
    assert_eq!(texts(&ready(&mut second).await), ["2", "3"]);
}

#[tokio::test]
async fn a_key_moves_on_when_its_member_closes() {
    let (bus, _clock, _place) = manual().await;
    let mut first = ordered(&bus, Order::Key, OnFailure::GoPast).await;
    let mut second = ordered(&bus, Order::Key, OnFailure::GoPast).await;
    publish_keyed(&bus, "orders", &[("a", "a1"), ("a", "a2"), ("a", "a3")]).await;
    let _held = first.receive(2, NOW).await.unwrap();
    assert!(ready(&mut second).await.is_empty());
    let waiting = tokio::spawn(async move { texts(&second.receive(10, SOON).await.unwrap()) });
    tokio::task::yield_now().await;
    first.close(SOON).await.unwrap();
    assert_eq!(waiting.await.unwrap(), ["a1", "a2", "a3"]);
}

#[tokio::test]
async fn going_past_lets_later_messages_out_while_the_failed_one_waits() {
    let (bus, clock, _place) = manual().await;
    let mut subscriber = ordered(&bus, Order::Key, OnFailure::GoPast).await;
    publish_keyed(&bus, "orders", &[("a", "a1"), ("a", "a2")]).await;
    let a1 = subscriber.receive(1, NOW).await.unwrap().remove(0);
    a1.nack(secs(5)).await.unwrap();
    let a2 = one(&mut subscriber).await;
    assert_eq!(text(&a2), "a2");
    a2.ack().await.unwrap();
    clock.advance(secs(5));
    assert_eq!(text(&one(&mut subscriber).await), "a1");
}

#[tokio::test]
async fn blocking_keeps_later_messages_until_the_failed_one_is_settled_for_good() {
    let (bus, clock, _place) = manual().await;
    let mut subscriber = ordered(&bus, Order::Key, OnFailure::Block).await;
    publish_keyed(&bus, "orders", &[("a", "a1"), ("a", "a2"), ("b", "b1")]).await;
    subscriber.receive(1, NOW).await.unwrap().remove(0).nack(secs(5)).await.unwrap();
    assert_eq!(done(&mut subscriber).await, ["b1"], "another key is not held up");
    clock.advance(secs(5));
    let a1 = one(&mut subscriber).await;
    assert_eq!((text(&a1), a1.attempt()), ("a1".into(), 2));
    assert!(ready(&mut subscriber).await.is_empty(), "a1 may fail again");
    a1.ack().await.unwrap();
    assert_eq!(text(&one(&mut subscriber).await), "a2");
}

#[tokio::test]
async fn under_block_what_was_out_behind_a_failed_message_comes_back_behind_it() {
    let (bus, clock, _place) = manual().await;
    let mut subscriber = ordered(&bus, Order::Key, OnFailure::Block).await;
    publish_keyed(&bus, "orders", &[("a", "a1"), ("a", "a2"), ("a", "a3")]).await;
    let mut out = ready(&mut subscriber).await;
    pick(&mut out, "a1").nack(secs(5)).await.unwrap();
    pick(&mut out, "a3").release().await.unwrap();
    drop(pick(&mut out, "a2"));
    assert!(ready(&mut subscriber).await.is_empty());
    clock.advance(secs(5));
    for expected in ["a1", "a2"] {
        let delivery = subscriber.receive(1, NOW).await.unwrap().remove(0);
        assert_eq!(text(&delivery), expected);
        delivery.ack().await.unwrap();
    }
    assert_eq!(text(&one(&mut subscriber).await), "a3");
}

#[tokio::test]
async fn under_block_a_failed_message_that_is_out_further_back_opens_no_way_past_the_first() {
    let (bus, clock, _place) = manual().await;
    let mut subscriber = ordered(&bus, Order::Key, OnFailure::Block).await;
    publish_keyed(&bus, "orders", &[("a", "a1"), ("a", "a2"), ("a", "a3")]).await;
    let mut out = ready(&mut subscriber).await;
    pick(&mut out, "a3").nack(secs(0)).await.unwrap();
    let a3 = one(&mut subscriber).await;
    pick(&mut out, "a1").nack(secs(5)).await.unwrap();
    pick(&mut out, "a2").release().await.unwrap();
    assert!(ready(&mut subscriber).await.is_empty(), "a1 comes first");
    clock.advance(secs(5));
    for expected in ["a1", "a2"] {
        let delivery = subscriber.receive(1, NOW).await.unwrap().remove(0);
        assert_eq!(text(&delivery), expected);
        delivery.ack().await.unwrap();
    }
    a3.ack().await.unwrap();
}

#[tokio::test]
async fn a_waiting_receive_wakes_when_a_blocked_key_may_go_on() {
    let (bus, clock, _place) = manual().await;
    let mut subscriber = ordered(&bus, Order::Key, OnFailure::Block).await;
    publish_keyed(&bus, "orders", &[("a", "a1")]).await;
    one(&mut subscriber).await.nack(secs(5)).await.unwrap();
    let waiting = tokio::spawn(async move { texts(&subscriber.receive(10, SOON).await.unwrap()) });
    tokio::task::yield_now().await;
    clock.advance(secs(5));
    assert_eq!(waiting.await.unwrap(), ["a1"]);
}

#[tokio::test]
async fn parking_sends_later_messages_of_the_key_after_the_dead_letter_until_all_are_redriven_in_order() {
    let (bus, _clock, _place) = manual().await;
    let mut subscriber = ordered(&bus, Order::Key, OnFailure::Park).await;
    publish_keyed(&bus, "orders", &[("a", "a1"), ("a", "a2"), ("b", "b1"), ("a", "a3")]).await;
    let mut out = subscriber.receive(2, NOW).await.unwrap();
    rejected(out.remove(0)).await;
    out.remove(0).release().await.unwrap();
    assert_eq!(done(&mut subscriber).await, ["b1"]);
    publish_keyed(&bus, "orders", &[("a", "a4")]).await;
    assert!(ready(&mut subscriber).await.is_empty());
    let found = letters(&bus).await;
    let shown: Vec<_> =
        found.iter().map(|letter| (letter.message.bytes(), letter.reason.as_str(), letter.attempts)).collect();
    let expected: [(&[u8], &str, u32); 4] =
        [(b"a1", "rejected", 1), (b"a2", "parked", 0), (b"a3", "parked", 0), (b"a4", "parked", 0)];
    assert_eq!(shown, expected);
    // Not out of order: a3 alone is refused.
    let scope = anybroker_core::DeadLetterScope::new("orders", "g");
    let refused = bus.broker().redrive(&scope, &[found[2].id.clone()]).await.remove(0).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Unavailable);
    let report = bus.dead_letters("orders", "g").unwrap().redrive(&Default::default()).await.unwrap();
    assert_eq!((report.matched, report.moved, report.failed.len()), (4, 4, 0));
    publish_keyed(&bus, "orders", &[("a", "a5")]).await;
    let back = ready(&mut subscriber).await;
    assert_eq!(texts(&back), ["a1", "a2", "a3", "a4", "a5"]);
    assert!(back.iter().all(|delivery| delivery.attempt() == 1));
}

#[tokio::test]
async fn purging_a_parked_key_lets_it_go_on() {
    let (bus, _clock, _place) = manual().await;
    let mut subscriber = ordered(&bus, Order::Key, OnFailure::Park).await;
    publish_keyed(&bus, "orders", &[("a", "a1"), ("a", "a2")]).await;
    let mut out = ready(&mut subscriber).await;
    rejected(out.remove(0)).await;
    drop(out);
    assert_eq!(bus.dead_letters("orders", "g").unwrap().purge(&DeadLetterFilter::all()).await.unwrap(), 2);
    publish_keyed(&bus, "orders", &[("a", "a3")]).await;
    assert_eq!(texts(&ready(&mut subscriber).await), ["a3"]);
}

#[tokio::test]
async fn total_order_is_one_member_at_a_time_across_all_keys() {
    let (bus, clock, _place) = manual().await;
    let mut first = ordered(&bus, Order::Total, OnFailure::Block).await;
    let mut second = ordered(&bus, Order::Total, OnFailure::Block).await;
    publish_keyed(&bus, "orders", &[("a", "1"), ("b", "2"), ("c", "3")]).await;
    let mut held = first.receive(1, NOW).await.unwrap();
    assert!(ready(&mut second).await.is_empty());
    held.remove(0).nack(secs(1)).await.unwrap();
    assert!(ready(&mut second).await.is_empty());
    assert!(ready(&mut first).await.is_empty());
    clock.advance(secs(1));
    let again = one(&mut second).await;
    assert_eq!((text(&again), again.attempt()), ("1".into(), 2));
    again.ack().await.unwrap();
    assert_eq!(texts(&ready(&mut first).await), ["2", "3"]);
}

#[tokio::test]
async fn total_order_parks_everything_behind_a_dead_letter() {
    let (bus, _clock, _place) = manual().await;
    let mut subscriber = ordered(&bus, Order::Total, OnFailure::Park).await;
    publish_keyed(&bus, "orders", &[("a", "1"), ("b", "2"), ("c", "3")]).await;
    rejected(subscriber.receive(1, NOW).await.unwrap().remove(0)).await;
    assert!(ready(&mut subscriber).await.is_empty());
    assert_eq!(
        letters(&bus).await.iter().map(|letter| letter.reason.as_str()).collect::<Vec<_>>(),
        ["rejected", "parked", "parked"]
    );
}

#[tokio::test]
async fn a_group_keeps_one_order_at_a_time() {
    let (bus, _clock, _place) = manual().await;
    publish_keyed(&bus, "orders", &[("a", "a1"), ("a", "a2")]).await;
    let mut keyed = ordered(&bus, Order::Key, OnFailure::Block).await;
    let refused = bus.subscribe(bus.subscription("orders", "g")).await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::AlreadyExists);
    keyed.receive(1, NOW).await.unwrap().remove(0).nack(NOW).await.unwrap();
    keyed.close(SOON).await.unwrap();
    let mut unordered = bus.subscribe(bus.subscription("orders", "g")).await.unwrap();
    let mut seen = ready(&mut unordered).await;
    seen.sort_by_key(|delivery| delivery.position());
    assert_eq!(
        seen.iter().map(|delivery| (text(delivery), delivery.attempt())).collect::<Vec<_>>(),
        [("a1".into(), 2), ("a2".into(), 1)]
    );
}

#[tokio::test]
async fn many_members_settling_at_random_keep_every_key_in_order() {
    use rand::{RngExt, SeedableRng};
    let mut random = rand::rngs::StdRng::seed_from_u64(7);
    let (bus, clock, _place) = built(|settings| settings.durability = Durability::Grouped).await;
    let mut members = Vec::new();
    for _ in 0..4 {
        let spec = bus.subscription("orders", "g").with_order(Order::Key).with_on_failure(OnFailure::Block);
        members.push(bus.subscribe(spec.with_max_attempts(None).with_crash_limit(None)).await.unwrap());
    }
    let mut next = [0u32; 10];
    let mut done = [0u32; 10];
    let mut out: Vec<(usize, anybroker_core::Delivery)> = Vec::new();
    for round in 0..6_000 {
        if round < 3_000 {
            let key = random.random_range(0..10usize);
            publish_keyed(&bus, "orders", &[(&key.to_string(), &next[key].to_string())]).await;
            next[key] += 1;
        }
        let member = random.random_range(0..members.len());
        let received = members[member].receive(random.random_range(1..5), NOW).await.unwrap();
        for delivery in received {
            let same = |(other, held): &&(usize, anybroker_core::Delivery)| {
                *other != member && held.message().key() == delivery.message().key()
            };
            assert!(out.iter().find(same).is_none(), "a key is with two members");
            out.push((member, delivery));
        }
        while out.len() > 20 || (round >= 3_000 && !out.is_empty()) {
            let (_, delivery) = out.remove(random.random_range(0..out.len()));
            let key: usize = String::from_utf8_lossy(delivery.message().key().unwrap()).parse().unwrap();
            let number: u32 = text(&delivery).parse().unwrap();
            let earlier_out = out.iter().any(|(_, held)| {
                held.message().key() == delivery.message().key() && text(held).parse::<u32>().unwrap() < number
            });
            match random.random_range(0..10) {
                // A handler works on one message of a key at a time, in order.
                0..7 if number == done[key] && !earlier_out => {
                    done[key] += 1;
                    delivery.ack().await.unwrap();
                }
                7 => drop(delivery),
                8 => drop(delivery.nack(secs(random.random_range(0..3))).await.unwrap()),
                _ => drop(delivery.release().await.unwrap()),
            }
            clock.advance(std::time::Duration::from_millis(50));
        }
    }
    clock.advance(secs(60));
    for _ in 0..60_000 {
        let mut progress = false;
        for member in &mut members {
            for delivery in member.receive(1, NOW).await.unwrap() {
                progress = true;
                let key: usize = String::from_utf8_lossy(delivery.message().key().unwrap()).parse().unwrap();
                assert_eq!(text(&delivery).parse::<u32>().unwrap(), done[key], "key {key}");
                done[key] += 1;
                delivery.ack().await.unwrap();
            }
        }
        if !progress {
            break;
        }
    }
    assert_eq!(done, next);
}

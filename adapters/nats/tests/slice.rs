//! What is this adapter's own, on a running server.
#![allow(clippy::unwrap_used)]

mod common;

use std::time::Duration;

use anybroker_core::{
    AckLevel, Effect, ErrorKind, Group, Message, OnFailure, Order, PublishOptions, Reason, Timestamp, TopologySpec,
    Verdict, ack,
};
use common::line::Line;
use common::{LONG, connect, nothing, number, numbered, publish, receive, try_connect, unique, url};
use tokio::time::Instant;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_shape_of_message_comes_back_byte_for_byte() {
    let Some(url) = url() else { return };
    let bus = connect(&url, "").await;
    let destination = unique("shapes");
    let name = destination.as_str();
    let mut subscriber = bus.subscribe(bus.subscription(name, "g")).await.unwrap();
    let all_bytes: Vec<u8> = (0..=255).collect();
    let messages = vec![
        Message::new(name, all_bytes.clone()).with_key(all_bytes.clone()).with_id("not a uuid ✓"),
        Message::new(name, ""),
        Message::tombstone(name, "k"),
        Message::new(name, "headers").with_header("b", "1").with_header("a", all_bytes).with_header("b", ""),
        Message::new(name, "native").with_header("b", "1").with_header("a", "2").with_header("b", "3"),
        Message::new(name, "forged").with_header("Nats-Rollup", "all").with_header("Nats-TTL", "1s"),
        Message::new(name, "both").with_content_type("text/plain").with_header("content-type", "the user's own"),
        Message::new(name, "before").with_timestamp(Timestamp::from_millis(-5)),
    ];
    publish(&bus, messages.clone()).await;
    let deliveries = receive(&mut subscriber, messages.len()).await;
    for (delivery, sent) in deliveries.iter().zip(&messages) {
        assert_eq!(delivery.message(), sent);
        assert_eq!((delivery.attempt(), delivery.facts().deliveries), (1, Some(1)));
    }
    ack(deliveries).await.into_iter().for_each(|outcome| assert_eq!(outcome.unwrap(), AckLevel::Confirmed));
    subscriber.close(LONG).await.unwrap();
    bus.delete(name, None).await.unwrap();
    bus.close(LONG).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_redrive_and_its_death_leave_one_letter_each_time_whatever_the_server_dedups() {
    let Some(url) = url() else { return };
    let bus = connect(&url, "").await;
    let name = unique("letters");
    let mut subscriber = bus.subscribe(bus.subscription(name.as_str(), "g")).await.unwrap();
    let mut other = bus.subscribe(bus.subscription(name.as_str(), "other")).await.unwrap();
    publish(&bus, numbered(&name, 0..1)).await;
    receive(&mut other, 1).await.remove(0).ack().await.unwrap();
    let letters = bus.dead_letters(name.as_str(), "g").unwrap();
    for redrives in 0..3 {
        let delivery = receive(&mut subscriber, 1).await.remove(0);
        let verdict = Verdict::new(Reason::Rejected).with_error_type("X").with_detail("line\r\nbreak ".repeat(1_000));
        delivery.dead_letter(verdict).await.unwrap();
        let found = letters.page(None, 10).await.unwrap().letters;
        assert_eq!(found.len(), 1);
        assert_eq!((found[0].redrives, found[0].attempts, &found[0].reason), (redrives, 1, &Reason::Rejected));
        assert!(found[0].detail.as_deref().unwrap().starts_with("line\r\nbreak line"));
        if redrives < 2 {
            assert_eq!(letters.redrive(&Default::default()).await.unwrap().moved, 1);
        }
    }
    nothing(&mut other).await;
    subscriber.close(LONG).await.unwrap();
    other.close(LONG).await.unwrap();
    bus.delete(name.as_str(), None).await.unwrap();
    bus.close(LONG).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn prefetched_messages_that_are_given_back_again_and_again_are_not_taken_for_crashes() {
    let Some(url) = url() else { return };
    let bus = connect(&url, "").await;
    let name = unique("spare");
    let spec = bus.subscription(name.as_str(), "g").with_crash_limit(3);
    publish(&bus, numbered(&name, 0..20)).await;
    for _ in 0..6 {
        let mut subscriber = bus.subscribe(spec.clone()).await.unwrap();
        // One is taken, nineteen are prefetched; the close gives all of them back.
        let first = receive(&mut subscriber, 1).await;
        first.into_iter().next().unwrap().release().await.unwrap();
        subscriber.close(LONG).await.unwrap();
    }
    let mut subscriber = bus.subscribe(spec).await.unwrap();
    let deliveries = receive(&mut subscriber, 20).await;
    assert!(deliveries.iter().all(|delivery| delivery.attempt() == 1));
    for outcome in ack(deliveries).await {
        outcome.unwrap();
    }
    assert!(bus.dead_letters(name.as_str(), "g").unwrap().page(None, 10).await.unwrap().letters.is_empty());
    subscriber.close(LONG).await.unwrap();
    bus.delete(name.as_str(), None).await.unwrap();
    bus.close(LONG).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_that_does_not_receive_leaves_its_prefetched_messages_to_others() {
    let Some(url) = url() else { return };
    let bus = connect(&url, "").await;
    let name = unique("idle");
    let spec = bus.subscription(name.as_str(), "g").with_lease(Duration::from_secs(2));
    let idle = bus.subscribe(spec.clone()).await.unwrap();
    publish(&bus, numbered(&name, 0..50)).await;
    let mut busy = bus.subscribe(spec).await.unwrap();
    let deliveries = receive(&mut busy, 50).await;
    assert!(deliveries.iter().all(|delivery| delivery.attempt() == 1));
    for outcome in ack(deliveries).await {
        outcome.unwrap();
    }
    idle.close(LONG).await.unwrap();
    busy.close(LONG).await.unwrap();
    bus.delete(name.as_str(), None).await.unwrap();
    bus.close(LONG).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_close_hands_the_order_over_at_once() {
    let Some(url) = url() else { return };
    let bus = connect(&url, "").await;
    let name = unique("handover");
    let spec = bus.subscription(name.as_str(), "g").with_order(Order::Key).with_lease(Duration::from_secs(60));
    let mut first = bus.subscribe(spec.clone()).await.unwrap();
    publish(&bus, numbered(&name, 0..10)).await;
    let held = receive(&mut first, 4).await;
    let mut second = bus.subscribe(spec).await.unwrap();
    nothing(&mut second).await;
    let begun = Instant::now();
    first.close(LONG).await.unwrap();
    let came = receive(&mut second, 10).await;
    assert_eq!(came.iter().map(number).collect::<Vec<_>>(), (0..10).collect::<Vec<_>>());
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
    drop(held);
    for outcome in ack(came).await {
        outcome.unwrap();
    }
    second.close(LONG).await.unwrap();
    bus.delete(name.as_str(), None).await.unwrap();
    bus.close(LONG).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_group_that_is_deleted_ends_its_subscriptions_and_a_deleted_destination_refuses_or_is_made_again() {
    let Some(url) = url() else { return };
    let (bus, strict) = (connect(&url, "").await, connect(&url, "create_destinations=false").await);
    let name = unique("deleted");
    let mut subscriber = bus.subscribe(bus.subscription(name.as_str(), "g")).await.unwrap();
    publish(&strict, numbered(&name, 0..1)).await;
    bus.delete(name.as_str(), Some(&Group::from("g"))).await.unwrap();
    let error = loop {
        match subscriber.receive(10, LONG).await {
            Ok(_) => {}
            Err(error) => break error,
        }
    };
    assert_eq!(error.kind(), ErrorKind::NotFound);
    bus.delete(name.as_str(), None).await.unwrap();
    let error = strict.send(Message::new(name.as_str(), "x")).await.unwrap_err();
    assert_eq!((error.kind(), error.effect()), (ErrorKind::NotFound, Effect::NotDone));
    bus.declare(&TopologySpec::destination(name.as_str())).await.unwrap();
    strict.send(Message::new(name.as_str(), "x")).await.unwrap();
    bus.delete(name.as_str(), None).await.unwrap();
    bus.close(LONG).await.unwrap();
    strict.close(LONG).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_batches_are_on_their_way_and_dropped_answers_lose_nothing() {
    let Some(url) = url() else { return };
    let bus = connect(&url, "").await;
    let name = unique("pipelined");
    let mut subscriber = bus.subscribe(bus.subscription(name.as_str(), "g")).await.unwrap();
    let mut waiting = Vec::new();
    for batch in 0..100 {
        let confirms = bus.submit(numbered(&name, batch * 100..batch * 100 + 100), &PublishOptions::default()).await;
        if batch % 2 == 0 {
            waiting.push(confirms);
        } else {
            drop(confirms);
        }
    }
    for confirms in waiting {
        confirms.await.into_iter().for_each(|outcome| assert!(outcome.is_ok(), "{outcome:?}"));
    }
    let mut came = Vec::new();
    while came.len() < 10_000 {
        let batch = subscriber.receive(1_000, LONG).await.unwrap();
        assert!(!batch.is_empty(), "{} of 10,000 came", came.len());
        came.extend(batch.iter().map(number));
        for outcome in ack(batch).await {
            outcome.unwrap();
        }
    }
    assert_eq!(came, (0..10_000).collect::<Vec<_>>());
    subscriber.close(LONG).await.unwrap();
    bus.delete(name.as_str(), None).await.unwrap();
    bus.close(LONG).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_is_not_there_is_an_error_within_the_connect_timeout() {
    let begun = Instant::now();
    let error = try_connect("nats://127.0.0.1:9", "connect_timeout=2s").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(begun.elapsed() < Duration::from_secs(4), "{:?}", begun.elapsed());
    let error = try_connect("nats://u:MARKER@127.0.0.1:9", "token=MARKER").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConfigInvalid);
    assert!(!format!("{error} {error:?}").contains("MARKER"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_batch_larger_than_what_may_be_on_its_way_is_stored_whole() {
    let Some(url) = url() else { return };
    let bus = connect(&url, "").await;
    let name = unique("large");
    publish(&bus, numbered(&name, 0..40_000)).await;
    assert_eq!(bus.describe(name.as_str()).await.unwrap().messages, Some(40_000));
    bus.delete(name.as_str(), None).await.unwrap();
    bus.close(LONG).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn delayed_messages_need_a_stream_that_is_made_for_them() {
    let Some(url) = url() else { return };
    let (bus, bounded) = (connect(&url, "").await, connect(&url, "max_mib=1").await);
    let delayed = |name: &str| Message::new(name, "x").with_delay(Duration::from_millis(300));
    let name = unique("bounded");
    let error = bounded.send(delayed(&name)).await.unwrap_err();
    assert_eq!((error.kind(), error.effect()), (ErrorKind::Unsupported, Effect::NotDone));
    // Made by somebody who did not want them, and told by the server.
    bounded.declare(&TopologySpec::group(name.as_str(), "g")).await.unwrap();
    let error = bus.send(delayed(&name)).await.unwrap_err();
    assert_eq!((error.kind(), error.effect()), (ErrorKind::Unsupported, Effect::NotDone));
    bus.delete(name.as_str(), None).await.unwrap();

    let name = unique("delayed");
    let mut subscriber = bus.subscribe(bus.subscription(name.as_str(), "g")).await.unwrap();
    let message = delayed(&name).with_key("k").with_header("a", "1").with_ttl(Duration::from_secs(60));
    let begun = Instant::now();
    let first = bus.send(message.clone()).await.unwrap();
    let second = bus.send(message.clone()).await.unwrap();
    assert_eq!((first.position, first.duplicate, second.duplicate), (None, false, true));
    let came = receive(&mut subscriber, 1).await.remove(0);
    assert!(begun.elapsed() >= Duration::from_millis(300), "{:?}", begun.elapsed());
    assert_eq!(
        (came.message().id(), came.message().key(), came.message().headers().len()),
        (message.id(), message.key(), 1)
    );
    came.ack().await.unwrap();
    nothing(&mut subscriber).await;
    subscriber.close(LONG).await.unwrap();
    bus.delete(name.as_str(), None).await.unwrap();
    bus.close(LONG).await.unwrap();
    bounded.close(LONG).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn behind_a_failed_message_its_key_waits_through_lost_leases_and_members() {
    let Some(url) = url() else { return };
    let bus = connect(&url, "member_timeout=1s").await;
    let name = unique("blocked");
    let spec = bus.subscription(name.as_str(), "g").with_order(Order::Key).with_on_failure(OnFailure::Block);
    let spec = spec.with_lease(Duration::from_secs(1)).with_max_attempts(None);
    let mut first = bus.subscribe(spec.clone()).await.unwrap();
    publish(&bus, numbered(&name, 0..3)).await;
    receive(&mut first, 1).await.remove(0).nack(Duration::from_millis(300)).await.unwrap();
    // Its second attempt outlives its lease: it stays in front, and its third hand-over is still the second attempt.
    let late = receive(&mut first, 1).await.remove(0);
    let again = receive(&mut first, 1).await.remove(0);
    assert_eq!((number(&late), late.attempt(), number(&again), again.attempt()), (0, 2, 0, 2));
    assert_eq!(late.ack().await.unwrap_err().error().kind(), ErrorKind::StaleDelivery);
    let nacked = Instant::now();
    again.nack(Duration::from_secs(2)).await.unwrap();
    first.close(LONG).await.unwrap();
    let mut second = bus.subscribe(spec).await.unwrap();
    for expected in [(0, 3), (1, 1), (2, 1)] {
        let came = receive(&mut second, 1).await.remove(0);
        assert_eq!((number(&came), came.attempt()), expected);
        assert!(nacked.elapsed() >= Duration::from_secs(2), "{:?}", nacked.elapsed());
        came.ack().await.unwrap();
    }
    second.close(LONG).await.unwrap();
    bus.delete(name.as_str(), None).await.unwrap();
    bus.close(LONG).await.unwrap();
}

/// The server goes on sending to a connection that stands still, until it has sent what was asked for: long after the member
/// there has renewed its claim for the last time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_sent_to_a_connection_that_stands_still_comes_first_at_the_next_member() {
    let Some(url) = url() else { return };
    let line = Line::to(&url).await;
    let (silent, bus) = (connect(&line.url, "member_timeout=1s").await, connect(&url, "member_timeout=1s").await);
    let name = unique("taken-over");
    let spec = bus.subscription(name.as_str(), "g").with_order(Order::Key).with_lease(Duration::from_secs(2));
    let spec = spec.with_max_in_flight(30);
    let mut first = silent.subscribe(spec.clone()).await.unwrap();
    publish(&bus, numbered(&name, 0..1)).await;
    receive(&mut first, 1).await.remove(0).ack().await.unwrap();
    let mut second = bus.subscribe(spec).await.unwrap();
    line.stand_still();
    let (publisher, to) = (bus.clone(), name.clone());
    let publishing = tokio::spawn(async move {
        for number in 1..=60 {
            publish(&publisher, numbered(&to, number..number + 1)).await;
            // Over the whole time in which the claim changes hands.
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    });
    let mut seen = Vec::new();
    while seen.len() < 60 {
        let came = receive(&mut second, 1).await.remove(0);
        seen.push(number(&came));
        came.ack().await.unwrap();
    }
    assert_eq!(seen, (1..=60).collect::<Vec<_>>());
    publishing.await.unwrap();
    second.close(LONG).await.unwrap();
    drop(first);
    bus.delete(name.as_str(), None).await.unwrap();
    bus.close(LONG).await.unwrap();
}

/// Its claim is gone: it cannot renew it when it goes on, and makes a new one when nobody without order is there any more.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_silent_member_that_kept_order_stands_by_for_one_without_order_that_came_meanwhile() {
    let Some(url) = url() else { return };
    let line = Line::to(&url).await;
    let (silent, bus) = (connect(&line.url, "member_timeout=1s").await, connect(&url, "member_timeout=1s").await);
    let name = unique("silent");
    let spec = bus.subscription(name.as_str(), "g").with_lease(Duration::from_secs(2));
    let mut keeper = silent.subscribe(spec.clone().with_order(Order::Key)).await.unwrap();
    publish(&bus, numbered(&name, 0..1)).await;
    receive(&mut keeper, 1).await.remove(0).ack().await.unwrap();
    line.stand_still();
    let mut other = bus.subscribe(spec.clone()).await.unwrap();
    line.go_on();
    publish(&bus, numbered(&name, 1..21)).await;
    let mut seen: Vec<u32> = Vec::new();
    while seen.len() < 20 {
        let came = receive(&mut other, 1).await.remove(0);
        seen.push(number(&came));
        came.ack().await.unwrap();
        assert!(keeper.receive(1, Duration::from_millis(20)).await.unwrap().is_empty(), "after {seen:?}");
    }
    // What was on its way to the silent one comes later.
    seen.sort_unstable();
    assert_eq!(seen, (1..21).collect::<Vec<_>>());
    other.close(LONG).await.unwrap();
    publish(&bus, numbered(&name, 21..22)).await;
    let came = receive(&mut keeper, 1).await.remove(0);
    assert_eq!(number(&came), 21);
    came.ack().await.unwrap();
    keeper.close(LONG).await.unwrap();
    bus.delete(name.as_str(), None).await.unwrap();
    bus.close(LONG).await.unwrap();
}

/// Told again, it would be taken from whoever has the message by then: the server looks at the message, not at the delivery.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_nack_whose_confirmation_is_late_takes_the_message_from_nobody_else() {
    let Some(url) = url() else { return };
    let line = Line::to(&url).await;
    let (slow, bus) = (connect(&line.url, "").await, connect(&url, "").await);
    let name = unique("told-once");
    let spec = bus.subscription(name.as_str(), "g").with_max_attempts(None);
    let mut first = slow.subscribe(spec.clone()).await.unwrap();
    publish(&bus, numbered(&name, 0..1)).await;
    let failing = receive(&mut first, 1).await.remove(0);
    first.pause(true).await.unwrap();
    line.answer_late(Duration::from_secs(2));
    let nacking = tokio::spawn(failing.nack(Duration::ZERO));
    let mut second = bus.subscribe(spec.clone()).await.unwrap();
    let held = receive(&mut second, 1).await.remove(0);
    assert_eq!((number(&held), held.attempt()), (0, 2));
    second.pause(true).await.unwrap();
    let mut third = bus.subscribe(spec).await.unwrap();
    nacking.await.unwrap().unwrap();
    nothing(&mut third).await;
    publish(&bus, numbered(&name, 1..2)).await;
    let canary = receive(&mut third, 1).await.remove(0);
    assert_eq!(number(&canary), 1);
    canary.ack().await.unwrap();
    held.ack().await.unwrap();
    line.answer_late(Duration::ZERO);
    for subscriber in [first, second, third] {
        subscriber.close(LONG).await.unwrap();
    }
    bus.delete(name.as_str(), None).await.unwrap();
    bus.close(LONG).await.unwrap();
}

/// What is delivered again looks its record up, and what is new does not.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_comes_again_is_not_overtaken_by_what_is_new() {
    let Some(url) = url() else { return };
    let line = Line::to(&url).await;
    let (bus, slow) = (connect(&url, "").await, connect(&line.url, "").await);
    let name = unique("again");
    let mut first = bus.subscribe(bus.subscription(name.as_str(), "g")).await.unwrap();
    publish(&bus, numbered(&name, 0..20)).await;
    for delivery in receive(&mut first, 20).await {
        delivery.nack(Duration::ZERO).await.unwrap();
    }
    first.close(LONG).await.unwrap();
    publish(&bus, numbered(&name, 20..21)).await;
    // All of them come together; that the records come later than that is what the line is for.
    line.answer_late(Duration::from_millis(200));
    let mut second = slow.subscribe(slow.subscription(name.as_str(), "g")).await.unwrap();
    let mut came: Vec<u32> = Vec::new();
    while came.len() < 21 {
        let delivery = receive(&mut second, 1).await.remove(0);
        came.push(number(&delivery));
        assert_eq!(delivery.attempt(), if number(&delivery) == 20 { 1 } else { 2 });
        delivery.ack().await.unwrap();
    }
    assert_eq!(came.last(), Some(&20), "{came:?}");
    second.close(LONG).await.unwrap();
    bus.delete(name.as_str(), None).await.unwrap();
    bus.close(LONG).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_lay_in_a_connection_for_longer_than_its_lease_is_not_handed_out() {
    let Some(url) = url() else { return };
    let line = Line::to(&url).await;
    let (silent, bus) = (connect(&line.url, "").await, connect(&url, "").await);
    let name = unique("too-late");
    let lease = Duration::from_secs(1);
    let spec = bus.subscription(name.as_str(), "g").with_lease(lease);
    let mut first = silent.subscribe(spec.clone()).await.unwrap();
    publish(&bus, numbered(&name, 0..1)).await;
    receive(&mut first, 1).await.remove(0).ack().await.unwrap();
    line.stand_still();
    // One that does not receive gives back what it has.
    let receiving = tokio::spawn(async move {
        let came = receive(&mut first, 1).await;
        (first, came)
    });
    publish(&bus, numbered(&name, 1..11)).await;
    // They are sent into the line, and to the other member when the server has waited long enough.
    let mut second = bus.subscribe(spec).await.unwrap();
    let mut acked = std::collections::BTreeSet::new();
    while acked.len() < 10 {
        for delivery in receive(&mut second, 1).await {
            let number = number(&delivery);
            // On a machine that stands still for the lease it comes again.
            if delivery.ack().await.is_ok() {
                acked.insert(number);
            }
        }
    }
    second.close(LONG).await.unwrap();
    line.go_on();
    publish(&bus, numbered(&name, 11..12)).await;
    let (mut first, mut came) = receiving.await.unwrap();
    assert_eq!(number(&came[0]), 11, "what is acked was handed out");
    came.remove(0).ack().await.unwrap();
    nothing(&mut first).await;
    first.close(LONG).await.unwrap();
    bus.delete(name.as_str(), None).await.unwrap();
    bus.close(LONG).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_in_a_connection_that_is_cut_is_called_back_in_its_order_before_its_lease_ends() {
    let Some(url) = url() else { return };
    let line = Line::to(&url).await;
    let (cut, bus) = (connect(&line.url, "").await, connect(&url, "").await);
    let name = unique("called-back");
    // Longer than anything here waits.
    let spec = bus.subscription(name.as_str(), "g").with_order(Order::Key).with_lease(LONG * 10);
    let mut subscriber = cut.subscribe(spec).await.unwrap();
    publish(&bus, numbered(&name, 0..5)).await;
    let mut held = receive(&mut subscriber, 5).await;
    held.remove(0).ack().await.unwrap();
    line.stand_still();
    publish(&bus, numbered(&name, 5..25)).await;
    let in_flight = || async { bus.lag(name.as_str(), "g").await.unwrap().in_flight };
    while in_flight().await.is_none_or(|(count, _)| count < 24) {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    line.cut();
    publish(&bus, numbered(&name, 25..30)).await;
    let came = receive(&mut subscriber, 25).await;
    assert_eq!(came.iter().map(number).collect::<Vec<_>>(), (5..30).collect::<Vec<_>>());
    // What was held all the time is held still.
    for outcome in ack(held.into_iter().chain(came).collect()).await {
        outcome.unwrap();
    }
    nothing(&mut subscriber).await;
    subscriber.close(LONG).await.unwrap();
    bus.delete(name.as_str(), None).await.unwrap();
    bus.close(LONG).await.unwrap();
}

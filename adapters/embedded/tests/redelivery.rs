//! Leases, delays, attempts and hand-over counts.

#![allow(clippy::unwrap_used, reason = "test code")]

mod common;

use anybroker_core::{ErrorKind, Message, Reason, Verdict};
use common::*;

#[tokio::test]
async fn what_is_acked_never_comes_back_and_other_groups_see_it_once() {
    let (bus, clock, _place) = manual().await;
    publish(&bus, "orders", &["1", "2"]).await;
    let mut first = bus.subscribe(bus.subscription("orders", "a")).await.unwrap();
    let mut second = bus.subscribe(bus.subscription("orders", "b")).await.unwrap();
    let deliveries = ready(&mut first).await;
    assert_eq!(texts(&deliveries), ["1", "2"]);
    ack_all(deliveries).await;
    clock.advance(secs(3600));
    assert!(ready(&mut first).await.is_empty());
    assert_eq!(texts(&ready(&mut second).await), ["1", "2"]);
    assert_eq!(bus.lag("orders", "a").await.unwrap().total(), Some(0));
}

#[tokio::test]
async fn a_lease_that_ends_brings_the_message_back_with_the_same_attempt() {
    let (bus, clock, _place) = manual().await;
    publish(&bus, "orders", &["1"]).await;
    let mut subscriber = bus.subscribe(bus.subscription("orders", "g").with_lease(secs(30))).await.unwrap();
    let held = one(&mut subscriber).await;
    clock.advance(secs(29));
    assert!(ready(&mut subscriber).await.is_empty());
    clock.advance(secs(1));
    let again = one(&mut subscriber).await;
    assert_eq!((again.attempt(), again.facts().deliveries), (1, Some(2)));
    let refused = held.ack().await.unwrap_err();
    assert_eq!(refused.error().kind(), ErrorKind::StaleDelivery);
    drop(refused);
    again.ack().await.unwrap();
}

#[tokio::test]
async fn a_lease_is_over_even_when_nobody_has_looked_since() {
    let (bus, clock, _place) = manual().await;
    publish(&bus, "orders", &["1"]).await;
    let mut subscriber = bus.subscribe(bus.subscription("orders", "g").with_lease(secs(30))).await.unwrap();
    let held = one(&mut subscriber).await;
    clock.advance(secs(30));
    assert_eq!(held.ack().await.unwrap_err().error().kind(), ErrorKind::StaleDelivery);
    assert_eq!(one(&mut subscriber).await.attempt(), 1);
}

#[tokio::test]
async fn an_extended_lease_holds_that_long_and_no_longer() {
    let (bus, clock, _place) = manual().await;
    publish(&bus, "orders", &["1", "2"]).await;
    let mut subscriber = bus.subscribe(bus.subscription("orders", "g").with_lease(secs(30))).await.unwrap();
    let mut held = ready(&mut subscriber).await;
    clock.advance(secs(20));
    held[0].extend(secs(60)).await.unwrap();
    clock.advance(secs(10));
    assert_eq!(text(&one(&mut subscriber).await), "2");
    clock.advance(secs(49));
    let first = held.remove(0);
    first.extend(secs(1)).await.unwrap();
    clock.advance(secs(1));
    assert_eq!(first.extend(secs(60)).await.unwrap_err().kind(), ErrorKind::StaleDelivery);
}

#[tokio::test]
async fn a_waiting_receive_wakes_when_a_lease_ends() {
    let (bus, clock, _place) = manual().await;
    publish(&bus, "orders", &["1"]).await;
    let mut first = bus.subscribe(bus.subscription("orders", "g").with_lease(secs(30))).await.unwrap();
    let mut second = bus.subscribe(bus.subscription("orders", "g")).await.unwrap();
    let _held = one(&mut first).await;
    let waiting = tokio::spawn(async move { texts(&second.receive(1, SOON).await.unwrap()) });
    tokio::task::yield_now().await;
    clock.advance(secs(30));
    assert_eq!(waiting.await.unwrap(), ["1"]);
}

#[tokio::test]
async fn a_nack_counts_an_attempt_and_its_delay_is_never_cut_short() {
    let (bus, clock, _place) = manual().await;
    publish(&bus, "orders", &["1"]).await;
    let mut subscriber = bus.subscribe(bus.subscription("orders", "g")).await.unwrap();
    one(&mut subscriber).await.nack(secs(10)).await.unwrap();
    clock.advance(std::time::Duration::from_millis(9_999));
    let lag = bus.lag("orders", "g").await.unwrap();
    // The first message of all, too.
    assert_eq!((lag.delayed.unwrap().0, lag.oldest_age.unwrap().0), (1, std::time::Duration::from_millis(9_999)));
    assert!(ready(&mut subscriber).await.is_empty());
    clock.advance(std::time::Duration::from_millis(1));
    let again = one(&mut subscriber).await;
    assert_eq!((again.attempt(), again.facts().deliveries), (2, Some(2)));
}

#[tokio::test]
async fn release_close_and_drop_do_not_count_as_attempts() {
    let (bus, _clock, _place) = manual().await;
    publish(&bus, "orders", &["1"]).await;
    let mut subscriber = bus.subscribe(bus.subscription("orders", "g")).await.unwrap();
    one(&mut subscriber).await.release().await.unwrap();
    let released = one(&mut subscriber).await;
    assert_eq!((released.attempt(), released.facts().deliveries), (1, Some(1)), "given back on purpose");
    drop(released);
    let dropped = one(&mut subscriber).await;
    assert_eq!((dropped.attempt(), dropped.facts().deliveries), (1, Some(2)), "a hand-over without an outcome");
    subscriber.close(SOON).await.unwrap();
    assert_eq!(dropped.ack().await.unwrap_err().error().kind(), ErrorKind::StaleDelivery);
    let mut next = bus.subscribe(bus.subscription("orders", "g")).await.unwrap();
    assert_eq!(one(&mut next).await.attempt(), 1);
}

#[tokio::test]
async fn a_failing_message_is_seen_exactly_max_attempts_times_then_there_is_one_dead_letter() {
    let (bus, clock, _place) = manual().await;
    publish(&bus, "orders", &["bad"]).await;
    let mut subscriber = bus.subscribe(bus.subscription("orders", "g").with_max_attempts(3)).await.unwrap();
    for attempt in 1..=3 {
        let delivery = one(&mut subscriber).await;
        assert_eq!(delivery.attempt(), attempt);
        delivery.nack(secs(1)).await.unwrap();
        clock.advance(secs(1));
    }
    assert!(ready(&mut subscriber).await.is_empty());
    let letters = bus.dead_letters("orders", "g").unwrap().page(None, 10).await.unwrap().letters;
    assert_eq!(letters.len(), 1);
    assert_eq!((letters[0].attempts, &letters[0].reason), (3, &Reason::AttemptsExhausted));
    assert_eq!(bus.lag("orders", "g").await.unwrap().total(), Some(0));
}

#[tokio::test]
async fn a_message_that_never_has_an_outcome_hits_the_crash_limit() {
    let (bus, _clock, _place) = manual().await;
    publish(&bus, "orders", &["killer", "healthy"]).await;
    let spec = bus.subscription("orders", "g").with_crash_limit(4);
    let mut subscriber = bus.subscribe(spec).await.unwrap();
    let mut seen = 0;
    while let Some(killer) = subscriber.receive(1, NOW).await.unwrap().pop() {
        if text(&killer) == "healthy" {
            killer.ack().await.unwrap();
        } else {
            seen += 1;
            drop(killer);
        }
    }
    assert_eq!(seen, 4);
    let letters = bus.dead_letters("orders", "g").unwrap().page(None, 10).await.unwrap().letters;
    assert_eq!(letters.iter().map(|letter| letter.reason.clone()).collect::<Vec<_>>(), [Reason::CrashLimit]);
}

#[tokio::test]
async fn a_delayed_publish_is_never_early_and_counts_as_delayed() {
    let (bus, clock, _place) = manual().await;
    bus.send(Message::new("orders", "later").with_delay(secs(60))).await.unwrap();
    bus.send(Message::new("orders", "now")).await.unwrap();
    let mut subscriber = bus.subscribe(bus.subscription("orders", "g")).await.unwrap();
    let now = one(&mut subscriber).await;
    assert_eq!((text(&now), now.message().delay()), ("now".into(), None));
    let lag = bus.lag("orders", "g").await.unwrap();
    assert_eq!((lag.ready.unwrap().0, lag.in_flight.unwrap().0, lag.delayed.unwrap().0), (0, 1, 1));
    now.ack().await.unwrap();
    clock.advance(std::time::Duration::from_millis(59_999));
    assert!(ready(&mut subscriber).await.is_empty());
    clock.advance(std::time::Duration::from_millis(1));
    let later = one(&mut subscriber).await;
    assert_eq!((text(&later), later.message().delay()), ("later".into(), None));
}

#[tokio::test]
async fn a_stale_settle_harms_no_other_entry_of_its_batch() {
    let (bus, clock, _place) = manual().await;
    publish(&bus, "orders", &["1"]).await;
    let mut subscriber = bus.subscribe(bus.subscription("orders", "g").with_lease(secs(5))).await.unwrap();
    let stale = one(&mut subscriber).await;
    clock.advance(secs(5));
    publish(&bus, "orders", &["2"]).await;
    let mut good = ready(&mut subscriber).await;
    let mut batch = vec![stale];
    batch.append(&mut good);
    let outcomes = anybroker_core::ack(batch).await;
    assert_eq!(outcomes.iter().map(|outcome| outcome.is_ok()).collect::<Vec<_>>(), [false, true, true]);
    drop(outcomes);
    assert_eq!(bus.lag("orders", "g").await.unwrap().total(), Some(0));
}

#[tokio::test]
async fn settling_the_same_token_again_is_stale() {
    let (bus, _clock, _place) = manual().await;
    publish(&bus, "orders", &["1", "2"]).await;
    let mut subscriber = bus.subscribe(bus.subscription("orders", "g")).await.unwrap();
    let mut deliveries = ready(&mut subscriber).await;
    let mut second = deliveries.pop().unwrap();
    let first = deliveries.pop().unwrap();
    let spent = first.token().clone();
    first.ack().await.unwrap();
    let own = std::mem::replace(&mut second.facts_mut().token, spent);
    let (mut second, error) = second.ack().await.unwrap_err().into_parts();
    assert_eq!(error.kind(), ErrorKind::StaleDelivery);
    second.facts_mut().token = own;
    second.ack().await.unwrap();
}

#[tokio::test]
async fn an_explicit_dead_letter_keeps_everything_and_says_why() {
    let (bus, clock, _place) = manual().await;
    let message =
        Message::new("orders", vec![0, 255, 1]).with_key([7u8, 0].as_slice().to_vec()).with_header("h", [0, 1]);
    bus.send(message.clone()).await.unwrap();
    let mut subscriber = bus.subscribe(bus.subscription("orders", "g")).await.unwrap();
    clock.advance(secs(3));
    let seen = clock_now(&clock);
    let delivery = one(&mut subscriber).await;
    clock.advance(secs(2));
    let verdict = Verdict::new(Reason::Rejected).with_error_type("VALIDATION_ERROR").with_detail("no total");
    delivery.dead_letter(verdict).await.unwrap();
    let letter = bus.dead_letters("orders", "g").unwrap().page(None, 1).await.unwrap().letters.remove(0);
    assert_eq!(letter.message, message);
    assert_eq!(letter.reason, Reason::Rejected);
    assert_eq!(letter.error_type.as_deref(), Some("VALIDATION_ERROR"));
    assert_eq!(letter.detail.as_deref(), Some("no total"));
    assert_eq!((letter.attempts, letter.redrives, letter.first_at), (1, 0, Some(seen)));
    assert_eq!(letter.last_at, clock_now(&clock));
}

fn clock_now(clock: &anybroker_core::ManualClock) -> anybroker_core::Timestamp {
    anybroker_core::Clock::now(clock)
}

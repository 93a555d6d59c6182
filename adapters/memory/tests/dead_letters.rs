//! Dead letters: scope, redrive, purge, expiry.

#![allow(clippy::unwrap_used, reason = "test code")]

mod common;

use anybroker_core::{
    Bus, DeadLetterFilter, DeadLetterId, DeadLetterScope, ErrorKind, Message, Reason, RedriveOptions, Subscriber,
    Verdict,
};
use common::*;

async fn reject(subscriber: &mut Subscriber) {
    for delivery in ready(subscriber).await {
        delivery.dead_letter(Verdict::new(Reason::Rejected)).await.unwrap();
    }
}

async fn payloads(bus: &Bus, group: &str) -> Vec<String> {
    let letters = bus.dead_letters("orders", group).unwrap().peek(&DeadLetterFilter::all(), 100).await.unwrap();
    letters.iter().map(|letter| String::from_utf8_lossy(letter.message.bytes()).into_owned()).collect()
}

#[tokio::test]
async fn redrive_gives_letters_back_only_to_the_group_that_failed_them() {
    let (bus, _clock) = manual();
    let mut failing = bus.subscribe(bus.subscription("orders", "failing")).await.unwrap();
    let mut fine = bus.subscribe(bus.subscription("orders", "fine")).await.unwrap();
    publish(&bus, "orders", &["1", "2"]).await;
    reject(&mut failing).await;
    assert_eq!(done(&mut fine).await, ["1", "2"]);
    assert!(payloads(&bus, "fine").await.is_empty());
    let ids: Vec<_> = bus.dead_letters("orders", "failing").unwrap().page(None, 9).await.unwrap().letters;
    let report = bus.dead_letters("orders", "failing").unwrap().redrive(&RedriveOptions::default()).await.unwrap();
    assert_eq!((report.matched, report.moved), (2, 2));
    let back = ready(&mut failing).await;
    assert_eq!(texts(&back), ["1", "2"]);
    assert!(back.iter().zip(&ids).all(|(delivery, letter)| delivery.message() == &letter.message));
    assert!(back.iter().all(|delivery| delivery.attempt() == 1));
    assert!(ready(&mut fine).await.is_empty());
    ack_all(back).await;
    assert_eq!(bus.lag("orders", "failing").await.unwrap().total(), Some(0));
}

#[tokio::test]
async fn redrives_are_remembered_and_the_loop_guard_refuses_in_the_end() {
    let (bus, _clock) = manual();
    let mut subscriber = bus.subscribe(bus.subscription("orders", "g")).await.unwrap();
    publish(&bus, "orders", &["1"]).await;
    let letters = bus.dead_letters("orders", "g").unwrap();
    for redrives in 0..3 {
        reject(&mut subscriber).await;
        assert_eq!(letters.page(None, 9).await.unwrap().letters[0].redrives, redrives);
        assert_eq!(letters.redrive(&RedriveOptions::default()).await.unwrap().moved, 1);
    }
    reject(&mut subscriber).await;
    let report = letters.redrive(&RedriveOptions::default()).await.unwrap();
    assert_eq!((report.moved, report.refused.len()), (0, 1));
}

#[tokio::test]
async fn a_redriven_letter_outlives_what_the_log_forgets() {
    let (bus, _clock) = built(anybroker_memory::Memory::builder().retention(0));
    let mut subscriber = bus.subscribe(bus.subscription("orders", "g")).await.unwrap();
    publish(&bus, "orders", &["1"]).await;
    reject(&mut subscriber).await;
    publish(&bus, "orders", &["2", "3"]).await;
    assert_eq!(done(&mut subscriber).await, ["2", "3"]);
    bus.dead_letters("orders", "g").unwrap().redrive(&RedriveOptions::default()).await.unwrap();
    assert_eq!(bus.lag("orders", "g").await.unwrap().total(), Some(1));
    one(&mut subscriber).await.release().await.unwrap();
    assert_eq!(done(&mut subscriber).await, ["1"]);
    assert_eq!(bus.lag("orders", "g").await.unwrap().total(), Some(0));
}

#[tokio::test]
async fn pages_are_oldest_first_and_resume_where_the_last_ended() {
    let (bus, _clock) = manual();
    let mut subscriber = bus.subscribe(bus.subscription("orders", "g")).await.unwrap();
    publish(&bus, "orders", &["1", "2", "3", "4", "5"]).await;
    reject(&mut subscriber).await;
    let letters = bus.dead_letters("orders", "g").unwrap();
    let first = letters.page(None, 2).await.unwrap();
    let second = letters.page(first.next.clone(), 2).await.unwrap();
    let third = letters.page(second.next.clone(), 2).await.unwrap();
    let sizes = [first.letters.len(), second.letters.len(), third.letters.len()];
    assert_eq!((sizes, third.next.is_none()), ([2, 2, 1], true));
    assert_eq!(payloads(&bus, "g").await, ["1", "2", "3", "4", "5"]);
    assert_eq!(payloads(&bus, "g").await.len(), 5, "reading changes nothing");
}

#[tokio::test]
async fn purge_deletes_and_what_is_gone_is_not_found() {
    let (bus, _clock) = manual();
    let mut subscriber = bus.subscribe(bus.subscription("orders", "g")).await.unwrap();
    publish(&bus, "orders", &["1", "2"]).await;
    reject(&mut subscriber).await;
    let scope = DeadLetterScope::new("orders", "g");
    let id = bus.dead_letters("orders", "g").unwrap().page(None, 1).await.unwrap().letters[0].id.clone();
    let broker = bus.broker();
    assert!(broker.purge(&scope, std::slice::from_ref(&id)).await[0].is_ok());
    let foreign = DeadLetterId("not one of ours".into());
    for outcome in broker.purge(&scope, &[id.clone(), foreign.clone()]).await {
        assert_eq!(outcome.unwrap_err().kind(), ErrorKind::NotFound);
    }
    for outcome in broker.redrive(&scope, &[id, foreign]).await {
        assert_eq!(outcome.unwrap_err().kind(), ErrorKind::NotFound);
    }
    assert_eq!(payloads(&bus, "g").await, ["2"]);
    let nowhere = DeadLetterScope::new("orders", "nobody");
    assert_eq!(broker.dead_letters(&nowhere, None, 1).await.unwrap_err().kind(), ErrorKind::NotFound);
}

#[tokio::test]
async fn what_expires_before_it_is_settled_is_a_dead_letter_in_each_group() {
    let (bus, clock) = manual();
    let mut quick = bus.subscribe(bus.subscription("orders", "quick")).await.unwrap();
    let mut slow = bus.subscribe(bus.subscription("orders", "slow")).await.unwrap();
    bus.send(Message::new("orders", "short").with_ttl(secs(10))).await.unwrap();
    bus.send(Message::new("orders", "long")).await.unwrap();
    assert_eq!(done(&mut quick).await, ["short", "long"]);
    clock.advance(std::time::Duration::from_millis(9_999));
    assert!(payloads(&bus, "slow").await.is_empty());
    clock.advance(std::time::Duration::from_millis(1));
    assert_eq!(payloads(&bus, "slow").await, ["short"]);
    let letter = bus.dead_letters("orders", "slow").unwrap().page(None, 1).await.unwrap().letters.remove(0);
    assert_eq!((letter.reason, letter.attempts), (Reason::Expired, 0));
    assert!(payloads(&bus, "quick").await.is_empty());
    assert_eq!(done(&mut slow).await, ["long"]);
    bus.dead_letters("orders", "slow").unwrap().redrive(&RedriveOptions::default()).await.unwrap();
    assert_eq!(done(&mut slow).await, ["short"], "redriven, it does not die at once again");
}

#[tokio::test]
async fn what_is_in_flight_does_not_expire_until_it_comes_back() {
    let (bus, clock) = manual();
    let spec = bus.subscription("orders", "g").with_lease(secs(3600));
    let mut subscriber = bus.subscribe(spec).await.unwrap();
    for payload in ["acked", "nacked", "retried"] {
        bus.send(Message::new("orders", payload).with_ttl(secs(10))).await.unwrap();
    }
    let mut out = ready(&mut subscriber).await;
    pick(&mut out, "retried").nack(secs(30)).await.unwrap();
    clock.advance(secs(11));
    assert_eq!(payloads(&bus, "g").await, ["retried"], "it was waiting for its delay");
    pick(&mut out, "acked").ack().await.unwrap();
    pick(&mut out, "nacked").nack(NOW).await.unwrap();
    assert!(ready(&mut subscriber).await.is_empty());
    assert_eq!(payloads(&bus, "g").await, ["retried", "nacked"]);
    let letters = bus.dead_letters("orders", "g").unwrap().page(None, 9).await.unwrap().letters;
    assert_eq!(letters.iter().map(|letter| letter.attempts).collect::<Vec<_>>(), [1, 1]);
}

#[tokio::test]
async fn a_key_goes_on_past_what_expired() {
    let (bus, clock) = manual();
    let spec = bus.subscription("orders", "g").with_order(anybroker_core::Order::Key);
    let mut first = bus.subscribe(spec.clone().with_on_failure(anybroker_core::OnFailure::Park)).await.unwrap();
    publish_keyed(&bus, "orders", &[("a", "a1")]).await;
    bus.send(Message::new("orders", "a2").with_key("a").with_ttl(secs(5))).await.unwrap();
    publish_keyed(&bus, "orders", &[("a", "a3")]).await;
    let a1 = first.receive(1, NOW).await.unwrap().remove(0);
    a1.release().await.unwrap();
    clock.advance(secs(5));
    assert_eq!(done(&mut first).await, ["a1", "a3"]);
    assert_eq!(payloads(&bus, "g").await, ["a2"]);
}

#[tokio::test]
async fn a_late_group_is_not_given_what_expired_while_it_was_kept_for_replay_only() {
    let (bus, clock) = manual();
    let mut first = bus.subscribe(bus.subscription("orders", "first")).await.unwrap();
    bus.send(Message::new("orders", "short").with_ttl(secs(10))).await.unwrap();
    bus.send(Message::new("orders", "long")).await.unwrap();
    assert_eq!(done(&mut first).await, ["short", "long"]);
    clock.advance(secs(10));
    let mut late = bus.subscribe(bus.subscription("orders", "late")).await.unwrap();
    assert_eq!(done(&mut late).await, ["long"]);
    assert!(payloads(&bus, "late").await.is_empty());
    assert_eq!(bus.lag("orders", "late").await.unwrap().total(), Some(0));
}

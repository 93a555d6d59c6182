//! Groups, replay, retention, bounds, deletion, names.

#![allow(clippy::unwrap_used, reason = "test code")]

mod common;

use anybroker_core::{
    Declared, Effect, ErrorKind, Message, Position, Start, SubscribeSpec, TopologyMode, TopologySpec,
};
use common::*;

async fn from(bus: &anybroker_core::Bus, group: &str, start: Start) -> Vec<String> {
    let mut subscriber =
        bus.subscribe(SubscribeSpec::new("orders", group).with_start(start).with_max_in_flight(10_000)).await.unwrap();
    texts(&ready(&mut subscriber).await)
}

#[tokio::test]
async fn a_new_group_starts_where_it_asks_to() {
    let (bus, clock, _place) = manual().await;
    publish(&bus, "orders", &["1", "2"]).await;
    clock.advance(secs(10));
    let moment = anybroker_core::Clock::now(&clock);
    publish(&bus, "orders", &["3"]).await;
    assert_eq!(from(&bus, "earliest", Start::Earliest).await, ["1", "2", "3"]);
    assert_eq!(from(&bus, "time", Start::Time(moment)).await, ["3"]);
    assert_eq!(from(&bus, "position", Start::Position(Position::new(1))).await, ["2", "3"]);
    assert!(from(&bus, "latest", Start::Latest).await.is_empty());
    publish(&bus, "orders", &["4"]).await;
    assert_eq!(from(&bus, "latest", Start::Earliest).await, ["4"], "a group that exists goes on where it was");
}

#[tokio::test]
async fn what_one_group_has_open_is_kept_whatever_the_retention() {
    let (bus, _clock, _place) = built(|settings| settings.retention_messages = 0).await;
    bus.declare(&TopologySpec::group("orders", "slow")).await.unwrap();
    let mut quick = bus.subscribe(bus.subscription("orders", "quick")).await.unwrap();
    publish(&bus, "orders", &["1", "2", "3"]).await;
    assert_eq!(done(&mut quick).await.len(), 3);
    assert_eq!(from(&bus, "slow", Start::Latest).await, ["1", "2", "3"]);
}

#[tokio::test]
async fn deleting_underneath_ends_a_waiting_receive_with_not_found() {
    let (bus, _clock, _place) = manual().await;
    for group_only in [true, false] {
        publish(&bus, "orders", &["1"]).await;
        let mut subscriber = bus.subscribe(bus.subscription("orders", "g")).await.unwrap();
        let mut rest = ready(&mut subscriber).await;
        let held = rest.pop().unwrap();
        ack_all(rest).await;
        let waiting = tokio::spawn(async move { subscriber.receive(1, SOON).await.map(|found| found.len()) });
        tokio::task::yield_now().await;
        let group = "g".into();
        bus.delete("orders", group_only.then_some(&group)).await.unwrap();
        assert_eq!(waiting.await.unwrap().unwrap_err().kind(), ErrorKind::NotFound);
        assert_eq!(held.ack().await.unwrap_err().error().kind(), ErrorKind::StaleDelivery);
        assert_eq!(bus.lag("orders", "g").await.unwrap_err().kind(), ErrorKind::NotFound);
    }
    assert_eq!(bus.describe("orders").await.unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!(bus.delete("orders", None).await.unwrap_err().kind(), ErrorKind::NotFound);
}

#[tokio::test]
async fn a_group_that_is_created_again_does_not_meet_the_deliveries_of_the_old_one() {
    let (bus, _clock, _place) = manual().await;
    publish(&bus, "orders", &["1"]).await;
    let mut old = bus.subscribe(bus.subscription("orders", "g")).await.unwrap();
    let stale = one(&mut old).await;
    bus.delete("orders", Some(&"g".into())).await.unwrap();
    let mut new = bus.subscribe(bus.subscription("orders", "g")).await.unwrap();
    let fresh = one(&mut new).await;
    assert_eq!(stale.ack().await.unwrap_err().error().kind(), ErrorKind::StaleDelivery);
    fresh.ack().await.unwrap();
}

#[tokio::test]
async fn declare_creates_once_and_verify_and_leave_create_nothing() {
    let (bus, _clock, _place) = manual().await;
    let spec = TopologySpec::group("orders", "g");
    assert_eq!(bus.verify(&spec).await.unwrap_err().kind(), ErrorKind::NotFound);
    for mode in [TopologyMode::Verify, TopologyMode::Leave] {
        let missing = bus.subscribe(bus.subscription("orders", "g").with_topology(mode)).await.unwrap_err();
        assert_eq!(missing.kind(), ErrorKind::NotFound);
    }
    assert_eq!(bus.declare(&spec).await.unwrap(), Declared::Created);
    assert_eq!(bus.declare(&spec).await.unwrap(), Declared::Existed);
    bus.verify(&spec).await.unwrap();
    let described = bus.describe("orders").await.unwrap();
    assert_eq!(described.groups.len(), 1);
    assert_eq!(described.groups[0].dead_letters, "orders.dlq");
}

#[tokio::test]
async fn publishing_to_a_missing_destination_is_not_found_where_it_may_not_be_created() {
    let (bus, _clock, _place) = built(|settings| settings.create_destinations = false).await;
    bus.declare(&TopologySpec::destination("orders")).await.unwrap();
    let batch = vec![Message::new("nowhere", "1"), Message::new("orders", "2")];
    let outcomes = bus.publish(batch).await;
    let missing = outcomes[0].as_ref().unwrap_err();
    assert_eq!((missing.kind(), missing.effect()), (ErrorKind::NotFound, Effect::NotDone));
    assert_eq!(outcomes[1].as_ref().unwrap().position, Some(Position::new(0)));
}

#[tokio::test]
async fn destinations_of_one_subscription_share_its_bound_fairly() {
    let (bus, _clock, _place) = manual().await;
    publish(&bus, "a", &["a"; 100]).await;
    publish(&bus, "b", &["b"; 100]).await;
    let spec = SubscribeSpec::new("a", "g").and_destination("b").and_destination("a").with_max_in_flight(10);
    let mut subscriber = bus.subscribe(spec).await.unwrap();
    let found = ready(&mut subscriber).await;
    assert_eq!(texts(&found).iter().filter(|text| *text == "a").count(), 5);
    assert_eq!(found.len(), 10);
    ack_all(found).await;
}

/// Deletion goes in steps, when it is worth it: more may be kept than was asked for, never less.
async fn settle_many(bus: &anybroker_core::Bus, group: &str, count: usize) {
    let spec = bus.subscription("orders", group).with_max_in_flight(100_000);
    let mut subscriber = bus.subscribe(spec).await.unwrap();
    for number in 0..count / 1_000 {
        publish(bus, "orders", &[number.to_string().as_str(); 1_000]).await;
        assert_eq!(done(&mut subscriber).await.len(), 1_000);
    }
}

#[tokio::test]
async fn settled_messages_are_kept_for_replay_up_to_the_retention() {
    let (bus, clock, _place) = built(|settings| settings.retention_messages = 2_000).await;
    settle_many(&bus, "g", 6_000).await;
    let kept = bus.describe("orders").await.unwrap().messages.unwrap();
    assert!((2_000..=4_000).contains(&kept), "{kept}");
    let replayed = from(&bus, "later", Start::Earliest).await;
    assert_eq!(replayed.len() as u64, kept);
    assert_eq!(replayed.last().unwrap(), "5");
    // By age as well: whichever bound is met first.
    bus.delete("orders", Some(&"later".into())).await.unwrap();
    clock.advance(secs(8 * 24 * 3600));
    settle_many(&bus, "g", 2_000).await;
    let kept = bus.describe("orders").await.unwrap().messages.unwrap();
    assert!(kept <= 2_000, "{kept}");
}

#[tokio::test]
async fn a_message_that_waits_is_kept_and_holds_up_the_deletion_of_no_other() {
    let (bus, clock, _place) = built(|settings| settings.retention_messages = 0).await;
    publish(&bus, "orders", &["waits", "dies"]).await;
    let mut subscriber = bus.subscribe(bus.subscription("orders", "g").with_max_attempts(2)).await.unwrap();
    let mut out = ready(&mut subscriber).await;
    pick(&mut out, "waits").nack(secs(60)).await.unwrap();
    pick(&mut out, "dies").dead_letter(anybroker_core::Verdict::new(anybroker_core::Reason::Rejected)).await.unwrap();
    subscriber.close(SOON).await.unwrap();
    settle_many(&bus, "g", 5_000).await;
    let kept = bus.describe("orders").await.unwrap().messages.unwrap();
    assert!((2..=2_002).contains(&kept), "{kept}");
    clock.advance(secs(60));
    let mut subscriber = bus.subscribe(bus.subscription("orders", "g")).await.unwrap();
    assert_eq!(done(&mut subscriber).await, ["waits"]);
    bus.dead_letters("orders", "g").unwrap().purge(&Default::default()).await.unwrap();
    let now = bus.describe("orders").await.unwrap().messages.unwrap();
    assert_eq!(now, kept - 2, "they were kept for nothing else");
}

//! Groups, replay, retention, bounds, deletion, names.

#![allow(clippy::unwrap_used, reason = "test code")]

mod common;

use std::time::Duration;

use anybroker_core::{
    Config, Declared, Effect, ErrorKind, Message, Position, PublishOptions, PublishOrder, Registry, Start,
    SubscribeSpec, TopologyMode, TopologySpec,
};
use anybroker_memory::{Memory, MemoryDriver};
use common::*;

async fn from(bus: &anybroker_core::Bus, group: &str, start: Start) -> Vec<String> {
    let mut subscriber = bus.subscribe(SubscribeSpec::new("orders", group).with_start(start)).await.unwrap();
    texts(&ready(&mut subscriber).await)
}

#[tokio::test]
async fn a_new_group_starts_where_it_asks_to() {
    let (bus, clock) = manual();
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
async fn settled_messages_are_kept_for_replay_up_to_the_retention() {
    let (bus, _clock) = built(Memory::builder().retention(2));
    let mut subscriber = bus.subscribe(bus.subscription("orders", "g")).await.unwrap();
    publish(&bus, "orders", &["1", "2", "3", "4"]).await;
    assert_eq!(done(&mut subscriber).await.len(), 4);
    assert_eq!(from(&bus, "later", Start::Earliest).await, ["3", "4"]);
    assert_eq!(bus.describe("orders").await.unwrap().messages, Some(2));
}

#[tokio::test]
async fn what_one_group_has_open_is_kept_whatever_the_retention() {
    let (bus, _clock) = built(Memory::builder().retention(0));
    bus.declare(&TopologySpec::group("orders", "slow")).await.unwrap();
    let mut quick = bus.subscribe(bus.subscription("orders", "quick")).await.unwrap();
    publish(&bus, "orders", &["1", "2", "3"]).await;
    assert_eq!(done(&mut quick).await.len(), 3);
    assert_eq!(from(&bus, "slow", Start::Latest).await, ["1", "2", "3"]);
}

#[tokio::test]
async fn a_hole_behind_an_unsettled_head_is_closed_when_the_head_is_settled() {
    let (bus, _clock) = built(Memory::builder().retention(0));
    let mut subscriber = bus.subscribe(bus.subscription("orders", "g")).await.unwrap();
    publish(&bus, "orders", &["1", "2", "3"]).await;
    let mut out = ready(&mut subscriber).await;
    let head = pick(&mut out, "1");
    ack_all(out).await;
    assert_eq!(bus.describe("orders").await.unwrap().messages, Some(1));
    assert_eq!(from(&bus, "other", Start::Earliest).await, ["1"]);
    head.ack().await.unwrap();
    publish(&bus, "orders", &["4"]).await;
    assert_eq!(done(&mut subscriber).await, ["4"]);
}

#[tokio::test]
async fn a_full_destination_makes_publishers_wait_until_there_is_room_or_their_deadline() {
    let bus = Memory::builder().max_messages(2).build().bus();
    let mut subscriber = bus.subscribe(bus.subscription("orders", "g")).await.unwrap();
    let soon = PublishOptions::default().with_timeout(Duration::from_millis(50));
    let batch = (1..=3).map(|number| Message::new("orders", number.to_string())).collect();
    let outcomes = bus.submit(batch, &soon).await.await;
    let full = outcomes[2].as_ref().unwrap_err();
    assert!(outcomes[0].is_ok() && outcomes[1].is_ok());
    assert_eq!((full.kind(), full.effect()), (ErrorKind::RateLimited, Effect::NotDone));
    let waiting = tokio::spawn({
        let bus = bus.clone();
        async move { bus.send(Message::new("orders", "4")).await }
    });
    tokio::task::yield_now().await;
    subscriber.receive(1, SOON).await.unwrap().remove(0).ack().await.unwrap();
    waiting.await.unwrap().unwrap();
    assert_eq!(done(&mut subscriber).await, ["2", "4"]);
}

#[tokio::test]
async fn behind_a_message_that_found_no_room_its_key_is_held_back() {
    let bus = Memory::builder().max_messages(1).build().bus();
    bus.subscribe(bus.subscription("orders", "g")).await.unwrap().close(SOON).await.unwrap();
    let batch = ["a", "a", "a", "b"].map(|key| Message::new("orders", "x").with_key(key)).to_vec();
    let soon = PublishOptions::default().with_timeout(Duration::from_millis(20));
    let outcomes = bus.submit(batch.clone(), &soon).await.await;
    let kinds: Vec<_> = outcomes.into_iter().map(|outcome| outcome.map(drop).map_err(|error| error.kind())).collect();
    let (full, held) = (Err(ErrorKind::RateLimited), Err(ErrorKind::Unavailable));
    assert_eq!(kinds, [Ok(()), full, held, full]);
    let unordered = soon.with_order(PublishOrder::None);
    let outcomes = bus.submit(batch, &unordered).await.await;
    assert!(outcomes.into_iter().all(|outcome| outcome.unwrap_err().kind() == ErrorKind::RateLimited));
}

#[tokio::test]
async fn dead_letters_take_room_too_until_they_are_purged() {
    let bus = Memory::builder().max_messages(1).build().bus();
    let mut subscriber = bus.subscribe(bus.subscription("orders", "g").with_max_attempts(1)).await.unwrap();
    publish(&bus, "orders", &["1"]).await;
    one(&mut subscriber).await.nack(NOW).await.unwrap();
    let soon = PublishOptions::default().with_timeout(Duration::from_millis(20));
    let outcome = bus.submit(vec![Message::new("orders", "2")], &soon).await.await.remove(0);
    assert_eq!(outcome.unwrap_err().kind(), ErrorKind::RateLimited);
    bus.dead_letters("orders", "g").unwrap().purge(&Default::default()).await.unwrap();
    publish(&bus, "orders", &["3"]).await;
}

#[tokio::test]
async fn deleting_underneath_ends_a_waiting_receive_with_not_found() {
    let (bus, _clock) = manual();
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
    let (bus, _clock) = manual();
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
    let (bus, _clock) = manual();
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
    let (bus, _clock) = built(Memory::builder().create_destinations(false));
    bus.declare(&TopologySpec::destination("orders")).await.unwrap();
    let batch = vec![Message::new("nowhere", "1"), Message::new("orders", "2")];
    let outcomes = bus.publish(batch).await;
    let missing = outcomes[0].as_ref().unwrap_err();
    assert_eq!((missing.kind(), missing.effect()), (ErrorKind::NotFound, Effect::NotDone));
    assert_eq!(outcomes[1].as_ref().unwrap().position, Some(Position::new(0)));
}

#[tokio::test]
async fn an_id_is_stored_once_within_the_dedup_window() {
    let (bus, clock) = built(Memory::builder().dedup_window(secs(60)));
    let message = Message::new("orders", "1").with_id("order-1");
    let first = bus.send(message.clone()).await.unwrap();
    let again = bus.send(message.clone()).await.unwrap();
    assert_eq!((first.duplicate, again.duplicate, first.position), (false, true, again.position));
    clock.advance(secs(60));
    assert!(!bus.send(message).await.unwrap().duplicate);
    assert_eq!(from(&bus, "g", Start::Earliest).await, ["1", "1"]);
    assert!(Memory::new().bus().capabilities().publish_dedup.note().unwrap().contains("dedup_window"));
}

#[tokio::test]
async fn destinations_of_one_subscription_share_its_bound_fairly() {
    let (bus, _clock) = manual();
    publish(&bus, "a", &["a"; 100]).await;
    publish(&bus, "b", &["b"; 100]).await;
    let spec = SubscribeSpec::new("a", "g").and_destination("b").and_destination("a").with_max_in_flight(10);
    let mut subscriber = bus.subscribe(spec).await.unwrap();
    let found = ready(&mut subscriber).await;
    assert_eq!(texts(&found).iter().filter(|text| *text == "a").count(), 5);
    assert_eq!(found.len(), 10);
    ack_all(found).await;
}

#[tokio::test]
async fn a_name_is_shared_within_the_process_and_no_name_is_private() {
    let connect = async |url: &str| Registry::new().with(MemoryDriver).connect(Config::from_url(url)).await;
    let one = connect("memory://topology-test?retention=5").await.unwrap();
    let other = connect("memory://topology-test?retention=5").await.unwrap();
    publish(&one, "orders", &["1"]).await;
    one.close(SOON).await.unwrap();
    assert_eq!(from(&other, "g", Start::Earliest).await, ["1"]);
    let private = connect("memory://").await.unwrap();
    assert_eq!(private.describe("orders").await.unwrap_err().kind(), ErrorKind::NotFound);
    let refused = connect("memory://topology-test?retention=6").await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::AlreadyExists);
    let bad = connect("memory://me@a,b/c?retention=x").await.unwrap_err();
    assert_eq!(bad.kind(), ErrorKind::ConfigInvalid);
}

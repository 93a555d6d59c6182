//! What is special about streams: progress of groups, replay, and the one member that reads.
#![allow(clippy::unwrap_used)]

mod common;

use std::time::Duration;

use anybroker_core::{Bus, Delivery, ErrorKind, Order, Position, Start, SubscribeSpec, Timestamp, ack};
use common::{LONG, Proxy, connect, nothing, number, numbered, own_server, publish, receive, unique, url};

const STREAM: &str = "queue=stream";

/// Acks those of these numbers, and answers the rest.
async fn ack_only(deliveries: Vec<Delivery>, numbers: &[u32]) -> Vec<Delivery> {
    let (done, rest): (Vec<_>, Vec<_>) =
        deliveries.into_iter().partition(|delivery| numbers.contains(&number(delivery)));
    for outcome in ack(done).await {
        outcome.unwrap();
    }
    rest
}

/// What a new member gets, settled by nobody.
async fn left(bus: &Bus, spec: SubscribeSpec, count: usize) -> Vec<u32> {
    let mut subscriber = bus.subscribe(spec).await.unwrap();
    let came = receive(&mut subscriber, count).await;
    nothing(&mut subscriber).await;
    subscriber.close(LONG).await.unwrap();
    came.iter().map(number).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_acked_in_any_order_stays_away_when_the_client_and_the_server_start_again() {
    let Some(server) = own_server("streams") else { return };
    let name = unique("progress");
    let bus = connect(&server.url, STREAM).await;
    let spec = bus.subscription(name.as_str(), "g");
    let mut subscriber = bus.subscribe(spec.clone()).await.unwrap();
    publish(&bus, numbered(&name, 0..6)).await;
    let rest = ack_only(receive(&mut subscriber, 6).await, &[0, 2, 5]).await;
    subscriber.close(LONG).await.unwrap();
    drop(rest);
    bus.close(LONG).await.unwrap();
    let bus = connect(&server.url, STREAM).await;
    assert_eq!(left(&bus, spec.clone(), 3).await, [1, 3, 4], "another client");
    bus.close(LONG).await.unwrap();
    server.does("kill").await;
    server.does("restart").await;
    let bus = connect(&server.url, STREAM).await;
    assert_eq!(left(&bus, spec, 3).await, [1, 3, 4], "a server that was killed");
    let all = bus.subscription(name.as_str(), "later");
    assert_eq!(left(&bus, all, 6).await, [0, 1, 2, 3, 4, 5], "what the stream keeps for a group that comes later");
    bus.close(LONG).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn groups_start_at_an_offset_a_time_and_the_end() {
    let Some(url) = url() else { return };
    let bus = connect(&url, STREAM).await;
    let name = unique("replay");
    publish(&bus, numbered(&name, 0..4)).await;
    // The clock goes on by itself; two publishes are never within one of its milliseconds then.
    let before = Timestamp::now();
    while Timestamp::now() <= before.after(Duration::from_millis(1)) {
        tokio::task::yield_now().await;
    }
    let moment = Timestamp::now();
    publish(&bus, numbered(&name, 4..8)).await;
    let spec = |group: &str, start: Start| bus.subscription(name.as_str(), group).with_start(start);
    assert_eq!(left(&bus, spec("offset", Start::Position(Position::new(5))), 3).await, [5, 6, 7]);
    assert_eq!(left(&bus, spec("time", Start::Time(moment)), 4).await, [4, 5, 6, 7]);
    let whole = Start::Time(moment.after(Duration::from_secs(60)));
    let mut future = bus.subscribe(spec("future", whole)).await.unwrap();
    let mut latest = bus.subscribe(spec("latest", Start::Latest)).await.unwrap();
    publish(&bus, numbered(&name, 8..9)).await;
    for subscriber in [&mut future, &mut latest] {
        let delivery = receive(subscriber, 1).await.remove(0);
        assert_eq!((number(&delivery), delivery.position()), (8, Some(Position::new(8))));
        delivery.ack().await.unwrap();
    }
    for subscriber in [future, latest] {
        subscriber.close(LONG).await.unwrap();
    }
    bus.delete(name.as_str(), None).await.unwrap();
    bus.close(LONG).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_member_reads_and_the_next_one_goes_on_where_it_was() {
    let Some(url) = url() else { return };
    let bus = connect(&url, STREAM).await;
    let name = unique("members");
    let spec = bus.subscription(name.as_str(), "g").with_order(Order::Key);
    let mut first = bus.subscribe(spec.clone()).await.unwrap();
    publish(&bus, numbered(&name, 0..20)).await;
    let held = receive(&mut first, 10).await;
    let mut second = bus.subscribe(spec).await.unwrap();
    nothing(&mut second).await;
    let held = ack_only(held, &[0, 1, 2, 3, 7]).await;
    first.close(LONG).await.unwrap();
    for outcome in ack(held).await {
        assert_eq!(outcome.unwrap_err().error().kind(), ErrorKind::StaleDelivery);
    }
    let came = receive(&mut second, 15).await;
    let expected: Vec<u32> = [4, 5, 6, 8, 9].into_iter().chain(10..20).collect();
    assert_eq!(came.iter().map(number).collect::<Vec<_>>(), expected);
    for outcome in ack(came).await {
        outcome.unwrap();
    }
    nothing(&mut second).await;
    second.close(LONG).await.unwrap();
    bus.delete(name.as_str(), None).await.unwrap();
    bus.close(LONG).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_member_has_acked_before_a_cut_does_not_come_to_it_again() {
    let Some(url) = url() else { return };
    let proxy = Proxy::start(&url).await;
    let (bus, direct) = (connect(&proxy.url, STREAM).await, connect(&url, STREAM).await);
    let name = unique("cut");
    let mut subscriber = bus.subscribe(bus.subscription(name.as_str(), "g")).await.unwrap();
    publish(&direct, numbered(&name, 0..10)).await;
    let rest = ack_only(receive(&mut subscriber, 10).await, &[0, 1, 2, 6]).await;
    // At once: what was acked last is not on the server yet.
    proxy.cut();
    let mut came: Vec<u32> = Vec::new();
    for delivery in receive(&mut subscriber, 6).await {
        came.push(number(&delivery));
        delivery.ack().await.unwrap();
    }
    assert_eq!(came, [3, 4, 5, 7, 8, 9]);
    assert!(ack(rest).await.iter().all(Result::is_err), "what was out of the lost connection is stale");
    nothing(&mut subscriber).await;
    subscriber.close(LONG).await.unwrap();
    direct.delete(name.as_str(), None).await.unwrap();
    for bus in [bus, direct] {
        bus.close(LONG).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_group_that_has_a_queue_in_the_place_of_a_stream_is_another_one() {
    let Some(url) = url() else { return };
    let (stream, quorum) = (connect(&url, STREAM).await, connect(&url, "").await);
    let name = unique("kinds");
    stream.subscribe(stream.subscription(name.as_str(), "s")).await.unwrap().close(LONG).await.unwrap();
    quorum.subscribe(quorum.subscription(name.as_str(), "q")).await.unwrap().close(LONG).await.unwrap();
    for (bus, group) in [(&quorum, "s"), (&stream, "q")] {
        let error = bus.subscribe(bus.subscription(name.as_str(), group)).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::AlreadyExists, "{group}");
    }
    // Both see what is published by either.
    publish(&stream, numbered(&name, 0..1)).await;
    publish(&quorum, numbered(&name, 1..2)).await;
    for (bus, group) in [(&stream, "s"), (&quorum, "q")] {
        assert_eq!(left(bus, bus.subscription(name.as_str(), group), 2).await, [0, 1], "{group}");
    }
    stream.delete(name.as_str(), None).await.unwrap();
    for bus in [stream, quorum] {
        bus.close(LONG).await.unwrap();
    }
}

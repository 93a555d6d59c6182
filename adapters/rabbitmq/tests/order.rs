//! Order per key when members come and go while more is queued than any of them has prefetched.
#![allow(clippy::unwrap_used)]

mod common;

use anybroker_core::{Bus, Order};
use common::{LONG, Proxy, connect, number, numbered, publish, receive, try_connect, unique, url};

/// How a member goes.
enum Goes {
    Closed,
    Cut,
}

/// A member with a connection of its own: it receives `takes`, acks the first `acks` of them, and goes. Tells what it saw.
async fn member(url: &str, name: &str, (max_in_flight, takes, acks): (usize, usize, usize), goes: Goes) -> Vec<u32> {
    let proxy = Proxy::start(url).await;
    let bus: Bus = try_connect(&proxy.url, "").await.unwrap();
    let spec = bus.subscription(name, "g").with_order(Order::Key).with_max_in_flight(max_in_flight);
    let mut subscriber = bus.subscribe(spec).await.unwrap();
    let mut deliveries = receive(&mut subscriber, takes).await;
    let seen = deliveries.iter().map(number).collect();
    let held = deliveries.split_off(acks);
    for delivery in deliveries {
        delivery.ack().await.unwrap();
    }
    match goes {
        Goes::Closed => {
            subscriber.close(LONG).await.unwrap();
            drop(held);
            bus.close(LONG).await.unwrap();
        }
        Goes::Cut => {
            proxy.end();
            drop((held, subscriber, bus));
        }
    }
    seen
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn under_order_a_member_that_holds_less_than_came_back_and_goes_too_changes_no_order() {
    let Some(url) = url() else { return };
    let bus = connect(&url, "").await;
    let name = unique("smaller");
    let spec = bus.subscription(name.as_str(), "g").with_order(Order::Key);
    bus.subscribe(spec).await.unwrap().close(LONG).await.unwrap();
    publish(&bus, numbered(&name, 0..60)).await;
    let expected = |from: u32, count: u32| (from..from + count).collect::<Vec<_>>();
    assert_eq!(member(&url, &name, (12, 12, 0), Goes::Closed).await, expected(0, 12));
    assert_eq!(member(&url, &name, (3, 3, 0), Goes::Closed).await, expected(0, 3));
    assert_eq!(member(&url, &name, (5, 5, 2), Goes::Closed).await, expected(0, 5));
    assert_eq!(member(&url, &name, (1, 1, 0), Goes::Closed).await, expected(2, 1));
    assert_eq!(member(&url, &name, (20, 20, 20), Goes::Closed).await, expected(2, 20));
    assert_eq!(member(&url, &name, (60, 38, 38), Goes::Closed).await, expected(22, 38));
    bus.delete(name.as_str(), None).await.unwrap();
    bus.close(LONG).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn under_order_members_that_are_cut_off_at_any_point_change_no_order() {
    let Some(url) = url() else { return };
    let bus = connect(&url, "").await;
    for seed in [3_u64, 17, 4_711] {
        let name = unique("cut-order");
        let spec = bus.subscription(name.as_str(), "g").with_order(Order::Key);
        bus.subscribe(spec).await.unwrap().close(LONG).await.unwrap();
        publish(&bus, numbered(&name, 0..200)).await;
        let mut random = seed;
        let mut next = |below: usize| {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            usize::try_from(random >> 33).unwrap() % below
        };
        let (mut acked, mut sure) = (0, 0);
        for round in 0..12 {
            let max_in_flight = 1 + next(16);
            let takes = 1 + next(max_in_flight);
            let acks = next(takes + 1);
            let goes = if next(2) == 0 { Goes::Closed } else { Goes::Cut };
            let is_closed = matches!(goes, Goes::Closed);
            let seen = member(&url, &name, (max_in_flight, takes, acks), goes).await;
            let start = seen[0];
            let run: Vec<u32> = (start..).take(takes).collect();
            assert_eq!(seen, run, "seed {seed}, round {round}: without a gap, in order");
            // Acks are sent, not confirmed: those that a cut swallowed are made again.
            assert!((sure..=acked).contains(&start), "seed {seed}, round {round}: {sure} <= {start} <= {acked}");
            acked = start + u32::try_from(acks).unwrap();
            sure = if is_closed { acked } else { start };
        }
        bus.delete(name.as_str(), None).await.unwrap();
    }
    bus.close(LONG).await.unwrap();
}

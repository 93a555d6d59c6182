use anybroker_core::{Result, Settlement, Settler, Settling};
use async_trait::async_trait;
use tokio::sync::mpsc;

use super::*;
use crate::wire::Inbound;

/// Nothing is settled here.
pub(super) struct Nobody;

#[async_trait]
impl Settler for Nobody {
    fn settle(&self, _: Vec<(Delivery, Settlement)>) -> Settling {
        unreachable!("nothing is settled here")
    }

    async fn extend(&self, _: &[&Delivery], _: Duration) -> Vec<Result<()>> {
        unreachable!("nothing is extended here")
    }

    fn abandoned(&self, _: &Token, _: Lane) {}
}

fn arrival(entry_id: u64) -> Arrival {
    let id = MessageIdData { ledger_id: 1, entry_id, ..Default::default() };
    Arrival { id, siblings: None, message: Message::new("d", "m"), notes: Notes::default() }
}

/// A connection on which consumer 1 is there.
pub(super) fn consumer() -> (Arc<Conn>, mpsc::UnboundedReceiver<Inbound>) {
    let conn = Arc::new(Conn::new(None));
    let inbound = conn.add_consumer(1);
    (conn, inbound)
}

#[test]
fn of_a_consumer_that_the_broker_has_closed_nothing_is_handed_out_while_its_feed_has_not_noticed() {
    let feed = FeedState::new("d".into(), "g".into(), false, 0, false);
    let shared = Shared::new(Duration::from_secs(60), 10, false, vec![feed]);
    let context = DeliveryContext::new("g".into(), None, Arc::new(Nobody));
    let (conn, _inbound) = consumer();
    shared.attached(0, &conn, 1, None);
    shared.arrive(0, vec![arrival(1)]);
    conn.abandon_consumer(1);
    assert!(shared.take(10, &context, &mut Vec::new()).unwrap().is_none());
}

#[test]
fn what_goes_back_goes_by_the_consumer_that_it_came_by_though_there_is_another_one_by_now() {
    let feed = FeedState::new("d".into(), "g".into(), false, 0, false);
    let shared = Shared::new(Duration::from_secs(60), 1, false, vec![feed]);
    let (conn, _inbound) = consumer();
    shared.attached(0, &conn, 1, None);
    let returned = shared.arrive(0, vec![arrival(1), arrival(2)]);
    let (next, _inbound) = consumer();
    shared.detached(0, false);
    shared.attached(0, &next, 1, None);
    let [((by, _), id)] = returned.as_slice() else { panic!("{} went back", returned.len()) };
    assert_eq!(id.entry_id, 2);
    assert!(Arc::ptr_eq(by, &conn));
}

#[test]
fn of_a_connection_that_has_ended_nothing_is_handed_out_while_its_feed_has_not_noticed() {
    let feed = FeedState::new("d".into(), "g".into(), false, 0, false);
    let shared = Shared::new(Duration::from_secs(60), 10, false, vec![feed]);
    let context = DeliveryContext::new("g".into(), None, Arc::new(Nobody));
    let take = || {
        let received = shared.take(10, &context, &mut Vec::new()).unwrap();
        received.map_or_else(Vec::new, |received| received.deliveries)
    };
    let give_back = |held: Vec<Delivery>| {
        for delivery in held {
            assert!(shared.give_back(delivery.token(), delivery.lane(), false));
        }
    };
    let (conn, _inbound) = consumer();
    shared.attached(0, &conn, 1, None);
    assert!(shared.arrive(0, vec![arrival(1)]).is_empty());
    // Given back, it comes again: the connection is there.
    give_back(take());
    let held = take();
    assert_eq!(held.len(), 1);
    conn.close();
    give_back(held);
    shared.arrive(0, vec![arrival(2)]);
    assert!(take().is_empty());
    // The broker gives them out again, to whoever comes.
    let (next, _inbound) = consumer();
    shared.detached(0, false);
    shared.attached(0, &next, 1, None);
    shared.arrive(0, vec![arrival(1), arrival(2)]);
    assert_eq!(take().len(), 2);
}

#[test]
fn no_more_than_the_bound_is_handed_out_whatever_has_come_and_a_settled_one_makes_room() {
    let feed = FeedState::new("d".into(), "g".into(), false, 0, false);
    let shared = Shared::new(Duration::from_secs(60), 2, false, vec![feed]);
    let context = DeliveryContext::new("g".into(), None, Arc::new(Nobody));
    let take = || {
        let received = shared.take(10, &context, &mut Vec::new()).unwrap();
        received.map_or_else(Vec::new, |received| received.deliveries)
    };
    let (conn, _inbound) = consumer();
    shared.attached(0, &conn, 1, None);
    let of_a_batch = |index| {
        let mut one = arrival(1);
        (one.id.batch_index, one.siblings) = (Some(index), Some(Siblings::new(5.into())));
        one
    };
    assert!(shared.arrive(0, (0..5).map(of_a_batch).collect()).is_empty(), "a batch comes whole");
    let mut held = take();
    assert_eq!(held.len(), 2);
    assert!(take().is_empty());
    let settled = held.pop().unwrap();
    let taken = shared.begin(settled.token(), settled.lane()).unwrap();
    assert!(take().is_empty(), "it is still being settled");
    assert!(shared.settled(taken.key));
    held.extend(take());
    assert_eq!(held.len(), 2);
    // What is given back has its place again, and is the next one.
    let given_back = held.pop().unwrap();
    assert!(shared.give_back(given_back.token(), given_back.lane(), false));
    assert_eq!(take().len(), 1);
    shared.detached(0, false);
    shared.attached(0, &conn, 1, None);
    shared.arrive(0, vec![arrival(7), arrival(8)]);
    assert_eq!(take().len(), 2, "what was out of a lost connection takes no room");
}

#[test]
fn what_one_topic_announces_is_out_before_another_one_announces_something() {
    let feeds = (0..2).map(|index| FeedState::new("d".into(), "g".into(), index == 1, index, true)).collect();
    let shared = Shared::new(Duration::from_secs(60), 10, false, feeds);
    let context = DeliveryContext::new("g".into(), None, Arc::new(Nobody));
    let (conn, _inbound) = consumer();
    let other = conn.add_consumer(2);
    // Others may have handed everything out.
    for feed in [0, 1] {
        shared.reserved(feed, (1, 10_000));
        shared.attached(feed, &conn, u64::from(feed) + 1, None);
        shared.arrive(feed, vec![arrival(1)]);
    }
    let take = || {
        let mut wanted = Vec::new();
        let received = shared.take(1, &context, &mut wanted).unwrap();
        (received.map_or(0, |received| received.deliveries.len()), wanted)
    };
    let note = |wanted: &Wanted| {
        let Wanted::Note { keys, .. } = wanted else { panic!("a reservation is wanted") };
        shared.noted(&shared.hand_overs(keys));
        shared.stored(wanted);
    };
    let mut order = Vec::new();
    for _ in 0..2 {
        let (out, wanted) = take();
        assert_eq!((out, wanted.len()), (0, 1), "only one topic announces");
        assert!(take().1.is_empty(), "it is being stored");
        note(&wanted[0]);
        order.push(wanted[0].feed());
        let (out, wanted) = take();
        assert_eq!((out, wanted.len()), (1, 0), "what is announced is handed out before anything else is announced");
    }
    order.sort_unstable();
    assert_eq!(order, [0, 1]);
    drop(other);
}

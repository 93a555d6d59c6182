use anybroker_core::{Delivery, DeliveryContext, Lane, Order, Result, Settlement, Settler, Settling, Token};
use async_trait::async_trait;

use super::*;

/// Nothing is settled here.
struct Nobody;

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

fn arrival(sequence: u64) -> Arrival {
    Arrival {
        feed: 0,
        sequence,
        ack: "a".into(),
        message: Arc::new(Message::new("d", "m")),
        delivered: 1,
        redrives: 0,
        since: Instant::now(),
        expires: None,
        must_look: false,
    }
}

#[tokio::test]
async fn what_must_be_here_together_may_be_more_than_may_be_out_and_goes_out_in_order_within_the_bound() {
    let lease = Duration::from_secs(60);
    let feed = FeedState::new("d".into(), "g".into(), true, lease * 2);
    let (shared, _tasks) = Shared::new(lease, 2, vec![feed]);
    shared.gain(0, "d".into(), Instant::now() + lease);
    shared.receiving(true);
    let context = DeliveryContext::new("g".into(), None, Arc::new(Nobody));
    let take = || {
        let received = shared.take(10, &context).unwrap();
        received.map_or_else(Vec::new, |received| received.deliveries)
    };
    let places = |held: &[Delivery]| -> Vec<u64> { held.iter().map(|held| held.position().unwrap().major).collect() };
    shared.hold(0, true);
    assert_eq!(shared.reserve(0), 2);
    assert_eq!(shared.reserve_for(0, 5, 5), 0, "what was asked for has not come");
    // Out of order, as they come back, and what is new between them.
    shared.arrive(&mut [4, 6].map(arrival).into());
    assert_eq!(shared.reserve(0), 0);
    assert_eq!(shared.reserve_for(0, 5, 5), 4, "beyond the bound");
    shared.arrive(&mut [5, 3, 1, 2].map(arrival).into());
    assert_eq!(shared.reserve_for(0, 5, 5), 0);
    take();
    shared.hold(0, false);
    let held = take();
    assert_eq!(held.len(), 2);
    assert!(take().is_empty());
    assert_eq!(shared.reserve(0), 0);
    let begun = shared.begin_acks(held.iter());
    assert!(take().is_empty(), "they are still being settled");
    shared.all_settled(begun.into_iter().flatten().map(|(acking, _)| acking.key));
    let next = take();
    assert_eq!((places(&held), places(&next)), (vec![1, 2], vec![3, 4]));
}

#[tokio::test]
async fn the_server_is_told_of_a_message_where_it_can_wait_as_long_as_the_lease_and_has_not_begun_to() {
    let lease = Duration::from_secs(30);
    let context = DeliveryContext::new("g".into(), None, Arc::new(Nobody));
    let is_told = |ack_wait, lay_for| {
        let feed = FeedState::new("d".into(), "g".into(), false, ack_wait);
        let (shared, mut tasks) = Shared::new(lease, 10, vec![feed]);
        let since = Instant::now() - Duration::from_secs(lay_for);
        shared.arrive(&mut vec![Arrival { since, ..arrival(1) }]);
        assert_eq!(shared.take(10, &context).unwrap().unwrap().deliveries.len(), 1);
        tasks.renewed.try_recv().is_ok()
    };
    let of_ours = crate::topology::ack_wait(lease);
    assert!(!is_told(of_ours, 5), "it waits longer than the lease anyway");
    assert!(is_told(of_ours, 10));
    assert!(is_told(lease, 1), "a process that stands still from now on has it for the whole lease");
    assert!(!is_told(lease - Duration::from_secs(1), 5), "it is renewed in time, should it still be out then");
    assert!(is_told(lease - Duration::from_secs(1), 20), "less than half of the time is left");
}

#[tokio::test]
async fn a_paused_member_asks_for_nothing_not_even_for_what_must_be_here_together() {
    let lease = Duration::from_secs(60);
    let feed = FeedState::new("d".into(), "g".into(), true, lease * 2);
    let (shared, _tasks) = Shared::new(lease, 2, vec![feed]);
    shared.gain(0, "d".into(), Instant::now() + lease);
    shared.receiving(true);
    shared.hold(0, true);
    shared.lock().is_paused = true;
    assert_eq!((shared.reserve(0), shared.reserve_for(0, 5, 5)), (0, 0));
    shared.lock().is_paused = false;
    assert_eq!(shared.reserve_for(0, 5, 5), 5);
}

/// Two messages of one key, of which the first is nacked without an answer, until its lease has ended.
async fn a_nack_without_an_answer(lease: Duration) -> (Shared, Tasks, Arc<DeliveryContext>, Key) {
    let feed = FeedState::new("d".into(), "g".into(), true, lease * 2).blocking(Order::Key);
    let (shared, tasks) = Shared::new(lease, 10, vec![feed]);
    shared.gain(0, "d".into(), Instant::now() + lease * 100);
    let context = DeliveryContext::new("g".into(), None, Arc::new(Nobody));
    let of_the_key = |sequence| {
        let message = Arc::new(Message::new("d", "m").with_key("k"));
        Arrival { message, ..arrival(sequence) }
    };
    shared.arrive(&mut [1, 2].map(of_the_key).into());
    let first = shared.take(1, &context).unwrap().unwrap().deliveries.remove(0);
    let taken = shared.begin(first.token(), first.lane()).unwrap();
    shared.failing(taken.key);
    shared.unsettled(taken.key, true);
    assert!(shared.take(10, &context).unwrap().is_none_or(|received| received.deliveries.is_empty()));
    tokio::time::sleep(lease * 2).await;
    shared.keep_leases();
    (shared, tasks, context, taken.key)
}

#[tokio::test]
async fn what_may_have_failed_blocks_its_key_until_its_record_has_told() {
    for (failures, together) in [(1, vec![(1, 2)]), (0, vec![(1, 1), (2, 1)])] {
        let (shared, mut tasks, context, key) = a_nack_without_an_answer(Duration::from_millis(50)).await;
        let take = || {
            let received = shared.take(10, &context).unwrap();
            let deliveries = received.map_or_else(Vec::new, |received| received.deliveries);
            deliveries.iter().map(|held| (held.position().unwrap().major, held.attempt())).collect::<Vec<_>>()
        };
        assert_eq!(take(), vec![]);
        let again = tasks.looking.try_recv().unwrap();
        assert_ne!(again.key, key, "the delivery whose lease has ended settles nothing");
        let record = Record { failures, ..Record::default() };
        shared.ready(again.key, record, Some(7));
        assert_eq!(take(), together);
        shared.settled(again.key);
        assert_eq!(take().len(), 2 - together.len(), "nothing stands in its way any more");
    }
}

//! Messages that are worked on in transactions, whatever becomes of the broker: each of them has its effect once, and what a
//! commit answers is true.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anybroker_core::{Bus, Effect, Message, Position, PublishOptions, Settlement, Subscriber, settle_in};
use tokio::time::Instant;

use crate::common::{LONG, QUIET, connect, nothing, number, numbered, publish, unique};

const MESSAGES: u32 = 60;

/// What the commits answered, by message.
#[derive(Debug, Default)]
struct Answers {
    done: BTreeSet<u32>,
    unknown: BTreeSet<u32>,
    not_done: usize,
}

/// Where the results of each message stand: their reader may see one twice, when its own acks did not reach the broker.
type Effects = BTreeMap<u32, BTreeSet<Position>>;

/// The messages, and what works on them.
pub(crate) struct Working {
    bus: Bus,
    source: String,
    made: String,
    subscriber: Subscriber,
    results: Subscriber,
    /// How many transactions have committed.
    pub(crate) commits: Arc<AtomicU32>,
}

impl Working {
    pub(crate) async fn begin(url: &str) -> Self {
        // A commit gives up after 2 s, before the broker is back.
        let bus = connect(url, "partitions=1&transaction_timeout=2s&commit_interval=20ms").await;
        let (source, made) = (unique("restart-source"), unique("restart-made"));
        let subscriber = bus.subscribe(bus.subscription(source.as_str(), "g").with_max_in_flight(8)).await.unwrap();
        let results = bus.subscribe(bus.subscription(made.as_str(), "g")).await.unwrap();
        publish(&bus, numbered(&source, 0..MESSAGES)).await;
        Self { bus, source, made, subscriber, results, commits: Arc::default() }
    }

    /// Makes one message of each until each has one.
    pub(crate) async fn finish(mut self) {
        let (mut answers, mut effects) = (Answers::default(), Effects::new());
        let deadline = Instant::now() + LONG * 4;
        while effects.len() < MESSAGES as usize {
            assert!(Instant::now() < deadline, "{} of {MESSAGES} have their effect: {answers:?}", effects.len());
            self.look(Duration::ZERO, &mut effects).await;
            self.work(&mut answers).await;
        }
        self.look(QUIET, &mut effects).await;
        nothing(&mut self.subscriber).await;
        let (done, unknown) = (answers.done.len(), answers.unknown.len());
        println!("in transactions: {done} done, {unknown} unknown, {} not done (and tried again)", answers.not_done);
        assert!(effects.values().all(|places| places.len() == 1), "{effects:?}, {answers:?}");
        // What was certainly not done is done later; what is missing among those that were done was unknown.
        let missing: BTreeSet<u32> = (0..MESSAGES).filter(|number| !answers.done.contains(number)).collect();
        assert!(missing.is_subset(&answers.unknown), "{missing:?}: {answers:?}");
        drop((self.subscriber, self.results));
        for name in [self.source, self.made] {
            let _ = self.bus.delete(name.as_str(), None).await;
        }
        self.bus.close(LONG).await.unwrap();
    }

    async fn look(&mut self, wait: Duration, effects: &mut Effects) {
        for delivery in self.results.receive(100, wait).await.unwrap() {
            effects.entry(number(&delivery)).or_default().insert(delivery.position().unwrap());
            // One that is lost comes again, at the same place.
            let _ = delivery.ack().await;
        }
    }

    async fn work(&mut self, answers: &mut Answers) {
        let deliveries = self.subscriber.receive(2, Duration::from_millis(100)).await.unwrap();
        if deliveries.is_empty() {
            return;
        }
        // The broker is away; what was received comes again.
        let Ok(transaction) = self.bus.begin().await else { return };
        let numbers: Vec<u32> = deliveries.iter().map(number).collect();
        let batch =
            numbers.iter().map(|number| Message::new(self.made.as_str(), number.to_string()).with_key("k")).collect();
        let options = PublishOptions::default().with_transaction(Arc::clone(&transaction)).with_timeout(LONG);
        let published = self.bus.submit(batch, &options).await;
        let batch = deliveries.into_iter().map(|delivery| (delivery, Settlement::Ack)).collect();
        if settle_in(&transaction, batch).await.iter().any(Result::is_err) {
            // The group has moved on without this member meanwhile. Dropped, the transaction is taken back.
            return;
        }
        match transaction.commit().await {
            Ok(()) => {
                self.commits.fetch_add(1, Ordering::AcqRel);
                answers.done.extend(numbers);
            }
            Err(error) if error.effect() == Effect::Unknown => answers.unknown.extend(numbers),
            Err(error) => {
                assert_eq!(error.effect(), Effect::NotDone);
                answers.not_done += numbers.len();
            }
        }
        drop(published);
    }
}

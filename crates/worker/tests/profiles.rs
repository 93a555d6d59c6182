//! The worker's promises on every profile of the memory broker: prefix acks, batches of ten, attempts that count too
//! much or are forgotten, late acks, lanes that move and connections that are lost. And on the embedded broker.
#![allow(clippy::unwrap_used, reason = "test code")]

mod support;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use anybroker_core::{Bus, Config, DeadLetterFilter, OnFailure, Order, Registry};
use anybroker_embedded::EmbeddedDriver;
use anybroker_memory::MemoryDriver;
use anybroker_worker::{
    Context, Counts, ErrorClass, Handler, HandlerError, HandlerOptions, Outcome, RetryPolicy, Worker, async_trait,
};
use parking_lot::Mutex;
use support::{DEADLINE, Running, drained, message, publish, spec, text};

const PROFILES: [&str; 6] = ["exact", "kafka", "rabbitmq", "jetstream", "sqs", "pulsar"];
const MESSAGES: u32 = 400;
const KEYS: u32 = 25;

/// What the group's handlers did, whichever member they ran on.
#[derive(Default)]
struct Journal {
    calls: HashMap<u32, u32>,
    /// In the order of their first success.
    done: Vec<u32>,
}

#[derive(Clone, Default)]
struct Work(Arc<Mutex<Journal>>);

fn is_bad(number: u32) -> bool {
    number % 40 == 7
}

fn failures(number: u32) -> u32 {
    if number.is_multiple_of(9) && !is_bad(number) { 2 } else { 0 }
}

#[async_trait]
impl Handler for Work {
    async fn handle(&self, ctx: &Context) -> Outcome {
        let number: u32 = text(ctx.message()).parse().unwrap();
        let calls = {
            let mut journal = self.0.lock();
            let calls = journal.calls.entry(number).or_default();
            *calls += 1;
            *calls
        };
        match number % 5 {
            0 => tokio::task::yield_now().await,
            1 => tokio::time::sleep(Duration::from_millis(1)).await,
            _ => {}
        }
        if is_bad(number) {
            return Err(HandlerError::new(ErrorClass::VALIDATION_ERROR, "bad"));
        }
        if calls <= failures(number) {
            return Err(HandlerError::new(ErrorClass::TIMEOUT, "flaky"));
        }
        let mut journal = self.0.lock();
        if !journal.done.contains(&number) {
            journal.done.push(number);
        }
        Ok(())
    }
}

async fn connect(url: &str) -> Bus {
    Registry::new().with(MemoryDriver).with(EmbeddedDriver).connect(Config::from_url(url)).await.unwrap()
}

struct Outcomes {
    journal: Journal,
    counts: Vec<Counts>,
    letters: BTreeMap<u32, u32>,
    ordered: bool,
}

/// Two members of a group work on the messages until nothing is left.
async fn work(url: &str, batch: usize) -> Outcomes {
    let bus = connect(url).await;
    let record = bus.capabilities();
    let mut spec = spec().with_max_attempts(50);
    if record.key_order.is_given() {
        spec = spec.with_order(Order::Key);
    }
    if record.block_on_failure.is_given() {
        spec = spec.with_on_failure(OnFailure::Block);
    }
    let ordered = spec.on_failure == OnFailure::Block;
    // Not every profile keeps what is published before its group exists.
    bus.subscribe(spec.clone()).await.unwrap().close(DEADLINE).await.unwrap();
    let handler = Work::default();
    let options = HandlerOptions::new(spec)
        .with_concurrency(4)
        .with_batch(batch)
        .with_retry(RetryPolicy::fixed(Duration::from_millis(1)));
    let start = || Running::start(Worker::new(bus.clone()).handle(options.clone(), handler.clone()));
    let members = [start(), start()];
    for chunk in 0..MESSAGES / 50 {
        let numbers = chunk * 50..(chunk + 1) * 50;
        publish(&bus, numbers.map(|n| message(&n.to_string()).with_key(format!("k{}", n % KEYS)))).await;
    }
    drained(&bus).await;
    let mut counts = Vec::new();
    for member in members {
        let report = member.stop().await;
        assert!(report.error().is_none(), "{report}");
        counts.push(report.total());
    }
    drained(&bus).await;
    let found = bus.dead_letters("orders", "payments").unwrap().peek(&DeadLetterFilter::all(), 1_000).await.unwrap();
    let mut letters = BTreeMap::new();
    for letter in found {
        assert_eq!(letter.error_type.as_deref(), Some("VALIDATION_ERROR"));
        *letters.entry(text(&letter.message).parse().unwrap()).or_default() += 1;
    }
    let journal = std::mem::take(&mut *handler.0.lock());
    Outcomes { journal, counts, letters, ordered }
}

fn check_all_came_through(url: &str, outcomes: &Outcomes) {
    let good: BTreeSet<u32> = (0..MESSAGES).filter(|number| !is_bad(*number)).collect();
    let bad: BTreeSet<u32> = (0..MESSAGES).filter(|number| is_bad(*number)).collect();
    assert_eq!(outcomes.journal.done.iter().copied().collect::<BTreeSet<_>>(), good, "{url}");
    assert_eq!(outcomes.letters.keys().copied().collect::<BTreeSet<_>>(), bad, "{url}");
    if outcomes.ordered {
        for key in 0..KEYS {
            let of: Vec<u32> = outcomes.journal.done.iter().copied().filter(|number| number % KEYS == key).collect();
            assert!(of.is_sorted(), "{url}: key {key} out of order: {of:?}");
        }
    }
}

fn check_each_came_through_once(url: &str, outcomes: &Outcomes) {
    check_all_came_through(url, outcomes);
    for number in 0..MESSAGES {
        assert_eq!(outcomes.journal.calls[&number], failures(number) + 1, "{url}: message {number}");
    }
    assert!(outcomes.letters.values().all(|count| *count == 1), "{url}");
    let sum = |of: fn(&Counts) -> u64| outcomes.counts.iter().map(of).sum::<u64>();
    let good = (0..MESSAGES).filter(|number| !is_bad(*number));
    assert_eq!(sum(|counts| counts.processed), good.clone().count() as u64, "{url}");
    let retried: u32 = good.map(failures).sum();
    assert_eq!(sum(|counts| counts.retried), u64::from(retried), "{url}");
    assert_eq!(sum(|counts| counts.stale + counts.unsettled + counts.panics), 0, "{url}");
}

#[tokio::test]
async fn on_every_profile_each_message_is_handled_exactly_as_often_as_it_has_to_be() {
    for profile in PROFILES {
        let url = format!("memory://?profile={profile}");
        check_each_came_through_once(&url, &work(&url, 100).await);
    }
}

/// The one broker without a server whose receives and settles cross threads and take their time.
#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn on_the_embedded_broker_each_message_is_handled_exactly_as_often_as_it_has_to_be() {
    let folder = tempfile::tempdir().unwrap();
    for round in 0..3 {
        let url = format!("embedded://{}/{round}.db", folder.path().display());
        check_each_came_through_once(&url, &work(&url, 100).await);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn on_every_profile_nothing_is_lost_and_keys_stay_in_order_whatever_goes_wrong() {
    for profile in PROFILES {
        let mut disturbed = 0;
        for seed in 1..=5 {
            let url = format!("memory://?profile={profile}&seed={seed}");
            // With small batches there are more receives that can go wrong.
            let outcomes = work(&url, 1).await;
            check_all_came_through(&url, &outcomes);
            disturbed += outcomes.counts.iter().map(|counts| counts.revoked + counts.stale).sum::<u64>();
        }
        // Otherwise this would prove nothing.
        assert!(disturbed > 0 || !["kafka", "rabbitmq", "pulsar"].contains(&profile), "{profile}: nothing went wrong");
    }
}

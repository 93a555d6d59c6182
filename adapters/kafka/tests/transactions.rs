//! Transactions beyond what the suite asks of every broker: processes that are killed, fencing, time.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

mod common;

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use anybroker_core::{
    Bus, Delivery, Effect, ErrorKind, Message, Nack, PublishOptions, Reason, Settlement, Subscriber, Transaction,
    Verdict, settle_in,
};
use common::{LONG, connect, nothing, number, numbered, publish, receive, unique, url};
use tokio::time::Instant;

const MESSAGES: u32 = 60;
/// How many are worked on in one transaction.
const BATCH: usize = 5;

async fn publish_in(bus: &Bus, transaction: &Arc<dyn Transaction>, batch: Vec<Message>) {
    let options = PublishOptions::default().with_transaction(Arc::clone(transaction));
    for outcome in bus.submit(batch, &options).await.await {
        outcome.unwrap();
    }
}

async fn ack_in(transaction: &Arc<dyn Transaction>, deliveries: Vec<Delivery>) {
    let batch = deliveries.into_iter().map(|delivery| (delivery, Settlement::Ack)).collect();
    for outcome in settle_in(transaction, batch).await {
        outcome.unwrap();
    }
}

async fn subscribe(bus: &Bus, destination: &str) -> Subscriber {
    bus.subscribe(bus.subscription(destination, "g")).await.unwrap()
}

/// The next ones, acked.
async fn take(subscriber: &mut Subscriber, count: usize) -> Vec<u32> {
    let mut numbers = Vec::with_capacity(count);
    for delivery in receive(subscriber, count).await {
        numbers.push(number(&delivery));
        delivery.ack().await.unwrap();
    }
    numbers
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_nack_in_a_transaction_comes_back_when_it_commits_with_its_count_and_its_delay() {
    let Some(url) = url() else { return };
    let bus = connect(&url, "partitions=1").await;
    let name = unique("nack-in");
    let mut subscriber = subscribe(&bus, &name).await;
    publish(&bus, numbered(&name, 0..1)).await;
    for is_committed in [false, true] {
        let delivery = receive(&mut subscriber, 1).await.remove(0);
        assert_eq!(delivery.attempt(), 1);
        let transaction = bus.begin().await.unwrap();
        let nack = Nack { delay: Duration::from_secs(1), error_type: None };
        settle_in(&transaction, vec![(delivery, Settlement::Nack(nack))]).await.remove(0).unwrap();
        if is_committed { transaction.commit().await.unwrap() } else { transaction.abort().await.unwrap() }
    }
    let delivery = receive(&mut subscriber, 1).await.remove(0);
    assert_eq!((number(&delivery), delivery.attempt()), (0, 2));
    delivery.ack().await.unwrap();
    nothing(&mut subscriber).await;
    subscriber.close(LONG).await.unwrap();
    bus.delete(name.as_str(), None).await.unwrap();
    bus.close(LONG).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_in_a_transaction_is_refused_and_nothing_of_it_is_done() {
    let Some(url) = url() else { return };
    let (bus, other) = (connect(&url, "partitions=1&nack=in_place").await, connect(&url, "").await);
    let name = unique("refused-in");
    let mut subscriber = subscribe(&bus, &name).await;
    publish(&bus, numbered(&name, 0..1)).await;
    let mut delivery = receive(&mut subscriber, 1).await.remove(0);
    let (transaction, foreign) = (bus.begin().await.unwrap(), other.begin().await.unwrap());
    let options = PublishOptions::default().with_transaction(Arc::clone(&foreign));
    for outcome in bus.submit(numbered(&name, 1..2), &options).await.await {
        assert_eq!(outcome.unwrap_err().kind(), ErrorKind::Unsupported);
    }
    for (transaction, settlement) in [
        (&foreign, Settlement::Ack),
        (&transaction, Settlement::Release),
        (&transaction, Settlement::Nack(Nack::default())),
    ] {
        let failed = settle_in(transaction, vec![(delivery, settlement)]).await.remove(0).unwrap_err();
        assert_eq!((failed.error().kind(), failed.error().effect()), (ErrorKind::Unsupported, Effect::NotDone));
        delivery = failed.into_delivery();
    }
    ack_in(&transaction, vec![delivery]).await;
    transaction.commit().await.unwrap();
    nothing(&mut subscriber).await;
    subscriber.close(LONG).await.unwrap();
    bus.delete(name.as_str(), None).await.unwrap();
    other.close(LONG).await.unwrap();
    bus.close(LONG).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_takes_a_transactional_id_fences_the_one_who_had_it() {
    let Some(url) = url() else { return };
    let id: &'static str = format!("partitions=1&transactional_id={}", unique("fence")).leak();
    let (zombie, heir, reader) = (connect(&url, id).await, connect(&url, id).await, connect(&url, "").await);
    let name = unique("fenced");
    let mut subscriber = subscribe(&heir, &name).await;
    let taken = zombie.begin().await.unwrap();
    publish_in(&zombie, &taken, numbered(&name, 0..5)).await;
    let transaction = heir.begin().await.unwrap();
    publish_in(&heir, &transaction, numbered(&name, 10..15)).await;
    // Its messages are refused, or its end is.
    let options = PublishOptions::default().with_transaction(Arc::clone(&taken)).with_timeout(LONG);
    for outcome in zombie.submit(numbered(&name, 5..6), &options).await.await {
        outcome.unwrap_err();
    }
    let error = taken.commit().await.unwrap_err();
    assert_eq!((error.kind(), error.effect()), (ErrorKind::AlreadyExists, Effect::NotDone), "{error:?}");
    let error = zombie.begin().await.err().unwrap();
    assert_eq!(error.kind(), ErrorKind::AlreadyExists, "it would fence the other one: {error:?}");
    transaction.commit().await.unwrap();
    assert_eq!(take(&mut subscriber, 5).await, [10, 11, 12, 13, 14]);
    nothing(&mut subscriber).await;
    // Without transactions it goes on.
    publish(&zombie, numbered(&name, 20..21)).await;
    assert_eq!(take(&mut subscriber, 1).await, [20]);
    subscriber.close(LONG).await.unwrap();
    reader.delete(name.as_str(), None).await.unwrap();
    for bus in [zombie, heir, reader] {
        bus.close(LONG).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_settled_by_a_subscription_that_is_gone_is_not_committed() {
    let Some(url) = url() else { return };
    let bus = connect(&url, "partitions=1").await;
    let (source, made) = (unique("gone-source"), unique("gone-made"));
    let mut subscriber = subscribe(&bus, &source).await;
    let mut results = subscribe(&bus, &made).await;
    publish(&bus, numbered(&source, 0..2)).await;
    let deliveries = receive(&mut subscriber, 2).await;
    let transaction = bus.begin().await.unwrap();
    ack_in(&transaction, deliveries).await;
    publish_in(&bus, &transaction, numbered(&made, 0..2)).await;
    subscriber.close(LONG).await.unwrap();
    // Its next owner may have the messages already.
    let mut subscriber = subscribe(&bus, &source).await;
    let error = transaction.commit().await.unwrap_err();
    assert_eq!((error.kind(), error.effect()), (ErrorKind::StaleDelivery, Effect::NotDone), "{error:?}");
    assert_eq!(take(&mut subscriber, 2).await, [0, 1]);
    nothing(&mut results).await;
    drop((subscriber, results));
    bus.close(LONG).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transaction_that_was_open_for_too_long_is_taken_back() {
    let Some(url) = url() else { return };
    let bus = connect(&url, "partitions=1&transaction_timeout=1s").await;
    let (source, made) = (unique("old-source"), unique("old-made"));
    let mut subscriber = subscribe(&bus, &source).await;
    let mut results = subscribe(&bus, &made).await;
    publish(&bus, numbered(&source, 0..1)).await;
    let deliveries = receive(&mut subscriber, 1).await;
    let transaction = bus.begin().await.unwrap();
    let begun = Instant::now();
    publish_in(&bus, &transaction, numbered(&made, 0..1)).await;
    ack_in(&transaction, deliveries).await;
    // Time itself is what is waited for.
    tokio::time::sleep_until(begun + Duration::from_millis(1_100)).await;
    let error = transaction.commit().await.unwrap_err();
    assert_eq!((error.kind(), error.effect()), (ErrorKind::Timeout, Effect::NotDone), "{error:?}");
    let again = receive(&mut subscriber, 1).await.remove(0);
    assert_eq!((number(&again), again.attempt()), (0, 1));
    // The next one takes its id, and with it what it left.
    let transaction = bus.begin().await.unwrap();
    publish_in(&bus, &transaction, numbered(&made, 1..2)).await;
    ack_in(&transaction, vec![again]).await;
    transaction.commit().await.unwrap();
    assert_eq!(take(&mut results, 1).await, [1]);
    nothing(&mut results).await;
    nothing(&mut subscriber).await;
    drop((subscriber, results));
    bus.close(LONG).await.unwrap();
}

/// Works on the source in transactions: for each message one of the same number. Says how many are done after each commit.
async fn work(bus: &Bus, source: &str, made: &str, until: impl Fn(u32) -> bool) {
    let mut subscriber = bus.subscribe(bus.subscription(source, "g")).await.unwrap();
    let mut done = 0;
    while !until(done) {
        let deliveries = subscriber.receive(BATCH, Duration::from_secs(1)).await.unwrap();
        if deliveries.is_empty() {
            continue;
        }
        let transaction = bus.begin().await.unwrap();
        let results = deliveries.iter().map(|delivery| Message::new(made, number(delivery).to_string()).with_key("k"));
        publish_in(bus, &transaction, results.collect()).await;
        let count = u32::try_from(deliveries.len()).unwrap();
        ack_in(&transaction, deliveries).await;
        println!("joined");
        std::io::stdout().flush().unwrap();
        transaction.commit().await.unwrap();
        done += count;
        println!("done {done}");
        std::io::stdout().flush().unwrap();
    }
    subscriber.close(LONG).await.unwrap();
}

/// Not a test by itself: what the killed process does.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_process_that_is_killed() {
    let Ok(task) = std::env::var("ANYBROKER_KAFKA_WORKS_ON") else { return };
    let (source, made) = task.split_once(' ').unwrap();
    let bus = connect(&url().unwrap(), "session_timeout=6s&transactional_id=anybroker-killed").await;
    work(&bus, source, made, |_| false).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_message_has_its_effect_once_although_the_process_is_killed_in_its_transactions() {
    let Some(url) = url() else { return };
    let bus = connect(&url, "partitions=1&session_timeout=6s&transactional_id=anybroker-killed").await;
    let (source, made) = (unique("killed-source"), unique("killed-made"));
    let mut results = subscribe(&bus, &made).await;
    publish(&bus, numbered(&source, 0..MESSAGES)).await;
    // Once between what it published and its commit, as far as that can be met, and once behind a commit.
    for (word, times) in [("joined", 3), ("done", 2)] {
        let (source, made) = (source.clone(), made.clone());
        let kill = move || {
            let mut child = Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "the_process_that_is_killed", "--nocapture"])
                .env("ANYBROKER_KAFKA_WORKS_ON", format!("{source} {made}"))
                .stdout(Stdio::piped())
                .spawn()
                .unwrap();
            let lines = BufReader::new(child.stdout.take().unwrap()).lines();
            let seen = lines.map_while(Result::ok).filter(|line| line.contains(word)).take(times).count();
            child.kill().unwrap();
            child.wait().unwrap();
            assert_eq!(seen, times, "the process ended by itself");
        };
        tokio::task::spawn_blocking(kill).await.unwrap();
    }
    let mut counts: BTreeMap<u32, u32> = BTreeMap::new();
    {
        let working = work(&bus, &source, &made, |_| false);
        tokio::pin!(working);
        let deadline = Instant::now() + LONG * 2;
        while counts.len() < MESSAGES as usize {
            assert!(Instant::now() < deadline, "{} of {MESSAGES} have a result", counts.len());
            tokio::select! {
                () = &mut working => unreachable!("it works until it is dropped"),
                came = results.receive(100, Duration::from_secs(1)) => {
                    for delivery in came.unwrap() {
                        *counts.entry(number(&delivery)).or_default() += 1;
                        delivery.ack().await.unwrap();
                    }
                }
            }
        }
    }
    nothing(&mut results).await;
    assert!(counts.values().all(|count| *count == 1), "{counts:?}");
    results.close(LONG).await.unwrap();
    bus.close(LONG).await.unwrap();
}

/// Buries what comes next in a transaction, which is left open.
async fn bury(bus: &Bus, subscriber: &mut Subscriber) -> Arc<dyn Transaction> {
    let delivery = receive(subscriber, 1).await.remove(0);
    let transaction = bus.begin().await.unwrap();
    let verdict = Box::new(Verdict::new(Reason::Rejected));
    settle_in(&transaction, vec![(delivery, Settlement::DeadLetter(verdict))]).await.remove(0).unwrap();
    transaction
}

/// How many dead letters are put back.
async fn redrive(bus: &Bus, destination: &str) -> u64 {
    bus.dead_letters(destination, "g").unwrap().redrive(&Default::default()).await.unwrap().moved
}

/// Kafka marks what a transaction committed after it has answered the commit.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_letter_of_a_transaction_is_redriven_to_its_group_as_soon_as_the_commit_has_answered() {
    let Some(url) = url() else { return };
    let bus = connect(&url, "partitions=1").await;
    let name = unique("letter-in");
    let mut subscriber = subscribe(&bus, &name).await;
    for round in 0..10 {
        publish(&bus, numbered(&name, round..round + 1)).await;
        bury(&bus, &mut subscriber).await.commit().await.unwrap();
        assert_eq!(redrive(&bus, &name).await, 1, "in round {round}");
        let again = receive(&mut subscriber, 1).await.remove(0);
        assert_eq!((number(&again), again.attempt()), (round, 1));
        again.ack().await.unwrap();
    }
    subscriber.close(LONG).await.unwrap();
    bus.delete(name.as_str(), None).await.unwrap();
    bus.close(LONG).await.unwrap();
}

/// The mark by which it was removed stands behind what is open.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_letter_that_was_put_back_is_not_put_back_again_while_another_one_is_in_an_open_transaction() {
    let Some(url) = url() else { return };
    let bus = connect(&url, "partitions=1").await;
    let name = unique("letter-open");
    let mut subscriber = subscribe(&bus, &name).await;
    publish(&bus, numbered(&name, 0..2)).await;
    bury(&bus, &mut subscriber).await.commit().await.unwrap();
    let transaction = bury(&bus, &mut subscriber).await;
    assert_eq!(redrive(&bus, &name).await, 1, "the one that is committed");
    assert_eq!(redrive(&bus, &name).await, 0, "it is gone, and the other one is not there yet");
    transaction.commit().await.unwrap();
    assert_eq!(redrive(&bus, &name).await, 1, "the other one");
    assert_eq!(take(&mut subscriber, 2).await, [0, 1]);
    nothing(&mut subscriber).await;
    subscriber.close(LONG).await.unwrap();
    bus.delete(name.as_str(), None).await.unwrap();
    bus.close(LONG).await.unwrap();
}

/// Its client serves the next transaction afterwards.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_commit_waits_for_a_publish_of_its_transaction_that_has_not_been_handed_over_yet() {
    let Some(url) = url() else { return };
    let bus = connect(&url, "partitions=1").await;
    let (name, fresh) = (unique("handed-over"), unique("handed-over-fresh"));
    let mut subscriber = subscribe(&bus, &name).await;
    let transaction = bus.begin().await.unwrap();
    // Publishes are handed over one after the other, and the first one makes its topic before.
    let ((), (), committed) = tokio::join!(
        publish(&bus, numbered(&fresh, 0..1)),
        publish_in(&bus, &transaction, numbered(&name, 0..3)),
        transaction.commit()
    );
    committed.unwrap();
    assert_eq!(take(&mut subscriber, 3).await, [0, 1, 2]);
    subscriber.close(LONG).await.unwrap();
    for destination in [name, fresh] {
        bus.delete(destination.as_str(), None).await.unwrap();
    }
    bus.close(LONG).await.unwrap();
}

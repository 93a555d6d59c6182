//! What fails comes back, counted, not before its time.

use std::collections::BTreeSet;
use std::time::Duration;

use anybroker_core::{AttemptCount, Destination, Reason};

use super::case;
use super::time::{come_in_due_order, longer_than, mixed};
use crate::Case;
use crate::case::{Proof, ensure, ensure_eq};
use crate::client::Client;
use crate::consumer::{Consumer, ack_all, ids};
use crate::env::Env;
use crate::need;

pub(super) const CASES: &[Case] = &[
    case!(
        "redelivery/a-nacked-message-comes-back-with-the-next-attempt",
        [need::NACK],
        "nack: comes back with attempt + 1; attempt = 1 + failed handler outcomes.",
        next_attempt
    ),
    case!(
        "redelivery/it-comes-back-unchanged",
        [need::NACK],
        "A redelivered message has the body, headers, key and id of the first delivery.",
        unchanged
    ),
    case!(
        "redelivery/a-failing-message-is-seen-exactly-n-times-then-is-one-dead-letter",
        [need::NACK, need::DEAD_LETTER],
        "max_attempts = N: the handler sees a failing message exactly N times, then there is exactly one dead letter, then silence.",
        exactly_n
    ),
    case!(
        "redelivery/only-failures-count-whatever-else-happens-in-between",
        [need::NACK, need::RELEASE, need::DEAD_LETTER],
        "attempt = 1 + failed handler outcomes; drop, release, close and rebalance do not count.",
        mixed_causes
    ),
    case!(
        "redelivery/many-failures-among-many-messages-lose-none",
        [need::NACK],
        "Every nacked message comes back, whatever else goes on.",
        many
    ),
    case!(
        "redelivery/a-delayed-nack-is-never-early",
        [need::NACK, need::NACK_DELAY],
        "Nack with delay: not before the given delay.",
        never_early
    ),
    case!(
        "redelivery/a-delayed-nack-does-not-hold-others-back",
        [need::NACK, need::NACK_DELAY],
        "Without order, a message that waits for its delay stops no other.",
        others_go_on
    ),
    case!(
        "redelivery/a-short-delay-does-not-wait-for-the-end-of-a-long-one",
        [need::NACK, need::NACK_DELAY],
        "Nack with delay is late by a declared precision, not by another message's delay.",
        in_due_order
    ),
    case!(
        "redelivery/a-delayed-nack-survives-the-close-of-its-consumer",
        [need::NACK, need::NACK_DELAY],
        "Nack with delay survives the consumer; neither the delay nor the count is lost.",
        survives_close
    ),
];

async fn next_attempt(env: &Env) -> Proof {
    let (destination, group) = (env.destination("d"), env.group("g"));
    let client = env.client().await?;
    let mut consumer = client.subscribe(env.spec(&destination, &group)).await?;
    let sent = client.fill(&destination, "k", 1).await?;
    for attempt in 1..=6 {
        let held = consumer.one().await?;
        ensure_eq!(held.id(), sent[0].id().to_string(), "what comes back");
        ensure_eq!(held.attempt(), attempt, "the attempt after {} nacks", attempt - 1);
        if attempt < 6 {
            held.nack(Duration::ZERO).await?;
        } else {
            held.ack().await?;
        }
    }
    consumer.silence_then_canary(&client, "it was acked").await
}

async fn unchanged(env: &Env) -> Proof {
    let (destination, group) = (env.destination("d"), env.group("g"));
    let client = env.client().await?;
    let mut consumer = client.subscribe(env.spec(&destination, &group)).await?;
    let message = client.message(&destination, "k").with_header("a", "1").with_header("a", "2");
    client.publish_ok(vec![message.clone()]).await?;
    for round in 0..3 {
        let held = consumer.one().await?;
        let mut copy = held.message().clone();
        ensure_eq!(copy, message, "the message of delivery {round}");
        // What a handler does to its copy is its own business.
        copy.headers_mut().append("handler", "was here");
        if round < 2 { held.nack(Duration::ZERO).await? } else { held.ack().await? }
    }
    Ok(())
}

async fn exactly_n(env: &Env) -> Proof {
    let client = env.client().await?;
    for limit in [1, 2, 5] {
        let (destination, group) = (env.destination(&format!("limit{limit}")), env.group("g"));
        let mut consumer = client.subscribe(env.spec(&destination, &group).with_max_attempts(limit)).await?;
        let sent = client.fill(&destination, "k", 1).await?;
        for attempt in 1..=limit {
            let held = consumer.one().await?;
            ensure_eq!(held.attempt(), attempt, "the attempt, of {limit}");
            held.nack(Duration::ZERO).await?;
        }
        consumer.silence_then_canary(&client, &format!("{limit} of {limit} attempts have failed")).await?;
        let letters = client.letters_until(&destination, &group, 1).await?;
        ensure_eq!(ids(letters.iter().map(|letter| &letter.message)), ids(&sent), "the dead letters after {limit}");
        ensure_eq!(letters[0].reason, Reason::AttemptsExhausted, "the reason");
        ensure_eq!(letters[0].attempts, limit, "the attempts that the letter tells");
        consumer.close().await?;
        let left = env.client().await?.drain(env.spec(&destination, &group).with_max_attempts(limit)).await?;
        ensure_eq!(ids(&left), Vec::<String>::new(), "what is left");
    }
    Ok(())
}

async fn mixed_causes(env: &Env) -> Proof {
    let (destination, group) = (env.destination("d"), env.group("g"));
    let client = env.client().await?;
    let spec = env.spec(&destination, &group).with_max_attempts(3);
    let mut consumer = client.subscribe(spec.clone()).await?;
    let sent = client.fill(&destination, "k", 1).await?;
    let mut failed = 0;
    let (mut seen, mut expected) = (Vec::new(), Vec::new());
    for what in ["drop", "nack", "release", "close", "nack", "drop", "close", "release", "nack"] {
        let held = consumer.one().await?;
        ensure_eq!(held.id(), sent[0].id().to_string(), "what comes before `{what}`");
        expected.push(1 + failed);
        seen.push(held.attempt());
        match what {
            "drop" => drop(held),
            "release" => held.release().await?,
            "close" => {
                consumer.close().await?;
                drop(held);
                consumer = client.subscribe(spec.clone()).await?;
            }
            _ => {
                // Where other things may count too, the limit may be met before the third failure.
                let last = held.attempt() >= 3;
                held.nack(Duration::ZERO).await?;
                failed += 1;
                if last {
                    break;
                }
            }
        }
    }
    if env.record.attempt_count == AttemptCount::Exact {
        ensure_eq!(seen, expected, "the attempts");
    }
    if env.record.attempt_count != AttemptCount::Volatile {
        let letters = client.letters_until(&destination, &group, 1).await?;
        ensure_eq!(ids(letters.iter().map(|letter| &letter.message)), ids(&sent), "the dead letters");
    }
    Ok(())
}

async fn many(env: &Env) -> Proof {
    let (destination, group) = (env.destination("d"), env.group("g"));
    let client = env.client().await?;
    let mut consumer = client.subscribe(env.spec(&destination, &group)).await?;
    let mut expected = BTreeSet::new();
    for number in 0..20 {
        expected.extend(ids(&client.fill(&destination, format!("key {number}").as_str(), 5).await?));
    }
    let mut acked = BTreeSet::new();
    let mut count = 0_u32;
    while acked.len() < expected.len() {
        for held in consumer.take(1).await? {
            count += 1;
            ensure!(count <= 1_000, "{} of {} are acked after 1,000 deliveries", acked.len(), expected.len());
            // Every third delivery fails, and every message at least once.
            if count.is_multiple_of(3) || held.attempt() == 1 {
                held.nack(Duration::ZERO).await?;
            } else {
                acked.insert(held.id());
                held.ack().await?;
            }
        }
    }
    ensure_eq!(acked, expected, "what was acked");
    consumer.silence_then_canary(&client, "all were acked").await?;
    consumer.close().await?;
    let left = env.client().await?.drain(env.spec(&destination, &group)).await?;
    ensure_eq!(ids(&left), Vec::<String>::new(), "what is left");
    Ok(())
}

/// How long a nack without a delay takes. What comes back late anyway is never early: delays are to be longer.
async fn usual<'e>(
    env: &Env,
    client: &Client<'e>,
    consumer: &mut Consumer<'e>,
    destination: &Destination,
) -> Proof<Duration> {
    client.fill(destination, "k", 1).await?;
    let (mut held, mut usual) = (consumer.one().await?, Duration::ZERO);
    for _ in 0..3 {
        let nacked = env.now();
        held.nack(Duration::ZERO).await?;
        held = consumer.one().await?;
        usual = usual.max(Duration::from_micros(env.now() - nacked));
    }
    held.ack().await?;
    Ok(usual)
}

async fn never_early(env: &Env) -> Proof {
    let (destination, group) = (env.destination("d"), env.group("g"));
    let client = env.client().await?;
    let mut consumer = client.subscribe(env.spec(&destination, &group)).await?;
    let usual = usual(env, &client, &mut consumer, &destination).await?;
    for delay in [300, 650, 20].map(|delay| longer_than(usual, delay)) {
        client.fill(&destination, "k", 1).await?;
        let held = consumer.one().await?;
        let nacked = env.now();
        held.nack(delay).await?;
        if env.harness.clock().is_some() {
            consumer.silence("the delay has not ended").await?;
            env.pass(delay).await;
        }
        let again = consumer.one().await?;
        let waited = Duration::from_micros(env.now() - nacked);
        ensure!(env.has_waited(nacked, delay), "nacked with {delay:?}, and back after {waited:?}");
        ensure_eq!(again.attempt(), 2, "its attempt");
        again.ack().await?;
    }
    consumer.silence_then_canary(&client, "all were acked").await
}

async fn others_go_on(env: &Env) -> Proof {
    let (destination, group) = (env.destination("d"), env.group("g"));
    let client = env.client().await?;
    let mut consumer = client.subscribe(env.spec(&destination, &group)).await?;
    client.fill(&destination, "slow", 1).await?;
    // Longer than the case waits for anything. That it comes when the delay has ended is another case's proof.
    consumer.one().await?.nack(env.patience() * 4).await?;
    for _ in 0..5 {
        let quick = client.fill(&destination, "quick", 1).await?;
        let held = consumer.one().await?;
        ensure_eq!(held.id(), quick[0].id().to_string(), "what comes while another waits for its delay");
        held.ack().await?;
    }
    Ok(())
}

async fn in_due_order(env: &Env) -> Proof {
    let (destination, group) = (env.destination("d"), env.group("g"));
    let client = env.client().await?;
    let mut consumer = client.subscribe(env.spec(&destination, &group)).await?;
    let delays = mixed(env, usual(env, &client, &mut consumer, &destination).await?);
    for number in 0..delays.len() {
        client.fill(&destination, format!("k{number}").as_str(), 1).await?;
    }
    let mut waiting = Vec::new();
    for (held, delay) in consumer.take(delays.len()).await?.into_iter().zip(delays) {
        let (nacked, id) = (env.now(), held.id());
        held.nack(delay).await?;
        waiting.push((delay, nacked, id));
    }
    come_in_due_order(env, &mut consumer, waiting, 2).await?;
    consumer.silence_then_canary(&client, "all were acked").await
}

async fn survives_close(env: &Env) -> Proof {
    let (destination, group) = (env.destination("d"), env.group("g"));
    let client = env.client().await?;
    let mut consumer = client.subscribe(env.spec(&destination, &group)).await?;
    let sent = client.fill(&destination, "k", 1).await?;
    let delay = Duration::from_millis(800);
    let held = consumer.one().await?;
    let nacked = env.now();
    held.nack(delay).await?;
    consumer.close().await?;
    client.close().await?;

    let other = env.client().await?;
    let mut consumer = other.subscribe(env.spec(&destination, &group)).await?;
    if env.harness.clock().is_some() {
        env.pass(delay).await;
    }
    let again = consumer.take(1).await?;
    let waited = Duration::from_micros(env.now() - nacked);
    ensure_eq!(again[0].id(), sent[0].id().to_string(), "what comes back");
    ensure!(env.has_waited(nacked, delay), "nacked with {delay:?}, and back after {waited:?} and a close");
    match env.record.attempt_count {
        AttemptCount::Exact => ensure_eq!(again[0].attempt(), 2, "the attempt after a nack and a close"),
        AttemptCount::Volatile => {}
        _ => ensure!(again[0].attempt() >= 2, "attempt {} after a nack and a close", again[0].attempt()),
    }
    ack_all(again).await?;
    consumer.silence_then_canary(&other, "it was acked").await
}

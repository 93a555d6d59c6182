//! Lives at the limits: of what a message may hold, of how often a broker hands one out, of how much waits behind one.

use std::collections::BTreeSet;
use std::time::Duration;

use anybroker_core::{
    AckGranularity, AttemptCount, Effect, ErrorKind, Message, OnFailure, Order, Reason, RedriveOptions, Verdict,
};

use super::case;
use crate::Case;
use crate::case::{Breach, Proof, ensure, ensure_eq, fail};
use crate::client::Client;
use crate::consumer::{Consumer, Held, ack_all, held_ids, ids};
use crate::env::Env;
use crate::need;

pub(super) const CASES: &[Case] = &[
    case!(
        "limits/a-message-at-all-its-limits-can-fail-be-buried-and-put-back",
        [need::NACK, need::DEAD_LETTER, need::REDRIVE],
        "Where a message was taken, its retries and its dead letter have room too, whatever this library writes beside it.",
        whole_life
    ),
    case!(
        "limits/a-message-outlives-every-limit-of-its-broker",
        [need::NACK],
        "Limits of the broker itself are reconciled: never does it drop or bury a message that the policy still owns.",
        outlives
    ),
    case!(
        "limits/what-is-held-for-long-keeps-its-place-while-hundreds-pass",
        [],
        "Acks may come in any order; what is behind one that is held goes on, and that one still comes back.",
        old_hole
    ),
    case!(
        "limits/many-holes-come-back-in-their-order",
        [need::KEY_ORDER],
        "What was acked between others stays away where acks are individual, and what comes back of a key comes in its order.",
        many_holes
    ),
];

/// Repeated hand-overs: more than any broker's own default, of which the highest is 20 (the delivery limit of quorum queues since
/// RabbitMQ 4.0, <https://www.rabbitmq.com/docs/quorum-queues#poison-message-handling>).
const HAND_OVERS: usize = 25;

/// What a message may hold at most in all its parts at once, and, should that be more than it may hold in all, the payload alone.
fn at_the_limits(env: &Env) -> Vec<Message> {
    let limits = env.record.limits;
    let bounded = |limit: Option<u64>, most: usize| {
        limit.and_then(|limit| usize::try_from(limit).ok()).map_or(most, |limit| limit.min(most))
    };
    let destination = env.destination("d");
    let payload = bounded(limits.payload, 1 << 20);
    let key = "k".repeat(bounded(limits.key, 128));
    let header = bounded(limits.headers, 16 << 10).saturating_sub("wide".len());
    let full = Message::new(&destination, vec![0xa5; payload]).with_key(key);
    let full = if header > 0 { full.with_header("wide", vec![0x5a; header]) } else { full };
    vec![full, Message::new(&destination, vec![0xa5; payload])]
}

async fn whole_life(env: &Env) -> Proof {
    let (destination, group) = (env.destination("d"), env.group("g"));
    let client = env.client().await?;
    let mut consumer = client.subscribe(env.spec(&destination, &group)).await?;
    let mut lived = 0;
    for message in at_the_limits(env) {
        match client.send(message.clone()).await? {
            Ok(_) => lived += 1,
            Err(error) if matches!(error.kind(), ErrorKind::TooLarge | ErrorKind::InvalidMessage) => {
                ensure_eq!(error.effect(), Effect::NotDone, "the effect of a refusal ({error})");
                continue;
            }
            Err(error) => return Err(error.into()),
        }
        one_life(env, &client, &mut consumer, &message).await?;
    }
    ensure!(lived > 0, "a payload of exactly the limit was refused");
    consumer.silence_then_canary(&client, "all were acked").await
}

async fn one_life<'e>(env: &Env, client: &Client<'e>, consumer: &mut Consumer<'e>, message: &Message) -> Proof {
    let (destination, group) = (env.destination("d"), env.group("g"));
    let same = |found: &Message, when: &str| -> Proof {
        ensure!(found == message, "it is not what was published, {when}");
        Ok(())
    };
    let held = consumer.one().await?;
    same(held.message(), "when it comes first")?;
    held.nack(Duration::ZERO).await?;
    let mut held = consumer.one().await?;
    same(held.message(), "after a nack")?;
    if env.record.nack_delay.is_given() {
        let delay = Duration::from_millis(300);
        held.nack(delay).await?;
        if env.harness.clock().is_some() {
            env.pass(delay).await;
        }
        held = consumer.one().await?;
        same(held.message(), "after a nack with a delay")?;
    }
    // What a person writes may be as long as a stack trace.
    let (error_type, detail) = ("E".repeat(200), "a line of a stack trace\n".repeat(3_000));
    let verdict = Verdict::new(Reason::Rejected).with_error_type(error_type.clone()).with_detail(detail.clone());
    held.dead_letter(verdict).await?;
    let letters = client.letters_until(&destination, &group, 1).await?;
    ensure_eq!(letters.len(), 1, "dead letters");
    let letter = &letters[0];
    same(&letter.message, "as a dead letter")?;
    ensure_eq!(letter.reason, Reason::Rejected, "the reason");
    let is_told =
        |told: Option<&str>, given: &str| told.is_some_and(|told| !told.is_empty() && given.starts_with(told));
    ensure!(is_told(letter.error_type.as_deref(), &error_type), "the error type: {:?}", letter.error_type);
    ensure!(is_told(letter.detail.as_deref(), &detail), "the detail is not the beginning of what was given");
    let report = client.redrive(&destination, &group, &RedriveOptions::default()).await?;
    ensure_eq!(report.moved, 1, "redriven");
    let held = consumer.one().await?;
    same(held.message(), "after a redrive")?;
    held.ack().await
}

async fn outlives(env: &Env) -> Proof {
    let (destination, group) = (env.destination("d"), env.group("g"));
    let client = env.client().await?;
    let spec = env.spec(&destination, &group);
    let mut consumer = client.subscribe(spec.clone()).await?;
    let message = client.fill(&destination, "k", 1).await?.remove(0);
    let is_it = |held: &Held<'_>, after: &str, failures: usize| -> Proof {
        ensure_eq!(held.id(), message.id().to_string(), "what comes {after}");
        if env.record.attempt_count == AttemptCount::Exact {
            ensure_eq!(usize::try_from(held.attempt()).ok(), Some(failures + 1), "its attempt {after}");
        }
        Ok(())
    };
    let mut failures = 0;
    for _ in 0..HAND_OVERS {
        let held = consumer.one().await?;
        is_it(&held, "after nacks", failures)?;
        held.nack(Duration::ZERO).await?;
        failures += 1;
    }
    for _ in 0..HAND_OVERS {
        let held = consumer.one().await?;
        is_it(&held, "after it was dropped", failures)?;
        drop(held);
    }
    if env.record.release.is_given() {
        for _ in 0..HAND_OVERS {
            let held = consumer.one().await?;
            is_it(&held, "after releases", failures)?;
            held.release().await?;
        }
    }
    // Where the broker counts hand-overs by itself, those of closed members count as well.
    for _ in 0..5 {
        let held = consumer.one().await?;
        is_it(&held, "after closes", failures)?;
        consumer.close().await?;
        drop(held);
        consumer = client.subscribe(spec.clone()).await?;
    }
    let held = consumer.one().await?;
    is_it(&held, "at last", failures)?;
    if env.record.dead_letter.is_given() {
        ensure_eq!(
            client.letters(&destination, &group).await?.len(),
            0,
            "dead letters of a message that nobody gave up"
        );
    }
    held.ack().await?;
    consumer.silence_then_canary(&client, "it was acked").await
}

async fn old_hole(env: &Env) -> Proof {
    const PASSING: usize = 600;
    let (destination, group) = (env.destination("d"), env.group("g"));
    let client = env.client().await?;
    let spec = env.spec(&destination, &group).with_max_in_flight(50);
    let mut consumer = client.subscribe(spec.clone()).await?;
    let keys: Vec<String> = (0..PASSING).map(|number| format!("key {number}")).collect();
    let sent: Vec<Message> = keys.iter().map(|key| client.message(&destination, key.as_str())).collect();
    client.publish_ok(sent.clone()).await?;
    let hole = consumer.one().await?;
    if env.at_once(PASSING) < PASSING {
        return Err(Breach::NotRun(
            "all messages are locked while some are out: hundreds do not pass one that is held".into(),
        ));
    }
    let mut seen = BTreeSet::from([hole.id()]);
    let deadline = std::time::Instant::now() + env.patience();
    while seen.len() < PASSING {
        let came = consumer.receive(49, Duration::from_millis(500)).await?;
        if came.is_empty() && std::time::Instant::now() >= deadline {
            fail!("{} of {PASSING} came while one was held", seen.len());
        }
        seen.extend(held_ids(&came));
        ack_all(came).await?;
    }
    let hole_id = hole.id();
    consumer.close().await?;
    drop(hole);
    let left = ids(&env.client().await?.drain(spec).await?);
    ensure!(left.contains(&hole_id), "what was held does not come again: {} others do", left.len());
    if env.record.ack_granularity == AckGranularity::Individual {
        ensure_eq!(left, vec![hole_id], "what comes after the close");
    }
    Ok(())
}

async fn many_holes(env: &Env) -> Proof {
    let (destination, group) = (env.destination("d"), env.group("g"));
    let client = env.client().await?;
    let spec = env.spec(&destination, &group).with_order(Order::Key).with_on_failure(OnFailure::GoPast);
    let mut consumer = client.subscribe(spec.clone()).await?;
    let count = env.of_one_key(40);
    let sent = ids(&client.fill(&destination, "k", count).await?);
    let came = consumer.take(count).await?;
    ensure_eq!(held_ids(&came), sent, "the order of the key");
    let holes: Vec<String> = sent.iter().skip(1).step_by(2).cloned().collect();
    let (kept, acked): (Vec<_>, Vec<_>) = came.into_iter().partition(|held| holes.contains(&held.id()));
    ack_all(acked).await?;
    consumer.close().await?;
    drop(kept);
    let left = ids(&env.client().await?.drain(spec).await?);
    match env.record.ack_granularity {
        AckGranularity::Individual => ensure_eq!(left, holes, "what comes after the close, in its order"),
        AckGranularity::Prefix => {
            let places: Vec<_> = left.iter().map(|id| sent.iter().position(|sent| sent == id)).collect();
            ensure!(places.is_sorted(), "what comes after the close is out of order: {places:?}");
            ensure!(holes.iter().all(|hole| left.contains(hole)), "of the holes {holes:?} came {left:?}");
            ensure!(!left.contains(&sent[0]), "what was acked before the first hole comes again");
        }
    }
    Ok(())
}

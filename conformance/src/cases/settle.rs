//! A delivery is settled once, and settling means what it says.

use std::collections::BTreeSet;

use anybroker_core::{AckGranularity, ErrorKind, Nack, Reason, Settlement, Verdict};

use super::case;
use crate::Case;
use crate::case::{Proof, ensure, ensure_eq};
use crate::consumer::{ack_all, ids, settle};
use crate::env::Env;
use crate::need;

pub(super) const CASES: &[Case] = &[
    case!("settle/what-was-acked-never-comes-again", [], "ack: done, never again in this group.", acked_is_done),
    case!(
        "settle/what-was-acked-stays-away-when-its-lease-would-have-ended",
        [],
        "ack: done, never again in this group; not only hidden for as long as a lease.",
        acked_outlives_its_lease
    ),
    case!(
        "settle/an-ack-answers-the-level-of-the-record",
        [],
        "`Ok` says its level: recorded, sent, or confirmed.",
        ack_level
    ),
    case!(
        "settle/acks-may-come-in-any-order",
        [],
        "Acks may come in any order; when all are there, nothing comes again after a close.",
        reverse_acks
    ),
    case!(
        "settle/a-batch-mixes-settlements-and-answers-for-each-entry",
        [need::NACK, need::RELEASE, need::DEAD_LETTER],
        "Batch settlement is the primitive; per-entry outcomes are read, never assumed.",
        mixed_batch
    ),
    case!(
        "settle/a-dropped-settle-still-settles",
        [],
        "The work is handed over in the call: a dropped settle future loses only the answer, and never becomes a nack.",
        dropped_settle
    ),
    case!(
        "settle/nacking-one-of-a-published-batch-brings-back-only-that-one",
        [need::NACK],
        "A delivery is settled by itself, however its message was published.",
        one_of_a_batch
    ),
    case!(
        "settle/what-was-dropped-unsettled-comes-back-uncounted",
        [],
        "Dropped unsettled = it comes back; never acked by a drop, and no failure is counted.",
        dropped
    ),
    case!(
        "settle/what-was-released-comes-back-with-the-same-attempt",
        [need::RELEASE],
        "Release gives back without counting a failure.",
        released
    ),
    case!(
        "settle/after-a-close-a-settle-is-stale-and-the-message-comes-back",
        [],
        "A settle after the subscription is gone is a typed StaleDelivery.",
        stale_after_close
    ),
];

async fn acked_is_done(env: &Env) -> Proof {
    let (destination, group) = (env.destination("d"), env.group("g"));
    let client = env.client().await?;
    let mut consumer = client.subscribe(env.spec(&destination, &group)).await?;
    client.fill(&destination, "k", 5).await?;
    ack_all(consumer.take(5).await?).await?;
    consumer.silence_then_canary(&client, "all were acked").await?;
    consumer.close().await?;
    let left = env.client().await?.drain(env.spec(&destination, &group)).await?;
    ensure_eq!(ids(&left), Vec::<String>::new(), "what a fresh client reads of a group that acked everything");
    Ok(())
}

async fn acked_outlives_its_lease(env: &Env) -> Proof {
    let (destination, group) = (env.destination("d"), env.group("g"));
    let client = env.client().await?;
    let lease = env.lease();
    let mut consumer = client.subscribe(env.spec(&destination, &group).with_lease(lease)).await?;
    let leased = env.now();
    client.fill(&destination, env.loose_key(), 3).await?;
    for _ in 0..3 {
        let held = consumer.one().await?;
        consumer.ack_in_time(held, leased).await?;
    }
    env.pass(lease + lease / 2).await;
    consumer.silence_then_canary(&client, "all were acked before their leases ended").await
}

async fn ack_level(env: &Env) -> Proof {
    let (destination, group) = (env.destination("d"), env.group("g"));
    let client = env.client().await?;
    let mut consumer = client.subscribe(env.spec(&destination, &group)).await?;
    client.fill(&destination, env.loose_key(), 3).await?;
    for held in consumer.take(3).await? {
        match held.settle(Settlement::Ack).await? {
            Ok(level) => ensure_eq!(level, env.record.ack_level, "what an ack answers"),
            Err((_, error)) => return Err(error.into()),
        }
    }
    consumer.silence_then_canary(&client, "all were acked").await
}

async fn reverse_acks(env: &Env) -> Proof {
    let (destination, group) = (env.destination("d"), env.group("g"));
    let client = env.client().await?;
    let mut consumer = client.subscribe(env.spec(&destination, &group)).await?;
    client.fill(&destination, "k", 10).await?;
    for held in consumer.take(10).await?.into_iter().rev() {
        held.ack().await?;
    }
    consumer.close().await?;
    client.close().await?;
    let left = env.client().await?.drain(env.spec(&destination, &group)).await?;
    ensure_eq!(ids(&left), Vec::<String>::new(), "what comes again after acks in reverse order and a close");
    Ok(())
}

async fn mixed_batch(env: &Env) -> Proof {
    let (destination, group) = (env.destination("d"), env.group("g"));
    let client = env.client().await?;
    let mut consumer = client.subscribe(env.spec(&destination, &group)).await?;
    // A key each, so that order keeps nothing back.
    let mut sent = Vec::new();
    for key in ["ack", "nack", "release", "bury"] {
        sent.extend(client.fill(&destination, key, 1).await?);
    }
    let batch = consumer
        .take(4)
        .await?
        .into_iter()
        .map(|held| {
            let settlement = match held.message().key() {
                Some(b"ack") => Settlement::Ack,
                Some(b"nack") => Settlement::Nack(Nack::default()),
                Some(b"release") => Settlement::Release,
                _ => Settlement::DeadLetter(Box::new(Verdict::new(Reason::Rejected))),
            };
            (held, settlement)
        })
        .collect();
    for outcome in settle(batch).await? {
        outcome.map_err(|(_, error)| crate::case::Breach::from(error))?;
    }
    let again = consumer.take(2).await?;
    let found: BTreeSet<_> = again.iter().map(|held| (held.id(), held.attempt())).collect();
    let expected = BTreeSet::from([(sent[1].id().to_string(), 2), (sent[2].id().to_string(), 1)]);
    match env.record.attempt_count {
        // What was released may be counted too.
        anybroker_core::AttemptCount::Approximate => {
            let found: BTreeSet<_> = found.into_iter().map(|(id, _)| id).collect();
            ensure_eq!(found, expected.into_iter().map(|(id, _)| id).collect(), "what comes back");
        }
        _ => ensure_eq!(found, expected, "what comes back, with its attempt"),
    }
    ack_all(again).await?;
    consumer.silence_then_canary(&client, "only the nacked and the released one come back").await?;
    let letters = client.letters_until(&destination, &group, 1).await?;
    ensure_eq!(ids(letters.iter().map(|letter| &letter.message)), ids([&sent[3]]), "the dead letters");
    consumer.close().await?;
    let left = env.client().await?.drain(env.spec(&destination, &group)).await?;
    ensure_eq!(ids(&left), Vec::<String>::new(), "what is left");
    Ok(())
}

async fn dropped_settle(env: &Env) -> Proof {
    let (destination, group) = (env.destination("d"), env.group("g"));
    let client = env.client().await?;
    let mut consumer = client.subscribe(env.spec(&destination, &group)).await?;
    client.fill(&destination, "k", 6).await?;
    for (index, held) in consumer.take(6).await?.into_iter().enumerate() {
        held.settle_and_forget(index % 2 == 0).await;
    }
    consumer.silence_then_canary(&client, "acks were handed over").await?;
    ensure_eq!(consumer.subscriber.in_flight(), 0, "in flight when nobody waits for an answer any more");
    consumer.close().await?;
    let left = env.client().await?.drain(env.spec(&destination, &group)).await?;
    ensure_eq!(ids(&left), Vec::<String>::new(), "what comes again");
    Ok(())
}

async fn one_of_a_batch(env: &Env) -> Proof {
    let (destination, group) = (env.destination("d"), env.group("g"));
    let client = env.client().await?;
    let mut consumer = client.subscribe(env.spec(&destination, &group)).await?;
    let sent = client.fill(&destination, "k", 10).await?;
    let mut came = consumer.take(10).await?;
    let place = came.iter().position(|held| held.id() == sent[4].id().to_string()).unwrap_or_default();
    let failed = came.remove(place);
    ack_all(came).await?;
    failed.nack(std::time::Duration::ZERO).await?;
    let again = consumer.one().await?;
    ensure_eq!(again.id(), sent[4].id().to_string(), "what comes back");
    ensure_eq!(again.attempt(), 2, "its attempt");
    again.ack().await?;
    consumer.silence_then_canary(&client, "its siblings were acked").await
}

async fn dropped(env: &Env) -> Proof {
    let (destination, group) = (env.destination("d"), env.group("g"));
    let client = env.client().await?;
    let lease = env.lease();
    let mut consumer = client.subscribe(env.spec(&destination, &group).with_lease(lease)).await?;
    let leased = env.now();
    let sent = client.fill(&destination, "k", 1).await?;
    let held = consumer.one().await?;
    drop(held);
    // At once where the broker can, by its lease otherwise.
    if env.harness.clock().is_some() && consumer.receive(0, env.quiet()).await?.is_empty() {
        env.pass(lease).await;
    }
    let again = consumer.one().await?;
    ensure_eq!(again.id(), sent[0].id().to_string(), "what comes back");
    if env.record.attempt_count != anybroker_core::AttemptCount::Approximate {
        ensure_eq!(again.attempt(), 1, "the attempt of a message that was dropped, not failed");
    }
    consumer.ack_in_time(again, leased).await?;
    consumer.silence_then_canary(&client, "it was acked").await
}

async fn released(env: &Env) -> Proof {
    let (destination, group) = (env.destination("d"), env.group("g"));
    let client = env.client().await?;
    let mut consumer = client.subscribe(env.spec(&destination, &group).with_max_attempts(2)).await?;
    let sent = client.fill(&destination, "k", 1).await?;
    // More often than attempts are allowed: none of it counts.
    for round in 0..4 {
        let held = consumer.one().await?;
        ensure_eq!(held.id(), sent[0].id().to_string(), "what comes in round {round}");
        if env.record.attempt_count != anybroker_core::AttemptCount::Approximate {
            ensure_eq!(held.attempt(), 1, "the attempt in round {round}");
        }
        held.release().await?;
    }
    consumer.one().await?.ack().await?;
    consumer.silence_then_canary(&client, "it was acked").await
}

async fn stale_after_close(env: &Env) -> Proof {
    let (destination, group) = (env.destination("d"), env.group("g"));
    let client = env.client().await?;
    let mut consumer = client.subscribe(env.spec(&destination, &group)).await?;
    let sent = client.fill(&destination, "k", 3).await?;
    let mut came = consumer.take(3).await?;
    came.sort_by_key(|held| sent.iter().position(|sent| sent.id().to_string() == held.id()));
    let last = came.pop().map(|held| held.ack());
    if let Some(ack) = last {
        ack.await?;
    }
    consumer.close().await?;
    for held in came {
        match held.settle(Settlement::Ack).await? {
            Ok(level) => crate::case::fail!("an ack after the close answers Ok({level:?})"),
            Err((_, error)) => ensure_eq!(error.kind(), ErrorKind::StaleDelivery, "an ack after the close"),
        }
    }
    let left = env.client().await?.drain(env.spec(&destination, &group)).await?;
    let found: BTreeSet<_> = ids(&left).into_iter().collect();
    let unsettled: BTreeSet<_> = ids(&sent[..2]).into_iter().collect();
    match env.record.ack_granularity {
        AckGranularity::Individual => ensure_eq!(found, unsettled, "what comes again"),
        // The third was acked above a hole: it may come again; it may also be kept in the commit's metadata.
        AckGranularity::Prefix => {
            let all: BTreeSet<_> = ids(&sent).into_iter().collect();
            ensure!(found.is_superset(&unsettled) && found.is_subset(&all), "what comes again: {found:?}");
        }
    }
    Ok(())
}

//! Ids are stable, and dedup, where there is any, swallows copies and nothing else.

use std::time::Duration;

use anybroker_core::{MessageId, Reason, RedriveOptions, Verdict};

use super::case;
use crate::Case;
use crate::case::{Proof, ensure, ensure_eq};
use crate::consumer::{ack_all, held_ids, ids};
use crate::env::Env;
use crate::need;

pub(super) const CASES: &[Case] = &[
    case!(
        "idempotency/the-id-is-stable-across-nack-drop-and-close",
        [need::NACK],
        "id: always there, kept by retry, so that a consumer can recognise a message it has seen.",
        stable
    ),
    case!(
        "idempotency/the-id-is-stable-across-redrive",
        [need::DEAD_LETTER, need::REDRIVE],
        "A redriven message starts again at attempt 1 with its id kept.",
        stable_redrive
    ),
    case!(
        "idempotency/ids-of-any-form-come-through-as-they-were-given",
        [],
        "id: UUIDv7 by default; any non-empty text otherwise.",
        any_id
    ),
    case!(
        "idempotency/a-second-publish-of-an-id-within-the-window-is-stored-once",
        [need::DEDUP],
        "A second publish of the same id within the window is not stored again; the receipt says so.",
        dedup
    ),
    case!(
        "idempotency/dedup-is-per-destination",
        [need::DEDUP],
        "Dedup keeps one copy per destination: the same id in two destinations is two messages.",
        dedup_per_destination
    ),
    case!(
        "idempotency/dedup-swallows-no-retry-and-no-redrive",
        [need::DEDUP, need::NACK, need::DEAD_LETTER, need::REDRIVE],
        "Where the broker dedups, every retry or redrive hop changes the key.",
        dedup_hops
    ),
];

async fn stable(env: &Env) -> Proof {
    let (destination, group) = (env.destination("d"), env.group("g"));
    let client = env.client().await?;
    let spec = env.spec(&destination, &group);
    let mut consumer = client.subscribe(spec.clone()).await?;
    let sent = client.fill(&destination, "k", 1).await?;
    let id = sent[0].id().to_string();
    let held = consumer.one().await?;
    ensure_eq!(held.id(), id, "the first delivery");
    held.nack(Duration::ZERO).await?;
    let held = consumer.one().await?;
    ensure_eq!(held.id(), id, "after a nack");
    drop(held);
    let held = consumer.one().await?;
    ensure_eq!(held.id(), id, "after it was dropped");
    consumer.close().await?;
    drop(held);
    let mut consumer = client.subscribe(spec).await?;
    let held = consumer.one().await?;
    ensure_eq!(held.id(), id, "after a close");
    held.ack().await?;
    consumer.silence_then_canary(&client, "it was acked").await
}

async fn stable_redrive(env: &Env) -> Proof {
    let (destination, group) = (env.destination("d"), env.group("g"));
    let client = env.client().await?;
    let mut consumer = client.subscribe(env.spec(&destination, &group)).await?;
    let sent = client.fill(&destination, "k", 1).await?;
    consumer.one().await?.dead_letter(Verdict::new(Reason::Rejected)).await?;
    client.letters_until(&destination, &group, 1).await?;
    client.redrive(&destination, &group, &RedriveOptions::default()).await?;
    let held = consumer.one().await?;
    ensure_eq!((held.id(), held.attempt()), (sent[0].id().to_string(), 1), "id and attempt after a redrive");
    held.ack().await?;
    consumer.silence_then_canary(&client, "it was acked").await
}

async fn any_id(env: &Env) -> Proof {
    let destination = env.destination("d");
    let client = env.client().await?;
    let mut consumer = client.subscribe(env.spec(&destination, &env.group("g"))).await?;
    for text in [
        "0191e2b4-0000-7000-8000-000000000000",
        "0191E2B4-0000-7000-8000-000000000000",
        "1",
        "order 17 / line 3",
        "заказ-17 🚚",
        " leading and trailing ",
        &"long".repeat(50),
    ] {
        let message = client.message(&destination, "k").with_id(MessageId::from(text));
        client.publish_ok(vec![message]).await?;
        let held = consumer.one().await?;
        ensure_eq!(held.id(), text, "the id");
        held.ack().await?;
    }
    Ok(())
}

async fn dedup(env: &Env) -> Proof {
    let destination = env.destination("d");
    let client = env.client().await?;
    let mut consumer = client.subscribe(env.spec(&destination, &env.group("g"))).await?;
    let message = client.message(&destination, "k");
    ensure!(!client.publish_ok(vec![message.clone()]).await?[0].duplicate, "the first publish is told a duplicate");
    // In a batch of its own, twice in one batch, and by another client, before and after it was settled.
    for receipt in client.publish_ok(vec![message.clone(), message.clone()]).await? {
        ensure!(receipt.duplicate, "a second publish is not told a duplicate");
    }
    consumer.one().await?.ack().await?;
    let other = env.client().await?;
    ensure!(other.publish_ok(vec![message.clone()]).await?[0].duplicate, "another client's is not told a duplicate");
    consumer.silence_then_canary(&client, "copies within the window are not stored").await
}

async fn dedup_per_destination(env: &Env) -> Proof {
    let (a, b) = (env.destination("a"), env.destination("b"));
    let client = env.client().await?;
    let mut first = client.subscribe(env.spec(&a, &env.group("g"))).await?;
    let mut second = client.subscribe(env.spec(&b, &env.group("g"))).await?;
    let message = client.message(&a, "k");
    let receipts = client.publish_ok(vec![message.clone(), message.clone().with_destination(&b)]).await?;
    ensure!(receipts.iter().all(|receipt| !receipt.duplicate), "the other destination's is told a duplicate");
    for consumer in [&mut first, &mut second] {
        let came = consumer.take(1).await?;
        ensure_eq!(held_ids(&came), ids([&message]), "what each destination brings");
        ack_all(came).await?;
    }
    Ok(())
}

async fn dedup_hops(env: &Env) -> Proof {
    let (destination, group) = (env.destination("d"), env.group("g"));
    let client = env.client().await?;
    let mut consumer = client.subscribe(env.spec(&destination, &group).with_max_attempts(2)).await?;
    let sent = client.fill(&destination, "k", 1).await?;
    for round in 0..3 {
        for attempt in 1..=2 {
            let held = consumer.one().await?;
            let expected = (sent[0].id().to_string(), attempt);
            ensure_eq!((held.id(), held.attempt()), expected, "delivery after {round} redrives");
            held.nack(Duration::ZERO).await?;
        }
        client.letters_until(&destination, &group, 1).await?;
        ensure_eq!(client.redrive(&destination, &group, &RedriveOptions::default()).await?.moved, 1, "moved");
    }
    consumer.one().await?.ack().await?;
    consumer.silence_then_canary(&client, "it was acked").await
}

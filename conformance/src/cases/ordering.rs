//! Order per key, across members, through failures.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anybroker_core::{DeadLetterFilter, Destination, Message, OnFailure, Order, Reason, RedriveOptions, Verdict};

use super::case;
use crate::Case;
use crate::case::{Proof, ensure, ensure_eq};
use crate::client::Client;
use crate::consumer::{Held, ack_all, held_ids, ids};
use crate::env::Env;
use crate::need;

pub(super) const CASES: &[Case] = &[
    case!(
        "ordering/messages-of-a-key-come-in-the-order-they-were-published",
        [need::KEY_ORDER],
        "Order::Key: messages of one key in the order they were published.",
        per_key
    ),
    case!(
        "ordering/a-key-keeps-its-order-across-members",
        [need::KEY_ORDER],
        "Order::Key holds across all members of the group.",
        across_members
    ),
    case!(
        "ordering/total-order-holds-over-all-keys",
        [need::TOTAL_ORDER],
        "Order::Total: all messages of a destination, one member at a time.",
        total
    ),
    case!(
        "ordering/under-block-later-messages-of-a-key-wait-for-the-failed-one",
        [need::KEY_ORDER, need::BLOCK, need::NACK_DELAY],
        "OnFailure::Block: after a nack, later messages of the key are not delivered before the failed one.",
        block
    ),
    case!(
        "ordering/under-block-the-first-of-several-failed-ones-holds-the-others-back",
        [need::KEY_ORDER, need::BLOCK, need::NACK_DELAY],
        "OnFailure::Block: what waits behind the first failure stays behind it, whatever further back has failed and is out again.",
        block_behind_the_first
    ),
    case!(
        "ordering/under-go-past-later-messages-of-a-key-pass-the-failed-one",
        [need::KEY_ORDER, need::NACK_DELAY],
        "OnFailure::GoPast: the failed one comes back later, the others go on.",
        go_past
    ),
    case!(
        "ordering/under-park-later-messages-of-a-key-follow-it-to-the-dead-letters",
        [need::KEY_ORDER, need::PARK, need::DEAD_LETTER, need::REDRIVE],
        "OnFailure::Park: later ones follow it to the dead-letter queue in order, and a redrive brings all back in order.",
        park
    ),
    case!(
        "ordering/purging-a-parked-key-frees-it",
        [need::KEY_ORDER, need::PARK, need::DEAD_LETTER, need::PURGE],
        "A key is parked until its letters are redriven or purged.",
        park_and_purge
    ),
    case!(
        "ordering/what-is-released-comes-back-in-order",
        [need::KEY_ORDER, need::RELEASE],
        "What is given back comes back in order, before what is behind it.",
        released
    ),
    case!(
        "ordering/what-a-close-gives-back-comes-in-order",
        [need::KEY_ORDER],
        "After a close the unsettled messages of a key come again in order.",
        after_close
    ),
    case!(
        "ordering/poison-on-one-key-does-not-stop-the-others",
        [need::NACK],
        "Poison on one key does not stop other keys.",
        poison
    ),
];

/// `count` messages of each key, interleaved in batches of seven; by key.
async fn interleaved(
    client: &Client<'_>,
    destination: &Destination,
    keys: &[&str],
    count: usize,
) -> Proof<BTreeMap<String, Vec<String>>> {
    let mut batch = Vec::new();
    for _ in 0..count {
        batch.extend(keys.iter().map(|key| client.message(destination, *key)));
    }
    for part in batch.chunks(7) {
        client.publish_ok(part.to_vec()).await?;
    }
    Ok(by_key(&batch))
}

fn by_key<'m>(messages: impl IntoIterator<Item = &'m Message>) -> BTreeMap<String, Vec<String>> {
    let mut found: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for message in messages {
        found.entry(key_of(message)).or_default().push(message.id().to_string());
    }
    found
}

fn key_of(message: &Message) -> String {
    String::from_utf8_lossy(message.key().unwrap_or_default()).into_owned()
}

async fn per_key(env: &Env) -> Proof {
    let (destination, group) = (env.destination("d"), env.group("g"));
    let client = env.client().await?;
    let mut consumer = client.subscribe(env.spec(&destination, &group).with_order(Order::Key)).await?;
    let sent = interleaved(&client, &destination, &["a", "b", "c", "d", "e"], 20).await?;
    let mut came = Vec::new();
    while came.len() < 100 {
        // However many the endpoint has out of a key at a time.
        let batch = consumer.receive((100 - came.len()).min(9), env.patience()).await?;
        ensure!(!batch.is_empty(), "{} of 100 deliveries came", came.len());
        came.extend(batch.iter().map(|held| held.message().clone()));
        ack_all(batch).await?;
    }
    ensure_eq!(by_key(&came), sent, "the order per key");
    consumer.silence_then_canary(&client, "all were acked").await
}

async fn across_members(env: &Env) -> Proof {
    let (destination, group) = (env.destination("d"), env.group("g"));
    let mut members = Vec::new();
    for _ in 0..3 {
        let client = env.client().await?;
        members.push(client.subscribe(env.spec(&destination, &group).with_order(Order::Key)).await?);
    }
    let client = env.client().await?;
    let sent = interleaved(&client, &destination, &["a", "b", "c", "d", "e", "f"], 15).await?;
    let mut came: Vec<Message> = Vec::new();
    let mut open: Vec<Vec<Held<'_>>> = members.iter().map(|_| Vec::new()).collect();
    let deadline = Instant::now() + env.patience();
    while came.len() < 90 {
        ensure!(Instant::now() < deadline, "{} of 90 deliveries came to three members", came.len());
        for (member, open) in members.iter_mut().zip(&mut open) {
            // What came in the last round is settled only now, while the others hold theirs.
            ack_all(std::mem::take(open)).await?;
            let batch = member.receive(4, Duration::from_millis(30)).await?;
            came.extend(batch.iter().map(|held| held.message().clone()));
            *open = batch;
        }
    }
    for open in open {
        ack_all(open).await?;
    }
    ensure_eq!(by_key(&came), sent, "the order per key over three members");
    for member in members {
        member.close().await?;
    }
    let left = env.client().await?.drain(env.spec(&destination, &group).with_order(Order::Key)).await?;
    ensure_eq!(ids(&left), Vec::<String>::new(), "what is left");
    Ok(())
}

async fn total(env: &Env) -> Proof {
    let (destination, group) = (env.destination("d"), env.group("g"));
    let client = env.client().await?;
    let mut consumer = client.subscribe(env.spec(&destination, &group).with_order(Order::Total)).await?;
    let mut sent = Vec::new();
    for number in 0..40 {
        let key = format!("key {}", number % 7);
        sent.push(client.message(&destination, (number % 5 > 0).then_some(key.as_str())));
    }
    for part in sent.chunks(6) {
        client.publish_ok(part.to_vec()).await?;
    }
    let mut came = Vec::new();
    while came.len() < 40 {
        let batch = consumer.take((40 - came.len()).min(7)).await?;
        came.extend(held_ids(&batch));
        ack_all(batch).await?;
    }
    ensure_eq!(came, ids(&sent), "the order of all messages");
    consumer.silence_then_canary(&client, "all were acked").await
}

async fn block(env: &Env) -> Proof {
    let (destination, group) = (env.destination("d"), env.group("g"));
    let client = env.client().await?;
    let spec = |destination: &Destination| {
        env.spec(destination, &group).with_order(Order::Key).with_on_failure(OnFailure::Block)
    };
    // Another key flows while one waits, here for longer than the case waits for anything.
    let blocked = env.destination("blocked");
    let mut consumer = client.subscribe(spec(&blocked)).await?;
    client.fill(&blocked, "a", 4).await?;
    consumer.one().await?.nack(env.patience() * 4).await?;
    let other = client.fill(&blocked, "b", 3).await?;
    let flowing = consumer.take(3).await?;
    ensure_eq!(held_ids(&flowing), ids(&other), "what flows while key a is blocked");
    ack_all(flowing).await?;
    consumer.silence("key a is blocked").await?;
    consumer.close().await?;

    let mut consumer = client.subscribe(spec(&destination)).await?;
    let sent = client.fill(&destination, "a", 4).await?;
    let held = consumer.one().await?;
    ensure_eq!(held.id(), sent[0].id().to_string(), "the first delivery");
    let delay = Duration::from_millis(700);
    let nacked = env.now();
    held.nack(delay).await?;
    if env.harness.clock().is_some() {
        consumer.silence("key a is blocked").await?;
        env.pass(delay).await;
    }
    let first = consumer.one().await?;
    let waited = Duration::from_micros(env.now() - nacked);
    ensure_eq!(first.id(), sent[0].id().to_string(), "what comes first of the blocked key");
    ensure_eq!(first.attempt(), 2, "its attempt");
    ensure!(env.has_waited(nacked, delay), "the failed message came back after {waited:?} of {delay:?}");
    first.ack().await?;
    let rest = consumer.take(3).await?;
    ensure_eq!(held_ids(&rest), ids(&sent[1..]), "what comes behind it, in order");
    ack_all(rest).await?;
    consumer.silence_then_canary(&client, "all were acked").await
}

async fn block_behind_the_first(env: &Env) -> Proof {
    let (destination, group) = (env.destination("d"), env.group("g"));
    let client = env.client().await?;
    let spec = env.spec(&destination, &group).with_order(Order::Key).with_on_failure(OnFailure::Block);
    let mut consumer = client.subscribe(spec).await?;
    let sent = client.fill(&destination, "a", 3).await?;
    let mut came = consumer.take(3).await?.into_iter();
    let (Some(first), Some(second), Some(third)) = (came.next(), came.next(), came.next()) else {
        return Err(crate::case::Breach::Failed("three deliveries were taken".into()));
    };
    // The last one fails and may be out again, because nothing in front of it has failed yet.
    third.nack(Duration::ZERO).await?;
    let out = consumer.receive(1, env.quiet()).await?;
    ensure!(out.iter().all(|held| held.id() == sent[2].id().to_string()), "only the last one was given back");
    let delay = Duration::from_millis(700);
    first.nack(delay).await?;
    second.release().await?;
    if env.harness.clock().is_some() {
        consumer.silence("key a is blocked").await?;
        env.pass(delay).await;
    }
    let mut expected = ids(&sent);
    expected.truncate(3 - out.len());
    for id in expected {
        let next = consumer.one().await?;
        ensure_eq!(next.id(), id, "what comes next of the blocked key");
        next.ack().await?;
    }
    ack_all(out).await?;
    consumer.silence_then_canary(&client, "all were acked").await
}

async fn go_past(env: &Env) -> Proof {
    let (destination, group) = (env.destination("d"), env.group("g"));
    let client = env.client().await?;
    // The others go past one that waits for longer than the case waits for anything.
    let passed = env.destination("passed");
    let mut consumer = client.subscribe(env.spec(&passed, &group).with_order(Order::Key)).await?;
    let sent = client.fill(&passed, "a", 4).await?;
    consumer.one().await?.nack(env.patience() * 4).await?;
    let rest = consumer.take(3).await?;
    ensure_eq!(held_ids(&rest), ids(&sent[1..]), "what goes past the failed message, in order");
    ack_all(rest).await?;
    consumer.close().await?;

    // It comes back; before or behind them, as its delay will have it.
    let mut consumer = client.subscribe(env.spec(&destination, &group).with_order(Order::Key)).await?;
    let sent = client.fill(&destination, "a", 4).await?;
    let delay = Duration::from_millis(300);
    consumer.one().await?.nack(delay).await?;
    if env.harness.clock().is_some() {
        env.pass(delay).await;
    }
    let (mut back, mut rest) = (Vec::new(), Vec::new());
    for _ in 0..sent.len() {
        let held = consumer.one().await?;
        if held.attempt() == 1 {
            rest.push(held.id());
        } else {
            back.push((held.id(), held.attempt()));
        }
        held.ack().await?;
    }
    ensure_eq!(back, [(sent[0].id().to_string(), 2)], "what comes back, and its attempt");
    ensure_eq!(rest, ids(&sent[1..]), "what goes past it, in order");
    consumer.silence_then_canary(&client, "all were acked").await
}

async fn park(env: &Env) -> Proof {
    let (destination, group) = (env.destination("d"), env.group("g"));
    let client = env.client().await?;
    let spec = env.spec(&destination, &group).with_order(Order::Key).with_on_failure(OnFailure::Park);
    let mut consumer = client.subscribe(spec.clone()).await?;
    let sent = client.fill(&destination, "a", 4).await?;
    let held = consumer.one().await?;
    ensure_eq!(held.id(), sent[0].id().to_string(), "the first delivery");
    held.dead_letter(Verdict::new(Reason::Rejected)).await?;
    let other = client.fill(&destination, "b", 2).await?;
    let flowing = consumer.take(2).await?;
    ensure_eq!(held_ids(&flowing), ids(&other), "what flows while key a is parked");
    ack_all(flowing).await?;
    let letters = client.letters_until(&destination, &group, 4).await?;
    ensure_eq!(ids(letters.iter().map(|letter| &letter.message)), ids(&sent), "the letters, in order");
    let reasons: Vec<_> = letters.iter().map(|letter| letter.reason.clone()).collect();
    ensure_eq!(
        reasons,
        vec![Reason::Rejected, Reason::Parked, Reason::Parked, Reason::Parked],
        "the reasons of the letters"
    );
    consumer.silence_then_canary(&client, "key a is parked").await?;

    let report = client.redrive(&destination, &group, &RedriveOptions::default()).await?;
    ensure_eq!(report.moved, 4, "letters redriven");
    let back = consumer.take(4).await?;
    ensure_eq!(held_ids(&back), ids(&sent), "what the redrive brings back, in order");
    ack_all(back).await?;
    let later = client.fill(&destination, "a", 1).await?;
    let next = consumer.one().await?;
    ensure_eq!(next.id(), later[0].id().to_string(), "the key flows again");
    next.ack().await?;
    consumer.close().await?;
    let left = env.client().await?.drain(spec).await?;
    ensure_eq!(ids(&left), Vec::<String>::new(), "what is left");
    Ok(())
}

async fn park_and_purge(env: &Env) -> Proof {
    let (destination, group) = (env.destination("d"), env.group("g"));
    let client = env.client().await?;
    let spec = env.spec(&destination, &group).with_order(Order::Key).with_on_failure(OnFailure::Park);
    let mut consumer = client.subscribe(spec).await?;
    client.fill(&destination, "a", 3).await?;
    consumer.one().await?.dead_letter(Verdict::new(Reason::Rejected)).await?;
    // An endpoint may park a message only when a member would get it.
    consumer.silence("key a is parked").await?;
    client.letters_until(&destination, &group, 3).await?;
    let purged = client.purge(&destination, &group, &DeadLetterFilter::all()).await?;
    ensure_eq!(purged, 3, "letters purged");
    let later = client.fill(&destination, "a", 2).await?;
    let next = consumer.take(2).await?;
    ensure_eq!(held_ids(&next), ids(&later), "the key flows again");
    ack_all(next).await?;
    consumer.silence_then_canary(&client, "purged letters do not come back").await
}

async fn released(env: &Env) -> Proof {
    let (destination, group) = (env.destination("d"), env.group("g"));
    let client = env.client().await?;
    let mut consumer = client.subscribe(env.spec(&destination, &group).with_order(Order::Key)).await?;
    let sent = client.fill(&destination, "k", 6).await?;
    for held in consumer.take(3).await?.into_iter().rev() {
        held.release().await?;
    }
    let mut came = Vec::new();
    while came.len() < 6 {
        let batch = consumer.take(1).await?;
        came.extend(held_ids(&batch));
        ack_all(batch).await?;
    }
    ensure_eq!(came, ids(&sent), "the order after three were released, the last first");
    consumer.silence_then_canary(&client, "all were acked").await
}

async fn after_close(env: &Env) -> Proof {
    let (destination, group) = (env.destination("d"), env.group("g"));
    let client = env.client().await?;
    let spec = env.spec(&destination, &group).with_order(Order::Key);
    let mut consumer = client.subscribe(spec.clone()).await?;
    let sent = client.fill(&destination, "k", 6).await?;
    let mut came = consumer.take(4).await?;
    let unsettled = came.split_off(1);
    ack_all(came).await?;
    consumer.close().await?;
    drop(unsettled);
    // One that may hold less takes a part of what came back, and gives that back too.
    let mut consumer = client.subscribe(spec.clone().with_max_in_flight(2)).await?;
    let part = consumer.take(2).await?;
    ensure_eq!(held_ids(&part), ids(&sent[1..3]), "what comes to the next member, in order");
    consumer.close().await?;
    drop(part);
    let left = env.client().await?.drain(spec).await?;
    ensure_eq!(ids(&left), ids(&sent[1..]), "what comes after the closes, in order");
    Ok(())
}

async fn poison(env: &Env) -> Proof {
    let (destination, group) = (env.destination("d"), env.group("g"));
    let client = env.client().await?;
    let spec = match env.record.key_order.is_given() {
        true => env.spec(&destination, &group).with_order(Order::Key),
        false => env.spec(&destination, &group),
    };
    let mut consumer = client.subscribe(spec).await?;
    let poison = client.fill(&destination, "poison", 1).await?[0].id().to_string();
    let sent = client.fill(&destination, "good", 20).await?;
    let mut came = Vec::new();
    let mut failed = 0;
    // Where keys are locked the endpoint chooses the key: one message at a time could be the poisoned one for ever.
    let most = if env.loose_key().is_none() { 4 } else { 1 };
    let deadline = Instant::now() + env.patience() * 2;
    while came.len() < 20 {
        let (good, late) = (came.len(), Instant::now() >= deadline);
        ensure!(!late, "{good} of 20 good messages came beside {failed} deliveries of a poisoned one");
        for held in consumer.receive(most, env.quiet()).await? {
            if held.id() == poison {
                failed += 1;
                held.nack(Duration::ZERO).await?;
            } else {
                came.push(held.id());
                held.ack().await?;
            }
        }
    }
    if env.record.key_order.is_given() {
        ensure_eq!(came, ids(&sent), "the good key, in order");
    }
    let held = consumer.one().await?;
    ensure_eq!(held.id(), poison, "what is still there");
    held.ack().await?;
    consumer.silence_then_canary(&client, "all were acked").await
}

//! What a publish answers, and that the answer is true.

use std::collections::BTreeSet;

use anybroker_core::{Effect, ErrorKind, PublishOptions, PublishOrder, RESERVED_HEADER_PREFIX, TopologySpec};
use futures_util::{FutureExt, StreamExt};

use super::case;
use crate::Case;
use crate::case::{Breach, Proof, ensure, ensure_eq, fail};
use crate::consumer::{ack_all, held_ids, ids};
use crate::env::Env;
use crate::need;

pub(super) const CASES: &[Case] = &[
    case!(
        "publish/one-bad-entry-does-not-spoil-its-batch",
        [],
        "One outcome per message, in the order given; one bad entry does not spoil its batch.",
        outcome_vector
    ),
    case!(
        "publish/behind-a-failed-entry-its-key-is-held-back",
        [],
        "Where order is required: after an entry of a key failed, later entries of that key in the batch are not attempted.",
        held_back
    ),
    case!(
        "publish/without-order-every-entry-stands-for-itself",
        [],
        "PublishOrder::None: every entry stands for itself.",
        not_held_back
    ),
    case!("publish/an-empty-batch-is-no-work", [], "One outcome per message: none for none.", empty_batch),
    case!(
        "publish/a-dropped-publish-loses-only-its-answer",
        [],
        "Dropping the future loses nothing but the answer: later publishes are unaffected.",
        dropped
    ),
    case!(
        "publish/a-dropped-confirm-loses-only-its-answer",
        [],
        "The batch is in the client's hands when submit returns; dropping the confirms loses nothing but the answer.",
        dropped_confirm
    ),
    case!(
        "publish/many-batches-on-their-way-keep-their-order",
        [need::KEY_ORDER],
        "Entries are handed to the client in call order; many batches may be in flight.",
        pipelined
    ),
    case!(
        "publish/what-was-refused-is-never-delivered",
        [],
        "not done: it certainly is not stored.",
        refused_is_not_stored
    ),
    case!(
        "publish/a-missing-destination-is-created-or-not-found",
        [],
        "A missing destination is an error, or is created where the configuration says so; never confirmed and lost.",
        missing
    ),
    case!(
        "publish/a-client-that-creates-nothing-finds-no-missing-destination",
        [],
        "Publishing to a destination that does not exist answers NotFound where nothing is created.",
        not_found
    ),
    case!(
        "publish/what-has-no-destination-does-not-spoil-its-batch",
        [need::UNROUTABLE, need::DECLARE],
        "One bad entry does not spoil a batch, also when it is the broker that refuses it; each entry has its outcome.",
        half_missing
    ),
    case!(
        "publish/a-batch-of-thousands-is-stored-whole",
        [],
        "Larger batches than one request carries are split; each entry has its outcome.",
        large_batch
    ),
];

async fn outcome_vector(env: &Env) -> Proof {
    let destination = env.destination("d");
    let client = env.client().await?;
    let mut consumer = client.subscribe(env.spec(&destination, &env.group("g"))).await?;
    // Every message has a key of its own, so that order holds nothing back.
    let keys: Vec<String> = (0..10).map(|number| format!("key {number}")).collect();
    let mut batch: Vec<_> = keys.iter().map(|key| client.message(&destination, key.as_str())).collect();
    let reserved = format!("{RESERVED_HEADER_PREFIX}attempt");
    batch[4] = batch[4].clone().with_header(&reserved, "99");
    let outcomes = client.publish(batch.clone()).await?;
    for (index, outcome) in outcomes.iter().enumerate() {
        match outcome {
            Ok(_) => ensure!(index != 4, "the bad entry answers Ok"),
            Err(error) if index == 4 => {
                ensure_eq!(error.kind(), ErrorKind::InvalidMessage, "kind of the bad entry");
                ensure_eq!(error.effect(), Effect::NotDone, "effect of the bad entry");
            }
            Err(error) => fail!("the good entry {index} answers {error:?}"),
        }
    }
    let bad = batch.remove(4);
    let came = consumer.take(9).await?;
    let found: BTreeSet<_> = held_ids(&came).into_iter().collect();
    ensure_eq!(found, ids(&batch).into_iter().collect::<BTreeSet<_>>(), "what was stored, without {}", bad.id());
    ack_all(came).await?;
    consumer.silence_then_canary(&client, "all were acked").await
}

/// Ten messages of two keys; the third of key a is one that every endpoint refuses.
async fn with_a_bad_entry(env: &Env, order: PublishOrder) -> Proof {
    let destination = env.destination("d");
    let client = env.client().await?;
    let mut consumer = client.subscribe(env.spec(&destination, &env.group("g"))).await?;
    let mut batch: Vec<_> =
        (0..10).map(|index| client.message(&destination, if index % 2 == 0 { "a" } else { "b" })).collect();
    batch[4] = batch[4].clone().with_header(format!("{RESERVED_HEADER_PREFIX}x"), "1");
    let options = PublishOptions::default().with_order(order);
    let outcomes = client.publish_with(batch.clone(), &options).await?;
    let refused: &[usize] = if order == PublishOrder::Key { &[4, 6, 8] } else { &[4] };
    let mut expected = Vec::new();
    for (index, outcome) in outcomes.iter().enumerate() {
        match outcome {
            Ok(_) if refused.contains(&index) => fail!("entry {index} answers Ok"),
            Ok(_) => expected.push(batch[index].id().to_string()),
            Err(error) if refused.contains(&index) => {
                ensure_eq!(error.effect(), Effect::NotDone, "effect of entry {index} ({error})");
            }
            Err(error) => fail!("entry {index} answers {error:?}"),
        }
    }
    let came = consumer.take(expected.len()).await?;
    let found: BTreeSet<_> = held_ids(&came).into_iter().collect();
    ensure_eq!(found, expected.into_iter().collect::<BTreeSet<_>>(), "what was stored");
    ack_all(came).await?;
    consumer.silence_then_canary(&client, "what was held back is not stored").await
}

async fn held_back(env: &Env) -> Proof {
    with_a_bad_entry(env, PublishOrder::Key).await
}

async fn not_held_back(env: &Env) -> Proof {
    with_a_bad_entry(env, PublishOrder::None).await
}

async fn empty_batch(env: &Env) -> Proof {
    let client = env.client().await?;
    ensure_eq!(client.publish(Vec::new()).await?.len(), 0, "outcomes of an empty batch");
    ensure_eq!(anybroker_core::settle(Vec::new()).await.len(), 0, "outcomes of settling nothing");
    Ok(())
}

async fn dropped(env: &Env) -> Proof {
    let (destination, group) = (env.destination("d"), env.group("g"));
    let client = env.client().await?;
    client.subscribe(env.spec(&destination, &group)).await?.close().await?;
    for round in 0..20 {
        let mut publishing = Box::pin(client.publish(client.messages(&destination, "dropped", 5)));
        // Dropped before the first poll, after it, or a little later: its messages are there or not.
        if round % 3 > 0 {
            drop((&mut publishing).now_or_never());
        }
        if round % 3 > 1 {
            tokio::task::yield_now().await;
        }
        drop(publishing);
        client.fill(&destination, "kept", 1).await?;
    }
    let left = env.client().await?.drain(env.spec(&destination, &group)).await?;
    let kept = left.iter().filter(|message| message.key() == Some(b"kept")).count();
    ensure_eq!(kept, 20, "confirmed messages among dropped publishes");
    Ok(())
}

async fn dropped_confirm(env: &Env) -> Proof {
    let (destination, group) = (env.destination("d"), env.group("g"));
    let client = env.client().await?;
    let mut consumer = client.subscribe(env.spec(&destination, &group)).await?;
    let sent = client.messages(&destination, env.loose_key(), 10);
    for message in &sent {
        client.submit_and_forget(vec![message.clone()]).await?;
    }
    let mut found = BTreeSet::new();
    for _ in 0..10 {
        let held = consumer.one().await?;
        found.insert(held.id());
        held.ack().await?;
    }
    ensure_eq!(found, ids(&sent).into_iter().collect::<BTreeSet<_>>(), "what was handed over and not asked after");
    consumer.silence_then_canary(&client, "all were acked").await
}

async fn pipelined(env: &Env) -> Proof {
    // So many that an answer overtakes another one, where each of them asks something before it goes on.
    const BATCHES: usize = 200;
    let destination = env.destination("d");
    let client = env.client().await?;
    let spec = env.spec(&destination, &env.group("g")).with_order(anybroker_core::Order::Key);
    let mut consumer = client.subscribe(spec).await?;
    let batches: Vec<_> = (0..BATCHES).map(|_| client.messages(&destination, "k", 1)).collect();
    // Called in order, all before the first answer is waited for. Whichever is woken first goes on first, as for anybody
    // who publishes a stream of batches; the first ones of a destination may have to look it up.
    let calls: Vec<_> = batches.iter().map(|batch| client.publish(batch.clone())).collect();
    let outcomes: Vec<_> = futures_util::stream::iter(calls).buffered(batches.len()).collect().await;
    for outcomes in outcomes {
        for outcome in outcomes? {
            outcome?;
        }
    }
    let sent: Vec<String> = batches.iter().flat_map(ids).collect();
    let mut came = Vec::new();
    while came.len() < BATCHES {
        let more = consumer.take((BATCHES - came.len()).min(env.of_one_key(20))).await?;
        came.extend(held_ids(&more));
        ack_all(more).await?;
    }
    ensure_eq!(came, sent, "the order of {BATCHES} batches on their way at once");
    consumer.silence_then_canary(&client, "all were acked").await
}

async fn refused_is_not_stored(env: &Env) -> Proof {
    let (destination, group) = (env.destination("d"), env.group("g"));
    let client = env.client().await?;
    client.subscribe(env.spec(&destination, &group)).await?.close().await?;
    let reserved = format!("{RESERVED_HEADER_PREFIX}x");
    for _ in 0..5 {
        let bad = client.message(&destination, "k").with_header(&reserved, "1");
        ensure!(client.send(bad).await?.is_err(), "a reserved header was accepted");
    }
    let sent = client.fill(&destination, "k", 1).await?;
    let left = env.client().await?.drain(env.spec(&destination, &group)).await?;
    ensure_eq!(ids(&left), ids(&sent), "what is stored");
    Ok(())
}

async fn missing(env: &Env) -> Proof {
    let destination = env.destination("missing");
    let client = env.client().await?;
    let message = client.message(&destination, "k");
    match client.send(message.clone()).await? {
        Err(error) => {
            ensure_eq!(error.kind(), ErrorKind::NotFound, "publishing to a missing destination ({error})");
            ensure_eq!(error.effect(), Effect::NotDone, "its effect");
        }
        // Created: where messages are kept before a group exists, it is there.
        Ok(_) if env.record.kept_before_group.is_given() => {
            let left = client.drain(env.spec(&destination, &env.group("g"))).await?;
            ensure_eq!(ids(&left), ids([&message]), "what a group reads of the created destination");
        }
        Ok(_) => fail!("confirmed, and nothing is kept before a group exists: it is lost"),
    }
    Ok(())
}

async fn not_found(env: &Env) -> Proof {
    let destination = env.destination("missing");
    let client = env.strict_client().await?;
    for round in 0..2 {
        match client.send(client.message(&destination, "k")).await? {
            Ok(_) => fail!("publish {round} to a destination that does not exist answers Ok"),
            Err(error) => {
                ensure_eq!(error.kind(), ErrorKind::NotFound, "publish {round} to a missing destination ({error})");
                ensure_eq!(error.effect(), Effect::NotDone, "its effect");
            }
        }
    }
    // Declared, the same client publishes to it.
    if !env.record.declare.is_given() {
        return Ok(());
    }
    client.declare(&TopologySpec::group(&destination, env.group("g"))).await?;
    let sent = client.fill(&destination, "k", 1).await?;
    let mut consumer = client.subscribe(env.spec(&destination, &env.group("g"))).await?;
    let came = consumer.take(1).await?;
    ensure_eq!(held_ids(&came), ids(&sent), "what is delivered once it is declared");
    ack_all(came).await?;
    if env.record.delete.is_given() {
        client.bus.delete(&destination, None).await?;
    }
    Ok(())
}

async fn half_missing(env: &Env) -> Proof {
    let (there, missing, group) = (env.destination("there"), env.destination("missing"), env.group("g"));
    let client = env.strict_client().await?;
    client.declare(&TopologySpec::group(&there, &group)).await?;
    let mut consumer = client.subscribe(env.spec(&there, &group)).await?;
    // Alone, and then many on their way at once.
    for (batches, order) in [(1, PublishOrder::Key), (1, PublishOrder::None), (20, PublishOrder::Key)] {
        let options = PublishOptions::default().with_order(order);
        let made: Vec<Vec<_>> = (0..batches)
            .map(|batch| {
                let to = |index: usize| if index % 3 == 1 { &missing } else { &there };
                let key = |index: usize| format!("{batch}/{}", index % 2);
                (0..9).map(|index| client.message(to(index), key(index).as_str())).collect()
            })
            .collect();
        let calls = made.iter().map(|batch| client.publish_with(batch.clone(), &options));
        let mut expected = BTreeSet::new();
        for (outcomes, batch) in futures_util::future::join_all(calls).await.into_iter().zip(&made) {
            for (outcome, message) in outcomes?.into_iter().zip(batch) {
                match outcome {
                    Ok(_) if *message.destination() == missing => {
                        fail!("a publish to a destination that does not exist answers Ok")
                    }
                    Ok(_) => drop(expected.insert(message.id().to_string())),
                    Err(error) if *message.destination() == missing => {
                        ensure_eq!(error.effect(), Effect::NotDone, "the effect of a missing destination ({error})");
                        // Later ones of its key are not tried.
                        let is_told = error.kind() == ErrorKind::NotFound || order == PublishOrder::Key;
                        ensure!(is_told, "publishing to a missing destination: {error:?}");
                    }
                    Err(error) => fail!("a good entry of a batch with bad ones: {error:?}"),
                }
            }
        }
        let mut found = BTreeSet::new();
        while found.len() < expected.len() {
            let came = consumer.take(env.at_once(6).min(expected.len() - found.len())).await?;
            found.extend(held_ids(&came));
            ack_all(came).await?;
        }
        ensure_eq!(found, expected, "what is stored of {batches} batches");
    }
    consumer.silence_then_canary(&client, "all were acked").await?;
    match env.record.delete.is_given() {
        true => Ok(client.bus.delete(&there, None).await?),
        false => Ok(()),
    }
}

async fn large_batch(env: &Env) -> Proof {
    let (destination, group) = (env.destination("d"), env.group("g"));
    let client = env.client().await?;
    let mut consumer = client.subscribe(env.spec(&destination, &group)).await?;
    let sent = client.messages(&destination, None, 3_000);
    client.publish_ok(sent.clone()).await?;
    let mut found = BTreeSet::new();
    let mut count = 0;
    while count < 3_000 {
        let came = consumer.receive(500, env.patience()).await?;
        if came.is_empty() {
            return Err(Breach::Failed(format!("{count} of 3,000 came")));
        }
        count += came.len();
        found.extend(held_ids(&came));
        ack_all(came).await?;
    }
    ensure_eq!(count, 3_000, "deliveries");
    ensure_eq!(found.len(), ids(&sent).into_iter().collect::<BTreeSet<_>>().len(), "distinct ids");
    consumer.silence_then_canary(&client, "all were acked").await
}

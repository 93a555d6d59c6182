//! What is published and settled in a transaction is seen together, or not at all.

use std::sync::Arc;

use anybroker_core::{Effect, ErrorKind, PublishOptions, Reason, RedriveOptions, Settlement, Verdict, settle_in};

use super::case;
use crate::Case;
use crate::case::{Proof, ensure_eq, fail};
use crate::consumer::{held_ids, ids, sorted};
use crate::env::Env;
use crate::need;
use crate::unit::Unit;

pub(super) const CASES: &[Case] = &[
    case!(
        "transactions/nothing-is-seen-before-the-commit-and-all-of-it-afterwards",
        [need::TRANSACTIONS],
        "Until the commit nobody sees anything of a transaction; after it, everybody sees all of it.",
        seen_together
    ),
    case!(
        "transactions/an-abort-leaves-nothing-and-what-was-settled-comes-back",
        [need::TRANSACTIONS],
        "Without a commit nothing becomes visible, and what was settled comes back as if it had been released.",
        aborted
    ),
    case!(
        "transactions/one-that-is-dropped-without-an-end-is-aborted",
        [need::TRANSACTIONS],
        "Dropped without an end, a transaction is aborted.",
        dropped
    ),
    case!(
        "transactions/a-close-aborts-what-is-open",
        [need::TRANSACTIONS],
        "A close aborts open transactions.",
        closed
    ),
    case!(
        "transactions/what-was-consumed-and-what-was-made-of-it-are-committed-together",
        [need::TRANSACTIONS],
        "Publish and settle take an optional transaction context.",
        consumed_and_made
    ),
    case!(
        "transactions/what-was-settled-above-a-hole-stays-settled-and-the-hole-comes-again",
        [need::TRANSACTIONS],
        "A commit settles what was settled in the transaction: no more, and no less, whatever lies in between.",
        above_a_hole
    ),
    case!(
        "transactions/a-dead-letter-and-its-source-are-one",
        [need::TRANSACTIONS, need::DEAD_LETTER],
        "A dead letter in a transaction is there when its source is settled, and not before.",
        dead_letter
    ),
    case!(
        "transactions/a-letter-that-is-put-back-while-another-stands-in-one-is-gone",
        [need::TRANSACTIONS, need::DEAD_LETTER, need::REDRIVE],
        "What is done outside of a transaction is seen at once, whatever else stands in an open one.",
        redriven_meanwhile
    ),
    case!(
        "transactions/of-two-at-once-only-the-one-that-commits-is-seen",
        [need::TRANSACTIONS],
        "Transactions of several clients on one destination, and what is published outside of them, do not mix.",
        side_by_side
    ),
    case!(
        "transactions/after-its-end-it-takes-nothing",
        [need::TRANSACTIONS],
        "Both ends of a transaction happen at most once; later calls answer Closed.",
        over
    ),
];

fn acks<T>(held: Vec<T>) -> Vec<(T, Settlement)> {
    held.into_iter().map(|held| (held, Settlement::Ack)).collect()
}

async fn seen_together(env: &Env) -> Proof {
    let (first, second) = (env.destination("first"), env.destination("second"));
    let (client, other) = (env.client().await?, env.client().await?);
    let mut of_first = other.subscribe(env.spec(&first, &env.group("g"))).await?;
    let mut of_second = other.subscribe(env.spec(&second, &env.group("g"))).await?;
    let mut unit = Unit::begin(&client).await?;
    let mut sent = client.messages(&first, "k", 10);
    sent.extend(client.messages(&second, "k", 10));
    unit.publish(sent.clone()).await?;
    of_first.silence("nothing is seen before the commit").await?;
    of_second.silence("nothing is seen before the commit").await?;
    unit.commit().await?;
    for (consumer, expected) in [(&mut of_first, &sent[..10]), (&mut of_second, &sent[10..])] {
        let came = consumer.take(10).await?;
        ensure_eq!(held_ids(&came), ids(expected), "what is seen after the commit, in order");
        crate::consumer::ack_all(came).await?;
        consumer.silence_then_canary(&client, "it was all of it").await?;
    }
    of_first.close().await?;
    of_second.close().await
}

async fn side_by_side(env: &Env) -> Proof {
    let destination = env.destination("d");
    let (one, another, plain) = (env.client().await?, env.client().await?, env.client().await?);
    let mut consumer = plain.subscribe(env.spec(&destination, &env.group("g"))).await?;
    let (mut kept, mut given_up) = (Unit::begin(&one).await?, Unit::begin(&another).await?);
    let mut expected = Vec::new();
    for _ in 0..5 {
        let of_kept = one.messages(&destination, "k", 3);
        kept.publish(of_kept.clone()).await?;
        given_up.publish(another.messages(&destination, "k", 3)).await?;
        expected.extend(of_kept);
        expected.extend(plain.fill(&destination, "k", 1).await?);
    }
    given_up.abort().await?;
    kept.commit().await?;
    let came = consumer.take(expected.len()).await?;
    ensure_eq!(
        sorted(held_ids(&came)),
        sorted(ids(&expected)),
        "what is seen of two transactions and of what is in none"
    );
    crate::consumer::ack_all(came).await?;
    consumer.silence_then_canary(&plain, "the rest was given up").await?;
    // The client whose transaction was aborted goes on.
    let mut next = Unit::begin(&another).await?;
    let sent = another.messages(&destination, "k", 3);
    next.publish(sent.clone()).await?;
    next.commit().await?;
    let came = consumer.take(3).await?;
    ensure_eq!(held_ids(&came), ids(&sent), "what the next one brings");
    crate::consumer::ack_all(came).await?;
    consumer.close().await
}

/// How a transaction does not commit.
#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    Abort,
    Drop,
    Close,
}

async fn aborted(env: &Env) -> Proof {
    not_committed(env, End::Abort).await
}

async fn dropped(env: &Env) -> Proof {
    not_committed(env, End::Drop).await
}

async fn closed(env: &Env) -> Proof {
    not_committed(env, End::Close).await
}

async fn not_committed(env: &Env, end: End) -> Proof {
    let (source, made, group) = (env.destination("source"), env.destination("made"), env.group("g"));
    let (client, other) = (env.client().await?, env.client().await?);
    let mut results = other.subscribe(env.spec(&made, &group)).await?;
    let mut consumer = client.subscribe(env.spec(&source, &group)).await?;
    let sent = other.fill(&source, "k", 3).await?;
    let came = consumer.take(3).await?;
    let mut unit = Unit::begin(&client).await?;
    unit.publish(client.messages(&made, "k", 5)).await?;
    unit.settle(acks(came)).await?;
    match end {
        End::Abort => unit.abort().await?,
        End::Drop => unit.vanish(),
        End::Close => {
            let transaction = Arc::clone(&unit.transaction);
            unit.vanish();
            client.close().await?;
            match transaction.commit().await {
                Ok(()) => fail!("a transaction commits after the close"),
                Err(error) => ensure_eq!(error.kind(), ErrorKind::Closed, "a commit after the close"),
            }
            consumer.vanish();
            consumer = other.subscribe(env.spec(&source, &group)).await?;
        }
    }
    let again = consumer.take(3).await?;
    ensure_eq!(held_ids(&again), ids(&sent), "what comes back, in order");
    for held in again {
        ensure_eq!(held.attempt(), 1, "the attempt of what did not fail");
        held.ack().await?;
    }
    consumer.silence_then_canary(&other, "it was settled the second time").await?;
    results.silence_then_canary(&other, "nothing of the transaction is seen").await?;
    consumer.close().await?;
    results.close().await
}

async fn consumed_and_made(env: &Env) -> Proof {
    let (source, made, group) = (env.destination("source"), env.destination("made"), env.group("g"));
    let (client, other) = (env.client().await?, env.client().await?);
    let mut results = other.subscribe(env.spec(&made, &group)).await?;
    let mut consumer = client.subscribe(env.spec(&source, &group)).await?;
    other.fill(&source, "k", 20).await?;
    let mut expected = Vec::new();
    for _ in 0..4 {
        let came = consumer.take(5).await?;
        let batch = client.messages(&made, "k", came.len());
        expected.extend(ids(&batch));
        let mut unit = Unit::begin(&client).await?;
        unit.publish(batch).await?;
        unit.settle(acks(came)).await?;
        unit.commit().await?;
    }
    let came = results.take(20).await?;
    ensure_eq!(held_ids(&came), expected, "what was made, in order");
    crate::consumer::ack_all(came).await?;
    // Neither a close nor anything else had to save it.
    consumer.vanish();
    let left = env.client().await?.drain(env.spec(&source, &group)).await?;
    ensure_eq!(ids(&left), Vec::<String>::new(), "what comes again of the source");
    results.silence_then_canary(&other, "each result is there once").await?;
    results.close().await
}

async fn above_a_hole(env: &Env) -> Proof {
    let (source, group) = (env.destination("source"), env.group("g"));
    let client = env.client().await?;
    let mut consumer = client.subscribe(env.spec(&source, &group)).await?;
    let sent = client.fill(&source, "k", 4).await?;
    let (mut joined, mut holes) = (Vec::new(), Vec::new());
    for (index, held) in consumer.take(4).await?.into_iter().enumerate() {
        if index % 2 == 1 { joined.push(held) } else { holes.push(held) }
    }
    let mut unit = Unit::begin(&client).await?;
    unit.settle(acks(joined)).await?;
    unit.commit().await?;
    consumer.vanish();
    drop(holes);
    let left = env.client().await?.drain(env.spec(&source, &group)).await?;
    ensure_eq!(sorted(ids(&left)), sorted(ids([&sent[0], &sent[2]])), "what comes again");
    Ok(())
}

async fn dead_letter(env: &Env) -> Proof {
    let (source, group) = (env.destination("source"), env.group("g"));
    let client = env.client().await?;
    let mut consumer = client.subscribe(env.spec(&source, &group)).await?;
    let sent = client.fill(&source, "k", 1).await?;
    for is_committed in [false, true] {
        let held = consumer.one().await?;
        ensure_eq!(held.id(), sent[0].id().to_string(), "what comes");
        let mut unit = Unit::begin(&client).await?;
        unit.settle(vec![(held, Settlement::DeadLetter(Box::new(Verdict::new(Reason::Rejected))))]).await?;
        let letters = client.letters(&source, &group).await?;
        ensure_eq!(letters.len(), 0, "dead letters before the commit");
        if is_committed {
            unit.commit().await?;
        } else {
            unit.abort().await?;
        }
    }
    let letters = client.letters_until(&source, &group, 1).await?;
    ensure_eq!(ids(letters.iter().map(|letter| &letter.message)), ids(&sent), "the dead letters after the commit");
    consumer.silence_then_canary(&client, "its source is settled").await?;
    consumer.close().await
}

async fn redriven_meanwhile(env: &Env) -> Proof {
    let (source, group) = (env.destination("source"), env.group("g"));
    let client = env.client().await?;
    let mut consumer = client.subscribe(env.spec(&source, &group)).await?;
    let sent = client.fill(&source, "k", 1).await?;
    consumer.one().await?.dead_letter(Verdict::new(Reason::Rejected)).await?;
    let others = client.fill(&source, "k", 1).await?;
    let other = consumer.one().await?;
    let mut unit = Unit::begin(&client).await?;
    unit.settle(vec![(other, Settlement::DeadLetter(Box::new(Verdict::new(Reason::Rejected))))]).await?;
    let report = client.redrive(&source, &group, &RedriveOptions::default()).await?;
    ensure_eq!(report.moved, 1, "letters that were put back");
    // It could be put back again otherwise.
    ensure_eq!(client.letters(&source, &group).await?.len(), 0, "dead letters when the only one was put back");
    let again = consumer.one().await?;
    ensure_eq!(again.id(), sent[0].id().to_string(), "what was put back");
    again.ack().await?;
    unit.commit().await?;
    let letters = client.letters_until(&source, &group, 1).await?;
    ensure_eq!(ids(letters.iter().map(|letter| &letter.message)), ids(&others), "the dead letters after the commit");
    consumer.silence_then_canary(&client, "it was put back once").await?;
    consumer.close().await
}

async fn over(env: &Env) -> Proof {
    let (source, group) = (env.destination("source"), env.group("g"));
    let client = env.client().await?;
    let mut consumer = client.subscribe(env.spec(&source, &group)).await?;
    for is_committed in [true, false] {
        let sent = client.fill(&source, "k", 1).await?;
        let unit = Unit::begin(&client).await?;
        let transaction = Arc::clone(&unit.transaction);
        if is_committed {
            unit.commit().await?;
        } else {
            unit.abort().await?;
        }
        for end in [transaction.commit().await, transaction.abort().await] {
            match end {
                Ok(()) => fail!("a transaction ends twice"),
                Err(error) => ensure_eq!(error.kind(), ErrorKind::Closed, "a second end"),
            }
        }
        let options = PublishOptions::default().with_transaction(Arc::clone(&transaction));
        for outcome in client.publish_with(client.messages(&source, "k", 1), &options).await? {
            match outcome {
                Ok(_) => fail!("a transaction that has ended takes a message"),
                Err(error) => ensure_eq!(error.effect(), Effect::NotDone, "publishing after the end"),
            }
        }
        let held = consumer.one().await?;
        ensure_eq!(held.id(), sent[0].id().to_string(), "what comes");
        let (held, error) = held.refused_in(|entry| settle_in(&transaction, vec![entry])).await?;
        ensure_eq!(error.kind(), ErrorKind::Closed, "settling after the end");
        held.ack().await?;
    }
    consumer.silence_then_canary(&client, "nothing of it was done").await?;
    consumer.close().await
}

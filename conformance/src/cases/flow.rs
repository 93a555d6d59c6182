//! Bounds on what is in flight, cancelled receives, pause.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anybroker_core::{AttemptCount, Parallelism};
use rand::RngExt;

use super::case;
use crate::Case;
use crate::case::{Breach, Proof, ensure, ensure_eq};
use crate::consumer::{ack_all, held_ids, ids};
use crate::env::Env;

pub(super) const CASES: &[Case] = &[
    case!(
        "flow/no-more-than-max-in-flight-are-out-unsettled",
        [],
        "The subscription never holds more than max_in_flight unsettled; settling makes room.",
        max_in_flight
    ),
    case!(
        "flow/a-full-member-leaves-the-rest-to-others",
        [],
        "Deliveries handed out plus prefetched ones never exceed max_in_flight, so that others get the rest.",
        leaves_the_rest
    ),
    case!("flow/a-receive-brings-at-most-what-was-asked-for", [], "receive(max, wait) brings at most max.", at_most),
    case!(
        "flow/a-receive-of-nothing-ends-with-its-wait",
        [],
        "receive(max, wait) ends empty when the wait is over, however long there is nothing.",
        of_nothing
    ),
    case!(
        "flow/saturated-with-unsettled-deliveries-it-goes-on-when-they-are-settled",
        [],
        "Back-pressure does not wedge a subscription.",
        saturated
    ),
    case!(
        "flow/a-thousand-cancelled-receives-lose-nothing-and-burn-no-attempt",
        [],
        "receive is cancel-safe: a dropped future loses nothing and burns no attempt.",
        cancelled
    ),
    case!(
        "flow/a-paused-subscription-delivers-nothing-and-a-resumed-one-everything",
        [],
        "A subscription can be paused; deliveries that are out stay valid.",
        paused
    ),
    case!(
        "flow/as-many-members-work-at-once-as-the-record-says",
        [],
        "Parallelism within a group is that of the record: each of so many members gets messages while the others hold theirs.",
        members_at_once
    ),
];

async fn max_in_flight(env: &Env) -> Proof {
    let destination = env.destination("d");
    let client = env.client().await?;
    let mut consumer = client.subscribe(env.spec(&destination, &env.group("g")).with_max_in_flight(4)).await?;
    let sent: BTreeSet<_> = ids(&client.fill(&destination, env.loose_key(), 12).await?).into_iter().collect();
    let mut held = consumer.take(4).await?;
    let mut seen: BTreeSet<_> = held_ids(&held).into_iter().collect();
    // Where what is out locks what is behind it, room comes with the last of it.
    let step = if env.at_once(usize::MAX) == usize::MAX { 1 } else { 4 };
    for _ in 0..8 / step {
        consumer.silence("max_in_flight deliveries are out").await?;
        ack_all(held.drain(..step).collect()).await?;
        let next = consumer.take(step).await?;
        seen.extend(held_ids(&next));
        held.extend(next);
    }
    ensure_eq!(seen, sent, "what was seen");
    ensure_eq!(consumer.subscriber.in_flight(), 4, "in flight");
    ack_all(held).await?;
    consumer.silence_then_canary(&client, "all were acked").await
}

async fn leaves_the_rest(env: &Env) -> Proof {
    if env.record.parallelism != Parallelism::Any {
        return Err(Breach::NotRun(
            "members own lanes here: what another member does not take stays in its lanes".into(),
        ));
    }
    let (destination, group) = (env.destination("d"), env.group("g"));
    let (one, two) = (env.client().await?, env.client().await?);
    let mut first = one.subscribe(env.spec(&destination, &group).with_max_in_flight(5)).await?;
    let sent: BTreeSet<_> = ids(&one.fill(&destination, None, 20).await?).into_iter().collect();
    let held = first.take(5).await?;
    let mut second = two.subscribe(env.spec(&destination, &group)).await?;
    let came = second.take(15).await?;
    let mut seen: BTreeSet<_> = held_ids(&held).into_iter().collect();
    seen.extend(held_ids(&came));
    ensure_eq!(seen, sent, "what both members hold");
    ack_all(came).await?;
    ack_all(held).await?;
    second.silence_then_canary(&two, "all were acked").await
}

async fn at_most(env: &Env) -> Proof {
    let destination = env.destination("d");
    let client = env.client().await?;
    let mut consumer = client.subscribe(env.spec(&destination, &env.group("g"))).await?;
    client.fill(&destination, "k", 30).await?;
    let mut count = 0;
    let deadline = Instant::now() + env.patience();
    while count < 30 {
        ensure!(Instant::now() < deadline, "{count} of 30 came");
        let came = consumer.receive(7, env.quiet()).await?;
        ensure!(came.len() <= 7, "{} deliveries, 7 were asked for", came.len());
        count += came.len();
        ack_all(came).await?;
    }
    consumer.silence_then_canary(&client, "all were acked").await
}

async fn saturated(env: &Env) -> Proof {
    let destination = env.destination("d");
    let client = env.client().await?;
    let most = env.at_once(50);
    let mut consumer = client.subscribe(env.spec(&destination, &env.group("g")).with_max_in_flight(most)).await?;
    let mut sent = BTreeSet::new();
    for number in 0..20 {
        sent.extend(ids(&client.fill(&destination, format!("key {number}").as_str(), 10).await?));
    }
    let held = consumer.take(most).await?;
    consumer.silence("max_in_flight deliveries are out").await?;
    let mut seen: BTreeSet<_> = held_ids(&held).into_iter().collect();
    ack_all(held).await?;
    while seen.len() < 200 {
        let came = consumer.take(10).await?;
        seen.extend(held_ids(&came));
        ack_all(came).await?;
    }
    ensure_eq!(seen, sent, "what was seen");
    consumer.silence_then_canary(&client, "all were acked").await
}

async fn cancelled(env: &Env) -> Proof {
    let (destination, group) = (env.destination("d"), env.group("g"));
    let client = env.client().await?;
    let mut consumer = client.subscribe(env.spec(&destination, &group)).await?;
    let mut random = env.rng();
    let (mut sent, mut seen) = (BTreeSet::new(), Vec::new());
    let mut cancelled = 0;
    for round in 0..1_000 {
        if round % 4 == 0 {
            sent.extend(ids(&client.fill(&destination, format!("key {}", round % 7).as_str(), 1).await?));
        }
        let micros = random.random_range(0..800);
        tokio::select! {
            biased;
            () = pause(micros) => cancelled += 1,
            came = consumer.receive(3, env.patience()) => {
                let came = came?;
                for held in &came {
                    if env.record.attempt_count != AttemptCount::Approximate {
                        ensure_eq!(held.attempt(), 1, "the attempt of {}", held.id());
                    }
                }
                seen.extend(held_ids(&came));
                ack_all(came).await?;
            }
        }
    }
    while seen.len() < sent.len() {
        let came = consumer.take(1).await?;
        ensure_eq!(came[0].attempt(), 1, "the attempt of {}", came[0].id());
        seen.extend(held_ids(&came));
        ack_all(came).await?;
    }
    ensure_eq!(seen.into_iter().collect::<BTreeSet<_>>(), sent, "what was seen");
    if cancelled < 100 {
        return Err(Breach::Inconclusive(format!("only {cancelled} of 1,000 receives were cancelled")));
    }
    consumer.silence_then_canary(&client, "all were acked").await?;
    consumer.close().await?;
    let left = env.client().await?.drain(env.spec(&destination, &group)).await?;
    ensure_eq!(ids(&left), Vec::<String>::new(), "what is left");
    Ok(())
}

/// A moment between "before the first poll" and well into the wait.
async fn pause(micros: u64) {
    match micros {
        0..200 => {}
        200..500 => tokio::task::yield_now().await,
        _ => tokio::time::sleep(Duration::from_micros(micros)).await,
    }
}

async fn paused(env: &Env) -> Proof {
    let destination = env.destination("d");
    let client = env.client().await?;
    let mut consumer = client.subscribe(env.spec(&destination, &env.group("g"))).await?;
    client.fill(&destination, "before", 1).await?;
    let held = consumer.one().await?;
    consumer.pause(true).await?;
    let sent: BTreeSet<_> = ids(&client.fill(&destination, "k", 5).await?).into_iter().collect();
    consumer.silence("the subscription is paused").await?;
    held.ack().await?;
    consumer.pause(false).await?;
    let came = consumer.take(5).await?;
    ensure_eq!(held_ids(&came).into_iter().collect::<BTreeSet<_>>(), sent, "what comes after resuming");
    for held in &came {
        ensure_eq!(held.attempt(), 1, "the attempt of {}", held.id());
    }
    ack_all(came).await?;
    consumer.silence_then_canary(&client, "all were acked").await
}

async fn of_nothing(env: &Env) -> Proof {
    let destination = env.destination("d");
    let client = env.client().await?;
    let mut consumer = client.subscribe(env.spec(&destination, &env.group("g"))).await?;
    for wait in [Duration::ZERO, Duration::from_millis(300), Duration::from_millis(1_500)] {
        // Every receive of a case has to keep its deadline.
        let came = consumer.receive(10, wait).await?;
        ensure!(came.is_empty(), "{} deliveries of nothing", came.len());
    }
    consumer.silence_then_canary(&client, "nothing was published").await
}

async fn members_at_once(env: &Env) -> Proof {
    let (destination, group) = (env.destination("d"), env.group("g"));
    let spec = || env.spec(&destination, &group).with_max_in_flight(1);
    let client = env.client().await?;
    client.subscribe(spec()).await?.close().await?;
    // So many keys that no lane is without.
    for number in 0..40 {
        client.fill(&destination, format!("key {number}").as_str(), 1).await?;
    }
    let count = match env.record.parallelism {
        Parallelism::Any => 3,
        Parallelism::Lanes(lanes) => lanes.min(3),
        Parallelism::One => 1,
    };
    let mut members = Vec::new();
    for _ in 0..count {
        members.push(client.subscribe(spec()).await?);
    }
    let mut held = Vec::new();
    for member in &mut members {
        held.push(member.one().await?);
    }
    if env.record.parallelism == Parallelism::One {
        let mut other = client.subscribe(spec()).await?;
        other.silence("one member works, says the record").await?;
        other.close().await?;
    }
    drop(held);
    for member in members {
        member.close().await?;
    }
    Ok(())
}

//! Delays before the first delivery, and times to live.

use std::time::Duration;

use anybroker_core::{Destination, ErrorKind, Reason};

use super::case;
use crate::Case;
use crate::case::{Proof, ensure, ensure_eq, fail};
use crate::client::Client;
use crate::consumer::{Consumer, ack_all, held_ids, ids, sorted};
use crate::env::Env;
use crate::need;

pub(super) const CASES: &[Case] = &[
    case!(
        "time/a-delayed-publish-is-never-early",
        [need::DELAYED_PUBLISH],
        "A delayed message is held back before its first delivery, never early.",
        delayed
    ),
    case!(
        "time/a-delayed-publish-does-not-hold-others-back",
        [need::DELAYED_PUBLISH],
        "A message that waits for its delay stops no other.",
        delayed_passes
    ),
    case!(
        "time/a-short-delay-does-not-wait-for-the-end-of-a-long-one",
        [need::DELAYED_PUBLISH],
        "Nack with delay and delayed publishing are late by a declared precision, not by another message's delay.",
        in_due_order
    ),
    case!(
        "time/a-delay-beyond-the-limit-is-refused",
        [need::DELAYED_PUBLISH],
        "Limits are enforced before the broker sees a message.",
        delay_limit
    ),
    case!(
        "time/what-is-not-settled-within-its-time-to-live-becomes-a-dead-letter",
        [need::TTL, need::DEAD_LETTER],
        "A message whose time to live ends before the group settled it becomes a dead letter with reason expired.",
        expired
    ),
    case!(
        "time/what-is-settled-within-its-time-to-live-does-not-expire",
        [need::TTL, need::DEAD_LETTER],
        "A message that was settled in time is no dead letter; one that is in flight is with its handler.",
        not_expired
    ),
];

async fn delayed(env: &Env) -> Proof {
    let destination = env.destination("d");
    let client = env.client().await?;
    let mut consumer = client.subscribe(env.spec(&destination, &env.group("g"))).await?;
    let usual = usual(env, &client, &mut consumer, &destination).await?;
    for delay in [400, 150].map(|delay| longer_than(usual, delay)) {
        let message = client.message(&destination, "k");
        let published = env.now();
        client.publish_ok(vec![message.clone().with_delay(delay)]).await?;
        if env.harness.clock().is_some() {
            env.pass(delay - Duration::from_millis(1)).await;
            consumer.silence("the delay has not ended").await?;
            env.pass(Duration::from_millis(1)).await;
        }
        let held = consumer.one().await?;
        let waited = Duration::from_micros(env.now() - published);
        ensure!(env.has_waited(published, delay), "published with a delay of {delay:?}, and here after {waited:?}");
        ensure_eq!(held.message(), &message, "the delayed message, without the instruction");
        ensure_eq!(held.attempt(), 1, "its attempt");
        held.ack().await?;
    }
    consumer.silence_then_canary(&client, "all were acked").await
}

/// How long a message without a delay takes. What comes late anyway is never early: delays are to be longer.
async fn usual<'e>(
    env: &Env,
    client: &Client<'e>,
    consumer: &mut Consumer<'e>,
    destination: &Destination,
) -> Proof<Duration> {
    let mut usual = Duration::ZERO;
    for _ in 0..3 {
        let published = env.now();
        client.fill(destination, "k", 1).await?;
        consumer.one().await?.ack().await?;
        usual = usual.max(Duration::from_micros(env.now() - published));
    }
    Ok(usual)
}

/// A delay of that many milliseconds more than twice what is usual.
pub(super) fn longer_than(usual: Duration, millis: u64) -> Duration {
    Duration::from_millis(millis + 2 * u64::try_from(usual.as_millis()).unwrap_or(0))
}

async fn delayed_passes(env: &Env) -> Proof {
    let destination = env.destination("d");
    let client = env.client().await?;
    let mut consumer = client.subscribe(env.spec(&destination, &env.group("g"))).await?;
    // Longer than the case waits for anything. That it comes when the delay has ended is another case's proof.
    let slow = client.message(&destination, "k").with_delay(env.patience() * 4);
    client.publish_ok(vec![slow]).await?;
    let quick = client.fill(&destination, "k", 3).await?;
    let came = consumer.take(3).await?;
    ensure_eq!(sorted(held_ids(&came)), sorted(ids(&quick)), "what comes before the delayed one");
    ack_all(came).await?;
    consumer.silence_then_canary(&client, "the delay has not ended").await
}

/// Delays in the order in which they are given: the longest first, each at least twice the next shorter one; and all once more, because
/// the first one of its length may have to make the place where it waits, which takes time.
pub(super) fn mixed(env: &Env, usual: Duration) -> [Duration; 8] {
    let step = Duration::from_millis(env.record.limits.delay_precision_ms.unwrap_or(0).max(500));
    [4, 1, 2, 0, 4, 1, 2, 0].map(|steps| longer_than(usual, 0).saturating_add(step) * steps)
}

/// What waits: how long, since when, and its id.
pub(super) type Waiting = (Duration, u64, String);

/// Acks what has waited; no message of the second four before one of them with a shorter delay, and none early.
pub(super) async fn come_in_due_order(
    env: &Env,
    consumer: &mut Consumer<'_>,
    waiting: Vec<Waiting>,
    attempt: u32,
) -> Proof {
    let mut second = waiting[4..].to_vec();
    second.sort_unstable();
    let mut second = second.into_iter();
    let mut by_due = waiting.clone();
    by_due.sort_unstable_by_key(|(delay, since, _)| Duration::from_micros(*since) + *delay);
    let mut turned = Duration::ZERO;
    for (delay, _, _) in by_due {
        // By hand it is turned from here on only.
        if env.harness.clock().is_some() && delay > turned {
            env.pass(delay - turned).await;
            turned = delay;
        }
        let held = consumer.one().await?;
        let Some(own) = waiting.iter().find(|(_, _, id)| *id == held.id()) else {
            fail!("nobody asked for {}", held.id())
        };
        ensure!(env.has_waited(own.1, own.0), "a delay of {:?} had not ended", own.0);
        if waiting[4..].contains(own) {
            let next = second.next();
            ensure_eq!(Some(own), next.as_ref(), "what comes next of those whose delay began last");
        }
        ensure_eq!(held.attempt(), attempt, "its attempt");
        held.ack().await?;
    }
    Ok(())
}

async fn in_due_order(env: &Env) -> Proof {
    let destination = env.destination("d");
    let client = env.client().await?;
    let mut consumer = client.subscribe(env.spec(&destination, &env.group("g"))).await?;
    let usual = usual(env, &client, &mut consumer, &destination).await?;
    let mut waiting = Vec::new();
    for (number, delay) in mixed(env, usual).into_iter().enumerate() {
        let message = client.message(&destination, format!("k{number}").as_str()).with_delay(delay);
        let published = env.now();
        client.publish_ok(vec![message.clone()]).await?;
        waiting.push((delay, published, message.id().to_string()));
    }
    come_in_due_order(env, &mut consumer, waiting, 1).await?;
    consumer.silence_then_canary(&client, "all were acked").await
}

async fn delay_limit(env: &Env) -> Proof {
    let destination = env.destination("d");
    let client = env.client().await?;
    let mut consumer = client.subscribe(env.spec(&destination, &env.group("g"))).await?;
    if let Some(limit) = env.record.limits.delay_max_ms {
        let over = client.message(&destination, "k").with_delay(Duration::from_millis(limit + 1));
        match client.send(over).await? {
            Ok(_) => fail!("a delay of more than the limit of {limit} ms was accepted"),
            Err(error) => ensure_eq!(error.kind(), ErrorKind::InvalidMessage, "a delay beyond the limit ({error})"),
        }
    } else {
        // Without a limit a year is held back, and does no harm.
        let year = client.message(&destination, "k").with_delay(Duration::from_secs(365 * 24 * 3_600));
        client.publish_ok(vec![year]).await?;
    }
    consumer.silence_then_canary(&client, "nothing is due").await
}

async fn expired(env: &Env) -> Proof {
    let (destination, group) = (env.destination("d"), env.group("g"));
    let client = env.client().await?;
    let spec = env.spec(&destination, &group);
    client.subscribe(spec.clone()).await?.close().await?;
    let ttl = Duration::from_millis(200);
    let message = client.message(&destination, "k");
    client.publish_ok(vec![message.clone().with_ttl(ttl)]).await?;
    let kept = client.fill(&destination, "k", 1).await?;
    env.pass(ttl + Duration::from_millis(50)).await;
    let mut consumer = client.subscribe(spec).await?;
    let held = consumer.one().await?;
    ensure_eq!(held.id(), kept[0].id().to_string(), "what is delivered: the one without a time to live");
    held.ack().await?;
    // A queue without order may have handed out the other one first, and looks at a time to live when it hands out: so the
    // consumer goes on.
    let waiting = client.letters_until(&destination, &group, 1);
    tokio::pin!(waiting);
    let letters = loop {
        tokio::select! {
            letters = &mut waiting => break letters?,
            more = consumer.receive(1, env.quiet()) => ensure_eq!(held_ids(&more?).len(), 0, "deliveries of what has expired"),
        }
    };
    ensure_eq!(letters.len(), 1, "dead letters");
    ensure_eq!(letters[0].message, message, "the expired message");
    ensure_eq!(letters[0].reason, Reason::Expired, "the reason");
    consumer.silence_then_canary(&client, "it has expired").await
}

async fn not_expired(env: &Env) -> Proof {
    let (destination, group) = (env.destination("d"), env.group("g"));
    let client = env.client().await?;
    let mut consumer = client.subscribe(env.spec(&destination, &group)).await?;
    let long = Duration::from_secs(3_600);
    client.publish_ok(vec![client.message(&destination, "k").with_ttl(long)]).await?;
    consumer.one().await?.ack().await?;
    // In flight when its time ends: its handler settles it. On a machine that stands still it may expire before; then
    // another one is given more time.
    let mut expired = 0;
    for millis in [600, 3_000, 15_000] {
        let ttl = Duration::from_millis(millis);
        client.publish_ok(vec![client.message(&destination, "k").with_ttl(ttl)]).await?;
        let received = consumer.receive(1, ttl + env.quiet()).await?;
        let Some(held) = received.into_iter().next() else {
            expired += 1;
            continue;
        };
        env.pass(ttl + Duration::from_millis(50)).await;
        held.ack().await?;
        let letters = match expired {
            0 => client.letters(&destination, &group).await?,
            some => client.letters_until(&destination, &group, some).await?,
        };
        ensure_eq!(letters.len(), expired, "dead letters, of those that had expired");
        return consumer.silence_then_canary(&client, "all were acked").await;
    }
    Err(crate::case::Breach::Inconclusive("each message expired before it could be received".into()))
}

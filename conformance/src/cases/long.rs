//! What only shows after minutes: windows, heartbeats and many leases outlived.

use std::time::{Duration, Instant};

use anybroker_core::Order;

use super::processes::stopped_until_missed;
use super::random::live_on;
use crate::Case;
use crate::case::{Breach, Proof, ensure, ensure_eq};
use crate::env::Env;
use crate::need;

/// A case of the third level.
macro_rules! long {
    ($name:literal, [$($need:expr),* $(,)?], $proves:literal, $run:path) => {
        $crate::Case {
            name: $name,
            level: $crate::Level::Long,
            proves: $proves,
            needs: &[$($need),*],
            alone: false,
            run: |env| Box::pin($run(env)),
        }
    };
}

pub(super) const CASES: &[Case] = &[
    long!(
        "long/after-the-window-an-id-is-stored-again",
        [need::DEDUP],
        "A second publish of the same id within the window is not stored again; after it, it is.",
        window_ends
    ),
    long!(
        "long/a-delivery-is-kept-for-as-long-as-it-is-extended",
        [need::LEASE, need::EXTENSION],
        "extend: keep the lease, again and again.",
        extended
    ),
    long!(
        "long/who-is-idle-for-minutes-goes-on",
        [],
        "Neither a publisher nor a member that has nothing to do for longer than any heartbeat or idle timeout is cut off in silence.",
        idle
    ),
    long!(
        "long/a-process-that-stands-still-until-its-broker-misses-it-does-no-harm-when-it-goes-on",
        [],
        "What a stopped process had is with others when the broker misses it, and it settles nothing of that when it goes on.",
        stopped_until_missed
    ),
    long!(
        "long/a-life-of-minutes-without-order-breaks-no-promise",
        [need::NACK, need::RELEASE, need::DEAD_LETTER, need::REDRIVE],
        "Nothing lost, nothing phantom, delivered again only with a cause, attempts as the record says, however long it goes on.",
        without_order
    ),
    long!(
        "long/a-life-of-minutes-with-order-per-key-breaks-no-promise",
        [need::NACK, need::RELEASE, need::DEAD_LETTER, need::REDRIVE, need::KEY_ORDER],
        "Order::Key holds for first deliveries, and a key is with one member at a time, however long it goes on.",
        with_order
    ),
];

/// Longer than the heartbeats and idle timeouts of brokers and of what stands between: AMQP's 60 s, Kafka's session of 45 s, NATS'
/// two pings of 2 minutes that are missed, load balancers' 60 s.
const IDLE: Duration = Duration::from_secs(270);
/// How long a life goes on, and how many steps it takes at most.
const LIFE: Duration = Duration::from_secs(150);
const STEPS: usize = 4_000;
/// How often a lease is extended.
const EXTENSIONS: u32 = 30;

async fn window_ends(env: &Env) -> Proof {
    let Some(window) = env.record.limits.dedup_window_ms.map(Duration::from_millis) else {
        return Err(Breach::NotRun("the record does not tell how long the window is".into()));
    };
    let destination = env.destination("d");
    let client = env.client().await?;
    let mut consumer = client.subscribe(env.spec(&destination, &env.group("g"))).await?;
    let message = client.message(&destination, "k");
    for round in 1..=2 {
        let receipts = client.publish_ok(vec![message.clone(), message.clone()]).await?;
        let told: Vec<bool> = receipts.iter().map(|receipt| receipt.duplicate).collect();
        ensure_eq!(told, [false, true], "which publishes of window {round} are told duplicates");
        let held = consumer.one().await?;
        ensure_eq!(held.id(), message.id().to_string(), "what comes in window {round}");
        ensure_eq!(held.attempt(), 1, "its attempt");
        held.ack().await?;
        consumer.silence_then_canary(&client, "the second one was not stored").await?;
        // A broker may look for what is old now and then only.
        env.pass(window + window / 10 + Duration::from_secs(1)).await;
    }
    Ok(())
}

async fn extended(env: &Env) -> Proof {
    let (destination, group) = (env.destination("d"), env.group("g"));
    let client = env.client().await?;
    let lease = env.lease();
    let spec = env.spec(&destination, &group).with_lease(lease);
    let (mut one, mut other) = (client.subscribe(spec.clone()).await?, client.subscribe(spec).await?);
    client.fill(&destination, "k", 1).await?;
    let deadline = Instant::now() + env.patience();
    let (held, mut waiting) = loop {
        if let Some(held) = one.receive(1, Duration::from_millis(100)).await?.pop() {
            break (held, other);
        }
        if let Some(held) = other.receive(1, Duration::from_millis(100)).await?.pop() {
            break (held, one);
        }
        ensure!(Instant::now() < deadline, "neither member gets the message within {:?}", env.patience());
    };
    for number in 1..=EXTENSIONS {
        let begun = env.now();
        if let Err(error) = held.extend(lease).await? {
            let text = format!("extension {number} of a lease of {lease:?}: {error}");
            // On a machine that stood still the lease may have ended in truth.
            return Err(if env.has_waited(begun, lease / 2) {
                Breach::Inconclusive(text)
            } else {
                Breach::Failed(text)
            });
        }
        if env.harness.clock().is_some() {
            env.pass(lease / 3).await;
        }
        let came = waiting.receive(1, if env.harness.clock().is_some() { Duration::ZERO } else { lease / 3 }).await?;
        ensure!(came.is_empty(), "it is with another member after extension {number} of a lease of {lease:?}");
    }
    held.ack().await?;
    waiting.silence_then_canary(&client, "it was acked").await
}

async fn idle(env: &Env) -> Proof {
    let destination = env.destination("d");
    let (publisher, reader) = (env.client().await?, env.client().await?);
    let mut consumer = reader.subscribe(env.spec(&destination, &env.group("g"))).await?;
    for round in 0..2 {
        if round > 0 {
            env.pass(IDLE).await;
        }
        publisher.fill(&destination, "k", 5).await?;
        for held in consumer.take(5).await? {
            held.ack().await?;
        }
    }
    consumer.silence_then_canary(&publisher, "all were acked").await
}

async fn without_order(env: &Env) -> Proof {
    live_on(env, |spec| spec, STEPS, LIFE).await
}

async fn with_order(env: &Env) -> Proof {
    live_on(env, |spec| spec.with_order(Order::Key), STEPS, LIFE).await
}

//! Connections that die while nobody says anything, and one connection that carries much.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anybroker_core::{Destination, Message, Parallelism, SubscribeSpec};
use futures_util::future::{join_all, try_join_all};
use tokio::time::Instant;

use super::faults::{acked, exchange, fault, millis, publish_until_stored};
use super::server::short_lease;
use crate::Case;
use crate::case::{Proof, ensure};
use crate::client::Client;
use crate::consumer::{Consumer, Held, ack_all, ids};
use crate::env::Env;
use crate::faults::{Kind, Line, Network, is_publishing_in_a_fault};
use crate::history::What;

pub(super) const CASES: &[Case] = &[
    fault!(
        "faults/after-a-silent-loss-a-lone-publisher-publishes-and-a-lone-member-receives-again",
        false,
        [],
        "Lost connections: every client finds out by itself, also when nothing is said and nobody could stand in for it.",
        silent
    ),
    fault!(
        "faults/after-cuts-of-one-connection-all-its-subscriptions-go-on-and-none-of-them-twice",
        false,
        [],
        "Lost connections: every subscription of a client recovers by itself, and no consumer is registered twice.",
        shared
    ),
];

/// How long nothing is said: longer than any client waits before it gives up a silent connection. By their documentation RabbitMQ's does
/// after twice its heartbeat (20 s), NATS' after three pings without an answer (15 s), Kafka's members after their session (10 s).
const SILENT: Duration = Duration::from_secs(21);

/// One publisher and one member, with nothing on their way and nothing in their hands.
async fn silent(env: &Env) -> Proof {
    let network = Network::open(env).await?;
    let lines = [network.line()?, network.line()?];
    if Arc::ptr_eq(&lines[0], &lines[1]) {
        half_open(env, &lines, "half-open").await?;
        return black_hole(env, &lines, "black-hole").await;
    }
    let others = [network.line()?, network.line()?];
    futures_util::try_join!(half_open(env, &lines, "half-open"), black_hole(env, &others, "black-hole")).map(drop)
}

/// The server has ended the connections, and the clients were not told. What they open anew passes: who finds out by himself goes
/// on while that lasts.
async fn half_open(env: &Env, lines: &[Arc<Line>; 2], label: &str) -> Proof {
    let mut lone = Lone::begin(env, lines, label).await?;
    let meanwhile = async {
        // The fault is that time goes by.
        tokio::time::sleep(SILENT).await;
        lone.go_on("with new connections let through").await
    };
    suffer(env, lines, Kind::HalfOpen, meanwhile).await?;
    lone.go_on("when all is well again").await?;
    lone.end().await
}

/// Nothing passes at all, on new connections neither.
async fn black_hole(env: &Env, lines: &[Arc<Line>; 2], label: &str) -> Proof {
    let mut lone = Lone::begin(env, lines, label).await?;
    suffer(env, lines, Kind::BlackHole, tokio::time::sleep(SILENT)).await;
    lone.go_on("after a black hole").await?;
    lone.end().await
}

/// Both lines, or the one that they are.
async fn suffer<T>(env: &Env, lines: &[Arc<Line>; 2], kind: Kind, meanwhile: impl Future<Output = T>) -> T {
    if Arc::ptr_eq(&lines[0], &lines[1]) {
        return lines[0].suffer_during(env, kind, meanwhile).await;
    }
    lines[0].suffer_during(env, kind, lines[1].suffer_during(env, kind, meanwhile)).await
}

/// A publisher and a member that nobody stands in for, and clients past the proxy.
struct Lone<'e> {
    env: &'e Env,
    publisher: Client<'e>,
    member: Client<'e>,
    side: Client<'e>,
    spec: SubscribeSpec,
    consumer: Consumer<'e>,
}

impl<'e> Lone<'e> {
    async fn begin(env: &'e Env, lines: &[Arc<Line>; 2], label: &str) -> Proof<Self> {
        let (publisher, member) = (lines[0].client(env).await?, lines[1].client(env).await?);
        let side = env.client().await?;
        // What the server hands to a connection that it takes for a living one comes again when its lease ends.
        let spec = env.spec(&env.destination(label), &env.group("g")).with_lease(short_lease(env));
        let consumer = member.subscribe(spec.clone()).await?;
        let mut lone = Self { env, publisher, member, side, spec, consumer };
        lone.go_on("before anything").await?;
        Ok(lone)
    }

    /// The same subscription receives what another client publishes, and the same publisher publishes.
    async fn go_on(&mut self, when: &str) -> Proof {
        for publisher in [&self.side, &self.publisher] {
            let held = exchange(self.env, publisher, &mut self.consumer, when).await?;
            acked(vec![held]).await?;
        }
        Ok(())
    }

    async fn end(self) -> Proof {
        self.consumer.close().await?;
        self.side.drain(self.spec).await?;
        for client in [self.publisher, self.member, self.side] {
            client.close().await?;
        }
        Ok(())
    }
}

/// What a subscription may hold.
const BOUND: usize = 4;
/// What is published to each destination after each fault.
const AFTER: usize = BOUND * 3;
/// How often the connection is lost.
const LOSSES: usize = 3;
/// What a publish may take while it is.
const PUBLISH_TIMEOUT: Duration = Duration::from_secs(2);

/// One client with subscriptions to two destinations, in two groups where there are groups, which publishes too.
async fn shared(env: &Env) -> Proof {
    let network = Network::open(env).await?;
    let line = network.line()?;
    let client = line.client(env).await?;
    let groups = if env.record.groups.is_given() { 2 } else { 1 };
    let destinations = [env.destination("one"), env.destination("two")];
    let mut consumers = Vec::new();
    for destination in &destinations {
        for number in 0..groups {
            let spec = env.spec(destination, &env.group(&format!("g{number}")));
            let spec = spec.with_max_in_flight(BOUND).with_lease(short_lease(env));
            consumers.push(client.subscribe(spec).await?);
        }
    }
    let mut random = env.rng();
    for number in 1..=LOSSES {
        let (kind, lasts) = match number {
            2 => (Kind::HalfOpen, millis(&mut random, 500..2_500)),
            3 => (Kind::Finish, millis(&mut random, 50..600)),
            _ => (Kind::Cut, millis(&mut random, 50..600)),
        };
        let is_over = AtomicBool::new(false);
        let meanwhile = async {
            // The fault is that time goes by.
            tokio::time::sleep(lasts).await;
        };
        let suffering = async {
            // Everybody is at work when it begins.
            tokio::time::sleep(millis(&mut random, 50..300)).await;
            line.suffer_during(env, kind, meanwhile).await;
            is_over.store(true, Ordering::Relaxed);
            Ok(())
        };
        let publishing = publish_until(&client, &destinations, &is_over);
        let consuming = try_join_all(consumers.iter_mut().map(|consumer| consume_until(consumer, &is_over)));
        futures_util::try_join!(suffering, publishing, consuming)?;
        let when = format!("after loss {number}, {kind},");
        let mut expected = Vec::new();
        for destination in &destinations {
            let message = |number| client.message(destination, format!("key {number}").as_str());
            let sent: Vec<Message> = (0..AFTER).map(message).collect();
            expected.push(ids(&sent).into_iter().collect::<HashSet<_>>());
            publish_until_stored(env, &client, sent, &when).await?;
        }
        let of = |consumer: &Consumer<'_>| usize::from(consumer.subscriber.spec().destinations[0] != destinations[0]);
        let coming = consumers.iter_mut().map(|consumer| {
            let missing = expected[of(consumer)].clone();
            everything_comes(env, consumer, missing, &when)
        });
        try_join_all(coming).await?;
    }
    if env.record.parallelism == Parallelism::Any {
        let side = env.client().await?;
        for destination in &destinations {
            side.fill(destination, None, AFTER).await?;
        }
        for consumer in &mut consumers {
            leaves_the_rest(env, consumer).await?;
        }
        side.close().await?;
    }
    let specs: Vec<SubscribeSpec> = consumers.iter().map(|consumer| consumer.subscriber.spec().clone()).collect();
    for closed in join_all(consumers.into_iter().map(Consumer::close)).await {
        closed?;
    }
    for spec in specs {
        let fresh = env.client().await?;
        fresh.drain(spec).await?;
        fresh.close().await?;
    }
    client.close().await
}

/// Publishes a few at a time.
async fn publish_until(client: &Client<'_>, destinations: &[Destination], is_over: &AtomicBool) -> Proof {
    while !is_over.load(Ordering::Relaxed) {
        for destination in destinations {
            let batch = client.messages(destination, "meanwhile", 3);
            let outcomes = client.publish_within(batch, PUBLISH_TIMEOUT).await?;
            outcomes.iter().filter_map(|outcome| outcome.as_ref().err()).try_for_each(is_publishing_in_a_fault)?;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}

/// Acks what comes.
async fn consume_until(consumer: &mut Consumer<'_>, is_over: &AtomicBool) -> Proof {
    while !is_over.load(Ordering::Relaxed) {
        let came = consumer.receive(BOUND, Duration::from_millis(200)).await?;
        acked(came).await?;
    }
    Ok(())
}

/// All of them come, and the subscription never has more than it may hold. What is out is kept until nothing more comes for a
/// quiet window, unless another connection was lost meanwhile, which takes away what was out.
async fn everything_comes(env: &Env, consumer: &mut Consumer<'_>, mut missing: HashSet<String>, when: &str) -> Proof {
    let bound = env.at_once(BOUND);
    let (begin, limit) = (Instant::now(), env.patience() + consumer.subscriber.spec().lease * 2);
    let mut is_shown = false;
    while !missing.is_empty() {
        let before = losses(env, consumer);
        let mut held: Vec<Held<'_>> = Vec::new();
        loop {
            let came = consumer.receive(AFTER, env.quiet().max(Duration::from_millis(500))).await?;
            let is_end = came.is_empty() || is_shown && held.len() + came.len() >= bound;
            for held in &came {
                missing.remove(&held.id());
            }
            held.extend(came);
            ensure!(
                held.len() <= BOUND || losses(env, consumer) > before,
                "{when} {} deliveries are out of a subscription that may hold {BOUND}",
                held.len()
            );
            if is_end || missing.is_empty() {
                break;
            }
        }
        is_shown |= held.len() >= bound && losses(env, consumer) == before;
        acked(held).await?;
        ensure!(
            missing.is_empty() || begin.elapsed() < limit,
            "{when} the subscription of {} to {:?} gets nothing for {limit:?}: {} stored messages are missing",
            consumer.subscriber.spec().group,
            consumer.subscriber.spec().destinations,
            missing.len()
        );
    }
    Ok(())
}

/// How often it said that its connection or a lane was lost.
fn losses(env: &Env, consumer: &Consumer<'_>) -> usize {
    let of = |what: &What| match what {
        What::Degraded { subscription } | What::LaneLost { subscription, .. } => *subscription == consumer.subscription,
        _ => false,
    };
    env.history.events().iter().filter(|event| of(&event.what)).count()
}

/// Of what is there, a member that is full keeps nothing back: who is registered twice at the broker would have as much again on its
/// way to it.
async fn leaves_the_rest(env: &Env, consumer: &mut Consumer<'_>) -> Proof {
    let spec = consumer.subscriber.spec().clone();
    let other = env.client().await?;
    let held = consumer.take(BOUND).await?;
    let mut second = other.subscribe(spec.with_max_in_flight(AFTER)).await?;
    ack_all(second.take(AFTER - BOUND).await?).await?;
    acked(held).await?;
    second.close().await?;
    other.close().await
}

//! Connections that are cut, held, slowed down or half gone.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anybroker_core::{AckLevel, Message, MessageId, OnFailure, Order, Settlement, SubscribeSpec};
use futures_util::future::BoxFuture;
use rand::RngExt;
use rand::rngs::StdRng;
use tokio::time::Instant;

use crate::case::{Breach, Proof, ensure};
use crate::client::Client;
use crate::consumer::{Consumer, Held, settle};
use crate::env::Env;
use crate::faults::{
    Disturbance, HEALED_TIMEOUT, Kind, Line, Network, Planned, Trial, is_publishing_in_a_fault, is_settling_in_a_fault,
    plan,
};
use crate::history::{Event, What};
use crate::{Case, need};

/// A case of the second level.
macro_rules! fault {
    ($name:literal, $alone:literal, [$($need:expr),* $(,)?], $proves:literal, $run:path) => {
        $crate::Case {
            name: $name,
            level: $crate::Level::Reliability,
            proves: $proves,
            needs: &[$($need),*],
            alone: $alone,
            run: |env| Box::pin($run(env)),
        }
    };
}

pub(super) use fault;

pub(super) const CASES: &[Case] = &[
    fault!(
        "faults/connections-cut-while-publishing-lose-nothing-that-was-confirmed",
        false,
        [],
        "A cut connection leaves an outcome unknown; what is done is stored, what is not done is not; publishers recover by themselves.",
        cut_publishing
    ),
    fault!(
        "faults/connections-cut-while-consuming-bring-back-what-was-not-settled",
        false,
        [],
        "Lost connections: every subscription recovers by itself, what was unsettled comes back, a confirmed ack stays.",
        cut_consuming
    ),
    fault!(
        "faults/after-a-cut-a-lone-publisher-publishes-and-a-lone-member-receives-again",
        false,
        [],
        "Lost connections: every client recovers by itself, also where no other could stand in for it.",
        alone
    ),
    fault!(
        "faults/an-ack-that-never-arrives-is-not-told-as-confirmed",
        false,
        [],
        "`Ok` says its level: what is told as confirmed is settled at the server, and comes to nobody again.",
        lost_acks
    ),
    fault!(
        "faults/a-black-hole-ends-no-call-late-and-loses-nothing",
        false,
        [],
        "Every call ends by its deadline, whatever the broker does; an answer that never came is unknown, of a publish and of an ack.",
        black_hole
    ),
    fault!(
        "faults/answers-that-are-lost-leave-outcomes-unknown-and-lose-nothing",
        false,
        [],
        "A missing confirm is unknown, never done and never not done.",
        lost_answers
    ),
    fault!(
        "faults/a-slow-connection-loses-nothing-and-doubles-nothing-that-was-answered",
        false,
        [],
        "Slowness is no failure.",
        slow
    ),
    fault!(
        "faults/a-mixed-schedule-breaks-no-promise",
        false,
        [],
        "Nothing lost, nothing phantom, delivered again only what a fault has met, no call without end, recovery by itself.",
        mixed
    ),
    fault!(
        "faults/a-mixed-schedule-keeps-the-order-of-each-key",
        false,
        [need::KEY_ORDER],
        "Order::Key holds for first deliveries, whatever becomes of connections.",
        mixed_in_order
    ),
    fault!(
        "faults/a-mixed-schedule-lets-nothing-pass-what-blocks-its-key",
        false,
        [need::KEY_ORDER, need::BLOCK],
        "OnFailure::Block holds whatever becomes of connections.",
        mixed_with_blocking
    ),
];

pub(super) fn millis(random: &mut StdRng, range: std::ops::Range<u64>) -> Duration {
    Duration::from_millis(random.random_range(range))
}

/// A cut of one kind or another.
fn cut(random: &mut StdRng) -> (Kind, Duration) {
    let lasts = millis(random, 50..600);
    match random.random_range(0..4) {
        0 => (Kind::Finish, lasts),
        1 => (Kind::CutAfter { bytes: random.random_range(100..20_000), answers: random.random() }, lasts * 2),
        _ => (Kind::Cut, lasts),
    }
}

async fn cut_publishing(env: &Env) -> Proof {
    disturbed(
        env,
        |spec| spec,
        6,
        |random, _| {
            let (kind, lasts) = cut(random);
            (kind, lasts, true)
        },
    )
    .await
}

async fn cut_consuming(env: &Env) -> Proof {
    disturbed(
        env,
        |spec| spec,
        6,
        |random, _| {
            let (kind, lasts) = cut(random);
            (kind, lasts, false)
        },
    )
    .await
}

async fn black_hole(env: &Env) -> Proof {
    disturbed(
        env,
        |spec| spec,
        6,
        |random, number| {
            let kind = [Kind::BlackHole, Kind::DeafServer, Kind::HalfOpen][number % 3];
            // Each of them for a publisher and for a member: what an ack has lost shows at members only.
            match number < 3 {
                // Longer than a publish may take.
                true => (kind, millis(random, 2_500..4_000), true),
                false => (kind, millis(random, 1_000..2_500), false),
            }
        },
    )
    .await
}

async fn lost_answers(env: &Env) -> Proof {
    disturbed(env, |spec| spec, 4, |random, number| (Kind::DropAnswers, millis(random, 500..2_500), number % 2 == 0))
        .await
}

async fn slow(env: &Env) -> Proof {
    disturbed(env, |spec| spec, 3, |random, number| (slowness(random), millis(random, 1_000..2_500), number % 2 == 0))
        .await
}

fn slowness(random: &mut StdRng) -> Kind {
    let bytes_per_second = if random.random() { 0 } else { random.random_range(20_000..200_000) };
    Kind::Slow { delay: millis(random, 20..200), bytes_per_second }
}

async fn mixed(env: &Env) -> Proof {
    disturbed(env, |spec| spec, 8, any).await
}

async fn mixed_in_order(env: &Env) -> Proof {
    disturbed(env, |spec| spec.with_order(Order::Key), 6, any).await
}

async fn mixed_with_blocking(env: &Env) -> Proof {
    disturbed(env, |spec| spec.with_order(Order::Key).with_on_failure(OnFailure::Block), 6, any).await
}

pub(super) fn any(random: &mut StdRng, _: usize) -> (Kind, Duration, bool) {
    let publishing = random.random();
    let (kind, lasts) = match random.random_range(0..8) {
        0..3 => cut(random),
        3 => (Kind::HalfOpen, millis(random, 500..2_500)),
        4 => (Kind::BlackHole, millis(random, 500..3_000)),
        5 => (Kind::DeafServer, millis(random, 500..3_000)),
        6 => (Kind::DropAnswers, millis(random, 300..2_000)),
        _ => (slowness(random), millis(random, 500..1_500)),
    };
    (kind, lasts, publishing)
}

/// A trial with a line for each client, and `count` faults that the seed draws.
async fn disturbed(
    env: &Env,
    shape: impl FnOnce(SubscribeSpec) -> SubscribeSpec,
    count: usize,
    draw: impl FnMut(&mut StdRng, usize) -> (Kind, Duration, bool),
) -> Proof {
    disturbed_on(env, &Network::open(env).await?, shape, count, draw).await
}

/// The same on that network.
pub(super) async fn disturbed_on(
    env: &Env,
    network: &Network<'_>,
    shape: impl FnOnce(SubscribeSpec) -> SubscribeSpec,
    count: usize,
    draw: impl FnMut(&mut StdRng, usize) -> (Kind, Duration, bool),
) -> Proof {
    disturb(env, network, &Trial::new(env, shape), count, draw).await
}

/// That trial, on that network.
pub(super) async fn disturb<'e>(
    env: &'e Env,
    network: &Network<'_>,
    trial: &Trial<'e>,
    count: usize,
    mut draw: impl FnMut(&mut StdRng, usize) -> (Kind, Duration, bool),
) -> Proof {
    let (publishers, members) = Trial::CLIENTS;
    let (mut lines, mut clients) = (Vec::new(), Vec::new());
    for _ in 0..publishers + members {
        let line = network.line()?;
        clients.push(line.client(env).await?);
        lines.push(line);
    }
    let members = clients.split_off(publishers);
    let mut number = 0;
    let planned = plan(&mut env.rng(), count, |random| {
        number += 1;
        draw(random, number - 1)
    });
    let hits: Vec<Box<dyn Disturbance>> = planned
        .into_iter()
        .map(|planned| {
            let of = if planned.publishing { &lines[..publishers] } else { &lines[publishers..] };
            Box::new(Hit { lines: of.to_vec(), planned }) as Box<dyn Disturbance>
        })
        .collect();
    trial.run(clients, members, &hits).await
}

/// A fault of one line, of the publishers' or of the members'.
struct Hit {
    lines: Vec<Arc<Line>>,
    planned: Planned,
}

impl Disturbance for Hit {
    fn describe(&self) -> String {
        self.planned.to_string()
    }

    fn wants(&self) -> (bool, usize) {
        (self.planned.publishing, self.planned.whom)
    }

    fn happen<'a>(&'a self, env: &'a Env, whom: usize) -> BoxFuture<'a, Proof> {
        Box::pin(async move {
            self.lines[whom].suffer(env, &self.planned).await;
            Ok(())
        })
    }
}

/// How often the two are cut off.
const CUTS: usize = 2;

/// One publisher and one member.
async fn alone(env: &Env) -> Proof {
    let network = Network::open(env).await?;
    let lines = [network.line()?, network.line()?];
    let (publisher, member) = (lines[0].client(env).await?, lines[1].client(env).await?);
    let spec = env.spec(&env.destination("d"), &env.group("g"));
    let mut consumer = member.subscribe(spec.clone()).await?;
    let mut held = exchange(env, &publisher, &mut consumer, "before any cut").await?;
    for number in 1..=CUTS {
        let planned = plan(&mut env.rng(), 2, |random| (Kind::Cut, millis(random, 50..600), true));
        let batch = publisher.messages(&spec.destinations[0], "in a cut", 5);
        let (outcomes, ()) =
            futures_util::join!(publisher.publish_within(batch, HEALED_TIMEOUT), lines[0].suffer(env, &planned[0]));
        outcomes?.iter().filter_map(|outcome| outcome.as_ref().err()).try_for_each(is_publishing_in_a_fault)?;
        lines[1].suffer(env, &planned[1]).await;
        acked(vec![held]).await?;
        let when = format!("after cut {number}");
        held = exchange(env, &publisher, &mut consumer, &when).await?;
        says_that_it_is_served(env, &mut consumer, &when).await?;
    }
    acked(vec![held]).await?;
    consumer.close().await?;
    env.client().await?.drain(spec).await?;
    for client in [publisher, member] {
        client.close().await?;
    }
    Ok(())
}

/// Publishes messages until all are stored, however many tries that takes.
pub(super) async fn publish_until_stored(env: &Env, client: &Client<'_>, mut left: Vec<Message>, when: &str) -> Proof {
    let (begin, limit) = (Instant::now(), env.patience());
    loop {
        let outcomes = client.publish_within(left.clone(), HEALED_TIMEOUT).await?;
        let mut again = Vec::new();
        for (message, outcome) in left.into_iter().zip(outcomes) {
            if let Err(error) = outcome {
                is_publishing_in_a_fault(&error)?;
                ensure!(begin.elapsed() < limit, "{when} the publisher publishes nothing for {limit:?}: {error:?}");
                again.push(message);
            }
        }
        if again.is_empty() {
            return Ok(());
        }
        left = again;
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Some messages go from one to the other, however many tries that takes: no fault lasts, and patience is the limit. One of them
/// stays unsettled.
pub(super) async fn exchange<'e>(
    env: &'e Env,
    publisher: &Client<'e>,
    consumer: &mut Consumer<'e>,
    when: &str,
) -> Proof<Held<'e>> {
    let destination = consumer.subscriber.spec().destinations[0].clone();
    let limit = env.patience();
    let sent: Vec<Message> =
        (0..5).map(|number| publisher.message(&destination, format!("key {number}").as_str())).collect();
    let mut missing: HashSet<MessageId> = sent.iter().map(|message| message.id().clone()).collect();
    let staying = sent[0].id().clone();
    publish_until_stored(env, publisher, sent, when).await?;
    let (begin, mut stays) = (Instant::now(), None);
    while !missing.is_empty() {
        let came = consumer.receive(10, Duration::from_millis(500)).await?;
        for held in &came {
            missing.remove(held.message().id());
        }
        let (staying, others): (Vec<_>, Vec<_>) = came.into_iter().partition(|held| *held.message().id() == staying);
        acked(others).await?;
        // Should it come again, the one before is not this member's any more.
        acked(staying.into_iter().filter_map(|held| stays.replace(held)).collect()).await?;
        let count = missing.len();
        ensure!(
            count == 0 || begin.elapsed() < limit,
            "{when} the member receives nothing for {limit:?}: {count} stored messages are missing"
        );
    }
    stays.ok_or_else(|| Breach::Failed(format!("{when} {staying} came and is gone")))
}

/// A member that has said that it is not served says that it is again.
async fn says_that_it_is_served(env: &Env, consumer: &mut Consumer<'_>, when: &str) -> Proof {
    let (begin, own) = (Instant::now(), consumer.subscription);
    let is_degraded = |events: &[Event]| {
        let said = events.iter().rev().find_map(|event| match event.what {
            What::Degraded { subscription } if subscription == own => Some(true),
            What::Recovered { subscription } if subscription == own => Some(false),
            _ => None,
        });
        said == Some(true)
    };
    while is_degraded(&env.history.events()) {
        ensure!(
            begin.elapsed() < env.patience(),
            "{when} the member receives, and does not say that it is served again"
        );
        acked(consumer.receive(10, env.quiet() / 4).await?).await?;
    }
    Ok(())
}

/// Acks them, as far as they are still this member's.
pub(super) async fn acked(batch: Vec<Held<'_>>) -> Proof {
    for outcome in settle(batch.into_iter().map(|held| (held, Settlement::Ack)).collect()).await? {
        if let Err((_, error)) = outcome {
            is_settling_in_a_fault(&error)?;
        }
    }
    Ok(())
}

/// For how long nothing arrives that a member says.
const ACKS_LOST: Duration = Duration::from_secs(2);
/// The least lease beside it: there is time to ask again, and to be told, before it ends.
const ASKED_AGAIN: Duration = Duration::from_secs(6);

/// One member, whose acks do not arrive, whatever connection they take. Where acks are confirmed, `Ok` is the server's own, and
/// a fresh client gets none of them. Where they are sent or recorded it promises less: the history says what may come again.
async fn lost_acks(env: &Env) -> Proof {
    let network = Network::open(env).await?;
    let line = network.line()?;
    let (publisher, member) = (env.client().await?, line.client(env).await?);
    let longest = env.record.limits.lease_max_ms.map_or(Duration::MAX, Duration::from_millis);
    let lease = env.lease().max(ASKED_AGAIN).min(longest);
    let spec = env.spec(&env.destination("d"), &env.group("g")).with_lease(lease);
    let mut consumer = member.subscribe(spec.clone()).await?;
    let leased = env.now();
    let message = |number| publisher.message(&spec.destinations[0], format!("key {number}").as_str());
    publisher.publish_ok((0..env.at_once(5)).map(message).collect()).await?;
    let held = consumer.take(env.at_once(5)).await?;
    let handed_out = env.now();
    let ids: Vec<MessageId> = held.iter().map(|held| held.message().id().clone()).collect();
    let planned = Planned { kind: Kind::DropRequests, lasts: ACKS_LOST, publishing: false, whom: 0 };
    let is_over = AtomicBool::new(false);
    let suffering = async {
        line.suffer(env, &planned).await;
        is_over.store(true, Ordering::Relaxed);
    };
    let settling = async {
        let outcomes = settle(held.into_iter().map(|held| (held, Settlement::Ack)).collect()).await?;
        Ok::<_, Breach>((outcomes, is_over.load(Ordering::Relaxed), !env.has_waited(leased, lease)))
    };
    // The first is polled first: the fault has begun when the acks are asked for.
    let ((), settled) = futures_util::join!(suffering, settling);
    let (outcomes, is_over, is_in_time) = settled?;
    let mut confirmed = HashSet::new();
    for (id, outcome) in ids.into_iter().zip(outcomes) {
        match outcome {
            Ok(AckLevel::Confirmed) => {
                ensure!(is_over, "the ack of {id} is told as confirmed before anything can have reached the server");
                // On a machine that stood still, the lease may have ended in truth.
                confirmed.extend(is_in_time.then_some(id));
            }
            Ok(_) => {}
            // Dropped with its error it comes back, unless it is settled.
            Err((_, error)) => is_settling_in_a_fault(&error)?,
        }
    }
    let mut again = Vec::new();
    while !env.has_waited(handed_out, lease) {
        again.extend(consumer.receive(10, Duration::from_millis(500)).await?);
    }
    drop(again);
    consumer.close().await?;
    for message in env.client().await?.drain(spec).await? {
        let id = message.id();
        ensure!(!confirmed.contains(id), "the ack of {id} was told as confirmed, and it comes again");
    }
    for client in [publisher, member] {
        client.close().await?;
    }
    Ok(())
}

//! A group's random life: whatever order things happen in, the history breaks no promise.

use std::time::{Duration, Instant};

use anybroker_core::{
    Destination, ErrorKind, Group, Nack, OnFailure, Order, Reason, RedriveOptions, Settlement, SubscribeSpec, Verdict,
};
use rand::RngExt;
use rand::rngs::StdRng;

use super::case;
use crate::Case;
use crate::case::{Breach, Proof, ensure};
use crate::client::Client;
use crate::consumer::{Consumer, Held};
use crate::env::Env;
use crate::need;

pub(super) const CASES: &[Case] = &[
    case!(
        "random/a-life-without-order-breaks-no-promise",
        [need::NACK, need::RELEASE, need::DEAD_LETTER, need::REDRIVE],
        "Nothing lost, nothing phantom, delivered again only with a cause, attempts as the record says, each message settled once.",
        without_order
    ),
    case!(
        "random/a-life-with-order-per-key-breaks-no-promise",
        [need::NACK, need::RELEASE, need::DEAD_LETTER, need::REDRIVE, need::KEY_ORDER],
        "Order::Key holds for first deliveries, and a key is with one member at a time, whatever is settled how.",
        with_order
    ),
    case!(
        "random/a-life-with-blocked-keys-breaks-no-promise",
        [need::NACK, need::RELEASE, need::DEAD_LETTER, need::REDRIVE, need::KEY_ORDER, need::BLOCK],
        "OnFailure::Block holds for every redelivery, whatever is settled how.",
        with_blocking
    ),
];

async fn without_order(env: &Env) -> Proof {
    live(env, |spec| spec).await
}

async fn with_order(env: &Env) -> Proof {
    live(env, |spec| spec.with_order(Order::Key)).await
}

async fn with_blocking(env: &Env) -> Proof {
    live(env, |spec| spec.with_order(Order::Key).with_on_failure(OnFailure::Block)).await
}

const MEMBERS: usize = 3;
const STEPS: usize = 400;

/// The members of a group, each with what it holds.
struct Life<'e> {
    env: &'e Env,
    client: Client<'e>,
    destination: Destination,
    group: Group,
    spec: SubscribeSpec,
    members: Vec<(Consumer<'e>, Vec<Held<'e>>)>,
    random: StdRng,
    published: usize,
}

async fn live(env: &Env, order: impl FnOnce(SubscribeSpec) -> SubscribeSpec) -> Proof {
    live_on(env, order, STEPS, Duration::MAX).await
}

/// A life of so many steps, or until the time is over.
pub(super) async fn live_on(
    env: &Env,
    order: impl FnOnce(SubscribeSpec) -> SubscribeSpec,
    steps: usize,
    time: Duration,
) -> Proof {
    let begin = Instant::now();
    let (destination, group) = (env.destination("d"), env.group("g"));
    let client = env.client().await?;
    let spec = order(env.spec(&destination, &group).with_max_attempts(3));
    let mut members = Vec::new();
    for _ in 0..MEMBERS {
        members.push((client.subscribe(spec.clone()).await?, Vec::new()));
    }
    let random = env.rng();
    let mut life = Life { env, client, destination, group, spec, members, random, published: 0 };
    for _ in 0..steps {
        if begin.elapsed() >= time {
            break;
        }
        life.step().await?;
    }
    life.end().await
}

impl Life<'_> {
    async fn step(&mut self) -> Proof {
        match self.random.random_range(0..100) {
            0..25 => self.publish().await,
            25..55 => self.receive().await,
            55..97 => self.settle().await,
            _ => self.come_and_go().await,
        }
    }

    async fn publish(&mut self) -> Proof {
        let count = self.random.random_range(1..6);
        let batch: Vec<_> = (0..count)
            .map(|_| {
                let key = format!("key {}", self.random.random_range(0..8));
                self.client.message(&self.destination, key.as_str())
            })
            .collect();
        self.published += count;
        self.client.publish_ok(batch).await?;
        Ok(())
    }

    async fn receive(&mut self) -> Proof {
        let (member, max) = (self.random.random_range(0..MEMBERS), self.random.random_range(1..6));
        let (consumer, held) = &mut self.members[member];
        // Where one member works, a life must be longer than it takes the next one to begin.
        let wait = if self.env.record.parallelism == anybroker_core::Parallelism::One { 25 } else { 2 };
        held.extend(consumer.receive(max, Duration::from_millis(wait)).await?);
        Ok(())
    }

    /// Settles one or several that a member holds, in any order.
    async fn settle(&mut self) -> Proof {
        let member = self.random.random_range(0..MEMBERS);
        let count = self.random.random_range(1..4);
        let mut batch = Vec::new();
        for _ in 0..count {
            let held = &mut self.members[member].1;
            if held.is_empty() {
                break;
            }
            let chosen = held.remove(self.random.random_range(0..held.len()));
            if let Some(settlement) = self.settlement() {
                batch.push((chosen, settlement));
            }
            // Otherwise it is dropped here.
        }
        for outcome in crate::consumer::settle(batch).await? {
            if let Err((_, error)) = outcome {
                // Lanes move when members come and go, or the endpoint is set up to lose what is out.
                let may_be_lost =
                    self.env.harness.is_disturbed() || self.env.record.parallelism != anybroker_core::Parallelism::Any;
                ensure!(may_be_lost && error.kind() == ErrorKind::StaleDelivery, "settling what is held: {error:?}");
            }
        }
        Ok(())
    }

    fn settlement(&mut self) -> Option<Settlement> {
        let delay = match self.env.record.nack_delay.is_given() && self.env.harness.clock().is_none() {
            true => Duration::from_millis(self.random.random_range(0..20)),
            false => Duration::ZERO,
        };
        match self.random.random_range(0..100) {
            0..50 => Some(Settlement::Ack),
            50..75 => Some(Settlement::Nack(Nack { delay, error_type: None })),
            75..85 => Some(Settlement::Release),
            85..93 => Some(Settlement::DeadLetter(Box::new(Verdict::new(Reason::Rejected)))),
            _ => None,
        }
    }

    /// A member closes with deliveries in its hands, and another one comes.
    async fn come_and_go(&mut self) -> Proof {
        let member = self.random.random_range(0..MEMBERS);
        let (consumer, held) = self.members.swap_remove(member);
        consumer.close().await?;
        drop(held);
        self.members.push((self.client.subscribe(self.spec.clone()).await?, Vec::new()));
        Ok(())
    }

    /// Everybody goes; what is left is acked, and so is what was buried. The checker does the rest.
    async fn end(self) -> Proof {
        for (consumer, held) in self.members {
            consumer.close().await?;
            drop(held);
        }
        self.env.client().await?.drain(self.spec.clone()).await?;
        let letters = self.client.letters(&self.destination, &self.group).await?.len();
        self.client.redrive(&self.destination, &self.group, &RedriveOptions::default()).await?;
        self.env.client().await?.drain(self.spec).await?;
        if self.published < 50 || letters == 0 {
            let published = self.published;
            return Err(Breach::Inconclusive(format!("only {published} messages and {letters} dead letters")));
        }
        let left = self.client.letters(&self.destination, &self.group).await?.len();
        ensure!(left == 0, "{left} dead letters after all were redriven and acked");
        Ok(())
    }
}

//! Publishers and members of a group that go on while faults come and go, and must end alike by themselves.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use anybroker_core::{
    Destination, Effect, Error, ErrorKind, Group, Message, MessageId, Nack, Reason, Settlement, SubscribeSpec, Verdict,
};
use futures_util::future::{BoxFuture, try_join_all};
use parking_lot::Mutex;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::case::{Proof, ensure, fail};
use crate::client::Client;
use crate::consumer::{Consumer, Held, settle};
use crate::env::Env;

const PUBLISHERS: usize = 4;
const MEMBERS: usize = 3;
/// What each publisher publishes: 2,000 messages in all.
const EACH: usize = 500;
const BATCH: usize = 20;
/// How many messages a publisher has at most beyond its share, in small batches, while a fault lasts that begins at nobody knows which
/// moment: so many that it does not run out of them before.
const MORE: usize = 500;
const SMALL: usize = 3;
/// The least time between two of those. A slower publish is followed by as long a pause: every second publisher is at it then.
const PAUSE: Duration = Duration::from_millis(10);
/// The same where faults last for longer.
const UNHURRIED: Duration = Duration::from_millis(150);
const KEYS: usize = 16;
/// Every publish ends by then, whatever the fault does.
const PUBLISH_TIMEOUT: Duration = Duration::from_secs(2);
/// And by then when no fault lasts any more: how soon a busy machine answers is not what is tried here.
pub(crate) const HEALED_TIMEOUT: Duration = Duration::from_secs(10);
/// One in so many messages whose publish failed or is unknown is left as it is: then nothing hides what became of it.
const ABANDONED: usize = 4;
/// One in so many deliveries is nacked, where that is possible.
const NACKED: usize = 25;
/// How often a message may fail where some are to be buried, and the key whose messages always do.
const ATTEMPTS: u32 = 3;
const FAILING: &[u8] = b"key 7";
/// For how long a failed one is held back there, at most, in milliseconds.
pub(crate) const HELD_BACK: u64 = 300;

/// Something that happens to the trial, begun when the trial says that it will be met.
pub(crate) trait Disturbance: Send + Sync {
    /// Whether it needs a publish in flight, or a delivery; of whom, or whoever comes next when that one has none.
    fn wants(&self) -> (bool, usize);

    /// For a schedule that people read.
    fn describe(&self) -> String;

    /// Whether it begins some time after it was asked for, such as by a command, so that publishers have to go on until then.
    fn is_awaited(&self) -> bool {
        false
    }

    /// Whether a server may forget in it what it has not confirmed, although it has delivered it.
    fn forgets(&self) -> bool {
        false
    }

    /// Happens to that publisher or member, and is over when the future is done.
    fn happen<'a>(&'a self, env: &'a Env, whom: usize) -> BoxFuture<'a, Proof>;
}

/// The clients of a trial. See [`Trial::run`].
pub(crate) struct Trial<'e> {
    env: &'e Env,
    destination: Destination,
    spec: SubscribeSpec,
    /// Whether members settle in every way that there is, and not only ack and nack.
    buries: bool,
    /// What publishers have beyond their share while a fault lasts, and the least time between two batches of it.
    beyond: (usize, Duration),
    progress: Progress,
}

/// What the parts of a trial tell each other.
#[derive(Default)]
struct Progress {
    changed: Notify,
    /// How many messages each publisher may have begun by now.
    budget: AtomicUsize,
    /// A fault is on its way, or lasts: they publish some more in small batches.
    awaited: AtomicBool,
    made: [AtomicUsize; PUBLISHERS],
    publishing: [AtomicBool; PUBLISHERS],
    holding: [AtomicUsize; MEMBERS],
    /// How many burials each member has asked for and has no answer to.
    burying: [AtomicUsize; MEMBERS],
    /// What is known to be stored: confirmed, or delivered by a server that does not forget.
    stored: Mutex<HashSet<MessageId>>,
    /// A disturbance makes the server forget.
    forgets: AtomicBool,
    /// Acked or buried, or asked for with an unknown effect.
    accounted: Mutex<HashSet<MessageId>>,
    /// The last fault is over.
    healed: Mutex<Option<Instant>>,
    over: AtomicBool,
}

impl Progress {
    fn tell(&self) {
        self.changed.notify_waiters();
    }

    /// Waits until it holds; false at the deadline.
    async fn until(&self, limit: Duration, mut holds: impl FnMut(&Self) -> bool) -> bool {
        let deadline = Instant::now() + limit;
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            if holds(self) {
                return true;
            }
            if tokio::time::timeout_at(deadline, changed).await.is_err() {
                return false;
            }
        }
    }

    fn is_publishing_beyond(&self, whom: usize, message: usize) -> bool {
        self.publishing[whom].load(Ordering::Relaxed) && self.made[whom].load(Ordering::Relaxed) > message
    }

    fn is_holding(&self, whom: usize) -> bool {
        self.holding[whom].load(Ordering::Relaxed) > 0
    }

    fn is_burying(&self, whom: usize) -> bool {
        self.burying[whom].load(Ordering::Relaxed) > 0
    }

    fn lacks(&self) -> usize {
        let accounted = self.accounted.lock();
        self.stored.lock().iter().filter(|id| !accounted.contains(*id)).count()
    }
}

impl<'e> Trial<'e> {
    /// `shape` alters what the members subscribe with.
    pub(crate) fn new(env: &'e Env, shape: impl FnOnce(SubscribeSpec) -> SubscribeSpec) -> Self {
        let (destination, group): (Destination, Group) = (env.destination("d"), env.group("g"));
        let least = env.lease().max(Duration::from_secs(5));
        let longest = env.record.limits.lease_max_ms.map_or(Duration::MAX, Duration::from_millis);
        let spec = shape(env.spec(&destination, &group).with_max_in_flight(100).with_lease(least.min(longest)));
        Self { env, destination, spec, buries: false, beyond: (MORE, PAUSE), progress: Progress::default() }
    }

    /// For faults that last: while they do, publishers go on more slowly, and for that long.
    pub(crate) fn enduring(self, faults: Duration) -> Self {
        let batches = faults.as_millis() / UNHURRIED.as_millis();
        let more = usize::try_from(batches).map_or(MORE, |batches| batches * SMALL).max(MORE);
        Self { beyond: (more, UNHURRIED), ..self }
    }

    /// The same with members that ack, fail, give back and bury: a message that has failed three times is a dead letter, and those
    /// of one key always fail.
    pub(crate) fn burying(env: &'e Env) -> Self {
        let trial = Self::new(env, |spec| spec.with_max_attempts(ATTEMPTS));
        Self { buries: true, ..trial }
    }

    /// What the members subscribe with.
    pub(crate) fn spec(&self) -> &SubscribeSpec {
        &self.spec
    }

    /// How many clients [`run`](Self::run) wants: publishers, then members.
    pub(crate) const CLIENTS: (usize, usize) = (PUBLISHERS, MEMBERS);

    /// Everybody works while the disturbances happen one after the other. Afterwards all that was confirmed must arrive at
    /// the members without anybody's help, and a fresh client, which `env` connects directly, reads what is left.
    pub(crate) async fn run(
        &self,
        publishers: Vec<Client<'e>>,
        members: Vec<Client<'e>>,
        disturbances: &[Box<dyn Disturbance + '_>],
    ) -> Proof {
        let mut random = self.env.rng();
        // Those that are not to happen keep their places, so that the others meet what they met with them.
        let disturbances: Vec<Option<&(dyn Disturbance + '_)>> = disturbances
            .iter()
            .map(|disturbance| self.env.schedule.draw(disturbance.describe()).then_some(disturbance.as_ref()))
            .collect();
        let forgets = disturbances.iter().flatten().any(|disturbance| disturbance.forgets());
        self.progress.forgets.store(forgets, Ordering::Relaxed);
        let mut consumers = Vec::new();
        for client in &members {
            consumers.push(client.subscribe(self.spec.clone()).await?);
        }
        let seeds: Vec<u64> = (0..PUBLISHERS + MEMBERS).map(|_| random.random()).collect();
        let (for_publishers, for_members) = seeds.split_at(PUBLISHERS);
        let publishing = publishers.iter().zip(for_publishers).enumerate();
        let publishing = try_join_all(publishing.map(|(number, (client, seed))| self.publish(number, client, *seed)));
        let consuming = consumers.into_iter().zip(for_members).enumerate();
        let consuming = try_join_all(consuming.map(|(number, (consumer, seed))| self.consume(number, consumer, *seed)));
        let watched = async {
            tokio::try_join!(self.disturb(&disturbances), publishing)?;
            self.settle_down().await
        };
        let (missing, _) = tokio::try_join!(watched, consuming)?;
        let drained = self.env.client().await?.drain(self.spec.clone()).await?;
        let came = drained.len();
        ensure!(
            missing == 0,
            "{missing} stored messages did not come to the members after the last fault; a fresh client got {came}"
        );
        for client in publishers.iter().chain(&members) {
            client.close().await?;
        }
        Ok(())
    }

    /// One disturbance after the other, each in the middle of its share of the messages.
    async fn disturb(&self, disturbances: &[Option<&(dyn Disturbance + '_)>]) -> Proof {
        let progress = &self.progress;
        let share = EACH / (disturbances.len() + 1);
        for (number, disturbance) in disturbances.iter().enumerate() {
            let Some(disturbance) = disturbance else { continue };
            progress.budget.store(share * (number + 1), Ordering::Relaxed);
            progress.tell();
            let (publishing, whom) = disturbance.wants();
            let middle = share * number + share / 3;
            let limit = self.env.patience() * 2;
            let mut chosen = None;
            let is_met = progress.until(limit, |progress| {
                chosen = match publishing {
                    true => Some(whom % PUBLISHERS).filter(|whom| progress.is_publishing_beyond(*whom, middle)),
                    // Order may leave everything to one member.
                    false => (0..MEMBERS)
                        .map(|next| (whom % MEMBERS + next) % MEMBERS)
                        .find(|whom| if self.buries { progress.is_burying(*whom) } else { progress.is_holding(*whom) }),
                };
                chosen.is_some()
            });
            is_met.await;
            let Some(whom) = chosen else { fail!("nothing was in flight that a fault could meet, for {limit:?}") };
            progress.awaited.store(disturbance.is_awaited(), Ordering::Relaxed);
            progress.tell();
            let happened = disturbance.happen(self.env, whom).await;
            progress.awaited.store(false, Ordering::Relaxed);
            happened?;
        }
        *progress.healed.lock() = Some(Instant::now());
        progress.budget.store(EACH, Ordering::Relaxed);
        progress.tell();
        Ok(())
    }

    /// Whatever is stored arrives by itself, and what was given back again; how much did not. As long as something arrives, the
    /// rest is late and not lost.
    async fn settle_down(&self) -> Proof<usize> {
        let limit = self.env.patience() + self.spec.lease * 2;
        let mut lacks = self.progress.lacks();
        while lacks > 0 && self.progress.until(limit, |progress| progress.lacks() < lacks).await {
            lacks = self.progress.lacks();
        }
        self.progress.over.store(true, Ordering::Relaxed);
        Ok(self.progress.lacks())
    }

    async fn publish(&self, number: usize, client: &Client<'e>, seed: u64) -> Proof {
        let mut random = StdRng::seed_from_u64(seed);
        let progress = &self.progress;
        let (mut made, mut more) = (0, 0);
        let (most, pause) = self.beyond;
        while made < EACH {
            let limit = self.env.patience() * 4;
            let mut has_more = false;
            let goes_on = progress.until(limit, |progress| {
                has_more = progress.budget.load(Ordering::Relaxed) <= made;
                !has_more || progress.awaited.load(Ordering::Relaxed) && more < most
            });
            ensure!(goes_on.await, "publisher {number} was not told to go on");
            let count = if has_more { SMALL } else { BATCH.min(EACH - made) };
            let batch: Vec<Message> = (0..count)
                .map(|_| client.message(&self.destination, format!("key {}", random.random_range(0..KEYS)).as_str()))
                .collect();
            let begin = Instant::now();
            if has_more {
                more += count;
            } else {
                made += count;
                progress.made[number].store(made, Ordering::Relaxed);
            }
            self.publish_until_known(number, client, batch, &mut random).await?;
            if has_more {
                tokio::time::sleep(begin.elapsed().clamp(pause, pause * 10)).await;
            }
        }
        Ok(())
    }

    /// Publishes with the same ids until everything is confirmed, but for some that are left as they are.
    async fn publish_until_known(
        &self,
        number: usize,
        client: &Client<'e>,
        batch: Vec<Message>,
        random: &mut StdRng,
    ) -> Proof {
        let progress = &self.progress;
        let (mut left, begin) = (batch, Instant::now());
        loop {
            progress.publishing[number].store(true, Ordering::Relaxed);
            progress.tell();
            let timeout = if progress.healed.lock().is_some() { HEALED_TIMEOUT } else { PUBLISH_TIMEOUT };
            let outcomes = client.publish_within(left.clone(), timeout).await?;
            progress.publishing[number].store(false, Ordering::Relaxed);
            let mut again = Vec::new();
            for (message, outcome) in left.into_iter().zip(outcomes) {
                match outcome {
                    Ok(_) => {
                        progress.stored.lock().insert(message.id().clone());
                    }
                    Err(error) => {
                        is_publishing_in_a_fault(&error)?;
                        if random.random_range(0..ABANDONED) > 0 {
                            again.push(message);
                        }
                    }
                }
            }
            progress.tell();
            if again.is_empty() {
                return Ok(());
            }
            left = again;
            let healed = *progress.healed.lock();
            if let Some(healed) = healed {
                let limit = self.env.patience();
                let since = healed.max(begin).elapsed();
                ensure!(since < limit, "publisher {number} has not recovered {since:?} after the last fault");
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    async fn consume(&self, number: usize, mut consumer: Consumer<'e>, seed: u64) -> Proof {
        let mut random = StdRng::seed_from_u64(seed);
        let progress = &self.progress;
        let mut held: Vec<Held<'e>> = Vec::new();
        loop {
            let came = consumer.receive(40, Duration::from_millis(200)).await?;
            let came_something = !came.is_empty();
            // Nobody knows when something comes again that a member gave back: at the end that is waited for.
            if !progress.forgets.load(Ordering::Relaxed) {
                progress.stored.lock().extend(came.iter().map(|held| held.message().id().clone()));
            }
            held.extend(came);
            progress.holding[number].store(held.len(), Ordering::Relaxed);
            progress.tell();
            if held.is_empty() && progress.over.load(Ordering::Relaxed) {
                return consumer.close().await;
            }
            // Some stay out, so that faults find them unsettled.
            held.shuffle(&mut random);
            let staying = if came_something { held.len() / 2 } else { 0 };
            let batch = held.split_off(staying);
            self.settle(number, batch, &mut random).await?;
            progress.holding[number].store(held.len(), Ordering::Relaxed);
        }
    }

    async fn settle(&self, number: usize, batch: Vec<Held<'e>>, random: &mut StdRng) -> Proof {
        let (mut entries, mut ends, mut burials) = (Vec::new(), Vec::new(), 0);
        for held in batch {
            let settlement = if self.buries { self.settlement(&held, random) } else { self.ack_or_nack(random) };
            let is_end = match settlement {
                Settlement::Ack | Settlement::DeadLetter(_) => true,
                Settlement::Nack(_) => self.spec.max_attempts.is_some_and(|most| held.attempt() >= most),
                Settlement::Release => false,
            };
            burials += usize::from(is_end && !matches!(settlement, Settlement::Ack));
            ends.push(is_end.then(|| held.message().id().clone()));
            entries.push((held, settlement));
        }
        // A fault may wait for a burial that is on its way.
        self.progress.burying[number].store(burials, Ordering::Relaxed);
        self.progress.tell();
        let outcomes = settle(entries).await?;
        self.progress.burying[number].store(0, Ordering::Relaxed);
        for (outcome, ended) in outcomes.into_iter().zip(ends) {
            let is_accounted = match &outcome {
                Ok(_) => true,
                // Dropped with its error it comes back, unless it is settled.
                Err((_, error)) => {
                    is_settling_in_a_fault(error)?;
                    error.effect() == Effect::Unknown
                }
            };
            if let Some(id) = ended.filter(|_| is_accounted) {
                self.progress.accounted.lock().insert(id);
            }
        }
        self.progress.tell();
        Ok(())
    }

    fn ack_or_nack(&self, random: &mut StdRng) -> Settlement {
        let nacks = self.env.record.nack.is_given() && random.random_range(0..NACKED) == 0;
        if nacks { Settlement::Nack(Nack::default()) } else { Settlement::Ack }
    }

    /// Any that the endpoint has, and a failure where the message always fails.
    fn settlement(&self, held: &Held<'e>, random: &mut StdRng) -> Settlement {
        let record = &self.env.record;
        let delay = random.random_range(0..=HELD_BACK);
        let delay = if record.nack_delay.is_given() { Duration::from_millis(delay) } else { Duration::ZERO };
        let fails = held.message().key() == Some(FAILING);
        match random.random_range(0..100) {
            drawn if record.nack.is_given() && (fails || drawn < 12) => {
                Settlement::Nack(Nack { delay, error_type: None })
            }
            12..20 if record.release.is_given() => Settlement::Release,
            20..26 if record.dead_letter.is_given() => Settlement::DeadLetter(Box::new(Verdict::new(Reason::Rejected))),
            _ => Settlement::Ack,
        }
    }
}

/// What a settle may fail with while connections come and go.
pub(crate) fn is_settling_in_a_fault(error: &Error) -> Proof {
    // What it was to settle may be somebody else's by now.
    let is_of_faults = error.kind() == ErrorKind::StaleDelivery || may_pass(error);
    ensure!(is_of_faults, "settling in a fault: {error:?}");
    Ok(())
}

/// What a publish may fail with while connections come and go. What was not attempted for order's sake is `Unavailable` too.
pub(crate) fn is_publishing_in_a_fault(error: &Error) -> Proof {
    ensure!(may_pass(error), "publishing in a fault: {error:?}");
    Ok(())
}

/// A fault is over sooner or later. An error that says that nothing was done and that it will not pass has another cause, of which
/// there is none here: the message is valid, its destination is there, and nobody has closed anything.
fn may_pass(error: &Error) -> bool {
    // RateLimited: what is to be stored finds no room.
    let passes = matches!(error.kind(), ErrorKind::Timeout | ErrorKind::Unavailable | ErrorKind::RateLimited);
    passes || error.effect() == Effect::Unknown
}

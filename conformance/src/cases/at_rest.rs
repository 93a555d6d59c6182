//! What lies at a server when its process is killed, and is in nobody's hands.

use std::time::Duration;

use anybroker_core::{AttemptCount, Reason, RedriveOptions, Settlement, SubscribeSpec, TopologySpec, Verdict};

use super::faults::fault;
use super::server::short_lease;
use crate::case::{Proof, ensure, ensure_eq};
use crate::client::Client;
use crate::consumer::{Consumer, Held, ack_all, ids, settle, sorted};
use crate::env::Env;
use crate::faults::{KILLED, is_settling_in_a_fault, of_server};
use crate::{Case, need};

pub(super) const CASES: &[Case] = &[fault!(
    "faults/what-lies-at-rest-survives-a-killed-server",
    true,
    [need::SURVIVES_KILL],
    "Messages without a member, places of groups, delayed failures and their counts, dead letters and delayed publishes survive the server's process.",
    at_rest
)];

/// What each group has waiting when the server is killed.
const WAITING: usize = 20;
/// How many are settled at a time, before.
const STEP: usize = 4;
/// How long what is delayed has to wait. Servers are there again before it ends, mostly.
const DELAY: Duration = Duration::from_secs(10);
/// Four times as long before the kill as a server may forget acks for that it has confirmed, where the record says that it does, and longer than
/// it takes to tell it of acks that are only recorded. Closing a subscription has done so.
pub(super) const WRITTEN: Duration = Duration::from_secs(4);
/// How long the server is away.
const AWAY: Duration = Duration::from_millis(500);

async fn at_rest(env: &Env) -> Proof {
    let server = env.server()?;
    let client = env.client().await?;
    let unread = Unread::begin(env, &client).await?;
    let half = Half::begin(env, &client).await?;
    let buried = Buried::begin(env, &client).await?;
    let delayed = Later::published(env, &client).await?;
    let failed = Later::failed(env, &client).await?;
    client.close().await?;
    let in_hand = InHand::begin(env).await?;
    tokio::time::sleep(WRITTEN).await;
    let away = async {
        // The fault is that time goes by.
        tokio::time::sleep(AWAY).await;
        Ok(())
    };
    of_server(env, KILLED, server.kill(), away, server.restart()).await?;
    futures_util::try_join!(
        unread.end(env),
        half.end(env),
        Buried::end(buried, env),
        Later::end(delayed, env, "published", first),
        Later::end(failed, env, "nacked", |attempt| second(env, attempt))
    )?;
    in_hand.end(env).await
}

/// A spec of a destination and group with that label. Its lease is one to be waited for: of what a member had fetched and gave back when
/// it closed, a server that was killed may remember only that it is out. So does JetStream (`consumer.go`: what is to be redelivered
/// is a queue in memory, and only what is pending is stored).
fn spec(env: &Env, label: &str) -> SubscribeSpec {
    env.spec(&env.destination(label), &env.group(label)).with_lease(short_lease(env))
}

/// That a fresh client reads these and nothing else.
async fn is_left(env: &Env, spec: &SubscribeSpec, expected: &[String], what: &str) -> Proof {
    let client = env.client().await?;
    let left = client.drain(spec.clone()).await?;
    client.close().await?;
    ensure_eq!(sorted(ids(&left)), sorted(expected.to_vec()), "{what}");
    Ok(())
}

/// Groups that were declared, and have no member.
struct Unread {
    specs: Vec<SubscribeSpec>,
    sent: Vec<String>,
}

impl Unread {
    async fn begin(env: &Env, client: &Client<'_>) -> Proof<Self> {
        let one = spec(env, "unread");
        let mut specs = vec![one.clone()];
        if env.record.groups.is_given() {
            specs.push(env.spec(&one.destinations[0], &env.group("unread-too")).with_lease(one.lease));
        }
        for spec in &specs {
            if env.record.declare.is_given() {
                client.declare(&TopologySpec::group(&spec.destinations[0], spec.group.clone())).await?;
            } else {
                client.subscribe(spec.clone()).await?.close().await?;
            }
        }
        let message = |number| client.message(&one.destinations[0], format!("key {}", number % STEP).as_str());
        let sent: Vec<_> = (0..WAITING).map(message).collect();
        client.publish_ok(sent.clone()).await?;
        Ok(Self { specs, sent: ids(&sent) })
    }

    async fn end(self, env: &Env) -> Proof {
        for spec in &self.specs {
            let client = env.client().await?;
            let left = client.drain(spec.clone()).await?;
            client.close().await?;
            // The canary that the other group was drained with is no message of before.
            let left: Vec<String> = ids(&left).into_iter().filter(|id| self.sent.contains(id)).collect();
            ensure_eq!(sorted(left), sorted(self.sent.clone()), "what {} kept, which had no member", spec.group);
        }
        Ok(())
    }
}

/// A group that has settled half of what there is.
struct Half {
    spec: SubscribeSpec,
    left: Vec<String>,
}

impl Half {
    async fn begin(env: &Env, client: &Client<'_>) -> Proof<Self> {
        let spec = spec(env, "half");
        let mut consumer = client.subscribe(spec.clone()).await?;
        let message = |number| client.message(&spec.destinations[0], format!("key {}", number % STEP).as_str());
        let sent: Vec<_> = (0..WAITING * 2).map(message).collect();
        client.publish_ok(sent.clone()).await?;
        let mut left = ids(&sent);
        for _ in 0..WAITING / STEP {
            let held = consumer.take(STEP).await?;
            left.retain(|id| held.iter().all(|held| held.id() != *id));
            ack_all(held).await?;
        }
        consumer.close().await?;
        Ok(Self { spec, left })
    }

    async fn end(self, env: &Env) -> Proof {
        is_left(env, &self.spec, &self.left, "what was not acked, of twice as many").await
    }
}

/// Dead letters.
struct Buried {
    spec: SubscribeSpec,
    /// The ids of what was refused, and of what died for a reason of its own.
    letters: [String; 2],
}

impl Buried {
    async fn begin(env: &Env, client: &Client<'_>) -> Proof<Option<Self>> {
        if !env.record.dead_letter.is_given() {
            return Ok(None);
        }
        let spec = spec(env, "buried");
        let mut consumer = client.subscribe(spec.clone()).await?;
        client.fill(&spec.destinations[0], "k", 1).await?;
        let rejected = consumer.one().await?;
        client.fill(&spec.destinations[0], "k", 1).await?;
        let letters_of_one = rejected.id();
        rejected.dead_letter(Verdict::new(Reason::Rejected)).await?;
        let other = consumer.one().await?;
        let letters = [letters_of_one, other.id()];
        let verdict =
            Verdict::new(Reason::Other("bad-card".into())).with_error_type("CARD").with_detail("no such card");
        other.dead_letter(verdict).await?;
        consumer.close().await?;
        Ok(Some(Self { spec, letters }))
    }

    async fn end(this: Option<Self>, env: &Env) -> Proof {
        let Some(Self { spec, letters }) = this else { return Ok(()) };
        let client = env.client().await?;
        let (source, group) = (&spec.destinations[0], &spec.group);
        let found = client.letters_until(source, group, letters.len()).await?;
        ensure_eq!(
            sorted(ids(found.iter().map(|letter| &letter.message))),
            sorted(letters.to_vec()),
            "the dead letters after the kill"
        );
        for letter in &found {
            let is_first = letter.message.id().to_string() == letters[0];
            let expected = if is_first { Reason::Rejected } else { Reason::Other("bad-card".into()) };
            ensure_eq!(letter.reason, expected, "the reason of a letter that outlived its server");
            let (error_type, detail) = (letter.error_type.as_deref(), letter.detail.as_deref());
            let told = if is_first { (None, None) } else { (Some("CARD"), Some("no such card")) };
            ensure_eq!((error_type, detail), told, "what a letter that outlived its server tells of the failure");
        }
        if env.record.redrive.is_given() {
            let report = client.redrive(source, group, &RedriveOptions::default()).await?;
            ensure_eq!(report.moved, 2, "letters that are put back");
            let mut consumer = client.subscribe(spec.clone()).await?;
            for held in consumer.take(letters.len()).await? {
                ensure!(letters.contains(&held.id()), "put back were {letters:?}, came {}", held.id());
                ensure_eq!(held.attempt(), 1, "the attempt of what was put back");
                held.ack().await?;
            }
            consumer.close().await?;
        }
        client.close().await?;
        is_left(env, &spec, &[], "beside the letters").await
    }
}

/// A message that is not due yet.
struct Later {
    spec: SubscribeSpec,
    id: String,
    since: u64,
}

impl Later {
    /// It failed, and waits to come back.
    async fn failed(env: &Env, client: &Client<'_>) -> Proof<Option<Self>> {
        if !env.record.nack.is_given() || !env.record.nack_delay.is_given() {
            return Ok(None);
        }
        let spec = spec(env, "failed");
        let mut consumer = client.subscribe(spec.clone()).await?;
        client.fill(&spec.destinations[0], "k", 1).await?;
        let held = consumer.one().await?;
        let (id, since) = (held.id(), env.now());
        held.nack(DELAY).await?;
        consumer.close().await?;
        Ok(Some(Self { spec, id, since }))
    }

    /// It was published with a delay.
    async fn published(env: &Env, client: &Client<'_>) -> Proof<Option<Self>> {
        if !env.record.delayed_publish.is_given() {
            return Ok(None);
        }
        let spec = spec(env, "delayed");
        client.subscribe(spec.clone()).await?.close().await?;
        let message = client.message(&spec.destinations[0], "k").with_delay(DELAY);
        let (id, since) = (message.id().to_string(), env.now());
        client.publish_ok(vec![message]).await?;
        Ok(Some(Self { spec, id, since }))
    }

    /// It comes when its delay has ended, and not before; once, with an attempt that `judge` takes.
    async fn end(this: Option<Self>, env: &Env, verb: &str, judge: impl FnOnce(u32) -> Proof) -> Proof {
        let Some(Self { spec, id, since }) = this else { return Ok(()) };
        let client = env.client().await?;
        let mut consumer = client.subscribe(spec.clone()).await?;
        let held = consumer.one().await?;
        let waited = Duration::from_micros(env.now() - since);
        ensure_eq!(held.id(), id, "what was {verb} with a delay");
        ensure!(env.has_waited(since, DELAY), "{verb} with a delay of {DELAY:?}, and here after {waited:?}");
        judge(held.attempt())?;
        held.ack().await?;
        consumer.close().await?;
        client.close().await?;
        is_left(env, &spec, &[], &format!("behind what was {verb} with a delay, and acked")).await
    }
}

/// The attempt of what failed once.
fn second(env: &Env, attempt: u32) -> Proof {
    match env.record.attempt_count {
        AttemptCount::Exact => ensure_eq!(attempt, 2, "the attempt of what failed before the kill"),
        AttemptCount::Approximate => ensure!(attempt >= 2, "attempt {attempt} of what failed before the kill"),
        // The record says that a count may start anew.
        AttemptCount::Volatile => {}
    }
    Ok(())
}

/// The attempt of what nobody has had yet.
fn first(attempt: u32) -> Proof {
    ensure_eq!(attempt, 1, "the attempt of what was published with a delay");
    Ok(())
}

/// A member with a delivery in its hands: one thing that the kill meets.
struct InHand<'e> {
    client: Client<'e>,
    consumer: Consumer<'e>,
    held: Held<'e>,
}

impl<'e> InHand<'e> {
    async fn begin(env: &'e Env) -> Proof<Self> {
        let client = env.client().await?;
        let spec = spec(env, "in-hand");
        let mut consumer = client.subscribe(spec.clone()).await?;
        client.fill(&spec.destinations[0], "k", 1).await?;
        let held = consumer.one().await?;
        Ok(Self { client, consumer, held })
    }

    /// It is acked, or comes again: the history says that it does not get lost.
    async fn end(self, env: &Env) -> Proof {
        let Self { client, consumer, held } = self;
        let spec = consumer.subscriber.spec().clone();
        if let Some(Err((_, error))) = settle(vec![(held, Settlement::Ack)]).await?.pop() {
            is_settling_in_a_fault(&error)?;
        }
        consumer.close().await?;
        client.close().await?;
        let fresh = env.client().await?;
        let left = fresh.drain(spec).await?;
        fresh.close().await?;
        ensure!(left.len() <= 1, "one message was there, and {} came", left.len());
        Ok(())
    }
}

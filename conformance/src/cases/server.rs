//! Servers that are killed, killed again while everybody comes back, frozen, without room, and closed to their clients.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use anybroker_core::{Error, ErrorKind, Nack, Reason, Settlement, SubscribeSpec, Verdict};
use futures_util::future::BoxFuture;
use tokio::time::Instant;

use super::faults::{fault, millis};
use crate::case::{Breach, Proof, ensure};
use crate::client::Client;
use crate::consumer::{Consumer, Held, ids, settle};
use crate::env::Env;
use crate::faults::{Disturbance, HEALED_TIMEOUT, KILLED, Trial, is_settling_in_a_fault, of_server};
use crate::history::What;
use crate::{Case, ServerControl, need};

pub(super) const CASES: &[Case] = &[
    fault!(
        "faults/a-server-that-is-killed-and-comes-back-loses-nothing-that-was-confirmed",
        true,
        [need::SURVIVES_KILL],
        "What is confirmed survives the server's process; everybody recovers by himself.",
        killed
    ),
    fault!(
        "faults/a-server-that-is-killed-again-while-clients-come-back-loses-nothing-that-was-confirmed",
        true,
        [need::SURVIVES_KILL],
        "Every subscription recovers by itself with back-off, also when the server goes again before everybody is back.",
        killed_again
    ),
    fault!(
        "faults/a-server-that-is-frozen-for-a-while-loses-nothing",
        true,
        [],
        "Every call ends by its deadline while the server is frozen, and everything goes on afterwards.",
        frozen
    ),
    fault!(
        "faults/a-server-without-room-refuses-or-holds-what-is-published-and-loses-nothing",
        true,
        [],
        "Every publish ends by its deadline while there is no room, typed or stored; with room again everything goes on by itself.",
        full
    ),
    fault!(
        "faults/clients-that-are-locked-out-are-told-so-and-go-on-when-they-are-let-in-again",
        true,
        [],
        "Whose credentials are revoked is told so by kind and in time; nothing is lost, and with them again everybody goes on.",
        locked_out
    ),
];

async fn killed(env: &Env) -> Proof {
    disturbed(env, Process::killed_once()).await
}

/// That trial, while the server is killed.
pub(super) async fn killed_in<'e>(env: &'e Env, trial: &Trial<'e>) -> Proof {
    disturb(env, trial, Process::killed_once()).await
}

/// How long the server is away each time. A client that waits longer between two tries finds it there between the two at times,
/// and at times not.
const AWAY: std::ops::Range<u64> = 200..2_500;
/// How long it serves in between: hardly, so that nobody is back yet, or so long that some are, or all and at work again.
const SERVES: std::ops::Range<u64> = 0..1_500;

async fn killed_again(env: &Env) -> Proof {
    let mut random = env.rng();
    let first = Kill { serves: Duration::ZERO, away: millis(&mut random, AWAY) };
    let second = Kill { away: millis(&mut random, AWAY), serves: millis(&mut random, SERVES) };
    disturbed(env, Process::Killed(vec![first, second])).await
}

async fn frozen(env: &Env) -> Proof {
    disturbed(env, Process::Frozen).await
}

async fn full(env: &Env) -> Proof {
    // Whether it can be told to is known before anything has begun.
    env.server()?.relieve().await.map_err(Breach::NotRun)?;
    disturbed(env, Process::Full).await
}

async fn disturbed(env: &Env, process: Process) -> Proof {
    disturb(env, &Trial::new(env, |spec: SubscribeSpec| spec), process).await
}

async fn disturb<'e>(env: &'e Env, trial: &Trial<'e>, process: Process) -> Proof {
    let server = env.server()?;
    let (publishers, members) = Trial::CLIENTS;
    let mut clients = Vec::new();
    for _ in 0..publishers + members {
        clients.push(env.client().await?);
    }
    let members = clients.split_off(publishers);
    let hits: [Box<dyn Disturbance>; 1] = [Box::new(OfServer { server, process })];
    trial.run(clients, members, &hits).await
}

/// The fault is that time goes by.
async fn lasting(time: Duration) -> Proof {
    tokio::time::sleep(time).await;
    Ok(())
}

/// A fault of the server.
struct OfServer {
    server: Arc<dyn ServerControl>,
    process: Process,
}

/// What becomes of its process.
enum Process {
    /// It is killed that often.
    Killed(Vec<Kill>),
    Frozen,
    /// It has no room for new messages.
    Full,
}

impl Process {
    fn killed_once() -> Self {
        Self::Killed(vec![Kill { serves: Duration::ZERO, away: Duration::ZERO }])
    }
}

/// One time of several.
#[derive(Debug)]
struct Kill {
    /// How long it has served before, since it was there again.
    serves: Duration,
    /// How long it stays away.
    away: Duration,
}

pub(super) const FROZEN_SERVER: &str = "server frozen";
const FULL_SERVER: &str = "server without room";
/// Longer than a publish may take.
const FROZEN: Duration = Duration::from_secs(5);
/// Some publishes begin and end in it.
const FULL: Duration = Duration::from_secs(6);
/// What a publish may take then.
const PUBLISH_TIMEOUT: Duration = Duration::from_secs(2);

impl Disturbance for OfServer {
    fn describe(&self) -> String {
        match &self.process {
            Process::Killed(kills) => {
                let told = kills.iter().map(|Kill { serves, away }| format!("after {serves:?} for {away:?}"));
                format!("{KILLED} {}", told.collect::<Vec<_>>().join(", and "))
            }
            Process::Frozen => format!("{FROZEN_SERVER}, for {FROZEN:?}"),
            Process::Full => format!("{FULL_SERVER}, for {FULL:?}"),
        }
    }

    fn wants(&self) -> (bool, usize) {
        (true, 0)
    }

    fn is_awaited(&self) -> bool {
        true
    }

    fn forgets(&self) -> bool {
        matches!(self.process, Process::Killed(_))
    }

    fn happen<'a>(&'a self, env: &'a Env, _: usize) -> BoxFuture<'a, Proof> {
        let server = &self.server;
        Box::pin(async move {
            match &self.process {
                Process::Killed(kills) => {
                    for Kill { serves, away } in kills {
                        tokio::time::sleep(*serves).await;
                        of_server(env, KILLED, server.kill(), lasting(*away), server.restart()).await?;
                    }
                    Ok(())
                }
                Process::Frozen => {
                    of_server(env, FROZEN_SERVER, server.pause(), lasting(FROZEN), server.resume()).await
                }
                Process::Full => without_room(env, server).await,
            }
        })
    }
}

/// A publisher and a member more, beside those of the trial, which are done with their share soon. What they are told while there is
/// no room is looked at: it comes in time, and is of a kind that says that it may pass. Afterwards the publisher goes on by itself.
async fn without_room(env: &Env, server: &Arc<dyn ServerControl>) -> Proof {
    let (publisher, member) = (env.client().await?, env.client().await?);
    let spec = env.spec(&env.destination("full"), &env.group("g")).with_lease(short_lease(env));
    let mut consumer = member.subscribe(spec.clone()).await?;
    for _ in 0..HELD / BATCH {
        publish_until_stored(env, &publisher, &spec, "before").await?;
    }
    let held = consumer.take(env.at_once(HELD)).await?;
    let mut turned_away = 0;
    let publishing = async {
        let begin = Instant::now();
        while begin.elapsed() < FULL {
            for error in publish(&publisher, &spec).await? {
                let passes =
                    matches!(error.kind(), ErrorKind::RateLimited | ErrorKind::Unavailable | ErrorKind::Timeout);
                ensure!(passes, "publishing while there is no room: {error:?}");
                turned_away += 1;
            }
            // A server that refuses at once is asked now and then.
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        Ok(())
    };
    let settling = settle_one_by_one(env, &mut consumer, held);
    let mut buried = BTreeSet::new();
    let meanwhile = async {
        let ((), done) = futures_util::try_join!(publishing, settling)?;
        buried = done;
        Ok(())
    };
    of_server(env, FULL_SERVER, server.fill(), meanwhile, server.relieve()).await?;
    publish_until_stored(env, &publisher, &spec, "with room again").await?;
    consumer.close().await?;
    publisher.drain(spec.clone()).await?;
    if env.record.dead_letter.is_given() {
        let letters = publisher.letters(&spec.destinations[0], &spec.group).await?;
        let letters: BTreeSet<String> = ids(letters.iter().map(|letter| &letter.message)).into_iter().collect();
        let lost: Vec<_> = buried.difference(&letters).collect();
        ensure!(lost.is_empty(), "buried while there was no room, and no letters: {lost:?}");
    }
    for client in [publisher, member] {
        client.close().await?;
    }
    match turned_away {
        0 => Err(Breach::Inconclusive("the server took everything while it was said to have no room".into())),
        _ => Ok(()),
    }
}

/// What a member has when the room ends, and how many messages are published at once.
const HELD: usize = 20;
const BATCH: usize = 5;

/// Acks one, nacks the next and buries the third, for as long as there is no room, and then acks what comes again. What cannot be
/// buried or put back is still this member's, and is acked instead. Answers what was buried.
async fn settle_one_by_one<'e>(
    env: &'e Env,
    consumer: &mut Consumer<'e>,
    held: Vec<Held<'e>>,
) -> Proof<BTreeSet<String>> {
    let begin = Instant::now();
    let pause = FULL / u32::try_from(HELD).unwrap_or(1);
    let judged = |outcomes: Vec<_>| {
        let failed = outcomes.into_iter().filter_map(|outcome: Result<_, (_, Error)>| outcome.err());
        failed.map(|(_, error)| error).try_for_each(|error| is_settling_in_a_fault(&error))
    };
    let mut buried = BTreeSet::new();
    for (number, held) in held.into_iter().enumerate() {
        let nack = Nack { delay: Duration::ZERO, error_type: None };
        let (settlement, id) = match number % 3 {
            1 if env.record.nack.is_given() => (Settlement::Nack(nack), None),
            2 if env.record.dead_letter.is_given() => {
                (Settlement::DeadLetter(Box::new(Verdict::new(Reason::Rejected))), Some(held.id()))
            }
            _ => (Settlement::Ack, None),
        };
        match held.settle(settlement).await? {
            Ok(_) => buried.extend(id),
            Err((held, error)) => {
                is_settling_in_a_fault(&error)?;
                judged(settle(vec![(held, Settlement::Ack)]).await?)?;
            }
        }
        tokio::time::sleep(pause).await;
    }
    while begin.elapsed() < FULL {
        let came = consumer.receive(10, pause).await?;
        judged(settle(came.into_iter().map(|held| (held, Settlement::Ack)).collect()).await?)?;
    }
    Ok(buried)
}

/// One that is worth waiting for: what cannot be given back comes again when its lease ends.
pub(super) fn short_lease(env: &Env) -> Duration {
    let longest = env.record.limits.lease_max_ms.map_or(Duration::MAX, Duration::from_millis);
    env.lease().max(Duration::from_secs(5)).min(longest)
}

/// Publishes some messages; what failed.
async fn publish(publisher: &Client<'_>, spec: &SubscribeSpec) -> Proof<Vec<Error>> {
    let batch = publisher.messages(&spec.destinations[0], "k", BATCH);
    let outcomes = publisher.publish_within(batch, PUBLISH_TIMEOUT).await?;
    Ok(outcomes.into_iter().filter_map(Result::err).collect())
}

/// The same client publishes again without anybody's help.
pub(super) async fn publish_until_stored(env: &Env, publisher: &Client<'_>, spec: &SubscribeSpec, when: &str) -> Proof {
    let (begin, limit) = (Instant::now(), env.patience());
    loop {
        let batch = publisher.messages(&spec.destinations[0], "k", BATCH);
        let outcomes = publisher.publish_within(batch, HEALED_TIMEOUT).await?;
        let Some(error) = outcomes.into_iter().find_map(Result::err) else { return Ok(()) };
        ensure!(begin.elapsed() < limit, "{when} the publisher publishes nothing for {limit:?}: {error:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Long enough for clients that come back with back-off to be turned away more than once.
const LOCKED_OUT: Duration = Duration::from_secs(6);

/// What a client may be told that is not let in any more: so, or what it knows of it, which is that its connection ended.
fn is_locked_out(error: &Error, what: &str) -> Proof {
    let lost = matches!(error.kind(), ErrorKind::Unavailable | ErrorKind::Timeout | ErrorKind::StaleDelivery);
    ensure!(lost || tells_so(error), "{what} while locked out: {error:?}");
    Ok(())
}

fn tells_so(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::Unauthenticated | ErrorKind::PermissionDenied)
}

async fn locked_out(env: &Env) -> Proof {
    let server = env.server()?;
    server.let_in().await.map_err(Breach::NotRun)?;
    let (publisher, member) = (env.client().await?, env.client().await?);
    let spec = env.spec(&env.destination("d"), &env.group("g")).with_lease(short_lease(env));
    let mut consumer = Some(member.subscribe(spec.clone()).await?);
    publish_until_stored(env, &publisher, &spec, "before").await?;
    let mut held = match &mut consumer {
        Some(consumer) => consumer.take(env.at_once(5)).await?,
        None => Vec::new(),
    };
    let publishing = async {
        // From now on they are locked out: how long that took to be told to the server is not their time.
        let begin = Instant::now();
        let mut told = false;
        while begin.elapsed() < LOCKED_OUT || !told && begin.elapsed() < LOCKED_OUT * 3 {
            for error in publish(&publisher, &spec).await? {
                is_locked_out(&error, "publishing")?;
                told |= tells_so(&error);
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        ensure!(told, "a publisher whose credentials are revoked is never told so");
        Ok(())
    };
    let consuming = async {
        let begin = Instant::now();
        if let Some(first) = held.pop()
            && let Err((_, error)) = first.settle(Settlement::Ack).await?
        {
            is_locked_out(&error, "acking")?;
        }
        while begin.elapsed() < LOCKED_OUT {
            receive(&mut consumer).await?;
        }
        let is_degraded = || env.history.events().iter().any(|event| matches!(event.what, What::Degraded { .. }));
        ensure!(consumer.is_none() || is_degraded(), "a member whose credentials are revoked is never told so");
        Ok(())
    };
    let meanwhile = async { futures_util::try_join!(publishing, consuming).map(drop) };
    of_server(env, "clients locked out", server.lock_out(), meanwhile, server.let_in()).await?;
    drop(held);
    publish_until_stored(env, &publisher, &spec, "let in again").await?;
    gather(env, &member, consumer, &spec, &publisher).await?;
    env.client().await?.drain(spec).await?;
    for client in [publisher, member] {
        client.close().await?;
    }
    Ok(())
}

/// Whatever comes is acked; a subscription that ends with the error of one that is locked out is gone.
async fn receive(consumer: &mut Option<Consumer<'_>>) -> Proof<usize> {
    let Some(open) = consumer else {
        tokio::time::sleep(Duration::from_millis(200)).await;
        return Ok(0);
    };
    let came = match open.try_receive(10, Duration::from_millis(500)).await? {
        Ok(came) => came,
        Err(error) => {
            // A connection that is lost ends no subscription.
            ensure!(tells_so(&error), "receiving while locked out: {error:?}");
            *consumer = None;
            return Ok(0);
        }
    };
    let count = came.len();
    for outcome in settle(came.into_iter().map(|held| (held, Settlement::Ack)).collect()).await? {
        if let Err((_, error)) = outcome {
            is_locked_out(&error, "acking")?;
        }
    }
    Ok(count)
}

/// The member goes on, or one that takes its place on the same client: what is published comes.
async fn gather<'e>(
    env: &'e Env,
    member: &Client<'e>,
    mut consumer: Option<Consumer<'e>>,
    spec: &SubscribeSpec,
    publisher: &Client<'e>,
) -> Proof {
    let (begin, limit) = (Instant::now(), env.patience());
    let mut count = 0;
    publish_until_stored(env, publisher, spec, "let in again").await?;
    while count < 5 {
        ensure!(begin.elapsed() < limit, "let in again, the member receives nothing for {limit:?}");
        if consumer.is_none() {
            consumer = member.try_subscribe(spec.clone()).await?.ok();
        }
        count += receive(&mut consumer).await?;
    }
    if let Some(consumer) = consumer {
        consumer.close().await?;
    }
    Ok(())
}

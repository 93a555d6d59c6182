//! What a client is told that asks a server which has stopped answering.

use std::collections::VecDeque;
use std::time::Duration;

use anybroker_core::{
    AckLevel, DeadLetterFilter, Error, ErrorKind, LagPrecision, MessageId, Nack, Reason, RedriveOptions, Settlement,
    SubscribeSpec, TopologySpec, Verdict,
};
use futures_util::future::{BoxFuture, try_join_all};

use super::faults::fault;
use super::server::{FROZEN_SERVER, publish_until_stored, short_lease};
use crate::case::{Proof, ensure, fail};
use crate::client::Client;
use crate::consumer::{Consumer, Held, settle};
use crate::env::Env;
use crate::faults::of_server;
use crate::history::What;
use crate::{Case, ServerControl};

pub(super) const CASES: &[Case] = &[fault!(
    "faults/every-verb-ends-in-time-and-says-why-while-the-server-is-frozen",
    true,
    [],
    "Every call ends by its deadline, whatever the broker does, with a kind that says that it may pass: settling, dead letters, topology, lag, \
     connecting and closing too; and nothing that no server answered is told as done.",
    every_verb
)];

/// How long whoever closes gives what is on its way.
const GRACE: Duration = Duration::from_secs(2);

async fn every_verb(env: &Env) -> Proof {
    let server = env.server()?;
    let scene = Scene::new(env).await?;
    let (work, dead) = (scene.work.clone(), scene.dead.clone());
    let client = of_frozen(env, server.as_ref(), scene).await?;
    publish_until_stored(env, &client, &work, "thawed").await?;
    client.close().await?;
    for spec in [work, dead] {
        let fresh = env.client().await?;
        fresh.drain(spec).await?;
        fresh.close().await?;
    }
    Ok(())
}

/// A client in the middle of its work, and one that is to be closed.
struct Scene<'e> {
    client: Client<'e>,
    consumer: Consumer<'e>,
    held: VecDeque<Held<'e>>,
    /// Open, and idle.
    idle: Consumer<'e>,
    closing: Client<'e>,
    work: SubscribeSpec,
    /// A source and group with two dead letters, where there are any.
    dead: SubscribeSpec,
    letters: Vec<MessageId>,
}

impl<'e> Scene<'e> {
    async fn new(env: &'e Env) -> Proof<Self> {
        let spec = |label: &str| {
            env.spec(&env.destination(label), &env.group(label)).with_lease(short_lease(env)).with_max_in_flight(20)
        };
        let (work, dead) = (spec("work"), spec("dead"));
        let client = env.client().await?;
        let mut consumer = client.subscribe(work.clone()).await?;
        let keys = 0..env.at_once(SETTLED);
        let sent = keys.map(|key| client.message(&work.destinations[0], format!("key {key}").as_str())).collect();
        client.publish_ok(sent).await?;
        let held = consumer.take(env.at_once(SETTLED)).await?.into();
        let mut burying = client.subscribe(dead.clone()).await?;
        let mut letters = Vec::new();
        if env.record.dead_letter.is_given() {
            for _ in 0..2 {
                client.fill(&dead.destinations[0], "k", 1).await?;
                burying.one().await?.dead_letter(Verdict::new(Reason::Rejected)).await?;
            }
            let found = client.letters_until(&dead.destinations[0], &dead.group, 2).await?;
            letters.extend(found.iter().map(|letter| letter.message.id().clone()));
        }
        burying.close().await?;
        let idle = client.subscribe(spec("idle")).await?;
        if env.record.declare.is_given() {
            client.declare(&TopologySpec::destination(env.destination("unloved"))).await?;
        }
        let closing = env.client().await?;
        closing.subscribe(spec("closing")).await?.close().await?;
        Ok(Self { client, consumer, held, idle, closing, work, dead, letters })
    }
}

/// How many deliveries are settled, each in another way.
const SETTLED: usize = 5;

/// What may be answered that no server has answered.
#[derive(Clone, Copy)]
enum May {
    /// Only that it may pass.
    Fail,
    /// The same, and that it is done as far as the client does it: what was not confirmed is not told as confirmed.
    Do,
}

struct Call<'c> {
    verb: &'static str,
    may: May,
    answer: BoxFuture<'c, Proof<Result<(), Error>>>,
}

/// Asks for everything at once while the server is frozen; the client that is left.
async fn of_frozen<'e>(env: &'e Env, server: &dyn ServerControl, scene: Scene<'e>) -> Proof<Client<'e>> {
    let Scene { client, consumer, mut held, idle, closing, work, dead, letters } = scene;
    {
        let mut calls = verbs(env, &client, &work, &dead, &letters);
        for settlement in settlements(env) {
            let Some(held) = held.pop_front() else { break };
            calls.push(settled(held, settlement));
        }
        if env.record.lease_extension.is_given()
            && let Some(held) = held.front()
        {
            calls.push(Call { verb: "extend", may: May::Do, answer: Box::pin(held.extend(short_lease(env))) });
        }
        calls.push(Call { verb: "close of a subscription", may: May::Do, answer: Box::pin(idle.try_close(GRACE)) });
        let close = env.bounded("close", closing.bus.close(GRACE));
        calls.push(Call { verb: "close", may: May::Do, answer: Box::pin(close) });
        let meanwhile = async { try_join_all(calls.into_iter().map(judged)).await.map(drop) };
        of_server(env, FROZEN_SERVER, server.pause(), meanwhile, server.resume()).await?;
    }
    drop(held);
    consumer.close().await?;
    Ok(client)
}

async fn judged(call: Call<'_>) -> Proof {
    let Call { verb, may, answer } = call;
    match (answer.await?, may) {
        (Ok(()), May::Do) => Ok(()),
        (Ok(()), May::Fail) => fail!("{verb} is told as done by a server that is frozen"),
        (Err(error), _) => {
            // What is held may be somebody else's by then.
            let is_stale = matches!(may, May::Do) && error.kind() == ErrorKind::StaleDelivery;
            let passes = is_stale || matches!(error.kind(), ErrorKind::Timeout | ErrorKind::Unavailable);
            ensure!(passes, "{verb} of a frozen server: {error:?}");
            Ok(())
        }
    }
}

/// Everything that only a server can answer.
fn verbs<'c>(
    env: &'c Env,
    client: &'c Client<'_>,
    work: &'c SubscribeSpec,
    dead: &'c SubscribeSpec,
    ids: &'c [MessageId],
) -> Vec<Call<'c>> {
    let (record, bus) = (&env.record, &client.bus);
    let (destination, group) = (&work.destinations[0], &work.group);
    let mut calls = Vec::new();
    let mut call = |verb, answer| calls.push(Call { verb, may: May::Fail, answer });
    call(
        "connect",
        Box::pin(async move {
            let connected = env.bounded("connect", env.harness.connect()).await?;
            Ok(connected.map(drop))
        }),
    );
    call(
        "subscribe",
        Box::pin(async move {
            let spec = env.spec(destination, &env.group("late"));
            Ok(client.try_subscribe(spec).await?.map(drop))
        }),
    );
    call(
        "verify",
        Box::pin(async move {
            let spec = TopologySpec::group(destination, group.clone());
            env.bounded("verify", bus.verify(&spec)).await
        }),
    );
    if record.declare.is_given() {
        call(
            "declare",
            Box::pin(async move {
                let spec = TopologySpec::group(env.destination("new"), env.group("new"));
                Ok(env.bounded("declare", bus.declare(&spec)).await?.map(drop))
            }),
        );
    }
    if record.declare.is_given() && record.delete.is_given() {
        call(
            "delete",
            Box::pin(async move {
                let unloved = env.destination("unloved");
                env.bounded("delete", bus.delete(&unloved, None)).await
            }),
        );
    }
    if record.describe.is_given() {
        call(
            "describe",
            Box::pin(async move { Ok(env.bounded("describe", bus.describe(destination)).await?.map(drop)) }),
        );
    }
    if record.lag != LagPrecision::default() {
        call("lag", Box::pin(async move { Ok(env.bounded("lag", bus.lag(destination, group)).await?.map(drop)) }));
    }
    if record.dead_letter.is_given() {
        call(
            "dead letters",
            Box::pin(async move {
                let letters = bus.dead_letters(&dead.destinations[0], &dead.group)?;
                let all = DeadLetterFilter::all();
                Ok(env.bounded("dead letters", letters.peek(&all, usize::MAX)).await?.map(drop))
            }),
        );
    }
    if record.dead_letter.is_given() && record.redrive.is_given() {
        call(
            "redrive",
            Box::pin(async move {
                let letters = bus.dead_letters(&dead.destinations[0], &dead.group)?;
                let (destination, group) = (dead.destinations[0].clone(), dead.group.clone());
                client.record(What::RedriveInfo { destination, group, ids: ids.to_vec() });
                let all = RedriveOptions::default();
                Ok(env.bounded("redrive", letters.redrive(&all)).await?.map(drop))
            }),
        );
    }
    if record.dead_letter.is_given() && record.purge.is_given() {
        call(
            "purge",
            Box::pin(async move {
                let letters = bus.dead_letters(&dead.destinations[0], &dead.group)?;
                let (destination, group) = (dead.destinations[0].clone(), dead.group.clone());
                client.record(What::PurgeInvoke { destination, group, ids: ids.to_vec() });
                Ok(env.bounded("purge", letters.purge(&DeadLetterFilter::all())).await?.map(drop))
            }),
        );
    }
    calls
}

fn settlements(env: &Env) -> Vec<Settlement> {
    let record = &env.record;
    let mut settlements = vec![Settlement::Ack];
    if record.dead_letter.is_given() {
        settlements.push(Settlement::DeadLetter(Box::new(Verdict::new(Reason::Rejected))));
    }
    if record.nack.is_given() {
        settlements.push(Settlement::Nack(Nack { delay: Duration::ZERO, error_type: None }));
    }
    if record.release.is_given() {
        settlements.push(Settlement::Release);
    }
    settlements
}

/// What only a member does, such as handing out again what is given back, no server has to answer. That a message is never to come
/// again one has.
fn settled<'c>(held: Held<'c>, settlement: Settlement) -> Call<'c> {
    let (verb, ends) = match &settlement {
        Settlement::Ack => ("ack", true),
        Settlement::Nack(_) => ("nack", false),
        Settlement::Release => ("release", false),
        Settlement::DeadLetter(_) => ("dead letter", true),
    };
    let answer = Box::pin(async move {
        match settle(vec![(held, settlement)]).await?.remove(0) {
            Ok(AckLevel::Confirmed) if ends => fail!("{verb} is told as confirmed by a server that is frozen"),
            Ok(_) => Ok(Ok(())),
            Err((_, error)) => Ok(Err(error)),
        }
    });
    Call { verb, may: May::Do, answer }
}

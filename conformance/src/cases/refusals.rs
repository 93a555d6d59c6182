//! How a refusal is verified: the call answers `Unsupported`, nothing happened, and the object is usable afterwards.

use std::time::Duration;

use anybroker_core::{
    DeadLetterFilter, Error, ErrorKind, Message, Nack, OnFailure, Order, Position, RedriveOptions, Settlement, Start,
    SubscribeSpec, Timestamp, TopologySpec, Verdict,
};

use crate::case::{Breach, Proof, ensure, ensure_eq, fail};
use crate::client::Client;
use crate::consumer::Consumer;
use crate::env::Env;

/// The answer must be a typed refusal.
fn must_be_unsupported<T>(what: &str, answer: Result<T, Error>) -> Proof {
    match answer {
        Ok(_) => fail!("{what} is refused by the record, and works"),
        Err(error) => {
            ensure_eq!(error.kind(), ErrorKind::Unsupported, "{what}: kind of the error ({error})");
            ensure_eq!(error.effect(), anybroker_core::Effect::NotDone, "{what}: effect of the error");
            Ok(())
        }
    }
}

/// A client with a group on a destination.
async fn set_up(env: &Env) -> Proof<(Client<'_>, Consumer<'_>)> {
    let client = env.client().await?;
    let consumer = client.subscribe(env.spec(&env.destination("d"), &env.group("g"))).await?;
    Ok((client, consumer))
}

/// The client and the consumer work as before, and there is nothing but what they do now.
async fn still_usable(client: &Client<'_>, mut consumer: Consumer<'_>) -> Proof {
    let destination = consumer.subscriber.spec().destinations[0].clone();
    let sent = client.fill(&destination, "after", 1).await?;
    let held = consumer.one().await?;
    ensure_eq!(held.id(), sent[0].id().to_string(), "the next delivery after the refusal");
    ensure_eq!(held.attempt(), 1, "its attempt");
    held.ack().await?;
    consumer.close().await
}

/// What is no call of its own cannot be refused by one; the report shows the record.
pub(crate) async fn cannot_be_called(_: &Env) -> Proof {
    Err(Breach::NotRun("the record refuses a guarantee that no single call asks for".into()))
}

async fn spec_refused(env: &Env, what: &str, change: impl FnOnce(SubscribeSpec) -> SubscribeSpec) -> Proof {
    let (client, consumer) = set_up(env).await?;
    let spec = change(env.spec(&env.destination("d"), &env.group("other")));
    must_be_unsupported(what, client.try_subscribe(spec).await?)?;
    still_usable(&client, consumer).await
}

pub(crate) async fn key_order(env: &Env) -> Proof {
    spec_refused(env, "order per key", |spec| spec.with_order(Order::Key)).await
}

pub(crate) async fn total_order(env: &Env) -> Proof {
    spec_refused(env, "total order", |spec| spec.with_order(Order::Total)).await
}

async fn on_failure_refused(env: &Env, what: &str, on_failure: OnFailure) -> Proof {
    // Where no order is given either, the order is what is refused first: Unsupported in any case.
    spec_refused(env, what, |spec| spec.with_order(Order::Key).with_on_failure(on_failure)).await
}

pub(crate) async fn block(env: &Env) -> Proof {
    on_failure_refused(env, "blocking a key", OnFailure::Block).await
}

pub(crate) async fn park(env: &Env) -> Proof {
    on_failure_refused(env, "parking a key", OnFailure::Park).await
}

pub(crate) async fn replay(env: &Env) -> Proof {
    spec_refused(env, "starting at a time", |spec| spec.with_start(Start::Time(Timestamp::now()))).await
}

pub(crate) async fn start_position(env: &Env) -> Proof {
    spec_refused(env, "starting at a position", |spec| spec.with_start(Start::Position(Position::new(0)))).await
}

pub(crate) async fn start_latest(env: &Env) -> Proof {
    spec_refused(env, "starting at the latest", |spec| spec.with_start(Start::Latest)).await
}

pub(crate) async fn patterns(env: &Env) -> Proof {
    let (client, consumer) = set_up(env).await?;
    let pattern = format!("{}.*", env.scope());
    let spec =
        SubscribeSpec::new(pattern.as_str(), env.group("other")).with_topology(anybroker_core::TopologyMode::Verify);
    // A name with a star is either refused as a pattern, or the name of a destination that does not exist.
    match client.try_subscribe(spec).await? {
        Ok(_) => fail!("patterns are refused by the record, and `{pattern}` was subscribed to"),
        Err(error) => ensure!(
            matches!(error.kind(), ErrorKind::Unsupported | ErrorKind::NotFound | ErrorKind::ConfigInvalid),
            "a pattern where patterns are refused: {error:?}"
        ),
    }
    still_usable(&client, consumer).await
}

async fn settlement_refused(env: &Env, what: &str, settlement: Settlement) -> Proof {
    let (client, mut consumer) = set_up(env).await?;
    client.fill(&env.destination("d"), "k", 1).await?;
    let held = consumer.one().await?;
    match held.settle(settlement.clone()).await? {
        Ok(_) => fail!("{what} is refused by the record, and works"),
        Err((held, error)) => {
            ensure_eq!(error.kind(), ErrorKind::Unsupported, "{what}: kind of the error ({error})");
            // That was the check layer. An adapter that would do it is too modest, or lies about doing it.
            ensure!(
                held.refused_by_adapter(settlement).await?,
                "{what} is refused by the record; the adapter answers Ok"
            );
        }
    }
    still_usable(&client, consumer).await
}

pub(crate) async fn nack(env: &Env) -> Proof {
    settlement_refused(env, "a nack", Settlement::Nack(Nack::default())).await
}

pub(crate) async fn nack_delay(env: &Env) -> Proof {
    let nack = Nack { delay: Duration::from_secs(60), error_type: None };
    settlement_refused(env, "a nack with a delay", Settlement::Nack(nack)).await
}

pub(crate) async fn release(env: &Env) -> Proof {
    settlement_refused(env, "giving back", Settlement::Release).await
}

pub(crate) async fn extension(env: &Env) -> Proof {
    let (client, mut consumer) = set_up(env).await?;
    client.fill(&env.destination("d"), "k", 1).await?;
    let held = consumer.one().await?;
    must_be_unsupported("extending a lease", held.extend(Duration::from_secs(60)).await?)?;
    held.ack().await?;
    still_usable(&client, consumer).await
}

/// Where nothing is leased, what is out for longer than a lease does not come again.
pub(crate) async fn lease(env: &Env) -> Proof {
    let client = env.client().await?;
    let lease = env.lease();
    let mut consumer = client.subscribe(env.spec(&env.destination("d"), &env.group("g")).with_lease(lease)).await?;
    client.fill(&env.destination("d"), "k", 1).await?;
    let held = consumer.one().await?;
    env.pass(lease + lease / 2).await;
    consumer.silence("leases are refused by the record").await?;
    held.ack().await?;
    still_usable(&client, consumer).await
}

/// Where hand-overs are not counted, none of them tells its number.
pub(crate) async fn crash_count(env: &Env) -> Proof {
    let (client, mut consumer) = set_up(env).await?;
    client.fill(&env.destination("d"), "k", 1).await?;
    for round in 1..=3 {
        let held = consumer.one().await?;
        let told = held.delivery().facts().deliveries;
        ensure!(
            told.is_none_or(|told| told <= held.attempt()),
            "hand-over {round} without an outcome is counted ({told:?}), and the record refuses to count them"
        );
        if round == 3 {
            held.ack().await?;
            break;
        }
        drop(held);
    }
    still_usable(&client, consumer).await
}

pub(crate) async fn dead_letter(env: &Env) -> Proof {
    let verdict = Verdict::new(anybroker_core::Reason::Rejected);
    settlement_refused(env, "a dead letter", Settlement::DeadLetter(Box::new(verdict))).await?;
    let client = env.client().await?;
    must_be_unsupported("reading dead letters", client.bus.dead_letters(env.destination("d"), env.group("g")))?;
    let spec = env.spec(&env.destination("d"), &env.group("other")).with_max_attempts(3);
    must_be_unsupported("a limit of attempts", client.try_subscribe(spec).await?)
}

pub(crate) async fn redrive(env: &Env) -> Proof {
    let (client, consumer) = set_up(env).await?;
    match client.bus.dead_letters(env.destination("d"), env.group("g")) {
        Err(error) => ensure_eq!(error.kind(), ErrorKind::Unsupported, "dead letters"),
        Ok(letters) => must_be_unsupported("redrive", letters.redrive(&RedriveOptions::default()).await)?,
    }
    still_usable(&client, consumer).await
}

pub(crate) async fn purge(env: &Env) -> Proof {
    let (client, consumer) = set_up(env).await?;
    match client.bus.dead_letters(env.destination("d"), env.group("g")) {
        Err(error) => ensure_eq!(error.kind(), ErrorKind::Unsupported, "dead letters"),
        Ok(letters) => must_be_unsupported("purge", letters.purge(&DeadLetterFilter::all()).await)?,
    }
    still_usable(&client, consumer).await
}

pub(crate) async fn groups(env: &Env) -> Proof {
    let (client, consumer) = set_up(env).await?;
    let other = env.spec(&env.destination("d"), &env.group("other"));
    must_be_unsupported("a second group", client.try_subscribe(other).await?)?;
    still_usable(&client, consumer).await
}

/// Where nothing is kept before a group exists, a publish must not be confirmed and lost.
pub(crate) async fn kept_before_group(env: &Env) -> Proof {
    let client = env.client().await?;
    let destination = env.destination("nobody");
    match client.send(client.message(&destination, "k")).await? {
        Ok(_) => fail!("confirmed although no group exists and none is kept for: it is lost"),
        Err(error) => ensure_eq!(error.kind(), ErrorKind::NotFound, "publishing where no group exists ({error})"),
    }
    let consumer = client.subscribe(env.spec(&destination, &env.group("g"))).await?;
    still_usable(&client, consumer).await
}

async fn message_refused(env: &Env, what: &str, kind: ErrorKind, change: impl FnOnce(Message) -> Message) -> Proof {
    let (client, consumer) = set_up(env).await?;
    let message = change(client.message(&env.destination("d"), "k"));
    match client.send(message).await? {
        Ok(_) => fail!("{what} is refused by the record, and was accepted"),
        Err(error) => ensure_eq!(error.kind(), kind, "{what}: kind of the error ({error})"),
    }
    still_usable(&client, consumer).await
}

pub(crate) async fn delayed_publish(env: &Env) -> Proof {
    let delay = Duration::from_secs(1);
    message_refused(env, "a delayed publish", ErrorKind::Unsupported, |message| message.with_delay(delay)).await
}

pub(crate) async fn ttl(env: &Env) -> Proof {
    let ttl = Duration::from_secs(60);
    message_refused(env, "a time to live", ErrorKind::Unsupported, |message| message.with_ttl(ttl)).await
}

pub(crate) async fn tombstones(env: &Env) -> Proof {
    let tombstone = |message: Message| Message::tombstone(message.destination().clone(), "k");
    message_refused(env, "a tombstone", ErrorKind::InvalidMessage, tombstone).await
}

/// Where a missing destination is not detected, a publish creates it: what is confirmed is there.
pub(crate) async fn unroutable(env: &Env) -> Proof {
    let client = env.client().await?;
    let destination = env.destination("missing");
    match client.send(client.message(&destination, "k")).await? {
        Ok(_) if env.record.kept_before_group.is_given() => {
            let left = client.drain(env.spec(&destination, &env.group("g"))).await?;
            ensure_eq!(left.len(), 1, "messages of a destination that the publish created");
            Ok(())
        }
        Ok(_) => Ok(()),
        Err(error) => fail!("a missing destination is not detected, says the record; the publish answers {error}"),
    }
}

/// Without dedup both copies are stored: nothing is swallowed by an id that was seen before.
pub(crate) async fn dedup(env: &Env) -> Proof {
    let (client, mut consumer) = set_up(env).await?;
    let message = client.message(&env.destination("d"), "k");
    for _ in 0..2 {
        let receipts = client.publish_ok(vec![message.clone()]).await?;
        ensure!(!receipts[0].duplicate, "the receipt says duplicate, the record says there is no dedup");
    }
    for _ in 0..2 {
        // One by one: a queue may lock a key while one of it is out.
        let held = consumer.one().await?;
        ensure_eq!(held.id(), message.id().to_string(), "the copies");
        held.ack().await?;
    }
    still_usable(&client, consumer).await
}

pub(crate) async fn transactions(env: &Env) -> Proof {
    let (client, consumer) = set_up(env).await?;
    must_be_unsupported("a transaction", client.bus.begin().await)?;
    still_usable(&client, consumer).await
}

pub(crate) async fn declare(env: &Env) -> Proof {
    let (client, consumer) = set_up(env).await?;
    let spec = TopologySpec::destination(env.destination("other"));
    must_be_unsupported("declaring", client.bus.declare(&spec).await)?;
    still_usable(&client, consumer).await
}

pub(crate) async fn describe(env: &Env) -> Proof {
    let (client, consumer) = set_up(env).await?;
    must_be_unsupported("describing", client.bus.describe(env.destination("d")).await)?;
    still_usable(&client, consumer).await
}

pub(crate) async fn delete(env: &Env) -> Proof {
    let (client, consumer) = set_up(env).await?;
    must_be_unsupported("deleting", client.bus.delete(env.destination("d"), None).await)?;
    still_usable(&client, consumer).await
}

pub(crate) async fn lag(env: &Env) -> Proof {
    let (client, consumer) = set_up(env).await?;
    must_be_unsupported("lag", client.bus.lag(env.destination("d"), env.group("g")).await)?;
    still_usable(&client, consumer).await
}

//! Topology, lag, and what is answered for what is not there.

use std::time::{Duration, Instant};

use anybroker_core::{
    AckLevel, Declared, Destination, Effect, ErrorKind, Figure, Group, Lag, Nack, OnFailure, Precision, Reason,
    Settlement, SubscribeSpec, TopologyMode, TopologySpec, Verdict,
};

use super::case;
use crate::Case;
use crate::case::{Breach, Proof, ensure, ensure_eq, fail};
use crate::client::Client;
use crate::consumer::{Consumer, Held, ack_all, held_ids, ids, settle, sorted};
use crate::env::Env;
use crate::need;

pub(super) const CASES: &[Case] = &[
    case!(
        "topology/declaring-twice-changes-nothing",
        [need::DECLARE],
        "declare creates what is missing and verifies what exists.",
        declare_twice
    ),
    case!(
        "topology/verify-changes-nothing-and-tells-what-is-missing",
        [need::DECLARE],
        "verify checks that it exists; changes nothing; NotFound.",
        verify
    ),
    case!(
        "topology/subscribing-under-verify-creates-nothing",
        [],
        "TopologyMode::Verify: what is missing is NotFound.",
        subscribe_verify
    ),
    case!(
        "topology/describe-shows-groups-and-both-names",
        [need::DECLARE, need::DESCRIBE],
        "describe shows logical and physical names.",
        describe
    ),
    case!(
        "topology/a-deleted-group-is-gone-and-others-stay",
        [need::DELETE, need::GROUPS],
        "Deletes a group with its dead letters; other groups are untouched.",
        delete_group
    ),
    case!(
        "topology/a-deleted-destination-ends-its-subscriptions-with-not-found",
        [need::DELETE],
        "A destination deleted underneath ends in a typed error, never in silence.",
        delete_destination
    ),
    case!(
        "topology/a-group-that-is-deleted-ends-its-subscriptions-and-no-others",
        [need::DELETE, need::GROUPS],
        "A consumer deleted underneath ends in a typed error, never in silence; other groups are untouched.",
        delete_group_underneath
    ),
    case!(
        "topology/what-failed-when-its-group-was-deleted-is-not-told-as-kept",
        [need::DELETE, need::GROUPS, need::NACK, need::DEAD_LETTER],
        "A dead letter or a retry that cannot be stored is not told as done, and comes to nobody else.",
        fails_without_a_group
    ),
    case!(
        "topology/what-does-not-exist-is-not-found",
        [],
        "NotFound: the destination, group or dead letter does not exist.",
        not_found
    ),
    case!(
        "topology/a-bad-spec-is-refused-with-every-bad-field",
        [],
        "Every bad field at once, before the broker is asked.",
        bad_spec
    ),
    case!(
        "topology/an-unmet-requirement-is-refused-with-its-remedy",
        [],
        "An unmet requirement refuses the connection, naming requirement, endpoint and remedy.",
        requirements
    ),
    case!(
        "topology/every-refused-verb-and-option-answers-unsupported-without-side-effect",
        [],
        "A refused verb answers Unsupported, without side effect; nothing is silently ignored.",
        unsupported_matrix
    ),
    case!(
        "lag/the-figures-equal-what-is-known",
        [need::LAG],
        "Ready, in flight, delayed, age of the oldest; each optional, with its precision.",
        lag_figures
    ),
    case!(
        "lag/each-group-has-its-own",
        [need::LAG, need::GROUPS],
        "What the group has left to do: what one settles is nothing to another.",
        lag_per_group
    ),
];

async fn declare_twice(env: &Env) -> Proof {
    let (destination, group) = (env.destination("d"), env.group("g"));
    let client = env.client().await?;
    let spec = TopologySpec::group(&destination, &group);
    client.declare(&spec).await?;
    let sent = client.fill(&destination, "k", 3).await?;
    ensure_eq!(client.bus.declare(&spec).await?, Declared::Existed, "declaring again");
    let spec = TopologySpec::destination(&destination);
    ensure_eq!(client.bus.declare(&spec).await?, Declared::Existed, "declaring its destination");
    let left = env.client().await?.drain(env.spec(&destination, &group)).await?;
    ensure_eq!(sorted(ids(&left)), sorted(ids(&sent)), "what the group keeps through a second declaration");
    Ok(())
}

/// The answer must be `NotFound`.
fn must_be_not_found<T>(what: &str, answer: Result<T, anybroker_core::Error>) -> Proof {
    match answer {
        Ok(_) => fail!("{what}: Ok"),
        Err(error) => {
            ensure_eq!(error.kind(), ErrorKind::NotFound, "{what} ({error})");
            Ok(())
        }
    }
}

async fn verify(env: &Env) -> Proof {
    let (destination, group) = (env.destination("d"), env.group("g"));
    let client = env.client().await?;
    let (of_destination, of_group) =
        (TopologySpec::destination(&destination), TopologySpec::group(&destination, &group));
    for _ in 0..2 {
        must_be_not_found("verifying a missing destination", client.bus.verify(&of_destination).await)?;
    }
    client.declare(&of_destination).await?;
    client.bus.verify(&of_destination).await?;
    for _ in 0..2 {
        must_be_not_found("verifying a missing group", client.bus.verify(&of_group).await)?;
    }
    client.declare(&of_group).await?;
    Ok(client.bus.verify(&of_group).await?)
}

async fn subscribe_verify(env: &Env) -> Proof {
    let (destination, group) = (env.destination("d"), env.group("g"));
    let client = env.client().await?;
    let spec = env.spec(&destination, &group).with_topology(TopologyMode::Verify);
    for _ in 0..2 {
        must_be_not_found("subscribing to a missing destination", client.try_subscribe(spec.clone()).await?.map(drop))?;
    }
    client.subscribe(env.spec(&destination, &group)).await?.close().await?;
    client.subscribe(spec).await?.close().await
}

async fn describe(env: &Env) -> Proof {
    let destination = env.destination("d.with.dots");
    let mut groups = vec![env.group("a"), env.group("b.c")];
    if !env.record.groups.is_given() {
        groups.remove(0);
    }
    let client = env.client().await?;
    for group in &groups {
        client.declare(&TopologySpec::group(&destination, group)).await?;
    }
    client.fill(&destination, "k", 2).await?;
    let description = client.bus.describe(&destination).await?;
    ensure_eq!(description.destination, destination, "the logical name");
    ensure!(!description.physical.is_empty(), "the physical name is empty");
    let mut found: Vec<_> = description.groups.iter().map(|group| group.group.clone()).collect();
    found.sort();
    ensure_eq!(found, groups, "the groups");
    for group in &description.groups {
        ensure!(!group.physical.is_empty() && !group.dead_letters.is_empty(), "a physical name is empty: {group:?}");
    }
    if let Some(messages) = description.messages {
        ensure!(messages >= 2, "{messages} messages stored, 2 were published");
    }
    must_be_not_found("describing a missing destination", client.bus.describe(env.destination("missing")).await)
}

async fn delete_group(env: &Env) -> Proof {
    let destination = env.destination("d");
    let (gone, stays) = (env.group("gone"), env.group("stays"));
    let client = env.client().await?;
    for group in [&gone, &stays] {
        client.subscribe(env.spec(&destination, group)).await?.close().await?;
    }
    let sent = client.fill(&destination, "k", 3).await?;
    client.bus.delete(&destination, Some(&gone)).await?;
    must_be_not_found("deleting it again", client.bus.delete(&destination, Some(&gone)).await)?;
    must_be_not_found("verifying it", client.bus.verify(&TopologySpec::group(&destination, &gone)).await)?;
    let left = env.client().await?.drain(env.spec(&destination, &stays)).await?;
    ensure_eq!(sorted(ids(&left)), sorted(ids(&sent)), "what the other group reads");
    Ok(())
}

/// What was deleted underneath ends the subscription, and not in silence.
async fn ends_with_not_found(env: &Env, consumer: &mut Consumer<'_>, deleted: &str) -> Proof {
    let deadline = Instant::now() + env.patience();
    loop {
        ensure!(Instant::now() < deadline, "a subscription of a deleted {deleted} goes on in silence");
        match consumer.try_receive(10, Duration::from_millis(200)).await? {
            Ok(came) => ensure!(came.is_empty(), "{} deliveries of a deleted {deleted}", came.len()),
            Err(error) => {
                ensure_eq!(error.kind(), ErrorKind::NotFound, "receiving from a deleted {deleted} ({error})");
                return Ok(());
            }
        }
    }
}

async fn delete_destination(env: &Env) -> Proof {
    let destination = env.destination("d");
    let (client, other) = (env.client().await?, env.client().await?);
    let mut consumer = client.subscribe(env.spec(&destination, &env.group("g"))).await?;
    client.fill(&destination, "k", 1).await?;
    let held = consumer.one().await?;
    other.bus.delete(&destination, None).await?;
    ends_with_not_found(env, &mut consumer, "destination").await?;
    // Settling what was out is harmless, and is not told a success that it is not.
    if let Err((_, error)) = held.settle(Settlement::Ack).await? {
        ensure!(
            matches!(error.kind(), ErrorKind::StaleDelivery | ErrorKind::NotFound),
            "an ack after the deletion: {error:?}"
        );
    }
    must_be_not_found("deleting it again", other.bus.delete(&destination, None).await)
}

async fn fails_without_a_group(env: &Env) -> Proof {
    let destination = env.destination("d");
    let (gone, stays) = (env.group("gone"), env.group("stays"));
    let (client, other) = (env.client().await?, env.client().await?);
    let mut consumer = client.subscribe(env.spec(&destination, &gone)).await?;
    let mut neighbour = client.subscribe(env.spec(&destination, &stays)).await?;
    let nack = |delay| Settlement::Nack(Nack { delay, error_type: None });
    let mut settlements = vec![nack(Duration::ZERO), Settlement::DeadLetter(Box::new(Verdict::new(Reason::Rejected)))];
    if (need::NACK_DELAY.given)(&env.record) {
        settlements.push(nack(Duration::from_millis(200)));
    }
    client.fill(&destination, "k", settlements.len()).await?;
    let held = consumer.take(settlements.len()).await?;
    ack_all(neighbour.take(settlements.len()).await?).await?;
    if let Err(error) = other.bus.delete(&destination, Some(&gone)).await {
        // Groups of a log have members, and are not deleted under them: what failed has its group.
        ensure!(error.effect() == Effect::NotDone && error.kind() == ErrorKind::Unavailable, "deleting it: {error:?}");
        for outcome in settle(held.into_iter().zip(settlements).collect()).await? {
            outcome.map_err(|(_, error)| error)?;
        }
        ensure_eq!(client.letters_until(&destination, &gone, 1).await?.len(), 1, "dead letters");
        return Ok(());
    }
    for (held, settlement) in held.into_iter().zip(settlements) {
        let what = format!("{settlement:?}");
        match held.settle(settlement).await? {
            Ok(level) => fail!("{what} after the deletion of its group answers Ok ({level:?})"),
            Err((_, error)) => ensure!(
                matches!(error.kind(), ErrorKind::StaleDelivery | ErrorKind::NotFound),
                "{what} after the deletion of its group: {error:?}"
            ),
        }
    }
    neighbour.silence_then_canary(&client, "nothing failed in this group").await
}

async fn delete_group_underneath(env: &Env) -> Proof {
    let destination = env.destination("d");
    let (gone, stays) = (env.group("gone"), env.group("stays"));
    let (client, other) = (env.client().await?, env.client().await?);
    let mut consumer = client.subscribe(env.spec(&destination, &gone)).await?;
    let mut neighbour = client.subscribe(env.spec(&destination, &stays)).await?;
    client.fill(&destination, "k", 1).await?;
    let held = consumer.one().await?;
    neighbour.one().await?.ack().await?;
    match other.bus.delete(&destination, Some(&gone)).await {
        Ok(()) => {}
        // Groups of a log have members, and are not deleted under them.
        Err(error) if error.effect() == Effect::NotDone && error.kind() == ErrorKind::Unavailable => {
            held.ack().await?;
            client.fill(&destination, "k", 1).await?;
            consumer.one().await?.ack().await?;
            neighbour.one().await?.ack().await?;
            consumer.close().await?;
            neighbour.close().await?;
            other.bus.delete(&destination, Some(&gone)).await?;
            let of_group = TopologySpec::group(&destination, &gone);
            return must_be_not_found("verifying it", client.bus.verify(&of_group).await);
        }
        Err(error) => return Err(error.into()),
    }
    ends_with_not_found(env, &mut consumer, "group").await?;
    // What was out has no group any more in which it could be done.
    match held.settle(Settlement::Ack).await? {
        Ok(level) => {
            ensure!(level != AckLevel::Confirmed, "an ack after the deletion of its group answers Ok, confirmed");
        }
        Err((_, error)) => ensure!(
            matches!(error.kind(), ErrorKind::StaleDelivery | ErrorKind::NotFound),
            "an ack after the deletion: {error:?}"
        ),
    }
    let sent = client.fill(&destination, "k", 3).await?;
    let came = neighbour.take(3).await?;
    ensure_eq!(sorted(held_ids(&came)), sorted(ids(&sent)), "what the other group reads");
    ack_all(came).await?;
    neighbour.silence_then_canary(&client, "all were acked").await?;
    must_be_not_found("verifying it", client.bus.verify(&TopologySpec::group(&destination, &gone)).await)
}

async fn not_found(env: &Env) -> Proof {
    let (missing, group) = (env.destination("missing"), env.group("missing"));
    let client = env.client().await?;
    let bus = &client.bus;
    if env.record.lag != anybroker_core::LagPrecision::default() {
        must_be_not_found("lag", bus.lag(&missing, &group).await)?;
    }
    if env.record.delete.is_given() {
        must_be_not_found("delete", bus.delete(&missing, None).await)?;
        must_be_not_found("delete of a group", bus.delete(&missing, Some(&group)).await)?;
    }
    if env.record.dead_letter.is_given() {
        must_be_not_found("reading dead letters", bus.dead_letters(&missing, &group)?.page(None, 10).await)?;
        let consumer = client.subscribe(env.spec(&env.destination("d"), &env.group("g"))).await?;
        let letters = bus.dead_letters(env.destination("d"), env.group("g"))?;
        let filter = anybroker_core::DeadLetterFilter::all();
        ensure_eq!(letters.count(&filter).await?, 0, "dead letters of a group that has none");
        consumer.close().await?;
    }
    Ok(())
}

async fn bad_spec(env: &Env) -> Proof {
    let client = env.client().await?;
    let spec = SubscribeSpec::new("", "")
        .with_max_in_flight(0)
        .with_lease(Duration::ZERO)
        .with_max_attempts(0)
        .with_crash_limit(0)
        .with_on_failure(OnFailure::Block);
    match client.try_subscribe(spec).await? {
        Ok(_) => fail!("a spec with seven mistakes was accepted"),
        Err(error) => {
            ensure_eq!(error.kind(), ErrorKind::ConfigInvalid, "kind ({error})");
            let mut named: Vec<_> = error.context().map(|(name, _)| name).collect();
            named.sort_unstable();
            let expected =
                ["crash_limit", "destinations", "group", "lease", "max_attempts", "max_in_flight", "on_failure"];
            ensure_eq!(named, expected.to_vec(), "the fields that are named");
            Ok(())
        }
    }
}

async fn requirements(env: &Env) -> Proof {
    let client = env.client().await?;
    let endpoint = client.bus.endpoint().to_string();
    let mut refused = 0;
    for name in anybroker_core::Requirement::names() {
        let text = name.replace(">=N", &format!(">={}", u64::MAX));
        let requirement = text.parse::<anybroker_core::Requirement>().map_err(Breach::Failed)?;
        let given = need::ALL.iter().find(|need| need.name == name).map(|need| (need.given)(&env.record));
        match (env.record.require(&endpoint, &[requirement]), given) {
            (Ok(()), Some(false)) => fail!("`{text}` is refused by the record, and its requirement is met"),
            (Err(error), Some(true)) => fail!("`{text}` is given, and its requirement is not met: {error}"),
            (Err(error), _) => {
                refused += 1;
                ensure_eq!(error.kind(), ErrorKind::Unsupported, "`{text}`: kind ({error})");
                let told = error.message();
                ensure!(told.contains(&endpoint) && told.contains(text.as_str()), "`{text}`: {told}");
            }
            (Ok(()), _) => {}
        }
    }
    if refused == 0 {
        return Err(Breach::Inconclusive("this endpoint meets every requirement there is".into()));
    }
    Ok(())
}

async fn unsupported_matrix(env: &Env) -> Proof {
    let mut verified = Vec::new();
    for need in need::ALL.iter().filter(|need| !(need.given)(&env.record)) {
        // Names of its own for each, or the groups of one would be in the way of another.
        let own = env.sub(need.name);
        let answer = (need.refusal)(&own).await;
        own.clean_up(false).await?;
        match answer {
            Ok(()) => verified.push(need.name),
            Err(Breach::NotRun(_)) => {}
            Err(Breach::Failed(why)) => fail!("{}: {why}", need.name),
            Err(other) => return Err(other),
        }
    }
    if verified.is_empty() {
        return Err(Breach::NotRun("the record refuses nothing that can be called".into()));
    }
    Ok(())
}

async fn lag_of(env: &Env, client: &Client<'_>, destination: &Destination, group: &Group) -> Proof<Lag> {
    Ok(env.bounded("lag", client.bus.lag(destination, group)).await??)
}

/// The figures are those that the record claims, no more and no less, and as exact.
fn told_as_claimed(env: &Env, lag: &Lag) -> Proof {
    let claimed = &env.record.lag;
    let precision = |figure: Figure| figure.map(|(_, precision)| precision);
    ensure_eq!(precision(lag.ready), claimed.ready, "how exact `ready` is");
    ensure_eq!(precision(lag.in_flight), claimed.in_flight, "how exact `in_flight` is");
    ensure_eq!(precision(lag.delayed), claimed.delayed, "how exact `delayed` is");
    // Of nothing there is no age.
    if let Some((_, told)) = lag.oldest_age {
        ensure_eq!(Some(told), claimed.oldest_age, "how exact `oldest_age` is");
    }
    Ok(())
}

/// An exact figure must be right at once, an estimate after a while.
async fn must_tell(
    env: &Env,
    client: &Client<'_>,
    place: (&Destination, &Group),
    step: &str,
    expected: (u64, u64, u64),
) -> Proof {
    let deadline = Instant::now() + env.patience();
    loop {
        let lag = lag_of(env, client, place.0, place.1).await?;
        told_as_claimed(env, &lag)?;
        let differs = |figure: Figure, expected: u64| figure.is_some_and(|(count, _)| count != expected);
        let wrong =
            differs(lag.ready, expected.0) || differs(lag.in_flight, expected.1) || differs(lag.delayed, expected.2);
        if !wrong {
            return Ok(());
        }
        let approximate = [lag.ready, lag.in_flight, lag.delayed]
            .iter()
            .flatten()
            .any(|(_, precision)| *precision == Precision::Approximate);
        ensure!(
            approximate && Instant::now() < deadline,
            "{step}: expected (ready, in flight, delayed) {expected:?}, found {lag:?}"
        );
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

async fn lag_figures(env: &Env) -> Proof {
    let (destination, group) = (env.destination("d"), env.group("g"));
    let place = (&destination, &group);
    let client = env.client().await?;
    let mut consumer = client.subscribe(env.spec(&destination, &group).with_max_in_flight(4)).await?;
    must_tell(env, &client, place, "empty", (0, 0, 0)).await?;
    consumer.pause(true).await?;
    client.fill(&destination, None, 10).await?;
    must_tell(env, &client, place, "10 published", (10, 0, 0)).await?;
    env.pass(Duration::from_millis(20)).await;
    let lag = lag_of(env, &client, &destination, &group).await?;
    if let Some((age, _)) = lag.oldest_age {
        ensure!(age >= Duration::from_millis(15), "the oldest is {age:?} old, published more than 20 ms ago");
    }
    consumer.pause(false).await?;
    let mut held: Vec<Held<'_>> = consumer.take(4).await?;
    must_tell(env, &client, place, "4 of 10 delivered", (6, 4, 0)).await?;
    held.pop().ok_or_else(|| Breach::Failed("no delivery".into()))?.ack().await?;
    must_tell(env, &client, place, "1 acked", (6, 3, 0)).await?;
    if env.record.nack_delay.is_given() {
        let delayed = held.pop().ok_or_else(|| Breach::Failed("no delivery".into()))?;
        delayed.nack(Duration::from_secs(60)).await?;
        must_tell(env, &client, place, "1 acked, 1 nacked with a delay", (6, 2, 1)).await?;
    }
    ack_all(held).await?;
    let done = lag_of(env, &client, &destination, &group).await?;
    if let Some((in_flight, Precision::Exact)) = done.in_flight {
        ensure_eq!(in_flight, 0, "in flight when all that was out is settled");
    }
    consumer.close().await
}

async fn lag_per_group(env: &Env) -> Proof {
    let destination = env.destination("d");
    let (one, two) = (env.group("one"), env.group("two"));
    let client = env.client().await?;
    let mut first = client.subscribe(env.spec(&destination, &one)).await?;
    client.subscribe(env.spec(&destination, &two)).await?.close().await?;
    client.fill(&destination, None, 5).await?;
    ack_all(first.take(5).await?).await?;
    must_tell(env, &client, (&destination, &one), "the group that acked all", (0, 0, 0)).await?;
    must_tell(env, &client, (&destination, &two), "the group that read nothing", (5, 0, 0)).await?;
    first.close().await
}

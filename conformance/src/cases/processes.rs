//! Publishers and members whose process is killed at a named point.

use std::collections::BTreeSet;
use std::time::Duration;

use anybroker_core::{
    AckGranularity, AckLevel, AttemptCount, ErrorKind, LateAck, Message, RedriveOptions, SubscribeSpec, Support,
};
use futures_util::future::try_join_all;
use tokio::time::Instant;

use crate::case::{Breach, Proof, ensure, ensure_eq, fail};
use crate::checker::may_be_under_way;
use crate::client::Client;
use crate::consumer::ids;
use crate::env::Env;
use crate::history::{Event, Seen, Verb, What};
use crate::process::{LATER, MISSED, Point, end_after, end_at};
use crate::{Case, Level, need};

/// What is published for a member that ends.
const MESSAGES: usize = 40;
const KEYS: usize = 8;
/// The least lease: time enough for whoever reads what is left, and no longer than has to be waited for.
const LEASE: Duration = Duration::from_secs(5);

pub(super) const CASES: &[Case] = &[
    Case {
        name: "faults/a-publisher-whose-process-is-killed-has-stored-what-was-confirmed",
        level: Level::Reliability,
        proves: "What is confirmed is stored, and nothing is made up, wherever the publisher's process ends.",
        needs: &[],
        alone: true,
        run: |env| Box::pin(publishers(env)),
    },
    Case {
        name: "faults/a-member-whose-process-is-killed-loses-nothing-and-what-it-settled-stays-settled",
        level: Level::Reliability,
        proves: "What a member had comes to others, and what was confirmed as settled does not, wherever its process ends.",
        needs: &[],
        alone: true,
        run: |env| Box::pin(members(env)),
    },
    Case {
        name: "faults/what-a-member-was-told-holds-when-its-process-is-killed-right-after",
        level: Level::Reliability,
        proves: "A delay and its count, a release, a dead letter and acks in any order outlive the process that was told of them.",
        needs: &[],
        alone: true,
        run: |env| Box::pin(told(env)),
    },
    Case {
        name: "faults/a-member-that-stands-still-for-longer-than-its-lease-does-no-harm-when-it-goes-on",
        level: Level::Reliability,
        proves: "A process that was stopped settles nothing of what others have by then, and what nobody else has is not lost.",
        needs: &[],
        alone: true,
        run: |env| Box::pin(stopped(env)),
    },
    Case {
        name: "faults/a-redrive-whose-process-is-killed-loses-no-letter-and-goes-on-when-it-is-asked-for-again",
        level: Level::Reliability,
        proves: "Redrive is resumable: wherever its process ends, each letter is one still, or its message is back; what was left is put back \
                 by the next.",
        needs: &[need::DEAD_LETTER, need::REDRIVE],
        alone: true,
        run: |env| Box::pin(redriven(env)),
    },
];

async fn publishers(env: &Env) -> Proof {
    try_join_all([Point::Publishing, Point::Confirmed].map(|point| one(env, point, 0))).await.map(drop)
}

async fn members(env: &Env) -> Proof {
    let mut points = vec![Point::Holding, Point::Acking, Point::Acked, Point::Closing];
    points.extend(env.record.nack.is_given().then_some(Point::Nacking));
    points.extend(env.record.dead_letter.is_given().then_some(Point::Burying));
    try_join_all(points.into_iter().map(|point| one(env, point, MESSAGES))).await.map(drop)
}

async fn told(env: &Env) -> Proof {
    let mut points = vec![Point::Hole];
    points.extend((env.record.nack.is_given() && env.record.nack_delay.is_given()).then_some(Point::Nacked));
    points.extend(env.record.release.is_given().then_some(Point::Released));
    points.extend(env.record.dead_letter.is_given().then_some(Point::Buried));
    let one = async |point| {
        let ended = one(env, point, MESSAGES).await?;
        match point {
            Point::Hole => hole(env, &ended),
            _ => once(env, point, &ended),
        }
    };
    try_join_all(points.into_iter().map(one)).await.map(drop)
}

/// A short stop, and others get what was held only where the broker's own lease gives it to them.
async fn stopped(env: &Env) -> Proof {
    stands_still(env, matches!(env.record.lease, Support::Native), Duration::ZERO).await
}

/// A stop until the broker misses the process, by whatever it does: then others have all that was held.
pub(super) async fn stopped_until_missed(env: &Env) -> Proof {
    stands_still(env, true, MISSED).await
}

async fn stands_still(env: &Env, must_come: bool, missed: Duration) -> Proof {
    let (client, spec, _) = prepared(env, Point::Stopped, MESSAGES).await?;
    let lease = spec.lease;
    let others = async |process| {
        let fresh = env.client().await?;
        let mut consumer = fresh.subscribe(spec.clone()).await?;
        let mut missing: BTreeSet<String> =
            unsettled(&env.history.events(), process).into_iter().map(|seen| seen.id.to_string()).collect();
        let begin = Instant::now();
        while !missing.is_empty() && (must_come || begin.elapsed() < lease * 2) {
            for held in consumer.receive(10, env.quiet()).await? {
                missing.remove(&held.id());
                held.ack().await?;
            }
            let limit = lease * 2 + env.patience() + missed;
            ensure!(
                begin.elapsed() < limit,
                "a stopped process held {missing:?}, which others do not get within {limit:?}"
            );
        }
        consumer.close().await?;
        fresh.close().await
    };
    let process = end_after(env, Point::Stopped, 0, &spec, others).await?;
    let fresh = env.client().await?;
    fresh.drain(spec.clone()).await?;
    let events = env.history.events();
    for (index, event) in events.iter().enumerate().filter(|(_, event)| event.client == process) {
        let What::SettleInvoke { delivery, verb, .. } = &event.what else { continue };
        let Some(seen) = delivery_of(&events, *delivery) else { continue };
        let is_with_others = events[..index]
            .iter()
            .any(|other| matches!(&other.what, What::Deliver(came) if other.client != process && came.id == seen.id));
        let is_refused = events[index..].iter().any(|answer| {
            matches!(&answer.what, What::SettleFail { delivery: of, kind: ErrorKind::StaleDelivery, .. } if of == delivery)
        });
        let may_be_accepted = env.record.late_ack != LateAck::Refused;
        ensure!(
            !is_with_others || is_refused || may_be_accepted,
            "{verb:?} of {} is not refused as stale, although another member has had it since",
            seen.id
        );
    }
    client.close().await?;
    fresh.close().await
}

/// What a client has and has not settled.
fn unsettled(events: &[Event], client: u32) -> Vec<&Seen> {
    let own = || events.iter().filter(|event| event.client == client);
    let is_settled =
        |number: u64| own().any(|event| matches!(event.what, What::SettleOk { delivery, .. } if delivery == number));
    let seen = own().filter_map(|event| match &event.what {
        What::Deliver(seen) => Some(seen),
        _ => None,
    });
    seen.filter(|seen| !is_settled(seen.delivery)).collect()
}

/// How many letters each of those processes finds.
const LETTERS: usize = 24;
const REDRIVES: usize = 3;

async fn redriven(env: &Env) -> Proof {
    let left: Vec<usize> = try_join_all((0..REDRIVES).map(|number| one_redriven(env, number))).await?;
    if left.iter().all(|left| *left == 0) {
        return Err(Breach::Inconclusive("every redrive had ended before its process did".into()));
    }
    Ok(())
}

/// A process that ends in the middle of a redrive; how many letters it has left, which another one puts back.
async fn one_redriven(env: &Env, number: usize) -> Proof<usize> {
    let label = format!("redriving-{number}");
    let (destination, group) = (env.destination(&label), env.group(&label));
    let spec = env.spec(&destination, &group);
    let client = env.client().await?;
    let sent = client.bury(&spec, LETTERS, KEYS).await?;
    end_at(env, Point::Redriving, number, &spec).await?;
    let fresh = env.client().await?;
    let mut missing: BTreeSet<String> = ids(&sent).into_iter().collect();
    let mut consumer = fresh.subscribe(spec.clone()).await?;
    let begin = Instant::now();
    let left = loop {
        for held in consumer.receive(10, env.quiet()).await? {
            missing.remove(&held.id());
            held.ack().await?;
        }
        let left = ids(fresh.letters(&destination, &group).await?.iter().map(|letter| &letter.message));
        if missing.iter().all(|id| left.contains(id)) {
            break left;
        }
        // Where reading leases them, those that the process had read are seen again when that has ended.
        ensure!(
            begin.elapsed() < env.patience() * 2,
            "neither letters any more nor back: {missing:?}; letters: {left:?}"
        );
    };
    consumer.close().await?;
    let report = fresh.redrive(&destination, &group, &RedriveOptions::default()).await?;
    // What the process had asked for may be done a moment after its end: a letter that was read as left is gone then.
    let count = left.len() as u64;
    ensure!(report.moved <= count && report.failed.is_empty(), "{count} letters were left, and put back: {report:?}");
    for id in ids(&fresh.drain(spec).await?) {
        missing.remove(&id);
    }
    ensure!(missing.is_empty(), "put back, and neither letters any more nor back: {missing:?}");
    let remaining = fresh.letters(&destination, &group).await?.len();
    ensure_eq!(remaining, 0, "letters after all were put back");
    for client in [client, fresh] {
        client.close().await?;
    }
    Ok(left.len())
}

/// A process that has ended, and what it left.
struct Ended {
    /// It in the history.
    client: u32,
    /// Every message that was there, in the order in which they were published.
    sent: Vec<String>,
    /// The dead letters.
    letters: Vec<String>,
}

/// What a process finds that ends at that point: its group, which was there first, and as many messages. Each has a destination of its
/// own: members that are gone keep lanes on some brokers until they are missed.
async fn prepared(env: &Env, point: Point, messages: usize) -> Proof<(Client<'_>, SubscribeSpec, Vec<Message>)> {
    let (destination, group) = (env.destination(&point.label()), env.group(&point.label()));
    let longest = env.record.limits.lease_max_ms.map_or(Duration::MAX, Duration::from_millis);
    // Whoever waits until nothing that it has settled is under way holds the rest for as long.
    let waits =
        if point == Point::Holding { may_be_under_way(env.record.ack_level) + env.quiet() } else { Duration::ZERO };
    let lease = env.lease().max(LEASE + waits).min(longest);
    let spec = env.spec(&destination, &group).with_lease(lease);
    let client = env.client().await?;
    client.subscribe(spec.clone()).await?.close().await?;
    let keys = if point == Point::Hole { 1 } else { KEYS };
    let message = |number| client.message(&destination, format!("key {}", number % keys).as_str());
    let sent: Vec<_> = (0..messages).map(message).collect();
    client.publish_ok(sent.clone()).await?;
    Ok((client, spec, sent))
}

/// A process that ends at that point, and a fresh client that reads what is left.
async fn one(env: &Env, point: Point, messages: usize) -> Proof<Ended> {
    let (client, spec, sent) = prepared(env, point, messages).await?;
    let ended = end_at(env, point, 0, &spec).await?;
    let fresh = env.client().await?;
    fresh.drain(spec.clone()).await?;
    let letters = match point {
        Point::Buried => fresh.letters(&spec.destinations[0], &spec.group).await?,
        _ => Vec::new(),
    };
    client.close().await?;
    Ok(Ended { client: ended, sent: ids(&sent), letters: ids(letters.iter().map(|letter| &letter.message)) })
}

/// What the process settled in a way that was answered, and was to come again or to become a letter, did so once.
fn once(env: &Env, point: Point, ended: &Ended) -> Proof {
    let events = env.history.events();
    let verb = match point {
        Point::Nacked => Verb::Nack,
        Point::Released => Verb::Release,
        _ => Verb::DeadLetter,
    };
    let mut count = 0;
    for event in events.iter().filter(|event| event.client == ended.client) {
        let What::SettleInvoke { delivery, verb: asked, .. } = &event.what else { continue };
        if *asked != verb {
            continue;
        }
        count += 1;
        let Some(before) = delivery_of(&events, *delivery) else { fail!("the history has no delivery {delivery}") };
        let again: Vec<_> = came_after(&events, ended).filter(|(_, seen)| seen.id == before.id).collect();
        let (id, letters) =
            (before.id.to_string(), ended.letters.iter().filter(|id| **id == before.id.to_string()).count());
        if point == Point::Buried {
            ensure_eq!(letters, 1, "the letters of {id}, which was buried before the process ended");
            ensure_eq!(again.len(), 0, "deliveries of {id}, which was buried before the process ended");
            continue;
        }
        ensure_eq!(again.len(), 1, "deliveries of {id} after the process ended");
        let (at, seen) = &again[0];
        let waited = Duration::from_micros(at.saturating_sub(event.at));
        ensure!(
            point != Point::Nacked || waited >= LATER,
            "{id} was nacked with {LATER:?}, and is back after {waited:?}"
        );
        let expected = if point == Point::Nacked { before.attempt + 1 } else { before.attempt };
        match env.record.attempt_count {
            AttemptCount::Exact => ensure_eq!(seen.attempt, expected, "the attempt of {id} after the process ended"),
            AttemptCount::Approximate => {
                ensure!(seen.attempt >= expected, "attempt {} of {id}, expected {expected} or more", seen.attempt);
            }
            // The record says that a count may start anew; no release raises it.
            AttemptCount::Volatile => {
                ensure!(seen.attempt <= expected, "attempt {} of {id}, expected at most {expected}", seen.attempt);
            }
        }
    }
    ensure!(count > 0, "the process has settled nothing as {verb:?}");
    Ok(())
}

/// Of messages of one key all but one were acked: that one comes. Where acks are individual nothing else does, once the broker
/// has been told; where they are prefixes, nothing before it.
fn hole(env: &Env, ended: &Ended) -> Proof {
    let events = env.history.events();
    let acked: BTreeSet<String> = events
        .iter()
        .filter(|event| event.client == ended.client)
        .filter_map(|event| match &event.what {
            What::SettleOk { delivery, .. } => delivery_of(&events, *delivery).map(|seen| seen.id.to_string()),
            _ => None,
        })
        .collect();
    let seen = events.iter().filter(|event| event.client == ended.client);
    let held: Vec<String> = seen
        .filter_map(|event| match &event.what {
            What::Deliver(seen) => Some(seen.id.to_string()),
            _ => None,
        })
        .collect();
    let holes: Vec<&String> = held.iter().filter(|id| !acked.contains(*id)).collect();
    let [hole] = holes[..] else { fail!("one delivery of {held:?} is to stay out, and {holes:?} did") };
    let after: BTreeSet<String> = came_after(&events, ended).map(|(_, seen)| seen.id.to_string()).collect();
    ensure!(after.contains(hole), "{hole} was not settled when the process ended, and it does not come again");
    let place = ended.sent.iter().position(|id| id == hole);
    // A queue without order may have handed others out, which nobody has acked.
    let comes_again = |id: &&String| acked.contains(*id) && after.contains(*id);
    let below: Vec<&String> = ended.sent.iter().take(place.unwrap_or_default()).filter(comes_again).collect();
    // A stream that nobody has told of an ack yet hands it out again, wherever it stands.
    let is_told = env.record.ack_granularity == AckGranularity::Prefix || env.record.ack_level != AckLevel::Recorded;
    ensure!(below.is_empty() || !is_told, "{below:?} was acked before {hole}, which was not, and it comes again");
    if env.record.ack_granularity == AckGranularity::Individual && is_told {
        let again: Vec<&String> = acked.intersection(&after).collect();
        ensure!(again.is_empty(), "{again:?} was acked, each for itself, and comes again");
    }
    Ok(())
}

fn delivery_of(events: &[Event], number: u64) -> Option<&Seen> {
    events.iter().find_map(|event| match &event.what {
        What::Deliver(seen) if seen.delivery == number => Some(seen),
        _ => None,
    })
}

/// What of these messages came to others than the process, and when.
fn came_after<'e>(events: &'e [Event], ended: &'e Ended) -> impl Iterator<Item = (u64, &'e Seen)> {
    events.iter().filter(|event| event.client != ended.client).filter_map(|event| match &event.what {
        What::Deliver(seen) if ended.sent.iter().any(|id| *id == seen.id.to_string()) => Some((event.at, seen)),
        _ => None,
    })
}

//! Leases end, are extended, and a settle that comes too late is told so.

use std::time::{Duration, Instant};

use anybroker_core::{AttemptCount, ErrorKind, LateAck, Nack, Reason, Settlement, Verdict};

use super::case;
use crate::Case;
use crate::case::{Breach, Proof, ensure, ensure_eq, fail};
use crate::client::Client;
use crate::consumer::{ack_all, held_ids, sorted};
use crate::env::Env;
use crate::need;

pub(super) const CASES: &[Case] = &[
    case!(
        "lease/a-delivery-comes-back-when-its-lease-has-ended-and-not-before",
        [need::LEASE],
        "Deliveries are leased and come back when the lease ends.",
        expiry
    ),
    case!(
        "lease/an-ended-lease-is-no-failed-attempt",
        [need::LEASE],
        "attempt = 1 + failed handler outcomes; a lost lease is none, where the count is exact.",
        uncounted
    ),
    case!("lease/an-extended-lease-holds", [need::LEASE, need::EXTENSION], "extend: keep the lease.", extension),
    case!(
        "lease/a-late-ack-is-refused-as-stale-or-accepted-as-the-record-says",
        [need::LEASE],
        "A settle after the lease is gone is a typed StaleDelivery wherever we can know it; where the broker accepts late acks, the record says so.",
        late_ack
    ),
    case!(
        "lease/a-stale-settle-harms-no-other-delivery",
        [need::LEASE],
        "A stale settle harms no other delivery of its batch.",
        stale_harms_none
    ),
    case!(
        "lease/a-late-nack-release-dead-letter-or-extension-is-stale-and-leaves-nothing-behind",
        [need::LEASE, need::NACK],
        "A settle after the lease is gone is StaleDelivery; it takes nothing from the member that has the message by then.",
        late_others
    ),
];

/// Long enough that the machine's own pauses do not end it by accident.
fn lease(env: &Env) -> Duration {
    env.lease()
}

async fn expiry(env: &Env) -> Proof {
    let (destination, group) = (env.destination("d"), env.group("g"));
    let client = env.client().await?;
    let spec = env.spec(&destination, &group).with_lease(lease(env));
    let mut consumer = client.subscribe(spec).await?;
    let leased = env.now();
    let sent = client.fill(&destination, "k", 1).await?;
    let held = consumer.one().await?;
    if env.harness.clock().is_some() {
        env.pass(lease(env) - Duration::from_millis(1)).await;
        consumer.silence("the lease has not ended").await?;
        env.pass(Duration::from_millis(1)).await;
    }
    let again = consumer.one().await?;
    let waited = Duration::from_micros(env.now() - leased);
    ensure_eq!(again.id(), sent[0].id().to_string(), "what comes back");
    // Leases are told in whole milliseconds (`Timestamp`), so that one may end within the millisecond before.
    let least = lease(env) - Duration::from_millis(1);
    ensure!(env.has_waited(leased, least), "leased for {:?}, and back after {waited:?}", lease(env));
    consumer.ack_in_time(again, leased).await?;
    held.freeze();
    consumer.silence_then_canary(&client, "it was acked").await
}

async fn uncounted(env: &Env) -> Proof {
    let (destination, group) = (env.destination("d"), env.group("g"));
    let client = env.client().await?;
    let mut consumer = client.subscribe(env.spec(&destination, &group).with_lease(lease(env))).await?;
    let leased = env.now();
    let sent = client.fill(&destination, "k", 1).await?;
    for round in 0..3 {
        let held = consumer.one().await?;
        ensure_eq!(held.id(), sent[0].id().to_string(), "what comes in round {round}");
        if env.record.attempt_count == AttemptCount::Exact {
            ensure_eq!(held.attempt(), 1, "the attempt after {round} ended leases");
        }
        if let Some(deliveries) = held.delivery().facts().deliveries {
            ensure!(deliveries > round, "hand-over {} is told as number {deliveries}", round + 1);
        }
        if round == 2 {
            consumer.ack_in_time(held, leased).await?;
            break;
        }
        held.freeze();
        if env.harness.clock().is_some() {
            env.pass(lease(env)).await;
        }
    }
    Ok(())
}

async fn extension(env: &Env) -> Proof {
    let (destination, group) = (env.destination("d"), env.group("g"));
    let client = env.client().await?;
    let short = lease(env);
    // As long as nothing else expires in a case, so that no pause of the machine ends it.
    let long = env.spec(&destination, &group).lease;
    let mut consumer = client.subscribe(env.spec(&destination, &group).with_lease(short)).await?;
    let leased = env.now();
    client.fill(&destination, "k", 1).await?;
    let deadline = Instant::now() + env.patience();
    let held = loop {
        let held = consumer.one().await?;
        let Err(error) = held.extend(long).await? else { break held };
        // On a machine that stood still for so long, the lease had ended in truth: it comes again.
        if error.kind() != ErrorKind::StaleDelivery || !env.has_waited(leased, short) {
            return Err(error.into());
        }
        if Instant::now() >= deadline {
            return Err(Breach::Inconclusive(format!("always too late to extend: {error}")));
        }
    };
    env.pass(short + short / 2).await;
    consumer.silence("the lease was extended").await?;
    held.ack().await?;
    consumer.silence_then_canary(&client, "it was acked").await
}

/// Lets the lease of everything that is out end, and waits until the first of it is with another member.
async fn let_it_end<'e>(env: &'e Env, client: &Client<'e>) -> Proof<crate::consumer::Consumer<'e>> {
    let other = client.subscribe(env.spec(&env.destination("d"), &env.group("g"))).await?;
    if env.harness.clock().is_some() {
        env.pass(lease(env)).await;
    }
    Ok(other)
}

async fn late_ack(env: &Env) -> Proof {
    let (destination, group) = (env.destination("d"), env.group("g"));
    let (one, two) = (env.client().await?, env.client().await?);
    let mut first = one.subscribe(env.spec(&destination, &group).with_lease(lease(env))).await?;
    let sent = one.fill(&destination, "k", 1).await?;
    let late = first.one().await?;
    let mut second = let_it_end(env, &two).await?;
    let held = second.one().await?;
    ensure_eq!(held.id(), sent[0].id().to_string(), "what the other member gets");
    match (late.settle(Settlement::Ack).await?, env.record.late_ack) {
        (Err((_, error)), LateAck::Refused | LateAck::Possible) => {
            ensure_eq!(error.kind(), ErrorKind::StaleDelivery, "a late ack ({error})");
            // The zombie's ack took nothing away: the message is with the other, who fails and gets it again.
            if env.record.nack.is_given() {
                held.nack(Duration::ZERO).await?;
                let again = second.one().await?;
                ensure_eq!(again.id(), sent[0].id().to_string(), "what comes back after the stale ack");
                again.ack().await?;
            } else {
                held.ack().await?;
            }
        }
        (Err((_, error)), LateAck::Accepted) => fail!("late acks are accepted, says the record; it answers {error}"),
        (Ok(_), LateAck::Refused) => fail!("late acks are refused, says the record; it answers Ok"),
        (Ok(_), LateAck::Accepted | LateAck::Possible) => {
            // The message is done, or the other one's to settle: neither harms anything.
            drop(held.settle(Settlement::Ack).await?);
        }
    }
    second.silence_then_canary(&two, "it was acked").await
}

async fn stale_harms_none(env: &Env) -> Proof {
    let (destination, group) = (env.destination("d"), env.group("g"));
    let client = env.client().await?;
    let mut first = client.subscribe(env.spec(&destination, &group).with_lease(lease(env))).await?;
    client.fill(&destination, "a", 1).await?;
    let mut late = first.one().await?;
    let mut second = let_it_end(env, &client).await?;
    second.one().await?.ack().await?;
    // A batch of a stale one and a good one, of two subscriptions.
    let leased = env.now();
    client.fill(&destination, "b", 1).await?;
    let deadline = Instant::now() + env.patience();
    loop {
        ensure!(Instant::now() < deadline, "no good entry was settled beside a stale one");
        let mut came = second.receive(1, Duration::from_millis(50)).await?;
        let is_seconds = !came.is_empty();
        if !is_seconds {
            came = first.receive(1, Duration::from_millis(50)).await?;
        }
        let Some(good) = came.pop() else { continue };
        let mut outcomes = crate::consumer::settle(vec![(late, Settlement::Ack), (good, Settlement::Ack)]).await?;
        let (good, stale) = (outcomes.pop(), outcomes.pop());
        let back = match stale {
            Some(Err((held, error))) => {
                ensure_eq!(error.kind(), ErrorKind::StaleDelivery, "the stale entry");
                Some(held)
            }
            Some(Ok(_)) if env.record.late_ack == LateAck::Refused => {
                fail!("late acks are refused, says the record; beside a good one it answers Ok")
            }
            _ => None,
        };
        let Some(Err((_, error))) = good else { break };
        // The lease of the first member is short: it may have ended in truth, on a machine that stood still.
        let ended = !is_seconds && error.kind() == ErrorKind::StaleDelivery && env.has_waited(leased, lease(env));
        match back {
            Some(held) if ended => late = held,
            _ => fail!("the good entry of a batch with a stale one: {error:?}"),
        }
    }
    first.close().await?;
    second.silence_then_canary(&client, "all were acked").await
}

async fn late_others(env: &Env) -> Proof {
    let (destination, group) = (env.destination("d"), env.group("g"));
    let (one, two) = (env.client().await?, env.client().await?);
    let mut verbs = vec![("nack", Some(Settlement::Nack(Nack::default())))];
    if env.record.release.is_given() {
        verbs.push(("release", Some(Settlement::Release)));
    }
    if env.record.dead_letter.is_given() {
        verbs.push(("dead letter", Some(Settlement::DeadLetter(Box::new(Verdict::new(Reason::Rejected))))));
    }
    if env.record.lease_extension.is_given() {
        verbs.push(("extension", None));
    }
    verbs.truncate(env.at_once(verbs.len()));
    let mut first = one.subscribe(env.spec(&destination, &group).with_lease(lease(env))).await?;
    // Of keys of their own: nothing holds them back.
    for (verb, _) in &verbs {
        one.fill(&destination, *verb, 1).await?;
    }
    let late = first.take(verbs.len()).await?;
    let mut second = let_it_end(env, &two).await?;
    let held = second.take(late.len()).await?;
    ensure_eq!(
        sorted(held_ids(&held)),
        sorted(held_ids(&late)),
        "what the other member gets when the leases have ended"
    );
    for (late, (verb, settlement)) in late.into_iter().zip(verbs) {
        let answer = match settlement {
            Some(settlement) => late.settle(settlement).await?.map(drop).map_err(|(held, error)| {
                // The application's again, and of no use to it.
                held.freeze();
                error
            }),
            None => {
                let extended = late.extend(lease(env)).await?;
                late.freeze();
                extended
            }
        };
        match answer {
            Err(error) => ensure_eq!(error.kind(), ErrorKind::StaleDelivery, "a late {verb} ({error})"),
            Ok(()) if env.record.late_ack == LateAck::Refused => {
                fail!("late settles are refused, says the record; a late {verb} answers Ok")
            }
            Ok(()) => {}
        }
    }
    // They are the other member's, and nobody else's.
    ack_all(held).await?;
    if env.record.dead_letter.is_given() {
        ensure_eq!(two.letters(&destination, &group).await?.len(), 0, "dead letters of messages that were acked");
    }
    second.silence_then_canary(&two, "all were acked").await
}

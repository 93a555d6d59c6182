//! Groups each see all messages; where they start, and that they go on.

use std::collections::BTreeSet;
use std::time::Duration;

use anybroker_core::{ErrorKind, Parallelism, Settlement, Start, Timestamp, TopologySpec};

use super::case;
use crate::Case;
use crate::case::{Breach, Proof, ensure, ensure_eq};
use crate::consumer::{Held, ack_all, held_ids, ids, settle};
use crate::env::Env;
use crate::need;

pub(super) const CASES: &[Case] = &[
    case!(
        "groups/each-group-sees-every-message",
        [need::GROUPS],
        "Members share messages, groups each see all.",
        each_sees_all
    ),
    case!(
        "groups/a-retry-returns-only-to-the-group-that-failed",
        [need::GROUPS, need::NACK],
        "Retry returns a message only to the group that failed it.",
        retry_is_scoped
    ),
    case!(
        "groups/a-declared-group-keeps-everything-published-from-then-on",
        [need::DECLARE],
        "A declared group keeps everything that is published from then on, before any member comes.",
        declared_keeps
    ),
    case!(
        "groups/a-late-group-that-starts-earliest-sees-what-is-kept",
        [need::GROUPS, need::KEPT_BEFORE_GROUP],
        "Start::Earliest: with the oldest message that is kept.",
        late_earliest
    ),
    case!(
        "groups/latest-is-fixed-when-subscribe-returns",
        [need::START_LATEST, need::GROUPS],
        "When subscribe returns it is effective: latest is fixed then, and everything confirmed afterwards belongs to the group.",
        latest_is_fixed
    ),
    case!(
        "groups/a-group-that-exists-goes-on-where-it-was",
        [],
        "Start applies to a new group only; a group that exists goes on where it was.",
        goes_on
    ),
    case!(
        "groups/a-group-that-was-deleted-starts-anew",
        [need::DELETE, need::KEPT_BEFORE_GROUP, need::START_LATEST],
        "Start applies to a new group; one that was deleted is new again, without its dead letters.",
        recreated
    ),
    case!(
        "groups/a-group-can-start-at-a-time",
        [need::GROUPS, need::REPLAY],
        "Start::Time: with the first message that was stored at or after this moment.",
        start_time
    ),
    case!(
        "groups/a-group-can-start-at-a-position",
        [need::GROUPS, need::START_POSITION],
        "Start::Position: with this position of each lane.",
        start_position
    ),
    case!(
        "groups/members-that-come-and-go-lose-nothing",
        [],
        "Members may come and go; every message is settled once, and nothing is lost.",
        churn
    ),
    case!(
        "groups/what-is-acked-while-its-lane-moves-does-not-come-again",
        [],
        "Revocation waits for a lane's handlers: what they ack before it is gone is settled for its next owner too.",
        acked_on_the_move
    ),
    case!(
        "groups/what-was-taken-from-a-full-member-is-read-again-when-it-comes-back",
        [],
        "Members may come and go: what another one took while a member was full, that one reads when the other has gone.",
        taken_while_full
    ),
];

async fn each_sees_all(env: &Env) -> Proof {
    let destination = env.destination("d");
    let client = env.client().await?;
    let groups = ["one", "two", "three"].map(|name| env.group(name));
    let mut consumers = Vec::new();
    for group in &groups {
        consumers.push(client.subscribe(env.spec(&destination, group)).await?);
    }
    let sent: BTreeSet<_> = ids(&client.fill(&destination, None, 50).await?).into_iter().collect();
    for (consumer, group) in consumers.iter_mut().zip(&groups) {
        let came = consumer.take(50).await?;
        ensure_eq!(held_ids(&came).into_iter().collect::<BTreeSet<_>>(), sent, "what group {group} sees");
        ack_all(came).await?;
    }
    for consumer in consumers {
        consumer.close().await?;
    }
    for group in &groups {
        // Canaries of earlier drains are this group's too.
        let left = env.client().await?.drain(env.spec(&destination, group)).await?;
        ensure!(left.iter().all(|message| message.key() == Some(b"canary")), "{} are left of {group}", left.len());
    }
    Ok(())
}

async fn retry_is_scoped(env: &Env) -> Proof {
    let destination = env.destination("d");
    let client = env.client().await?;
    let (mut good, mut bad) = (
        client.subscribe(env.spec(&destination, &env.group("good"))).await?,
        client.subscribe(env.spec(&destination, &env.group("bad"))).await?,
    );
    let sent = client.fill(&destination, "k", 1).await?;
    good.one().await?.ack().await?;
    for attempt in 1..=3 {
        let held = bad.one().await?;
        ensure_eq!((held.id(), held.attempt()), (sent[0].id().to_string(), attempt), "what the failing group sees");
        held.nack(Duration::ZERO).await?;
    }
    good.silence("the group has acked").await?;
    bad.one().await?.ack().await?;
    bad.silence("the group has acked").await?;
    good.silence_then_canary(&client, "the group has acked").await
}

async fn declared_keeps(env: &Env) -> Proof {
    let (destination, group) = (env.destination("d"), env.group("g"));
    let client = env.client().await?;
    client.declare(&TopologySpec::group(&destination, &group)).await?;
    let sent: BTreeSet<_> = ids(&client.fill(&destination, None, 10).await?).into_iter().collect();
    // Latest, so that only the declaration can have kept them.
    let spec = env.spec(&destination, &group).with_start(env.latest());
    let left = env.client().await?.drain(spec).await?;
    ensure_eq!(ids(&left).into_iter().collect::<BTreeSet<_>>(), sent, "what the declared group kept");
    Ok(())
}

async fn late_earliest(env: &Env) -> Proof {
    let destination = env.destination("d");
    let client = env.client().await?;
    let mut first = client.subscribe(env.spec(&destination, &env.group("first"))).await?;
    let sent = client.fill(&destination, "k", 10).await?;
    // Half of it is settled by the first group, which is nothing to the second.
    ack_all(first.take(5).await?).await?;
    let left = env.client().await?.drain(env.spec(&destination, &env.group("late"))).await?;
    let found: BTreeSet<_> = ids(&left).into_iter().collect();
    ensure_eq!(found, ids(&sent).into_iter().collect::<BTreeSet<_>>(), "what the late group sees");
    // In any order: the canary has a key of its own.
    let rest = first.take(6).await?;
    ensure!(rest.iter().any(|held| held.message().key() == Some(b"canary")), "the canary did not come");
    Ok(())
}

async fn latest_is_fixed(env: &Env) -> Proof {
    let (destination, group) = (env.destination("d"), env.group("late"));
    let client = env.client().await?;
    let keeper = client.subscribe(env.spec(&destination, &env.group("keeper"))).await?;
    client.fill(&destination, "k", 5).await?;
    let mut late = client.subscribe(env.spec(&destination, &group).with_start(Start::Latest)).await?;
    // Published by another client at once, before the member has received anything.
    let sent = env.client().await?.fill(&destination, "k", 5).await?;
    let came = late.take(5).await?;
    ensure_eq!(
        held_ids(&came).into_iter().collect::<BTreeSet<_>>(),
        ids(&sent).into_iter().collect::<BTreeSet<_>>(),
        "what a group that starts latest sees"
    );
    ack_all(came).await?;
    late.silence_then_canary(&client, "older messages are not the group's").await?;
    keeper.close().await
}

async fn goes_on(env: &Env) -> Proof {
    let (destination, group) = (env.destination("d"), env.group("g"));
    let client = env.client().await?;
    let mut consumer = client.subscribe(env.spec(&destination, &group)).await?;
    let sent = client.fill(&destination, None, 6).await?;
    let came = consumer.take(3).await?;
    let mut seen: BTreeSet<_> = held_ids(&came).into_iter().collect();
    ack_all(came).await?;
    consumer.close().await?;
    // Neither start moves it: not back to the first, not past what is left.
    let mut again = client.subscribe(env.spec(&destination, &group).with_start(env.latest())).await?;
    let came = again.take(1).await?;
    for held in &came {
        ensure!(seen.insert(held.id()), "{} was acked and comes again", held.id());
    }
    ack_all(came).await?;
    again.close().await?;
    let left = env.client().await?.drain(env.spec(&destination, &group).with_start(Start::Earliest)).await?;
    for id in ids(&left) {
        ensure!(seen.insert(id.clone()), "{id} was acked and comes again");
    }
    ensure_eq!(seen, ids(&sent).into_iter().collect::<BTreeSet<_>>(), "all that was seen");
    Ok(())
}

async fn recreated(env: &Env) -> Proof {
    let (destination, group) = (env.destination("d"), env.group("g"));
    let client = env.client().await?;
    let mut consumer = client.subscribe(env.spec(&destination, &group)).await?;
    client.fill(&destination, "k", 4).await?;
    let mut came = consumer.take(4).await?;
    if let (Some(last), true) = (came.pop(), env.record.dead_letter.is_given()) {
        last.dead_letter(anybroker_core::Verdict::new(anybroker_core::Reason::Rejected)).await?;
    }
    ack_all(came).await?;
    consumer.close().await?;
    client.bus.delete(&destination, Some(&group)).await?;
    let mut consumer = client.subscribe(env.spec(&destination, &group).with_start(Start::Latest)).await?;
    let sent = client.fill(&destination, "k", 2).await?;
    let came = consumer.take(2).await?;
    ensure_eq!(
        held_ids(&came).into_iter().collect::<BTreeSet<_>>(),
        ids(&sent).into_iter().collect::<BTreeSet<_>>(),
        "what the group sees when it was created again, at latest"
    );
    ack_all(came).await?;
    if env.record.dead_letter.is_given() {
        ensure_eq!(client.letters(&destination, &group).await?.len(), 0, "dead letters of the new group");
    }
    consumer.silence_then_canary(&client, "older messages are not the new group's").await
}

async fn start_time(env: &Env) -> Proof {
    let destination = env.destination("d");
    let client = env.client().await?;
    let keeper = client.subscribe(env.spec(&destination, &env.group("keeper"))).await?;
    client.fill(&destination, "k", 3).await?;
    env.pass(Duration::from_millis(20)).await;
    let moment = env.harness.clock().map_or_else(Timestamp::now, |clock| anybroker_core::Clock::now(&clock));
    env.pass(Duration::from_millis(20)).await;
    let sent = client.fill(&destination, "k", 3).await?;
    let spec = env.spec(&destination, &env.group("late")).with_start(Start::Time(moment));
    let left = env.client().await?.drain(spec).await?;
    ensure_eq!(
        ids(&left).into_iter().collect::<BTreeSet<_>>(),
        ids(&sent).into_iter().collect::<BTreeSet<_>>(),
        "what a group that starts at {moment} sees"
    );
    keeper.close().await
}

async fn start_position(env: &Env) -> Proof {
    let destination = env.destination("d");
    let client = env.client().await?;
    let mut keeper = client.subscribe(env.spec(&destination, &env.group("keeper"))).await?;
    // One key, so that one lane holds them all.
    let sent = client.fill(&destination, "k", 6).await?;
    let came = keeper.take(6).await?;
    let from =
        came.iter().find(|held| held.id() == sent[3].id().to_string()).and_then(|held| held.delivery().position());
    ack_all(came).await?;
    let Some(from) = from else {
        return Err(Breach::Inconclusive("deliveries tell no position to start from".into()));
    };
    let spec = env.spec(&destination, &env.group("late")).with_start(Start::Position(from));
    let left = env.client().await?.drain(spec).await?;
    ensure_eq!(
        ids(&left).into_iter().collect::<BTreeSet<_>>(),
        ids(&sent[3..]).into_iter().collect::<BTreeSet<_>>(),
        "what a group that starts at {from} sees"
    );
    keeper.close().await
}

async fn churn(env: &Env) -> Proof {
    let (destination, group) = (env.destination("d"), env.group("g"));
    let client = env.client().await?;
    let mut stayer = client.subscribe(env.spec(&destination, &group)).await?;
    let mut sent = BTreeSet::new();
    let mut acked = BTreeSet::new();
    for round in 0..8 {
        let key = format!("key {round}");
        sent.extend(ids(&client.fill(&destination, key.as_str(), 10).await?));
        let visitor = env.client().await?;
        let mut guest = visitor.subscribe(env.spec(&destination, &group)).await?;
        let mut held = guest.receive(5, Duration::from_millis(100)).await?;
        let kept = held.split_off(held.len() / 2);
        acked.extend(held_ids(&held));
        ack_all(held).await?;
        // Leaves with deliveries in its hands.
        guest.close().await?;
        drop(kept);
        visitor.close().await?;
        let held = stayer.receive(5, Duration::from_millis(100)).await?;
        acked.extend(held_ids(&held));
        for outcome in settle(held.into_iter().map(|held| (held, Settlement::Ack)).collect()).await? {
            // With lanes that move, a delivery may be somebody else's by now: it is typed, and it comes again.
            if let Err((_, error)) = outcome {
                ensure_eq!(error.kind(), ErrorKind::StaleDelivery, "an ack while members come and go");
            }
        }
    }
    stayer.close().await?;
    let left = env.client().await?.drain(env.spec(&destination, &group)).await?;
    acked.extend(ids(&left));
    ensure_eq!(acked, sent, "everything that was acked");
    Ok(())
}

async fn acked_on_the_move(env: &Env) -> Proof {
    let (destination, group) = (env.destination("d"), env.group("g"));
    let (client, other) = (env.client().await?, env.client().await?);
    let mut first = client.subscribe(env.spec(&destination, &group)).await?;
    let count = env.at_once(12);
    for number in 0..count {
        client.fill(&destination, format!("key {number}").as_str(), 1).await?;
    }
    let held = first.take(count).await?;
    // Lanes begin to move while the second member joins. What has no lanes moves nothing.
    let (second, ()) = futures_util::try_join!(other.subscribe(env.spec(&destination, &group)), async {
        let deadline = tokio::time::Instant::now() + if has_lanes(env) { env.patience() } else { env.quiet() };
        while first.lanes_lost == 0 && tokio::time::Instant::now() < deadline {
            first.receive(1, Duration::from_millis(20)).await?;
        }
        Ok(())
    })?;
    let mut second = second;
    if has_lanes(env) && first.lanes_lost == 0 {
        return Err(Breach::Inconclusive("no lane moved to the second member".into()));
    }
    let acks = held.into_iter().map(|held| (held, Settlement::Ack)).collect();
    let mut late = BTreeSet::new();
    for outcome in settle(acks).await? {
        // On a machine that stood still the lane may be gone already; then the message is the other one's.
        if let Err((held, error)) = outcome {
            ensure_eq!(error.kind(), ErrorKind::StaleDelivery, "an ack while a lane moves");
            late.insert(held.id());
        }
    }
    first.close().await?;
    let again = second.take(late.len()).await?;
    ensure_eq!(held_ids(&again).into_iter().collect::<BTreeSet<_>>(), late, "what comes to the next owner");
    ack_all(again).await?;
    second.silence_then_canary(&other, "the rest was acked before its lane had moved").await
}

async fn taken_while_full(env: &Env) -> Proof {
    const ALL: usize = 60;
    let (destination, group) = (env.destination("d"), env.group("g"));
    let spec = || env.spec(&destination, &group).with_max_in_flight(10);
    let (client, other) = (env.client().await?, env.client().await?);
    let mut first = client.subscribe(spec()).await?;
    for number in 0..ALL {
        client.fill(&destination, format!("key {number}").as_str(), 1).await?;
    }
    let mut held = first.take(10).await?;
    // It is full until the other one has something: a lane of its own, where there are lanes. Where one member works at a time,
    // the other one gets nothing.
    let mut second = other.subscribe(spec()).await?;
    let deadline = tokio::time::Instant::now() + env.patience();
    let others = loop {
        ensure!(tokio::time::Instant::now() < deadline, "nothing came to the second member");
        held.extend(first.receive(1, Duration::from_millis(20)).await?);
        let came = second.receive(1, Duration::from_millis(20)).await?;
        if !came.is_empty() || env.record.parallelism == Parallelism::One {
            break came;
        }
    };
    // It reads on, to the end of what it can get: whatever it had to stop goes on.
    let mut acked = BTreeSet::new();
    while !held.is_empty() {
        acked.extend(acked_of(held).await?);
        held = first.receive(10, env.quiet()).await?;
    }
    drop(others);
    second.close().await?;
    let deadline = tokio::time::Instant::now() + env.patience();
    while acked.len() < ALL {
        let late = tokio::time::Instant::now() >= deadline;
        ensure!(!late, "{} of {ALL} came to the member that is alone again", acked.len());
        acked.extend(acked_of(first.receive(10, env.quiet()).await?).await?);
    }
    first.silence_then_canary(&client, "all were acked").await
}

/// Acks them, and answers the ids of those whose lane was still the member's.
async fn acked_of(batch: Vec<Held<'_>>) -> Proof<Vec<String>> {
    let mut acked = held_ids(&batch);
    let acks = batch.into_iter().map(|held| (held, Settlement::Ack)).collect();
    for outcome in settle(acks).await? {
        if let Err((held, error)) = outcome {
            ensure_eq!(error.kind(), ErrorKind::StaleDelivery, "an ack while lanes move");
            acked.retain(|id| *id != held.id());
        }
    }
    Ok(acked)
}

fn has_lanes(env: &Env) -> bool {
    matches!(env.record.parallelism, Parallelism::Lanes(_))
}

//! Closing, going away, and going on.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anybroker_core::{AckGranularity, AttemptCount, Destination, ErrorKind, TopologySpec};
use futures_util::future::join_all;

use super::case;
use crate::Case;
use crate::case::{Breach, Proof, ensure, ensure_eq, fail};
use crate::consumer::{Held, ack_all, held_ids, ids, sorted};
use crate::env::Env;
use crate::need;

pub(super) const CASES: &[Case] = &[
    case!(
        "lifecycle/what-was-acked-right-before-a-close-is-not-redelivered-and-the-rest-is",
        [],
        "An ack that returned Ok is not redelivered after a close; what is unsettled goes back.",
        acked_before_close
    ),
    case!(
        "lifecycle/acks-that-were-handed-over-are-done-when-a-close-has-returned",
        [],
        "Close: flush acks, also those whose answer nobody waits for.",
        acks_on_their_way
    ),
    case!(
        "lifecycle/what-a-close-gives-back-is-not-counted-as-an-attempt",
        [need::DEAD_LETTER],
        "Close: what was prefetched or is unsettled goes back without counting as an attempt.",
        close_is_uncounted
    ),
    case!("lifecycle/prefetched-messages-go-back-at-a-close", [], "Close gives back what was prefetched.", prefetched),
    case!(
        "lifecycle/an-ack-hole-before-a-close-brings-back-the-hole-or-the-rest-of-its-lane",
        [],
        "Individual acks: only the hole comes again. Prefix acks: the hole and what is above it, and nothing below.",
        ack_hole
    ),
    case!(
        "lifecycle/an-ack-settles-nothing-of-another-lane-destination-or-group",
        [],
        "Ack: done, never again in this group. It is of one delivery, of its lane and its group.",
        acks_stay_where_they_are
    ),
    case!(
        "lifecycle/a-closed-consumer-takes-nothing-any-more",
        [],
        "Close: stop receiving. What is published afterwards is for those who are there.",
        takes_nothing_more
    ),
    case!(
        "lifecycle/what-had-come-before-a-close-is-not-handed-out-after-it",
        [],
        "After close every verb answers Closed, a receive too for which something had come already; that goes back.",
        hands_nothing_out
    ),
    case!(
        "lifecycle/a-consumer-that-vanishes-loses-nothing",
        [],
        "Never acked by a drop: what a client that goes away without a close held comes back.",
        vanished
    ),
    case!(
        "lifecycle/reading-in-rounds-of-open-and-close-sees-every-message-once",
        [],
        "A group goes on where it was, over any number of closes.",
        rounds
    ),
    case!(
        "lifecycle/a-receive-that-waits-ends-when-the-connection-is-closed",
        [],
        "After close every verb answers Closed, a receive that is waiting included.",
        close_while_receiving
    ),
    case!(
        "lifecycle/after-a-close-every-verb-answers-closed-and-a-second-close-is-ok",
        [],
        "Close is idempotent; every verb answers Closed afterwards.",
        closed_verbs
    ),
    case!(
        "lifecycle/a-close-waits-for-publishes-on-their-way",
        [],
        "Outcomes of publishes on their way are waited for; what is Ok is stored.",
        close_while_publishing
    ),
    case!(
        "lifecycle/closing-one-client-does-not-disturb-another",
        [],
        "Connections are closed by themselves.",
        others_go_on
    ),
];

async fn acked_before_close(env: &Env) -> Proof {
    let (destination, group) = (env.destination("d"), env.group("g"));
    let client = env.client().await?;
    let mut consumer = client.subscribe(env.spec(&destination, &group)).await?;
    let count = env.of_one_key(50);
    let sent = client.fill(&destination, "k", count).await?;
    let mut came = consumer.take(count).await?;
    came.sort_by_key(|held| sent.iter().position(|message| message.id().to_string() == held.id()));
    // The first half, so that prefixes hold it too.
    let kept = came.split_off(count / 2);
    ack_all(came).await?;
    consumer.close().await?;
    drop(kept);
    client.close().await?;
    let left = env.client().await?.drain(env.spec(&destination, &group)).await?;
    let found: BTreeSet<_> = ids(&left).into_iter().collect();
    ensure_eq!(found, ids(&sent[count / 2..]).into_iter().collect::<BTreeSet<_>>(), "what comes after the close");
    ensure_eq!(left.len(), count - count / 2, "how many come after the close");
    Ok(())
}

async fn close_is_uncounted(env: &Env) -> Proof {
    let (destination, group) = (env.destination("d"), env.group("g"));
    let client = env.client().await?;
    let spec = env.spec(&destination, &group).with_max_attempts(2);
    client.subscribe(spec.clone()).await?.close().await?;
    let sent = client.fill(&destination, "k", 3).await?;
    // More closes than attempts are allowed.
    for round in 0..4 {
        let mut consumer = client.subscribe(spec.clone()).await?;
        let came = consumer.take(3).await?;
        ensure_eq!(came.len(), 3, "deliveries in round {round}");
        if env.record.attempt_count != AttemptCount::Approximate {
            let attempts: Vec<u32> = came.iter().map(Held::attempt).collect();
            ensure_eq!(attempts, vec![1, 1, 1], "the attempts after {round} closes");
        }
        consumer.close().await?;
        drop(came);
    }
    let left = env.client().await?.drain(spec).await?;
    ensure_eq!(
        ids(&left).into_iter().collect::<BTreeSet<_>>(),
        ids(&sent).into_iter().collect::<BTreeSet<_>>(),
        "what is left"
    );
    Ok(())
}

async fn prefetched(env: &Env) -> Proof {
    let (destination, group) = (env.destination("d"), env.group("g"));
    let client = env.client().await?;
    let mut first = client.subscribe(env.spec(&destination, &group).with_max_in_flight(100)).await?;
    let count = env.of_one_key(20);
    let sent = client.fill(&destination, "k", count).await?;
    let held = first.one().await?;
    let seen = held.id();
    held.ack().await?;
    let begin = Instant::now();
    first.close().await?;
    let other = env.client().await?;
    let mut second = other.subscribe(env.spec(&destination, &group)).await?;
    let mut found = BTreeSet::from([seen]);
    for _ in 1..count {
        // At once: what the first had may come back as late as the lease of what the second has would end.
        let held = second.one().await?;
        found.insert(held.id());
        held.ack().await?;
    }
    ensure!(begin.elapsed() < env.patience(), "what was prefetched came back after {:?}", begin.elapsed());
    ensure_eq!(found, ids(&sent).into_iter().collect::<BTreeSet<_>>(), "what both consumers saw");
    second.silence_then_canary(&other, "all were acked").await
}

async fn ack_hole(env: &Env) -> Proof {
    let (destination, group) = (env.destination("d"), env.group("g"));
    let client = env.client().await?;
    let mut consumer = client.subscribe(env.spec(&destination, &group)).await?;
    let sent = client.fill(&destination, "k", 10).await?;
    let mut came = consumer.take(10).await?;
    came.sort_by_key(|held| sent.iter().position(|message| message.id().to_string() == held.id()));
    let hole = came.remove(4);
    ack_all(came).await?;
    consumer.close().await?;
    drop(hole);
    client.close().await?;
    let left = ids(&env.client().await?.drain(env.spec(&destination, &group)).await?);
    match env.record.ack_granularity {
        AckGranularity::Individual => ensure_eq!(left, ids(&sent[4..5]), "what comes after the close"),
        AckGranularity::Prefix => {
            // What was acked above the hole may come again; it may also be kept in the commit's metadata.
            ensure!(left.contains(&sent[4].id().to_string()), "the hole does not come again: {left:?}");
            let above: BTreeSet<_> = ids(&sent[4..]).into_iter().collect();
            ensure!(left.iter().all(|id| above.contains(id)), "acked below the hole, and comes again: {left:?}");
        }
    }
    Ok(())
}

async fn acks_stay_where_they_are(env: &Env) -> Proof {
    let (one, two) = (env.destination("one"), env.destination("two"));
    let group = env.group("g");
    let client = env.client().await?;
    let mut consumer = client.subscribe(env.spec(&one, &group).and_destination(&two)).await?;
    let mut other = match env.record.groups.is_given() {
        true => Some(client.subscribe(env.spec(&two, &env.group("other"))).await?),
        false => None,
    };
    let count = env.at_once(12);
    for destination in [&one, &two] {
        for number in 0..count {
            client.fill(destination, format!("key {number}").as_str(), 1).await?;
        }
    }
    let came = consumer.take(2 * count).await?;
    let others = match &mut other {
        Some(other) => other.take(count).await?,
        None => Vec::new(),
    };
    // Everything of one lane, so that it makes a prefix where only prefixes are kept; of the later destination.
    let lane = |held: &Held| (held.message().destination().clone(), held.delivery().lane().index);
    let Some(chosen) = came.iter().map(lane).find(|(destination, _)| *destination == two) else {
        fail!("nothing of {two} came");
    };
    let (acked, kept): (Vec<_>, Vec<_>) = came.into_iter().partition(|held| lane(held) == chosen);
    let of = |destination: &Destination| -> BTreeSet<String> {
        kept.iter().filter(|held| held.message().destination() == destination).map(Held::id).collect()
    };
    let mut expected = vec![(&one, group.clone(), of(&one)), (&two, group, of(&two))];
    ack_all(acked).await?;
    consumer.close().await?;
    if let Some(other) = other {
        expected.push((&two, env.group("other"), held_ids(&others).into_iter().collect()));
        other.close().await?;
    }
    drop((kept, others));
    client.close().await?;
    for (destination, group, expected) in expected {
        let left = env.client().await?.drain(env.spec(destination, &group)).await?;
        // The canary of an earlier drain is this group's too.
        let left = left.iter().filter(|message| message.key() != Some(b"canary"));
        ensure_eq!(
            ids(left).into_iter().collect::<BTreeSet<_>>(),
            expected,
            "what comes again of {destination} to {group}"
        );
    }
    Ok(())
}

async fn takes_nothing_more(env: &Env) -> Proof {
    let (destination, group) = (env.destination("d"), env.group("g"));
    let (client, other) = (env.client().await?, env.client().await?);
    let mut closed = client.subscribe(env.spec(&destination, &group)).await?;
    // A receive that is given up may leave a request behind that asks for messages.
    let receiving = closed.receive(10, env.patience());
    if let Ok(came) = tokio::time::timeout(env.quiet(), receiving).await {
        fail!("{} deliveries of nothing", came?.len());
    }
    closed.close().await?;
    // Its connection stays open.
    let count = env.at_once(12);
    let mut sent = BTreeSet::new();
    for number in 0..count {
        sent.extend(ids(&other.fill(&destination, format!("key {number}").as_str(), 1).await?));
    }
    // The closed one has the time to take it, should it still be at work.
    tokio::time::sleep(env.quiet()).await;
    let mut consumer = other.subscribe(env.spec(&destination, &group)).await?;
    let came = consumer.take(count).await?;
    ensure_eq!(held_ids(&came).into_iter().collect::<BTreeSet<_>>(), sent, "what comes to who is there");
    ack_all(came).await?;
    consumer.silence_then_canary(&other, "all were acked").await?;
    client.close().await
}

async fn hands_nothing_out(env: &Env) -> Proof {
    let (destination, group) = (env.destination("d"), env.group("g"));
    let client = env.client().await?;
    let mut consumer = client.subscribe(env.spec(&destination, &group)).await?;
    let count = env.of_one_key(8);
    let sent = client.fill(&destination, "k", count).await?;
    // Less than there is: the rest may have come as well.
    let held = consumer.take(2).await?;
    client.close().await?;
    match consumer.try_receive(10, Duration::from_millis(100)).await? {
        Ok(came) => fail!("a receive after the close brings {} deliveries", came.len()),
        Err(error) => ensure_eq!(error.kind(), ErrorKind::Closed, "a receive after the close ({error})"),
    }
    drop(held);
    // Noted: what it had fetched comes again, and a broker's own count counts that.
    consumer.vanish();
    let left = env.client().await?.drain(env.spec(&destination, &group)).await?;
    ensure_eq!(
        ids(&left).into_iter().collect::<BTreeSet<_>>(),
        ids(&sent).into_iter().collect::<BTreeSet<_>>(),
        "what comes after the close"
    );
    Ok(())
}

async fn vanished(env: &Env) -> Proof {
    let (destination, group) = (env.destination("d"), env.group("g"));
    let lease = env.lease();
    let spec = env.spec(&destination, &group).with_lease(lease);
    let client = env.client().await?;
    let mut consumer = client.subscribe(spec.clone()).await?;
    let sent = client.fill(&destination, "k", 6).await?;
    let mut came = consumer.take(6).await?;
    came.sort_by_key(|held| sent.iter().position(|message| message.id().to_string() == held.id()));
    let held = came.split_off(2);
    ack_all(came).await?;
    // Gone without a word: the deliveries are not even dropped.
    held.into_iter().for_each(Held::freeze);
    consumer.vanish();
    drop(client);
    if env.harness.clock().is_some() {
        env.pass(lease).await;
    }
    let other = env.client().await?;
    let mut consumer = other.subscribe(env.spec(&destination, &group)).await?;
    let mut found = BTreeSet::new();
    while found.len() < 4 {
        for held in consumer.take(1).await? {
            found.insert(held.id());
            held.ack().await?;
        }
    }
    let expected: BTreeSet<_> = ids(&sent[2..]).into_iter().collect();
    // An ack that was recorded only may be lost with its client.
    ensure!(found.is_superset(&expected), "of {expected:?} came {found:?}");
    if env.record.ack_level == anybroker_core::AckLevel::Confirmed {
        ensure_eq!(found, expected, "what comes after the client vanished");
    }
    consumer.silence_then_canary(&other, "all were acked").await
}

async fn rounds(env: &Env) -> Proof {
    let (destination, group) = (env.destination("d"), env.group("g"));
    let client = env.client().await?;
    client.subscribe(env.spec(&destination, &group)).await?.close().await?;
    let mut sent = BTreeSet::new();
    for number in 0..10 {
        sent.extend(ids(&client.fill(&destination, format!("key {number}").as_str(), 5).await?));
    }
    let mut found = Vec::new();
    for _ in 0..5 {
        let reader = env.client().await?;
        let mut consumer = reader.subscribe(env.spec(&destination, &group)).await?;
        let came = consumer.take(10).await?;
        found.extend(held_ids(&came));
        ack_all(came).await?;
        consumer.close().await?;
        reader.close().await?;
    }
    ensure_eq!(found.len(), 50, "deliveries in five rounds");
    ensure_eq!(found.into_iter().collect::<BTreeSet<_>>(), sent, "what five rounds saw");
    let left = env.client().await?.drain(env.spec(&destination, &group)).await?;
    ensure_eq!(ids(&left), Vec::<String>::new(), "what is left");
    Ok(())
}

async fn close_while_receiving(env: &Env) -> Proof {
    let destination = env.destination("d");
    let client = env.client().await?;
    let mut consumer = client.subscribe(env.spec(&destination, &env.group("g"))).await?;
    let begin = Instant::now();
    let (received, closed) = futures_util::join!(consumer.try_receive(10, env.patience()), async {
        // The receive waits already when the connection is closed.
        tokio::time::sleep(Duration::from_millis(100)).await;
        client.close().await
    });
    closed?;
    let took = begin.elapsed();
    ensure!(took < env.patience() / 2, "the receive ended {took:?} after it began, the close came after 100 ms");
    match received? {
        Ok(came) => ensure!(came.is_empty(), "{} deliveries of nothing", came.len()),
        Err(error) => ensure_eq!(error.kind(), ErrorKind::Closed, "the receive that waited ({error})"),
    }
    match consumer.try_receive(10, Duration::from_millis(100)).await? {
        Ok(_) => Err(Breach::Failed("a receive after the close answers Ok".into())),
        Err(error) => {
            ensure_eq!(error.kind(), ErrorKind::Closed, "a receive after the close ({error})");
            Ok(())
        }
    }
}

async fn closed_verbs(env: &Env) -> Proof {
    let (destination, group) = (env.destination("d"), env.group("g"));
    let client = env.client().await?;
    // Some endpoints keep nothing before a group exists.
    client.subscribe(env.spec(&destination, &group)).await?.close().await?;
    client.fill(&destination, "k", 1).await?;
    client.close().await?;
    client.close().await?;
    let bus = &client.bus;
    let spec = TopologySpec::group(&destination, &group);
    let answers = [
        ("publish", client.send(client.message(&destination, "k")).await?.err()),
        ("subscribe", client.try_subscribe(env.spec(&destination, &group)).await?.err()),
        ("dead letters", bus.dead_letters(&destination, &group).err()),
        ("declare", bus.declare(&spec).await.err()),
        ("verify", bus.verify(&spec).await.err()),
        ("describe", bus.describe(&destination).await.err()),
        ("delete", bus.delete(&destination, None).await.err()),
        ("lag", bus.lag(&destination, &group).await.err()),
        ("begin", bus.begin().await.err()),
    ];
    for (verb, error) in answers {
        let Some(error) = error else {
            return Err(Breach::Failed(format!("{verb} after the close answers Ok")));
        };
        ensure_eq!(error.kind(), ErrorKind::Closed, "{verb} after the close ({error})");
    }
    Ok(())
}

async fn close_while_publishing(env: &Env) -> Proof {
    let (destination, group) = (env.destination("d"), env.group("g"));
    let keeper = env.client().await?;
    keeper.subscribe(env.spec(&destination, &group)).await?.close().await?;
    let client = env.client().await?;
    let publishing = join_all((0..20).map(|_| client.publish(client.messages(&destination, "k", 5))));
    let (outcomes, closed) = futures_util::join!(publishing, client.close());
    closed?;
    let (mut ok, mut other) = (0_usize, 0_usize);
    for batch in outcomes {
        for outcome in batch? {
            match outcome {
                Ok(_) => ok += 1,
                // Handed over behind the close.
                Err(error) if error.kind() == ErrorKind::Closed => other += 1,
                Err(error) => fail!("a publish that was on its way at a close: {error:?}"),
            }
        }
    }
    ensure_eq!(ok + other, 100, "outcomes");
    if ok == 0 {
        return Err(Breach::Inconclusive("no publish was on its way when the close began".into()));
    }
    // The checker compares what the drain brings with what was Ok.
    let left = env.client().await?.drain(env.spec(&destination, &group)).await?;
    ensure!(left.len() >= ok, "{} stored, {ok} were Ok", left.len());
    Ok(())
}

async fn others_go_on(env: &Env) -> Proof {
    let (destination, group) = (env.destination("d"), env.group("g"));
    let (first, second) = (env.client().await?, env.client().await?);
    // One that reads on its own, and one that shares a group with the client that is closed.
    let one = first.subscribe(env.spec(&destination, &group)).await?;
    let mut two = second.subscribe(env.spec(&env.destination("other"), &env.group("two"))).await?;
    second.fill(&env.destination("other"), "k", 1).await?;
    let held = two.one().await?;
    let mut sibling = second.subscribe(env.spec(&destination, &group)).await?;
    one.close().await?;
    first.close().await?;
    // What was out is out still, and is settled where it was.
    held.ack().await?;
    let sent = second.fill(&env.destination("other"), "k", 3).await?;
    let came = two.take(3).await?;
    ensure_eq!(sorted(held_ids(&came)), sorted(ids(&sent)), "deliveries after another client's close");
    ack_all(came).await?;
    let sent = second.fill(&destination, "k", 3).await?;
    let came = sibling.take(3).await?;
    ensure_eq!(
        sorted(held_ids(&came)),
        sorted(ids(&sent)),
        "deliveries to the other member of a closed client's group"
    );
    ack_all(came).await?;
    sibling.silence_then_canary(&second, "all were acked").await?;
    two.silence_then_canary(&second, "all were acked").await
}

async fn acks_on_their_way(env: &Env) -> Proof {
    let (destination, group) = (env.destination("d"), env.group("g"));
    let client = env.client().await?;
    let mut consumer = client.subscribe(env.spec(&destination, &group)).await?;
    let count = env.of_one_key(20);
    client.fill(&destination, "k", count).await?;
    for (index, held) in consumer.take(count).await?.into_iter().enumerate() {
        held.settle_and_forget(index % 2 == 0).await;
    }
    // At once: nobody waits for an answer.
    consumer.close().await?;
    client.close().await?;
    let left = env.client().await?.drain(env.spec(&destination, &group)).await?;
    ensure_eq!(ids(&left), Vec::<String>::new(), "what comes again, although its ack was handed over before the close");
    Ok(())
}

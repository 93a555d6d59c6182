//! Keys among the members of a group: with one at a time, and from one to another.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anybroker_core::{ErrorKind, Order};
use futures_util::future::join;

use super::case;
use crate::Case;
use crate::case::{Proof, ensure, ensure_eq};
use crate::consumer::{Consumer, Held, ack_all, held_ids, ids};
use crate::env::Env;
use crate::need;

pub(super) const CASES: &[Case] = &[
    case!(
        "ordering/a-key-is-with-one-member-at-a-time",
        [need::KEY_ORDER],
        "The unsettled deliveries of one key belong to one member at a time.",
        sticky_key
    ),
    case!(
        "ordering/a-member-that-keeps-another-order-is-refused-or-breaks-none",
        [need::KEY_ORDER],
        "A group whose members disagree about order, as while a service is replaced, breaks it for nobody: who comes later is refused, gets nothing of what the others hold, or keeps the order too.",
        disagreed
    ),
    case!(
        "ordering/a-member-without-order-that-was-paused-breaks-none-when-it-goes-on",
        [need::KEY_ORDER],
        "A member without order that comes back to a group whose members keep one by now takes nothing of what they hold: it is told so, gets nothing, or keeps the order too.",
        paused_meanwhile
    ),
    case!(
        "ordering/what-a-member-drops-comes-in-order-to-another",
        [need::KEY_ORDER],
        "What a member that goes on drops, one delivery after another, comes in order to a member that waits, before what is behind it.",
        dropped
    ),
];

async fn sticky_key(env: &Env) -> Proof {
    let (destination, group) = (env.destination("d"), env.group("g"));
    let (one, two) = (env.client().await?, env.client().await?);
    let spec = env.spec(&destination, &group).with_order(Order::Key);
    let mut first = one.subscribe(spec.clone()).await?;
    let mut second = two.subscribe(spec.clone()).await?;
    let sent = one.fill(&destination, "k", 6).await?;
    let (mut held, first_has_it) = whoever_has_it(env, &mut first, &mut second, 2).await?;
    let (holder, other) = if first_has_it { (&mut first, &mut second) } else { (&mut second, &mut first) };
    other.silence("another member holds deliveries of this key").await?;
    // More of the key may go to the same member meanwhile, and to no other.
    held.extend(holder.receive(2, Duration::from_millis(50)).await?);
    other.silence("another member holds deliveries of this key").await?;
    let count = held.len();
    ensure_eq!(held_ids(&held), ids(&sent[..count]), "what the holder has, in order");
    ack_all(held).await?;
    first.close().await?;
    second.close().await?;
    let left = env.client().await?.drain(spec).await?;
    ensure_eq!(ids(&left), ids(&sent[count..]), "what is left, in order");
    Ok(())
}

/// What comes of a key to whichever of two members gets it, and whether that is the first: with lanes the endpoint chooses.
async fn whoever_has_it<'e>(
    env: &Env,
    first: &mut Consumer<'e>,
    second: &mut Consumer<'e>,
    max: usize,
) -> Proof<(Vec<Held<'e>>, bool)> {
    let deadline = Instant::now() + env.patience();
    loop {
        ensure!(Instant::now() < deadline, "no member got the key");
        let held = first.receive(max, Duration::from_millis(50)).await?;
        if !held.is_empty() {
            return Ok((held, true));
        }
        let held = second.receive(max, Duration::from_millis(50)).await?;
        if !held.is_empty() {
            return Ok((held, false));
        }
    }
}

/// The history says whether a key of the one that keeps order is with the other one as well.
async fn disagreed(env: &Env) -> Proof {
    for (label, first, then) in [("kept", Order::Key, Order::None), ("not-kept", Order::None, Order::Key)] {
        let (destination, group) = (env.destination(label), env.group(label));
        let (one, two) = (env.client().await?, env.client().await?);
        // What the one does not take is there for the other.
        let spec = |order| env.spec(&destination, &group).with_order(order).with_max_in_flight(4);
        let mut was_there = one.subscribe(spec(first)).await?;
        let mut sent = one.fill(&destination, "k", 4).await?;
        let mut held = was_there.take(2).await?;
        let mut came_late = None;
        match two.try_subscribe(spec(then)).await? {
            Ok(consumer) => came_late = Some(consumer),
            Err(error) => {
                ensure_eq!(error.kind(), ErrorKind::AlreadyExists, "the refusal of another order: {error}");
            }
        }
        sent.extend(one.fill(&destination, "k", 20).await?);
        // Whoever gets more of the key; what each has it holds.
        for _ in 0..4 {
            held.extend(was_there.receive(5, env.quiet() / 4).await?);
            if let Some(consumer) = &mut came_late {
                held.extend(consumer.receive(5, env.quiet() / 4).await?);
            }
        }
        drop(held);
        was_there.close().await?;
        // Alone, the order is its own.
        let mut consumer = match came_late {
            Some(consumer) => consumer,
            None => two.subscribe(spec(then)).await?,
        };
        let mut left: BTreeSet<String> = ids(&sent).into_iter().collect();
        let deadline = Instant::now() + env.patience();
        while !left.is_empty() {
            ensure!(
                Instant::now() < deadline,
                "{label}: {} of {} came to who is alone",
                sent.len() - left.len(),
                sent.len()
            );
            for held in consumer.receive(10, env.quiet()).await? {
                left.remove(&held.id());
                held.ack().await?;
            }
        }
        consumer.close().await?;
    }
    Ok(())
}

async fn paused_meanwhile(env: &Env) -> Proof {
    let (destination, group) = (env.destination("d"), env.group("g"));
    let (one, two) = (env.client().await?, env.client().await?);
    let spec = |order| env.spec(&destination, &group).with_order(order).with_max_in_flight(4);
    let mut paused = one.subscribe(spec(Order::None)).await?;
    paused.pause(true).await?;
    // So long that it keeps nothing for itself any more.
    env.pass(env.quiet()).await;
    let sent = one.fill(&destination, "k", 16).await?;
    let mut held = Vec::new();
    match two.try_subscribe(spec(Order::Key)).await? {
        Err(error) => ensure_eq!(error.kind(), ErrorKind::AlreadyExists, "the refusal of another order: {error}"),
        Ok(mut keeper) => {
            held.extend(keeper.receive(4, env.quiet()).await?);
            paused.pause(false).await?;
            // What each has it holds; the history says whether a key is with both.
            for _ in 0..4 {
                held.extend(keeper.receive(4, env.quiet() / 4).await?);
                match paused.try_receive(4, env.quiet() / 4).await? {
                    Ok(came) => held.extend(came),
                    Err(error) => {
                        ensure_eq!(error.kind(), ErrorKind::AlreadyExists, "the end of who keeps no order: {error}");
                        break;
                    }
                }
            }
            held.clear();
            keeper.close().await?;
        }
    }
    // One that was told that it ends has nothing to close.
    let _ = paused.try_close(env.patience()).await?;
    // What a member without order gives back has none.
    let left: BTreeSet<_> = ids(&env.client().await?.drain(spec(Order::Key)).await?).into_iter().collect();
    ensure_eq!(left, ids(&sent).into_iter().collect::<BTreeSet<_>>(), "what is left");
    Ok(())
}

async fn dropped(env: &Env) -> Proof {
    let (destination, group) = (env.destination("d"), env.group("g"));
    let (one, two) = (env.client().await?, env.client().await?);
    let spec = env.spec(&destination, &group).with_order(Order::Key);
    let mut first = one.subscribe(spec.clone()).await?;
    let mut second = two.subscribe(spec).await?;
    let sent = one.fill(&destination, "k", 6).await?;
    let (held, first_has_it) = whoever_has_it(env, &mut first, &mut second, 3).await?;
    let (dropping, waiting) = if first_has_it { (&mut first, &mut second) } else { (&mut second, &mut first) };
    // It is not to get them itself; where keys are shared out in lanes it does all the same, when it goes on.
    dropping.pause(true).await?;
    let drops = async {
        env.pass(env.quiet() / 4).await;
        for held in held {
            drop(held);
            tokio::task::yield_now().await;
        }
    };
    let (mut came, ()) = join(waiting.receive(1, env.quiet() * 2), drops).await;
    dropping.pause(false).await?;
    let mut expected = ids(&sent).into_iter();
    let deadline = Instant::now() + env.patience();
    while expected.len() > 0 {
        let left = expected.len();
        ensure!(Instant::now() < deadline, "{left} of {} did not come after three were dropped", sent.len());
        for held in came? {
            ensure_eq!(Some(held.id()), expected.next(), "what comes next after three were dropped");
            held.ack().await?;
        }
        came = waiting.receive(1, env.quiet() / 4).await;
        if matches!(&came, Ok(none) if none.is_empty()) {
            came = dropping.receive(1, env.quiet() / 4).await;
        }
    }
    first.close().await?;
    second.close().await
}

//! Everything published arrives, unchanged, once, and nothing else does.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use futures_util::future::join_all;

use super::case;
use crate::Case;
use crate::case::{Proof, ensure, ensure_eq};
use crate::consumer::{ack_all, held_ids, ids};
use crate::env::Env;
use crate::need;

pub(super) const CASES: &[Case] = &[
    case!(
        "delivery/what-is-published-arrives-once-and-unchanged",
        [],
        "A message that was published Ok reaches every group; everything round-trips byte for byte.",
        arrives
    ),
    case!(
        "delivery/a-fresh-client-gets-what-was-stored-before-it-came",
        [],
        "Publish and subscribe need not be of one connection: what is confirmed is stored.",
        stored
    ),
    case!(
        "delivery/messages-published-before-the-group-exists-are-kept-for-it",
        [need::KEPT_BEFORE_GROUP],
        "Messages published before a group exists are kept for it (Start::Earliest).",
        before_group
    ),
    case!(
        "delivery/destinations-do-not-leak-into-one-another",
        [],
        "Each message names its destination, and only its groups see it.",
        no_leak
    ),
    case!(
        "delivery/one-subscription-reads-several-destinations",
        [],
        "A subscription states its destinations: a list.",
        several_destinations
    ),
    case!(
        "delivery/one-batch-goes-to-several-destinations",
        [],
        "Publish is batch-shaped; destinations may be mixed.",
        mixed_batch
    ),
    case!(
        "delivery/concurrent-publishers-lose-nothing",
        [],
        "Many batches may be on their way, and each confirmed message is stored.",
        concurrent_publishers
    ),
    case!(
        "delivery/two-members-share-the-messages-of-a-group",
        [],
        "Members share messages: each goes to one of them.",
        members_share
    ),
    case!(
        "delivery/a-receive-on-an-empty-queue-waits-its-time-and-is-empty",
        [],
        "receive waits up to `wait`; it is empty when the wait is over.",
        empty_receive
    ),
    case!(
        "delivery/a-receive-returns-early-when-something-is-there",
        [],
        "receive returns early when something is there.",
        early_receive
    ),
];

async fn arrives(env: &Env) -> Proof {
    let client = env.client().await?;
    let (destination, group) = (env.destination("d"), env.group("g"));
    let mut consumer = client.subscribe(env.spec(&destination, &group)).await?;
    let sent = client.messages(&destination, None, 100);
    for batch in sent.chunks(30) {
        client.publish_ok(batch.to_vec()).await?;
    }
    let mut found = BTreeSet::new();
    let mut left = sent.len();
    while left > 0 {
        let came = consumer.take(env.at_once(left)).await?;
        left -= came.len();
        found.extend(held_ids(&came));
        for held in &came {
            ensure_eq!(held.attempt(), 1, "the attempt of {}", held.id());
            ensure_eq!(held.message().destination(), &destination, "the destination of {}", held.id());
            ensure!(
                held.message().delay().is_none() && held.message().ttl().is_none(),
                "instructions of the publish show"
            );
        }
        ack_all(came).await?;
    }
    ensure_eq!(found, ids(&sent).into_iter().collect::<BTreeSet<_>>(), "the set of ids");
    consumer.silence_then_canary(&client, "everything was acked").await?;
    consumer.close().await?;
    let left = env.client().await?.drain(env.spec(&destination, &group)).await?;
    ensure_eq!(ids(&left), Vec::<String>::new(), "what was left");
    client.close().await
}

async fn stored(env: &Env) -> Proof {
    let (destination, group) = (env.destination("d"), env.group("g"));
    let first = env.client().await?;
    first.subscribe(env.spec(&destination, &group)).await?.close().await?;
    let sent = first.fill(&destination, "k", 10).await?;
    first.close().await?;
    let left = env.client().await?.drain(env.spec(&destination, &group)).await?;
    let (mut expected, mut found) = (ids(&sent), ids(&left));
    expected.sort();
    found.sort();
    ensure_eq!(found, expected, "what a fresh client reads");
    Ok(())
}

async fn before_group(env: &Env) -> Proof {
    let (destination, group) = (env.destination("d"), env.group("g"));
    let client = env.client().await?;
    let sent = client.fill(&destination, None, 20).await?;
    let left = client.drain(env.spec(&destination, &group)).await?;
    let (mut expected, mut found) = (ids(&sent), ids(&left));
    expected.sort();
    found.sort();
    ensure_eq!(found, expected, "what a group that came later reads");
    Ok(())
}

async fn no_leak(env: &Env) -> Proof {
    let client = env.client().await?;
    // Names of which one begins the other, and which differ in a dot only.
    let names = ["a", "a.b", "a-b", "ab"].map(|name| env.destination(name));
    let group = env.group("g");
    let mut consumers = Vec::new();
    for name in &names {
        consumers.push(client.subscribe(env.spec(name, &group)).await?);
    }
    let mut sent = Vec::new();
    for name in &names {
        sent.push(client.fill(name, "k", 3).await?);
    }
    for (consumer, sent) in consumers.iter_mut().zip(&sent) {
        let came = consumer.take(3).await?;
        let found: BTreeSet<_> = held_ids(&came).into_iter().collect();
        ensure_eq!(found, ids(sent).into_iter().collect::<BTreeSet<_>>(), "what {} brings", sent[0].destination());
        ack_all(came).await?;
    }
    for consumer in &mut consumers {
        consumer.silence_then_canary(&client, "another destination's messages").await?;
    }
    Ok(())
}

async fn several_destinations(env: &Env) -> Proof {
    let client = env.client().await?;
    let (a, b) = (env.destination("a"), env.destination("b"));
    let spec = env.spec(&a, &env.group("g")).and_destination(b.clone());
    let mut consumer = client.subscribe(spec).await?;
    let (mut sent, more) = (client.fill(&a, "k", 5).await?, client.fill(&b, "k", 5).await?);
    sent.extend(more);
    let came = consumer.take(10).await?;
    let found: BTreeSet<_> = came.iter().map(|held| (held.message().destination().clone(), held.id())).collect();
    let expected: BTreeSet<_> =
        sent.iter().map(|message| (message.destination().clone(), message.id().to_string())).collect();
    ensure_eq!(found, expected, "what the two destinations bring");
    ack_all(came).await?;
    consumer.silence_then_canary(&client, "both were read").await
}

async fn mixed_batch(env: &Env) -> Proof {
    let client = env.client().await?;
    let names = ["a", "b", "c"].map(|name| env.destination(name));
    let group = env.group("g");
    let mut consumers = Vec::new();
    for name in &names {
        consumers.push(client.subscribe(env.spec(name, &group)).await?);
    }
    let batch: Vec<_> = (0..30).map(|index| client.message(&names[index % 3], "k")).collect();
    client.publish_ok(batch.clone()).await?;
    for (consumer, name) in consumers.iter_mut().zip(&names) {
        let came = consumer.take(10).await?;
        let found: BTreeSet<_> = held_ids(&came).into_iter().collect();
        let expected: BTreeSet<_> =
            ids(batch.iter().filter(|message| message.destination() == name)).into_iter().collect();
        ensure_eq!(found, expected, "what {name} brings");
        ack_all(came).await?;
    }
    Ok(())
}

async fn concurrent_publishers(env: &Env) -> Proof {
    let (destination, group) = (env.destination("d"), env.group("g"));
    let consumer = env.client().await?;
    let mut subscription = consumer.subscribe(env.spec(&destination, &group)).await?;
    let mut clients = Vec::new();
    for _ in 0..4 {
        clients.push(env.client().await?);
    }
    // Each client has several batches on their way at once.
    let publishing = clients.iter().flat_map(|client| (0..5).map(|_| client.fill(&destination, "k", 10)));
    let mut expected = BTreeSet::new();
    for sent in join_all(publishing).await {
        expected.extend(ids(&sent?));
    }
    let mut found = BTreeSet::new();
    while found.len() < 200 {
        let came = subscription.take(env.of_one_key(50)).await?;
        found.extend(held_ids(&came));
        ack_all(came).await?;
    }
    ensure_eq!(found, expected, "the set of ids");
    subscription.close().await?;
    let left = env.client().await?.drain(env.spec(&destination, &group)).await?;
    ensure_eq!(ids(&left), Vec::<String>::new(), "what was left");
    Ok(())
}

async fn members_share(env: &Env) -> Proof {
    let (destination, group) = (env.destination("d"), env.group("g"));
    let (one, two) = (env.client().await?, env.client().await?);
    let mut first = one.subscribe(env.spec(&destination, &group)).await?;
    let mut second = two.subscribe(env.spec(&destination, &group)).await?;
    let mut expected = BTreeSet::new();
    for number in 0..20 {
        expected.extend(ids(&one.fill(&destination, format!("key {number}").as_str(), 2).await?));
    }
    let mut found = Vec::new();
    let deadline = Instant::now() + env.patience();
    while found.len() < 40 {
        ensure!(Instant::now() < deadline, "{} of 40 deliveries came to the two members", found.len());
        for consumer in [&mut first, &mut second] {
            let came = consumer.receive(3, Duration::from_millis(50)).await?;
            found.extend(held_ids(&came));
            ack_all(came).await?;
        }
    }
    ensure_eq!(found.len(), 40, "deliveries to both members together");
    ensure_eq!(found.into_iter().collect::<BTreeSet<_>>(), expected, "the set of ids");
    second.close().await?;
    first.close().await?;
    let left = env.client().await?.drain(env.spec(&destination, &group)).await?;
    ensure_eq!(ids(&left), Vec::<String>::new(), "what was left");
    Ok(())
}

async fn empty_receive(env: &Env) -> Proof {
    let client = env.client().await?;
    let destination = env.destination("d");
    let mut consumer = client.subscribe(env.spec(&destination, &env.group("g"))).await?;
    let wait = Duration::from_millis(300);
    let begin = Instant::now();
    let came = consumer.receive(10, wait).await?;
    let took = begin.elapsed();
    ensure!(came.is_empty(), "{} deliveries of nothing", came.len());
    ensure!(took >= wait, "an empty receive ended after {took:?}, before its {wait:?}");
    let begin = Instant::now();
    ensure!(consumer.receive(10, Duration::ZERO).await?.is_empty(), "deliveries of nothing");
    ensure!(begin.elapsed() < env.patience(), "a receive that may not wait took {:?}", begin.elapsed());
    consumer.silence_then_canary(&client, "nothing was published").await
}

async fn early_receive(env: &Env) -> Proof {
    let client = env.client().await?;
    let destination = env.destination("d");
    let mut consumer = client.subscribe(env.spec(&destination, &env.group("g"))).await?;
    let wait = env.patience() * 2;
    let begin = Instant::now();
    let (came, sent) = futures_util::join!(consumer.receive(100, wait), async {
        // The receive waits already when the message comes.
        tokio::time::sleep(Duration::from_millis(50)).await;
        client.fill(&destination, "k", 1).await
    });
    let (came, sent) = (came?, sent?);
    ensure_eq!(held_ids(&came), ids(&sent), "what a waiting receive brings");
    ensure!(begin.elapsed() < wait / 2, "a receive of up to 100 waited {:?} with a message there", begin.elapsed());
    ack_all(came).await
}

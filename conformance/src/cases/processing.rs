//! Consume, process and publish in transactions, while connections are lost, workers give up, and the server is killed.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use anybroker_core::{Destination, Effect, Error, Settlement};
use futures_util::future::{join, try_join_all};
use rand::RngExt;
use rand::rngs::StdRng;
use tokio::sync::watch;
use tokio::time::Instant;

use super::faults::{any, fault, millis};
use crate::case::{Breach, Proof, ensure};
use crate::client::Client;
use crate::consumer::{Consumer, Held, ack_all, ids};
use crate::env::Env;
use crate::faults::{
    KILLED, Line, Network, Planned, is_publishing_in_a_fault, is_settling_in_a_fault, of_server, plan,
};
use crate::unit::{End, Unit};
use crate::{Case, ServerControl, need};

pub(super) const CASES: &[Case] = &[
    fault!(
        "faults/what-transactions-make-of-what-they-settle-is-there-exactly-once-whatever-is-cut",
        false,
        [need::TRANSACTIONS],
        "Of each message that is consumed, processed and published in transactions there is one result, neither none nor two, however often connections are lost and workers give up.",
        cut
    ),
    fault!(
        "faults/what-transactions-make-of-what-they-settle-is-there-exactly-once-when-the-server-is-killed",
        true,
        [need::TRANSACTIONS, need::SURVIVES_KILL],
        "The same, while the server's process is killed and comes back.",
        killed
    ),
];

/// How many faults the workers' connections meet.
const FAULTS: usize = 6;
/// How often the server is killed.
const KILLS: usize = 2;
const WORKERS: usize = 2;
/// What one transaction takes at most.
const BATCH: usize = 10;
/// One of so many transactions is given up when everything is in it.
const GIVEN_UP: u32 = 8;

/// What is hit.
enum Hit {
    /// The connections of the workers.
    Line(Arc<Line>),
    Server(Arc<dyn ServerControl>),
}

async fn cut(env: &Env) -> Proof {
    let network = Network::open(env).await?;
    let line = network.line()?;
    let mut workers = Vec::new();
    for _ in 0..WORKERS {
        workers.push(line.client(env).await?);
    }
    exactly_once(env, workers, Hit::Line(line)).await
}

async fn killed(env: &Env) -> Proof {
    let server = env.server()?;
    let mut workers = Vec::new();
    for _ in 0..WORKERS {
        workers.push(env.client().await?);
    }
    exactly_once(env, workers, Hit::Server(server)).await
}

/// Workers read `source` and write `made`. Nothing is told apart by its id: each result has the id of what it was made of as its
/// key, and all that come count.
async fn exactly_once(env: &Env, workers: Vec<Client<'_>>, hit: Hit) -> Proof {
    let outside = env.client().await?;
    let (source, made) = (env.destination("source"), env.destination("made"));
    let (sources, results) = (env.spec(&source, &env.group("g")), env.spec(&made, &env.group("results")));
    let (disturbed, is_disturbed) = watch::channel(true);
    let (done, is_done) = watch::channel(false);
    let mut random = env.rng();
    let seeds: Vec<u64> = workers.iter().map(|_| random.random()).collect();
    let mut consumer = outside.subscribe(results).await?;
    let mut working = Vec::new();
    for (client, seed) in workers.iter().zip(seeds) {
        let consumer = client.subscribe(sources.clone()).await?;
        working.push(work(env, client, consumer, &made, seed, is_done.clone()));
    }
    let reading = async {
        let suffering = async {
            let suffered = suffer(env, &hit, random).await;
            let _ = disturbed.send(false);
            suffered
        };
        let (fed, suffered) = join(feed(env, &outside, &source, is_disturbed), suffering).await;
        suffered?;
        let mut found = fed?;
        let mut last = Instant::now();
        loop {
            let missing = found.values().filter(|result| result.is_missing()).count();
            if missing == 0 {
                break;
            }
            ensure!(last.elapsed() < env.patience(), "{missing} of {} have no result", found.len());
            let came = consumer.receive(100, env.quiet()).await?;
            if !came.is_empty() {
                last = Instant::now();
            }
            count(came, &mut found).await?;
        }
        Ok::<_, Breach>(found)
    };
    let read_to_the_end = async {
        let read = reading.await;
        let _ = done.send(true);
        read
    };
    let (worked, read) = join(try_join_all(working), read_to_the_end).await;
    worked?;
    let mut found = read?;
    // Behind them those of which it is not known whether they were sent, and what is there once too often.
    loop {
        let came = consumer.receive(100, env.quiet()).await?;
        if came.is_empty() {
            break;
        }
        count(came, &mut found).await?;
    }
    let wrong: Vec<_> = found.iter().filter(|(_, result)| result.count > 1 || result.is_missing()).collect();
    ensure!(wrong.is_empty(), "not there once: {wrong:?}");
    consumer.silence_then_canary(&outside, "each has its result").await?;
    consumer.close().await?;
    // What may be stored and was not waited for may be left.
    let has_result = |id: &String| found.get(id).is_none_or(|result| result.is_certain || result.count > 0);
    let left: Vec<String> = ids(&outside.drain(sources).await?).into_iter().filter(has_result).collect();
    ensure!(left.is_empty(), "come again although there is a result: {left:?}");
    outside.close().await?;
    for client in workers {
        client.close().await?;
    }
    Ok(())
}

/// How often the result of something is there.
#[derive(Debug, Default)]
struct Found {
    count: usize,
    /// What it was made of is stored.
    is_certain: bool,
}

impl Found {
    fn is_missing(&self) -> bool {
        self.is_certain && self.count == 0
    }
}

/// Counts results by what they were made of, and acks them.
async fn count(came: Vec<Held<'_>>, found: &mut BTreeMap<String, Found>) -> Proof {
    for held in &came {
        let key = held.message().key().map(String::from_utf8_lossy).unwrap_or_default();
        let of_nothing = || Breach::Failed(format!("a result of {key}, which was not sent"));
        found.get_mut(&*key).ok_or_else(of_nothing)?.count += 1;
    }
    ack_all(came).await
}

/// What the seed draws, one after another.
async fn suffer(env: &Env, hit: &Hit, mut random: StdRng) -> Proof {
    match hit {
        Hit::Line(line) => {
            let mut number = 0;
            let planned = plan(&mut random, FAULTS, |random| {
                number += 1;
                any(random, number)
            });
            let planned: Vec<Planned> =
                planned.into_iter().filter(|fault| env.schedule.draw(fault.to_string())).collect();
            for fault in planned {
                tokio::time::sleep(millis(&mut random, 200..1_200)).await;
                line.suffer(env, &fault).await;
            }
        }
        Hit::Server(server) => {
            for _ in 0..KILLS {
                tokio::time::sleep(millis(&mut random, 500..2_500)).await;
                let away = millis(&mut random, 100..1_500);
                let gone = async {
                    tokio::time::sleep(away).await;
                    Ok(())
                };
                of_server(env, KILLED, server.kill(), gone, server.restart()).await?;
            }
        }
    }
    tokio::time::sleep(Duration::from_millis(500)).await;
    Ok(())
}

/// Keeps the workers busy while there are faults; answers the ids of what may be there.
async fn feed(
    env: &Env,
    client: &Client<'_>,
    source: &Destination,
    is_disturbed: watch::Receiver<bool>,
) -> Proof<BTreeMap<String, Found>> {
    let mut fed = BTreeMap::new();
    while *is_disturbed.borrow() {
        let message = |number: usize| client.message(source, format!("key {}", number % 7).as_str());
        let batch: Vec<_> = (0..5).map(message).collect();
        for (id, outcome) in ids(&batch).into_iter().zip(client.publish(batch).await?) {
            match outcome {
                Ok(_) => drop(fed.insert(id, Found { count: 0, is_certain: true })),
                Err(error) => {
                    is_publishing_in_a_fault(&error)?;
                    if error.effect() == Effect::Unknown {
                        fed.insert(id, Found::default());
                    }
                }
            }
        }
        env.pass(Duration::from_millis(20)).await;
    }
    Ok(fed)
}

async fn work<'e>(
    env: &'e Env,
    client: &Client<'e>,
    mut consumer: Consumer<'e>,
    made: &Destination,
    seed: u64,
    is_done: watch::Receiver<bool>,
) -> Proof {
    let mut random: StdRng = rand::SeedableRng::seed_from_u64(seed);
    while !*is_done.borrow() {
        let came = consumer.receive(BATCH, Duration::from_millis(200)).await?;
        if came.is_empty() {
            continue;
        }
        let results = came.iter().map(|held| client.message(made, held.id().as_str())).collect();
        let acks = came.into_iter().map(|held| (held, Settlement::Ack)).collect();
        let end = match random.random_range(0..2 * GIVEN_UP) {
            0 => End::Abort,
            1 => End::Drop,
            _ => End::Commit,
        };
        let problem = match Unit::try_begin(client).await? {
            // What it holds comes again.
            Err(error) => Some(error),
            Ok(unit) => unit.try_all(results, acks, end).await?.err(),
        };
        if let Some(error) = problem {
            is_of_a_fault(&error)?;
            env.pass(Duration::from_millis(50)).await;
        }
    }
    consumer.close().await
}

fn is_of_a_fault(error: &Error) -> Proof {
    is_settling_in_a_fault(error).or_else(|_| is_publishing_in_a_fault(error))
}

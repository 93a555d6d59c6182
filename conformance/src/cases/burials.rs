//! What is buried, given back and held back while connections come and go, or the server does.

use std::collections::HashSet;
use std::time::Duration;

use anybroker_core::{Reason, RedriveOptions, SubscribeSpec, Verdict};

use super::at_rest::WRITTEN;
use super::faults::{any, disturb, fault};
use super::server::killed_in;
use crate::case::{Breach, Proof, ensure};
use crate::consumer::ids;
use crate::env::Env;
use crate::faults::{HELD_BACK, Network, Trial};
use crate::{Case, need};

pub(super) const CASES: &[Case] = &[
    fault!(
        "faults/a-mixed-schedule-buries-what-is-to-be-buried-and-loses-nothing",
        false,
        [need::DEAD_LETTER],
        "The dead letter is stored before the source is settled; a fault in between may double the letter, never lose it; attempts, delays and what is given back stay what they are.",
        mixed
    ),
    fault!(
        "faults/a-server-that-is-killed-while-messages-are-buried-loses-neither-letters-nor-messages",
        true,
        [need::DEAD_LETTER, need::SURVIVES_KILL],
        "Letters, failures and delays survive the server's process as what is confirmed does.",
        killed
    ),
];

async fn mixed(env: &Env) -> Proof {
    let trial = Trial::burying(env);
    disturb(env, &Network::open(env).await?, &trial, 8, any).await?;
    bring_back(env, &trial).await
}

async fn killed(env: &Env) -> Proof {
    let trial = Trial::burying(env);
    set_out(env, trial.spec()).await?;
    killed_in(env, &trial).await?;
    bring_back(env, &trial).await
}

/// A message fails with and without a delay and is buried, so that whatever the endpoint makes for that has been there for a while. A queue
/// that was made in the last moments of a RabbitMQ server comes back without a leader, and takes nothing from then on (4.0.5: "configured
/// member of queue … was not found on this node. Starting member as a new one. Context: name_not_registered"); nothing that was
/// confirmed is in it.
async fn set_out(env: &Env, spec: &SubscribeSpec) -> Proof {
    let client = env.client().await?;
    let mut consumer = client.subscribe(spec.clone()).await?;
    let (destination, group) = (&spec.destinations[0], &spec.group);
    let mut delays = Vec::new();
    if env.record.nack.is_given() {
        delays.push(0);
    }
    if env.record.nack.is_given() && env.record.nack_delay.is_given() {
        // Where the wait is a queue of its own, there may be one for each range of delays.
        delays.extend([HELD_BACK / 3, HELD_BACK]);
    }
    for delay in delays {
        client.fill(destination, "first", 1).await?;
        consumer.one().await?.nack(Duration::from_millis(delay)).await?;
        consumer.one().await?.ack().await?;
    }
    client.fill(destination, "first", 1).await?;
    consumer.one().await?.dead_letter(Verdict::new(Reason::Rejected)).await?;
    client.letters_until(destination, group, 1).await?;
    consumer.close().await?;
    client.close().await?;
    tokio::time::sleep(WRITTEN).await;
    Ok(())
}

/// Everything that was stored is acked by now, or a letter, as the checker knows from the history. What was buried is redriven, and each
/// letter brings its message to whoever reads the group; then there is none left.
async fn bring_back(env: &Env, trial: &Trial<'_>) -> Proof {
    let spec = trial.spec();
    let (destination, group) = (&spec.destinations[0], &spec.group);
    let client = env.client().await?;
    let letters = client.letters(destination, group).await?;
    if letters.is_empty() {
        return Err(Breach::Inconclusive("nothing was buried".into()));
    }
    if env.record.redrive.is_given() {
        let report = client.redrive(destination, group, &RedriveOptions::default()).await?;
        let count = letters.len() as u64;
        ensure!(report.moved == count, "{} of {count} dead letters were redriven: {report:?}", report.moved);
        let came = env.client().await?.drain(spec.clone()).await?;
        let came: HashSet<String> = ids(&came).into_iter().collect();
        let missing: Vec<String> =
            ids(letters.iter().map(|letter| &letter.message)).into_iter().filter(|id| !came.contains(id)).collect();
        ensure!(missing.is_empty(), "redriven, and they never came: {missing:?}");
        let left = client.letters(destination, group).await?.len();
        ensure!(left == 0, "{left} dead letters after all were redriven and acked");
    }
    client.close().await
}

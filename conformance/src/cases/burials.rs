//! What is buried, given back and held back while connections come and go, or the server does.

use std::collections::HashSet;

use anybroker_core::RedriveOptions;

use super::faults::{any, disturb, fault};
use super::server::killed_in;
use crate::case::{Breach, Proof, ensure};
use crate::consumer::ids;
use crate::env::Env;
use crate::faults::{Network, Trial};
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
    killed_in(env, &trial).await?;
    bring_back(env, &trial).await
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

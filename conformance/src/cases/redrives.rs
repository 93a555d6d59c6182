//! Several that put letters back at once.

use std::collections::BTreeSet;
use std::time::Duration;

use anybroker_core::{Error, ErrorKind, RedriveOptions};
use futures_util::future::try_join_all;
use tokio::time::Instant;

use super::case;
use crate::case::{Proof, ensure};
use crate::client::Client;
use crate::consumer::ids;
use crate::env::Env;
use crate::history::What;
use crate::{Case, need};

pub(super) const CASES: &[Case] = &[case!(
    "dead-letter/two-that-redrive-at-once-lose-no-letter-and-are-told-what-is-gone",
    [need::DEAD_LETTER, need::REDRIVE],
    "Redrive may be asked for by several at once: each message is back, no letter is left, and what the other one was faster with is NotFound, \
     or Unavailable while it is leased.",
    at_once
)];

const LETTERS: usize = 24;

async fn at_once(env: &Env) -> Proof {
    let (destination, group) = (env.destination("d"), env.group("g"));
    let spec = env.spec(&destination, &group);
    let client = env.client().await?;
    let sent = client.bury(&spec, LETTERS, 4).await?;
    let letters: Vec<_> = sent.iter().map(|message| message.id().clone()).collect();
    let others = [env.client().await?, env.client().await?];
    let redrive = async |other: &Client<'_>| {
        // Which of the two puts a letter back is not known.
        let what = What::RedriveInfo { destination: destination.clone(), group: group.clone(), ids: letters.clone() };
        other.record(what);
        let queue = other.bus.dead_letters(&destination, &group)?;
        let mut options = RedriveOptions::default();
        options.batch = 5;
        let report = match env.bounded("redrive", queue.redrive(&options)).await? {
            Ok(report) => report,
            Err(error) => return tells_of_another(&error),
        };
        report.failed.iter().try_for_each(|(_, error)| tells_of_another(error))
    };
    try_join_all(others.iter().map(redrive)).await?;
    // What both had leased at times, where reading leases, neither may have put back.
    let begin = Instant::now();
    while !client.letters(&destination, &group).await?.is_empty() {
        ensure!(begin.elapsed() < env.patience(), "letters are left after {:?}", env.patience());
        client.redrive(&destination, &group, &RedriveOptions::default()).await?;
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let mut missing: BTreeSet<String> = ids(&sent).into_iter().collect();
    for id in ids(&client.drain(spec).await?) {
        missing.remove(&id);
    }
    ensure!(missing.is_empty(), "dead letters that two put back at once, and that never came: {missing:?}");
    for client in others.iter().chain([&client]) {
        client.close().await?;
    }
    Ok(())
}

fn tells_of_another(error: &Error) -> Proof {
    let tells = matches!(error.kind(), ErrorKind::NotFound | ErrorKind::Unavailable);
    ensure!(tells, "a redrive while another one is at work on the same letters: {error:?}");
    Ok(())
}

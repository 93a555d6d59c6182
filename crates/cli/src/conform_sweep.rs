//! `anybroker conform sweep`: what killed runs have left behind.

use anybroker::Timestamp;
use anybroker_conformance::sweep;
use serde_json::json;

use crate::args::{Global, SweepArgs};
use crate::exit::{Exit, Failure, Tally};
use crate::output::Output;
use crate::{connect, json};

pub(crate) async fn run(global: &Global, args: &SweepArgs, output: &mut Output) -> Result<Exit, Failure> {
    let bus = connect::connect(global).await?;
    let found = sweep(&bus, args.older_than, args.dry_run).await?;
    let (now, mut tally, mut rows) = (Timestamp::now(), Tally::default(), Vec::new());
    for leftover in &found {
        let failed = leftover.deleted.as_ref().and_then(|deleted| deleted.as_ref().err());
        match &leftover.deleted {
            Some(Err(error)) => tally.failure(error.kind()),
            Some(Ok(())) => tally.success(),
            None => {}
        }
        let age = now.since(leftover.begun);
        if output.is_json() {
            output.object(&json!({
                "destination": leftover.destination.as_str(),
                "begun": leftover.begun.to_string(),
                "age_ms": u64::try_from(age.as_millis()).unwrap_or(u64::MAX),
                "deleted": matches!(leftover.deleted, Some(Ok(()))),
                "dry_run": args.dry_run,
                "error": failed.map(json::error),
            }))?;
        } else {
            let ended = match &leftover.deleted {
                None => "would be deleted".to_owned(),
                Some(Ok(())) => "deleted".to_owned(),
                Some(Err(error)) => error.to_string(),
            };
            rows.push(vec![leftover.destination.to_string(), leftover.begun.to_string(), ended]);
        }
    }
    if !output.is_json() {
        match rows.is_empty() {
            true => output.line("nothing is left behind")?,
            false => output.table(&["DESTINATION", "RUN BEGAN", ""], rows)?,
        }
    }
    output.flush()?;
    connect::close_after(&bus, tally.exit(), output.is_json()).await
}

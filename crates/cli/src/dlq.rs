//! `anybroker dlq`: dead letters are listed, read, put back and deleted.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anybroker::{Bus, DeadLetter, DeadLetterFilter, DeadLetters, Reason, RedriveOptions, RedriveReport};
use serde_json::{Value, json};

use crate::args::{DlqCommand, Global, Letters, ListArgs, PurgeArgs, RedriveArgs};
use crate::consume::{key_and_headers, payload};
use crate::exit::{Exit, Failure, Tally};
use crate::interrupt::Interrupt;
use crate::output::{Output, or_dash, readable};
use crate::progress::Progress;
use crate::{connect, json};

/// How many letters are read at once.
const PAGE: usize = 500;
/// What `peek` shows where nothing else is said.
const PEEK: u64 = 10;

pub(crate) async fn run(global: &Global, command: DlqCommand, output: &mut Output) -> Result<Exit, Failure> {
    match command {
        DlqCommand::List(args) => show(global, args, output, None, rows).await,
        DlqCommand::Peek(args) => show(global, args, output, Some(PEEK), blocks).await,
        DlqCommand::Redrive(args) => redrive(global, args, output).await,
        DlqCommand::Purge(args) => purge(global, args, output).await,
    }
}

type Show = fn(&[DeadLetter], &mut Output) -> Result<(), Failure>;

/// Page by page, so that a long queue neither fills the memory nor lets its reader wait.
async fn show(
    global: &Global,
    args: ListArgs,
    output: &mut Output,
    limit: Option<u64>,
    for_people: Show,
) -> Result<Exit, Failure> {
    let (bus, letters) = open(global, &args.letters).await?;
    let filter = filter(&args.letters);
    let mut left = args.limit.or(limit).map_or(usize::MAX, |limit| usize::try_from(limit).unwrap_or(usize::MAX));
    let unfiltered = filter == DeadLetterFilter::all();
    let mut from = None;
    loop {
        let page = letters.page(from.take(), if unfiltered { PAGE.min(left) } else { PAGE }).await?;
        let mut found: Vec<DeadLetter> = page.letters.into_iter().filter(|letter| filter.matches(letter)).collect();
        found.truncate(left);
        left -= found.len();
        if output.is_json() {
            found.iter().try_for_each(|letter| output.object(&json::letter(letter)))?;
        } else if !found.is_empty() {
            for_people(&found, output)?;
        }
        output.flush()?;
        match page.next {
            Some(next) if left > 0 => from = Some(next),
            _ => break,
        }
    }
    connect::close(&bus).await?;
    Ok(Exit::Done)
}

fn rows(letters: &[DeadLetter], output: &mut Output) -> Result<(), Failure> {
    let rows = letters
        .iter()
        .map(|letter| {
            vec![
                letter.message.id().to_string(),
                or_dash(letter.message.key().map(readable)),
                readable(letter.reason.as_str().as_bytes()),
                or_dash(letter.error_type.as_deref().map(|class| readable(class.as_bytes()))),
                letter.attempts.to_string(),
                letter.redrives.to_string(),
                letter.last_at.to_string(),
            ]
        })
        .collect();
    output.table(&["ID", "KEY", "REASON", "ERROR TYPE", "ATTEMPTS", "REDRIVES", "DIED AT"], rows)
}

fn blocks(letters: &[DeadLetter], output: &mut Output) -> Result<(), Failure> {
    for letter in letters {
        output.line(&format!(
            "{} {} attempts={} redrives={} died={}{}",
            letter.message.id(),
            readable(letter.reason.as_str().as_bytes()),
            letter.attempts,
            letter.redrives,
            letter.last_at,
            key_and_headers(&letter.message),
        ))?;
        for (name, text) in [("error type", &letter.error_type), ("detail", &letter.detail)] {
            if let Some(text) = text {
                output.line(&format!("  {name}: {}", readable(text.as_bytes())))?;
            }
        }
        output.line(&format!("  {}", payload(&letter.message)))?;
    }
    Ok(())
}

async fn redrive(global: &Global, args: RedriveArgs, output: &mut Output) -> Result<Exit, Failure> {
    let (bus, letters) = open(global, &args.letters).await?;
    let mut interrupt = Interrupt::listen()?;
    let mut options = RedriveOptions::default();
    options.filter = filter(&args.letters);
    options.dry_run = args.dry_run;
    options.limit = args.limit;
    options.rate = args.rate;
    options.max_redrives = args.max_redrives;
    let progress = Progress::new("redriven", false);
    let moved = Arc::new(AtomicU64::new(0));
    let so_far = Arc::clone(&moved);
    let work = letters.redrive_with(&options, |report| {
        so_far.store(report.moved, Ordering::Relaxed);
        progress.set(report.moved);
    });
    let report = tokio::select! {
        biased;
        () = interrupt.requested() => None,
        report = work => Some(report?),
    };
    drop(progress);
    let exit = match report {
        Some(report) => tell(&report, args.dry_run, output)?,
        // What went back stays back, and the batch that is on its way comes to its end before the connection is closed; the next run
        // goes on with the rest.
        None => {
            let moved = moved.load(Ordering::Relaxed);
            if output.is_json() {
                output.object(&json!({"moved": moved, "interrupted": true, "dry_run": args.dry_run}))?;
            } else {
                output.line(&format!(
                    "interrupted after {moved} were redriven, and the batch that was on its way; run it again to go on"
                ))?;
            }
            Exit::Interrupted
        }
    };
    output.flush()?;
    connect::close_after(&bus, exit, output.is_json()).await
}

fn tell(report: &RedriveReport, dry_run: bool, output: &mut Output) -> Result<Exit, Failure> {
    if output.is_json() {
        let refused: Vec<Value> = report
            .refused
            .iter()
            .map(|(letter, id, redrives)| {
                json!({"dead_letter_id": letter.to_string(), "id": id.to_string(), "redrives": redrives})
            })
            .collect();
        let failed: Vec<Value> = report
            .failed
            .iter()
            .map(|(letter, error)| json!({"dead_letter_id": letter.to_string(), "error": json::error(error)}))
            .collect();
        output.object(&json!({
            "matched": report.matched, "moved": report.moved, "dry_run": dry_run,
            "refused": refused, "failed": failed,
        }))?;
    } else {
        for (_, id, redrives) in &report.refused {
            output.line(&format!("refused  {id}: redriven {redrives} times already; see --max-redrives"))?;
        }
        for (letter, error) in &report.failed {
            output.line(&format!("failed   {letter}: {error}"))?;
        }
        let did = if dry_run { "would be redriven" } else { "redriven" };
        output.line(&format!("{} of {} {did}", report.moved, report.matched))?;
    }
    let mut tally = Tally::default();
    report.failed.iter().for_each(|(_, error)| tally.failure(error.kind()));
    if report.moved > 0 {
        tally.success();
    }
    Ok(match tally.exit() {
        Exit::Done if !report.refused.is_empty() => Exit::Failed,
        exit => exit,
    })
}

async fn purge(global: &Global, args: PurgeArgs, output: &mut Output) -> Result<Exit, Failure> {
    if !args.yes && !args.dry_run {
        return Err(Failure::Usage(
            "purged letters are gone; say --yes to delete them, or --dry-run to count them".into(),
        ));
    }
    let (bus, letters) = open(global, &args.letters).await?;
    let filter = filter(&args.letters);
    let (did, count) = if args.dry_run {
        ("would be purged", letters.count(&filter).await?)
    } else {
        let _progress = Progress::new("purging", false);
        ("purged", letters.purge(&filter).await?)
    };
    if output.is_json() {
        let purged = if args.dry_run { 0 } else { count };
        output.object(&json!({"matched": count, "purged": purged, "dry_run": args.dry_run}))?;
    } else {
        output.line(&format!("{count} {did}"))?;
    }
    output.flush()?;
    connect::close(&bus).await?;
    Ok(Exit::Done)
}

async fn open(global: &Global, args: &Letters) -> Result<(Bus, DeadLetters), Failure> {
    let bus = connect::connect(global).await?;
    let letters = bus.dead_letters(args.source.as_str(), args.group.as_str())?;
    Ok((bus, letters))
}

fn filter(args: &Letters) -> DeadLetterFilter {
    let mut filter = DeadLetterFilter::all();
    filter.reason = args.reason.as_deref().map(Reason::from);
    filter.error_type = args.error_type.as_deref().map(Into::into);
    filter.since = args.since;
    filter.until = args.until;
    filter.key = args.key.clone().map(Into::into);
    filter.headers = args.headers.iter().map(|(name, value)| (name.clone(), value.clone().into())).collect();
    filter.id = args.id.as_deref().map(Into::into);
    filter
}

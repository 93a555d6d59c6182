//! Failed messages. SQS counts hand-overs, not failures, and cannot change a message: so a failure sends a copy that
//! carries the count, and deletes the message when the copy is stored. Attempts are exact, and survive everybody's crash.
//!
//! The copy waits for its delay in the queue itself. A FIFO queue delays no single messages: there a copy with a delay
//! waits in a standard queue of the group, and whichever member sees it first when its time has come puts it at
//! the end of its key.

use std::sync::Arc;
use std::time::Duration;

use anybroker_core::{Bytes, Error, ErrorKind, Result, SettleOutcome, Timestamp};
use tokio::time::Instant;

use crate::codec::{self, Carried};
use crate::config::LONGEST_POLL;
use crate::error::failed;
use crate::parcel::{self, LONGEST_DELAY, Parcel, Route};
use crate::requests::{self, Change};
use crate::settle::{Entry, REQUEST, delete_copied};
use crate::source::{Source, raw, receiving};

/// How long a member may take to put a message back; another one does it after that.
const LEASE: Duration = Duration::from_secs(10);

/// Stores a copy of each, which counts the failure, and deletes those whose copy is stored.
pub(crate) async fn send_copies(entries: Vec<(Entry, Duration)>, source: &Source) -> Vec<(usize, SettleOutcome)> {
    let (later, now): (Vec<_>, Vec<_>) =
        entries.into_iter().partition(|(_, delay)| source.is_fifo() && !delay.is_zero());
    let retry = source.queues.retry.as_deref().unwrap_or_default();
    let (mut outcomes, done) = tokio::join!(
        send_to(&source.queues.queue, now, source, source.is_fifo()),
        send_to(retry, later, source, false)
    );
    outcomes.extend(done);
    outcomes
}

async fn send_to(
    url: &str,
    entries: Vec<(Entry, Duration)>,
    source: &Source,
    is_fifo: bool,
) -> Vec<(usize, SettleOutcome)> {
    if entries.is_empty() {
        return Vec::new();
    }
    let parcels = entries.iter().map(|(entry, delay)| {
        let (message, attempt) = (entry.delivery.message(), entry.delivery.attempt());
        let carried = Carried {
            failed: attempt,
            // Up to its limit SQS keeps the time, by its own clock.
            not_before: (*delay > LONGEST_DELAY).then(|| Timestamp::now().after(*delay)),
            ..entry.lease.carried.clone()
        };
        let mut parcel = Parcel::new(codec::encode(message, &carried, None));
        if is_fifo {
            // Of this failure: told twice within five minutes, it is stored once.
            parcel.lane = Some(source.lane_of(message, format!("nack-{}-{attempt}", entry.lease.message_id)));
        } else {
            parcel.delay = (*delay).min(LONGEST_DELAY);
        }
        parcel
    });
    let route = Route::Queue(url.into());
    let stored = parcel::send_all(&source.clients, &route, parcels.collect(), REQUEST, "settle").await;
    let mut outcomes = Vec::new();
    let mut done = Vec::new();
    for ((entry, _), answer) in entries.into_iter().zip(stored) {
        match answer {
            Ok(_) => done.push(entry),
            Err(error) => outcomes.push(entry.outcome(Err(error), source)),
        }
    }
    outcomes.extend(delete_copied(done, source).await);
    outcomes
}

/// Brings back what is due, for as long as the subscription is open. A poll that is open when it closes runs on, so that
/// what it brings is not leased to nobody.
pub(crate) fn bring_back(source: &Arc<Source>) {
    let Some(retry) = source.queues.retry.clone() else { return };
    let source = Arc::clone(source);
    tokio::spawn(async move {
        while source.inbox.is_alive() {
            match once(&source, &retry).await {
                Ok(()) => {}
                // The group is gone: its own queue tells the subscriber.
                Err(error) if error.kind() == ErrorKind::NotFound => return,
                Err(error) => {
                    tracing::warn!(%error, "delayed messages could not be brought back; it is tried again");
                    tokio::time::sleep(Duration::from_secs(1)).await;
                }
            }
        }
    });
}

async fn once(source: &Source, retry: &str) -> Result<()> {
    let wait = requests::seconds(LONGEST_POLL);
    let answer = receiving(&source.clients.polls, retry, parcel::BATCH, wait, LEASE).send().await;
    let answer = answer.map_err(|error| failed("receive", &error))?;
    let (now, until) = (Timestamp::now(), Instant::now() + LEASE);
    let (mut early, mut due, mut parcels): (Vec<Change>, Vec<Bytes>, Vec<Parcel>) = Default::default();
    for mut message in answer.messages.unwrap_or_default() {
        let Some(handle) = message.receipt_handle.take().map(Bytes::from) else { continue };
        let raw = raw(message);
        // Of this copy: a second member that sends it once more within five minutes sends nothing.
        let dedup = format!("retry-{}", raw.id);
        let mut decoded = codec::decode(raw, &source.destination);
        match decoded.carried.not_before.take().filter(|not_before| *not_before > now) {
            Some(not_before) => {
                let left = u64::try_from(not_before.as_millis() - now.as_millis()).unwrap_or(0);
                early.push(((handle, until), Duration::from_millis(left)));
            }
            None => {
                let mut parcel = Parcel::new(codec::encode(&decoded.message, &decoded.carried, None));
                parcel.lane = Some(source.lane_of(&decoded.message, dedup));
                parcels.push(parcel);
                due.push(handle);
            }
        }
    }
    if parcels.is_empty() && early.is_empty() {
        return Ok(());
    }
    let route = Route::Queue(source.queues.queue.as_str().into());
    let sent = parcel::send_all(&source.clients, &route, parcels, LEASE, "receive").await;
    let mut problem: Option<Error> = None;
    let mut brought = Vec::new();
    for (handle, outcome) in due.into_iter().zip(sent) {
        match outcome {
            Ok(_) => brought.push((handle, until)),
            Err(error) => problem = Some(error),
        }
    }
    let deleted = requests::delete(&source.clients, retry, &brought).await;
    let changed = requests::change(&source.clients, retry, &early, "receive").await;
    let failed = deleted.into_iter().chain(changed).filter_map(Result::err).next();
    problem.or(failed).map_or(Ok(()), Err)
}

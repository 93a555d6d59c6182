//! Deleting and changing visibility in requests of ten, with the outcome of each entry.

use std::time::Duration;

use anybroker_core::{Bytes, Effect, Error, ErrorKind, Result};
use aws_sdk_sqs::types::{
    BatchResultErrorEntry, ChangeMessageVisibilityBatchRequestEntry, DeleteMessageBatchRequestEntry,
};
use futures_util::future::join_all;
use tokio::time::Instant;

use crate::clients::Clients;
use crate::error::{failed_entry, unmentioned};
use crate::parcel::BATCH;

/// How often something is asked for while nobody knows whether it is done.
pub(crate) const TRIES: u32 = 3;
/// How long the answer of a delete may take.
const ANSWER: Duration = Duration::from_secs(10);

/// A receipt handle, and when the lease ends that it stands for.
pub(crate) type Leased = (Bytes, Instant);

/// A leased message, and how long from now its lease is to last. None at all gives it back.
pub(crate) type Change = (Leased, Duration);

/// Gives back at once.
pub(crate) fn give_back(leased: Leased) -> Change {
    (leased, Duration::ZERO)
}

/// Deletes; one outcome per handle, in order. Asked again where an answer is lost: then "no such receipt handle" may say that
/// the earlier request has deleted it, and comes as [`ErrorKind::StaleDelivery`] with an unknown effect.
///
/// Not asked again when the lease is over. Another one may have received it by then, and "if you use an old `ReceiptHandle`, the
/// request will succeed, but the message might not be deleted"
/// (<https://docs.aws.amazon.com/AWSSimpleQueueService/latest/APIReference/API_DeleteMessage.html>).
pub(crate) async fn delete(clients: &Clients, url: &str, leased: &[Leased]) -> Vec<Result<()>> {
    let requests = leased.chunks(BATCH).map(|chunk| {
        let until = chunk.iter().map(|(_, until)| *until).collect();
        ask(until, "settle", |_| true, |left| delete_ten(clients, url, chunk, left))
    });
    join_all(requests).await.into_iter().flatten().collect()
}

/// Changes visibility timeouts; one outcome per entry, in order. Asked again while the lease lasts, but for what is given back:
/// when the answer is lost another one may have received it already, and the second request would take it from him. It comes
/// back at the end of its lease at the latest.
pub(crate) async fn change(
    clients: &Clients,
    url: &str,
    changes: &[Change],
    operation: &'static str,
) -> Vec<Result<()>> {
    change_by(clients, url, changes, operation, false).await
}

/// Gives dead letters back. Asked again whatever becomes of the answer: another reader may lose some of its time by that, and
/// without it nobody would see them until their leases end.
pub(crate) async fn give_letters_back(clients: &Clients, url: &str, leased: Vec<Leased>) {
    let changes: Vec<Change> = leased.into_iter().map(give_back).collect();
    // Should it fail, they come back by themselves.
    let _ = change_by(clients, url, &changes, "dead letters", true).await;
}

async fn change_by(
    clients: &Clients,
    url: &str,
    changes: &[Change],
    operation: &'static str,
    is_shared: bool,
) -> Vec<Result<()>> {
    let now = Instant::now();
    let requests = changes.chunks(BATCH).map(|chunk| {
        // A lease that is made shorter may be over before the old one was.
        let until = |((_, until), lease): &Change| if lease.is_zero() { *until } else { (*until).min(now + *lease) };
        let is_repeatable = move |index: usize| is_shared || !chunk[index].1.is_zero();
        let send = move |left| change_ten(clients, url, chunk, left, operation);
        ask(chunk.iter().map(until).collect(), operation, is_repeatable, send)
    });
    join_all(requests).await.into_iter().flatten().collect()
}

/// Whole seconds, rounded up: never early.
pub(crate) fn seconds(duration: Duration) -> i32 {
    i32::try_from(duration.as_secs() + u64::from(duration.subsec_nanos() > 0)).unwrap_or(i32::MAX)
}

/// The handle's text; it was one when it came.
fn text(handle: &Bytes) -> String {
    String::from_utf8_lossy(handle).into_owned()
}

/// Asks until each of up to ten entries has its answer, which `send` brings for those that are left. An entry is not asked for
/// again when its lease is over, nor where it may be done already and must not be done twice.
async fn ask<F>(
    until: Vec<Instant>,
    operation: &'static str,
    is_repeatable: impl Fn(usize) -> bool,
    send: impl Fn(Vec<usize>) -> F,
) -> Vec<Result<()>>
where
    F: Future<Output = Result<Vec<Result<()>>>>,
{
    let mut answers: Vec<Option<Result<()>>> = Vec::new();
    answers.resize_with(until.len(), || None);
    let mut left: Vec<usize> = (0..until.len()).collect();
    let mut may_be_done = false;
    for asked in 1.. {
        let error = match tokio::time::timeout(ANSWER, send(left.clone())).await {
            Ok(Ok(mut told)) => {
                for index in left {
                    let answer = std::mem::replace(&mut told[index], Ok(()));
                    answers[index] = Some(answer.map_err(|error| match error.kind() {
                        ErrorKind::StaleDelivery if may_be_done => error.with_effect(Effect::Unknown),
                        _ => error,
                    }));
                }
                break;
            }
            Ok(Err(error)) => error,
            Err(_) => Error::new(ErrorKind::Timeout, operation, format!("no answer within {ANSWER:?}")),
        };
        may_be_done |= error.effect() == Effect::Unknown;
        let error = if may_be_done { error.with_effect(Effect::Unknown) } else { error };
        let is_last = !passes(&error) || asked >= TRIES;
        if !is_last {
            tokio::time::sleep(pause(asked)).await;
        }
        let now = Instant::now();
        left.retain(|index| {
            let is_over = is_last || until[*index] <= now || may_be_done && !is_repeatable(*index);
            if is_over {
                answers[*index] = Some(Err(error.duplicate()));
            }
            !is_over
        });
        if left.is_empty() {
            break;
        }
    }
    answers.into_iter().map(|answer| answer.expect("it ends when nothing is left")).collect()
}

/// By the client without retries of its own: it would not tell that an answer before was lost.
async fn delete_ten(clients: &Clients, url: &str, leased: &[Leased], left: Vec<usize>) -> Result<Vec<Result<()>>> {
    let entries = left.into_iter().map(|index| {
        DeleteMessageBatchRequestEntry::builder()
            .id(index.to_string())
            .receipt_handle(text(&leased[index].0))
            .build()
            .expect("id and handle are set")
    });
    let request = clients.sender.delete_message_batch().queue_url(url).set_entries(Some(entries.collect()));
    let answer = request.send().await.map_err(|error| clients.failed("settle", &error))?;
    let done = answer.successful().iter().map(|entry| entry.id());
    Ok(outcomes("settle", leased.len(), done, answer.failed()))
}

/// Whether it is worth to ask again.
pub(crate) fn passes(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::Unavailable | ErrorKind::Timeout | ErrorKind::RateLimited)
}

/// Longer each time, and not the same for all who were cut off at once.
pub(crate) fn pause(asked: u32) -> Duration {
    let spread = uuid::Uuid::new_v4().as_bytes()[0];
    Duration::from_millis(200 * u64::from(asked * asked) + u64::from(spread))
}

/// As [`delete_ten`], and for the same reason.
async fn change_ten(
    clients: &Clients,
    url: &str,
    changes: &[Change],
    left: Vec<usize>,
    operation: &'static str,
) -> Result<Vec<Result<()>>> {
    let entries = left.into_iter().map(|index| {
        let ((handle, _), lease) = &changes[index];
        ChangeMessageVisibilityBatchRequestEntry::builder()
            .id(index.to_string())
            .receipt_handle(text(handle))
            .visibility_timeout(seconds(*lease))
            .build()
            .expect("id and handle are set")
    });
    let request = clients.sender.change_message_visibility_batch().queue_url(url).set_entries(Some(entries.collect()));
    let answer = request.send().await.map_err(|error| clients.failed(operation, &error))?;
    let done = answer.successful().iter().map(|entry| entry.id());
    Ok(outcomes(operation, changes.len(), done, answer.failed()))
}

fn outcomes<'a>(
    operation: &'static str,
    count: usize,
    done: impl Iterator<Item = &'a str>,
    failures: &[BatchResultErrorEntry],
) -> Vec<Result<()>> {
    let mut outcomes: Vec<Result<()>> = (0..count).map(|_| Err(unmentioned(operation))).collect();
    let place = |id: &str| id.parse::<usize>().ok().filter(|index| *index < count);
    for index in done.filter_map(place) {
        outcomes[index] = Ok(());
    }
    for failure in failures {
        if let Some(index) = place(failure.id()) {
            let error = failed_entry(operation, failure);
            // "The receipt handle has expired", in one of several codes; LocalStack (4.13.1) calls it no fault of the sender.
            let is_parameter = failure.code().contains("InvalidParameterValue");
            let is_stale =
                (is_parameter || error.kind() == ErrorKind::InvalidMessage) && error.message().contains("eceipt");
            outcomes[index] = Err(match is_stale {
                true => Error::new(ErrorKind::StaleDelivery, operation, error.message()),
                false => error,
            });
        }
    }
    outcomes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_expired_receipt_handle_is_stale_whoever_is_blamed_for_it() {
        let text = "Value x for parameter ReceiptHandle is invalid. Reason: The receipt handle has expired.";
        for (code, is_senders) in [("InvalidParameterValue", true), ("InvalidParameterValueException", false)] {
            let entry = BatchResultErrorEntry::builder().id("0").code(code).sender_fault(is_senders).message(text);
            let failure = entry.build().expect("id, code and blame are set");
            let outcomes = outcomes("settle", 1, std::iter::empty(), &[failure]);
            let kind = outcomes[0].as_ref().map_err(Error::kind);
            assert_eq!(kind, Err(ErrorKind::StaleDelivery), "{code}");
        }
    }
}

//! Deleting and changing visibility in requests of ten, with the outcome of each entry.

use std::time::Duration;

use anybroker_core::{Bytes, Effect, Error, ErrorKind, Result};
use aws_sdk_sqs::Client;
use aws_sdk_sqs::types::{
    BatchResultErrorEntry, ChangeMessageVisibilityBatchRequestEntry, DeleteMessageBatchRequestEntry,
};
use futures_util::future::join_all;
use tokio::time::Instant;

use crate::clients::Clients;
use crate::error::{failed, failed_entry, unmentioned};
use crate::parcel::BATCH;

/// How often something is asked for while nobody knows whether it is done.
pub(crate) const TRIES: u32 = 3;
/// How long the answer of a delete may take.
const ANSWER: Duration = Duration::from_secs(10);

/// A receipt handle, and when the lease ends that it stands for.
pub(crate) type Leased = (Bytes, Instant);

/// Deletes; one outcome per handle, in order. Asked again where an answer is lost: then "no such receipt handle" may say that
/// the earlier request has deleted it, and comes as [`ErrorKind::StaleDelivery`] with an unknown effect.
///
/// Not asked again when the lease is over. Another one may have received it by then, and "if you use an old `ReceiptHandle`, the
/// request will succeed, but the message might not be deleted"
/// (<https://docs.aws.amazon.com/AWSSimpleQueueService/latest/APIReference/API_DeleteMessage.html>).
pub(crate) async fn delete(clients: &Clients, url: &str, leased: &[Leased]) -> Vec<Result<()>> {
    let requests = leased.chunks(BATCH).map(|chunk| delete_ten(clients, url, chunk));
    join_all(requests).await.into_iter().flatten().collect()
}

/// Changes visibility timeouts; one outcome per entry, in order.
pub(crate) async fn change(
    client: &Client,
    url: &str,
    entries: &[(Bytes, Duration)],
    operation: &'static str,
) -> Vec<Result<()>> {
    let requests = entries.chunks(BATCH).map(|chunk| change_ten(client, url, chunk, operation));
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

/// By the client without retries of its own: it would not tell that an answer before was lost.
async fn delete_ten(clients: &Clients, url: &str, leased: &[Leased]) -> Vec<Result<()>> {
    let mut answers: Vec<Option<Result<()>>> = Vec::new();
    answers.resize_with(leased.len(), || None);
    let mut left: Vec<usize> = (0..leased.len()).collect();
    let mut may_be_done = false;
    for asked in 1.. {
        let entries = left.iter().map(|index| {
            DeleteMessageBatchRequestEntry::builder()
                .id(index.to_string())
                .receipt_handle(text(&leased[*index].0))
                .build()
                .expect("id and handle are set")
        });
        let request = clients.sender.delete_message_batch().queue_url(url).set_entries(Some(entries.collect()));
        let error = match tokio::time::timeout(ANSWER, request.send()).await {
            Ok(Ok(answer)) => {
                let done = answer.successful().iter().map(|entry| entry.id());
                let mut told = outcomes("settle", leased.len(), done, answer.failed());
                for index in left {
                    let answer = std::mem::replace(&mut told[index], Ok(()));
                    answers[index] = Some(answer.map_err(|error| match error.kind() {
                        ErrorKind::StaleDelivery if may_be_done => error.with_effect(Effect::Unknown),
                        _ => error,
                    }));
                }
                break;
            }
            Ok(Err(error)) => clients.failed("settle", &error),
            Err(_) => Error::new(ErrorKind::Timeout, "settle", format!("no answer within {ANSWER:?}")),
        };
        may_be_done |= error.effect() == Effect::Unknown;
        let error = if may_be_done { error.with_effect(Effect::Unknown) } else { error };
        let is_last = !passes(&error) || asked >= TRIES;
        if !is_last {
            tokio::time::sleep(pause(asked)).await;
        }
        let now = Instant::now();
        left.retain(|index| {
            let is_over = is_last || leased[*index].1 <= now;
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

/// Whether it is worth to ask again.
pub(crate) fn passes(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::Unavailable | ErrorKind::Timeout | ErrorKind::RateLimited)
}

/// Longer each time, and not the same for all who were cut off at once.
pub(crate) fn pause(asked: u32) -> Duration {
    let spread = uuid::Uuid::new_v4().as_bytes()[0];
    Duration::from_millis(200 * u64::from(asked * asked) + u64::from(spread))
}

async fn change_ten(
    client: &Client,
    url: &str,
    changes: &[(Bytes, Duration)],
    operation: &'static str,
) -> Vec<Result<()>> {
    let entries = changes.iter().enumerate().map(|(index, (handle, duration))| {
        ChangeMessageVisibilityBatchRequestEntry::builder()
            .id(index.to_string())
            .receipt_handle(text(handle))
            .visibility_timeout(seconds(*duration))
            .build()
            .expect("id and handle are set")
    });
    let request = client.change_message_visibility_batch().queue_url(url).set_entries(Some(entries.collect()));
    match request.send().await {
        Ok(answer) => {
            let done = answer.successful().iter().map(|entry| entry.id());
            outcomes(operation, changes.len(), done, answer.failed())
        }
        Err(error) => all(changes.len(), &failed(operation, &error)),
    }
}

fn all(count: usize, error: &Error) -> Vec<Result<()>> {
    (0..count).map(|_| Err(error.duplicate())).collect()
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

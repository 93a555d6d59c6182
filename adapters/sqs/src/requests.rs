//! Deleting and changing visibility in requests of ten, with the outcome of each entry.

use std::time::Duration;

use anybroker_core::{Bytes, Error, ErrorKind, Result};
use aws_sdk_sqs::Client;
use aws_sdk_sqs::types::{
    BatchResultErrorEntry, ChangeMessageVisibilityBatchRequestEntry, DeleteMessageBatchRequestEntry,
};
use futures_util::future::join_all;

use crate::error::{failed, failed_entry, unmentioned};
use crate::parcel::BATCH;

/// Deletes; one outcome per handle, in order.
pub(crate) async fn delete(client: &Client, url: &str, handles: &[Bytes]) -> Vec<Result<()>> {
    let requests = handles.chunks(BATCH).map(|chunk| delete_ten(client, url, chunk));
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

async fn delete_ten(client: &Client, url: &str, handles: &[Bytes]) -> Vec<Result<()>> {
    let entries = handles.iter().enumerate().map(|(index, handle)| {
        DeleteMessageBatchRequestEntry::builder()
            .id(index.to_string())
            .receipt_handle(text(handle))
            .build()
            .expect("id and handle are set")
    });
    let request = client.delete_message_batch().queue_url(url).set_entries(Some(entries.collect()));
    match request.send().await {
        Ok(answer) => {
            let done = answer.successful().iter().map(|entry| entry.id());
            outcomes("settle", handles.len(), done, answer.failed())
        }
        Err(error) => all(handles.len(), &failed("settle", &error)),
    }
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
            // "The receipt handle has expired", in one of several codes.
            let is_stale = error.kind() == ErrorKind::InvalidMessage && error.message().contains("eceipt");
            outcomes[index] = Err(match is_stale {
                true => Error::new(ErrorKind::StaleDelivery, operation, error.message()),
                false => error,
            });
        }
    }
    outcomes
}

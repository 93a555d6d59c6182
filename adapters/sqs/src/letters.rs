//! Writing dead letters: stored, confirmed, before their source is deleted.

use anybroker_core::{ByteString, Delivery, Error, Reason, SettleOutcome, Timestamp, Verdict};
use serde::{Deserialize, Serialize};

use crate::codec::{self, Carried};
use crate::inbox::Arrival;
use crate::parcel::{self, Parcel, Route};
use crate::requests;
use crate::settle::{Entry, REQUEST, delete_copied};
use crate::source::Source;

/// Detail beyond that is cut: a letter must not be larger than SQS takes. In bytes.
const LONGEST_DETAIL: usize = 4_096;

/// Why a message died, as its letter tells.
#[derive(Serialize, Deserialize)]
pub(crate) struct Note {
    pub(crate) group: String,
    pub(crate) reason: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) error_type: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) detail: Option<String>,
    pub(crate) attempts: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) first_at: Option<i64>,
    pub(crate) last_at: i64,
    pub(crate) redrives: u32,
}

impl Note {
    fn new(source: &Source, verdict: &Verdict, attempts: u32, carried: &Carried) -> Self {
        let cut = |text: &ByteString| {
            let end = (0..=text.len().min(LONGEST_DETAIL)).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(0);
            text[..end].to_owned()
        };
        Self {
            group: source.group.to_string(),
            reason: verdict.reason.as_str().to_owned(),
            error_type: verdict.error_type.as_ref().map(cut),
            detail: verdict.detail.as_ref().map(cut),
            attempts,
            first_at: carried.first_at.map(Timestamp::as_millis),
            last_at: Timestamp::now().as_millis(),
            redrives: carried.redrives,
        }
    }

    fn text(&self) -> String {
        serde_json::to_string(self).expect("texts and numbers become JSON")
    }
}

/// Stores the letters, and deletes the sources of those that are stored.
pub(crate) async fn bury(entries: Vec<(Entry, Box<Verdict>)>, source: &Source) -> Vec<(usize, SettleOutcome)> {
    if entries.is_empty() {
        return Vec::new();
    }
    let parcels = entries.iter().map(|(entry, verdict)| letter(&entry.delivery, verdict, entry, source));
    let route = Route::Queue(source.queues.letters.as_str().into());
    let stored = parcel::send_all(&source.clients, &route, parcels.collect(), REQUEST, "dead_letter").await;
    let mut outcomes = Vec::new();
    let mut buried = Vec::new();
    for ((entry, _), answer) in entries.into_iter().zip(stored) {
        match answer {
            Ok(_) => buried.push(entry),
            Err(error) => {
                let text = format!("the dead letter could not be stored: {}", error.message());
                let error =
                    Error::new(error.kind(), "dead_letter", text).with_effect(error.effect()).with_retry(error.retry());
                outcomes.push(entry.outcome(Err(error), source));
            }
        }
    }
    outcomes.extend(delete_copied(buried, source).await);
    outcomes
}

fn letter(delivery: &Delivery, verdict: &Verdict, entry: &Entry, source: &Source) -> Parcel {
    let note = Note::new(source, verdict, delivery.attempt(), &entry.lease.carried);
    Parcel::new(codec::encode(delivery.message(), &Carried::default(), Some(&note.text())))
}

/// Buries what has come after its time to live has ended. What cannot be buried is met again when its lease ends.
pub(crate) async fn bury_expired(source: &Source, expired: Vec<Arrival>) {
    if expired.is_empty() {
        return;
    }
    let verdict = Verdict::new(Reason::Expired);
    let parcels = expired.iter().map(|arrival| {
        let note = Note::new(source, &verdict, arrival.carried.failed, &arrival.carried);
        Parcel::new(codec::encode(&arrival.message, &Carried::default(), Some(&note.text())))
    });
    let route = Route::Queue(source.queues.letters.as_str().into());
    let stored = parcel::send_all(&source.clients, &route, parcels.collect(), REQUEST, "dead_letter").await;
    let mut buried = Vec::new();
    for (arrival, answer) in expired.into_iter().zip(stored) {
        match answer {
            Ok(_) => buried.push((arrival.handle, arrival.until)),
            Err(error) => tracing::warn!(%error, "an expired message could not be buried; it is tried again"),
        }
    }
    let deleted = requests::delete(&source.clients, &source.queues.queue, &buried).await;
    for error in deleted.into_iter().filter_map(Result::err) {
        tracing::warn!(%error, "an expired message was buried and not deleted; it may be buried twice");
    }
}

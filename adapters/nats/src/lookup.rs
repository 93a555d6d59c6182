//! Messages that were delivered before: their record is read, and applied, before they are handed out.

use std::sync::Arc;
use std::time::Duration;

use anybroker_core::Timestamp;
use async_nats::Subject;
use tokio::time::Instant;

use crate::desk::{Desk, Telling, nak};
use crate::record::Record;
use crate::state::{Key, Looking};

/// As little as that is waited here rather than told to the server.
const NEARLY: Duration = Duration::from_millis(100);

/// Reads the record of a message that was delivered before, where it is not known.
pub(crate) async fn look_up(desk: Arc<Desk>, Looking { key, feed, ack, known }: Looking) {
    if known.is_some() {
        return apply(desk, feed, key, known, ack).await;
    }
    loop {
        let Some((sequence, _)) = desk.shared.place_of(key) else { return };
        match desk.read_record(feed, sequence).await {
            Ok(found) => return apply(desk, feed, key, found, ack).await,
            Err(error) => {
                // Handed out without it, its attempt would be wrong.
                tracing::debug!(%error, "a record could not be read yet");
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
        }
    }
}

/// Makes a message ready, or sends it back when it comes too early: a restarted server may have forgotten its delay.
async fn apply(desk: Arc<Desk>, feed: u32, key: Key, found: Option<(Record, u64)>, ack: Subject) {
    let Some((mut record, place)) = found else { return desk.shared.ready(key, Record::default(), None) };
    let not_before = Timestamp::from_millis(record.not_before);
    let early = not_before.since(Timestamp::now());
    if early <= NEARLY {
        if !early.is_zero() {
            tokio::time::sleep(early).await;
        }
        return desk.shared.ready(key, record, Some(place));
    }
    if desk.shared.keeps_failed(feed) {
        return desk.shared.wait(key, record, place, Instant::now() + early);
    }
    let Some((sequence, delivered)) = desk.shared.place_of(key) else { return };
    (record.spare, record.delivered) = (record.spare + 1, delivered);
    let deadline = Instant::now() + desk.settle_timeout;
    let written = desk.write(vec![desk.record_of(feed, sequence, &record)], deadline).await.pop();
    if let Some(Ok(place)) = written {
        desk.shared.leaving(key, (record, place));
        let early = not_before.since(Timestamp::now());
        let telling = Telling { feed, key: Some(key), ack, payload: nak(early) };
        let _ = desk.tell(&mut [telling], deadline).await;
    }
    // Not told, it comes back when its lease ends, and is looked at again.
    desk.shared.settled(key);
}

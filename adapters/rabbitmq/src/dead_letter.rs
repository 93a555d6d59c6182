//! Dead letters: copies in a queue of their group. AMQP has no way to look without taking: reading leases the letters for as
//! long as it lasts. Their order is that of their ids, which begin with the time of death.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use anybroker_core::naming::fnv1a;
use anybroker_core::{
    ByteString, Bytes, DeadLetter, DeadLetterId, DeadLetterPage, DeadLetterScope, Effect, Error, ErrorKind, Message,
    Reason, Result, Timestamp, Verdict,
};
use lapin::BasicProperties;
use lapin::message::Delivery;
use lapin::types::{AMQPValue, FieldTable, LongString};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::sync::OwnedMutexGuard;
use tokio::time::Instant;
use uuid::Uuid;

use crate::codec::{Hop, LETTER, bytes_of, decode, encode as encode_message, notes, number};
use crate::link::Link;
use crate::names::Names;
use crate::outlet::{Answer, Board, Outlet, Parcel};
use crate::reading::{REQUEST, Reading};
use crate::topology::Topology;

/// Detail beyond that is cut: headers lie in one frame.
const LONGEST_DETAIL: usize = 4_096;
/// Groups whose turns are remembered.
const MOST_TURNS: usize = 64;

/// Why a message died, as its letter tells.
#[derive(Serialize, Deserialize)]
struct Note {
    id: String,
    reason: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    error_type: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    detail: Option<String>,
    attempts: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    first_at: Option<i64>,
    last_at: i64,
    redrives: u32,
}

/// The properties of a letter: those of the message, and why it died.
pub(crate) fn encode(message: &Message, hop: &Hop, attempts: u32, verdict: &Verdict) -> BasicProperties {
    let cut = |text: &ByteString| {
        let end = (0..=text.len().min(LONGEST_DETAIL)).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(0);
        text[..end].to_owned()
    };
    let note = Note {
        id: Uuid::now_v7().simple().to_string(),
        reason: verdict.reason.as_str().to_owned(),
        error_type: verdict.error_type.as_ref().map(cut),
        detail: verdict.detail.as_ref().map(cut),
        attempts,
        first_at: (hop.first != 0).then_some(hop.first),
        last_at: Timestamp::now().as_millis(),
        redrives: hop.redrives,
    };
    let properties = encode_message(message, None, &mut Vec::new());
    let mut table = properties.headers().clone().unwrap_or_default();
    let note = serde_json::to_vec(&note).expect("texts and numbers become JSON");
    table.insert(LETTER.into(), AMQPValue::LongString(LongString::from(note)));
    properties.with_headers(table)
}

/// What a letter's properties tell; of one that the server made itself, what it noted.
fn note_of(properties: &BasicProperties, queue: &str) -> Note {
    let table = properties.headers().as_ref().map(FieldTable::inner);
    let own = table.and_then(|table| table.get(LETTER)).and_then(bytes_of);
    if let Some(note) = own.and_then(|note| serde_json::from_slice(note).ok()) {
        return note;
    }
    let mut note = Note {
        id: String::new(),
        reason: Reason::BrokerLimit.as_str().to_owned(),
        error_type: None,
        detail: None,
        attempts: notes(properties).hop.failures,
        first_at: Some(notes(properties).hop.first).filter(|first| *first != 0),
        last_at: 0,
        redrives: notes(properties).hop.redrives,
    };
    let deaths = match table.and_then(|table| table.get("x-death")) {
        Some(AMQPValue::FieldArray(deaths)) => deaths.as_slice(),
        _ => &[],
    };
    let fields = deaths.iter().filter_map(|death| match death {
        AMQPValue::FieldTable(fields) => Some(fields.inner()),
        _ => None,
    });
    let text =
        |value: Option<&AMQPValue>| value.and_then(bytes_of).map(|text| String::from_utf8_lossy(text).into_owned());
    for death in fields {
        if text(death.get("queue")).as_deref() != Some(queue) {
            continue;
        }
        if text(death.get("reason")).as_deref() == Some("expired") {
            note.reason = Reason::Expired.as_str().to_owned();
        }
        note.last_at = death.get("time").and_then(number).unwrap_or(0).saturating_mul(1_000);
    }
    note.id = servers_id(note.last_at, properties.message_id().as_ref().map_or("", |id| id.as_str()));
    note
}

/// The id of a letter that the server made: it sorts by time as ours do (the first 48 bits of a UUIDv7 are milliseconds), and
/// within the server's second by the message's own id.
fn servers_id(died_at: i64, message: &str) -> String {
    let millis = u64::try_from(died_at).unwrap_or(0);
    let message = Uuid::try_parse(message).map_or_else(|_| fnv1a(message.as_bytes()), |id| id.as_u128());
    format!("{millis:012x}x{message:032x}")
}

/// Dead letters of one connection.
pub(crate) struct Letters {
    link: Arc<Link>,
    topology: Arc<Topology>,
    copies: Arc<Outlet>,
    /// Readers of this process take turns; those of others see less meanwhile.
    turns: Mutex<HashMap<String, Arc<tokio::sync::Mutex<()>>>>,
}

impl Letters {
    pub(crate) fn new(link: Arc<Link>, topology: Arc<Topology>, copies: Arc<Outlet>) -> Self {
        Self { link, topology, copies, turns: Mutex::default() }
    }

    async fn turn(&self, queue: &str) -> OwnedMutexGuard<()> {
        let turn = {
            let mut turns = self.turns.lock();
            if turns.len() >= MOST_TURNS {
                turns.retain(|_, turn| Arc::strong_count(turn) > 1);
            }
            Arc::clone(turns.entry(queue.to_owned()).or_default())
        };
        turn.lock_owned().await
    }

    async fn open(&self, queue: &str) -> Result<Reading> {
        Reading::open(&self.link, &Names::letters(queue)).await
    }

    /// Letters are read all, and those that belong to the page are kept: `max` and one.
    pub(crate) async fn page(
        &self,
        scope: &DeadLetterScope,
        from: Option<&DeadLetterId>,
        max: usize,
    ) -> Result<DeadLetterPage> {
        let (queue, _) = self.topology.expect_group(&scope.source, &scope.group, "dead letters").await?;
        let _turn = self.turn(&queue).await;
        let mut reading = self.open(&queue).await?;
        let mut kept: BTreeMap<(String, u64), (Note, Delivery)> = BTreeMap::new();
        // A reading that is not ended gives everything back with its channel.
        while let Some(delivery) = reading.next().await? {
            let note = note_of(&delivery.properties, &queue);
            if from.is_some_and(|from| *note.id < *from.0) {
                continue;
            }
            kept.insert((note.id.clone(), delivery.delivery_tag), (note, delivery));
            if kept.len() > max.saturating_add(1) {
                kept.pop_last();
            }
        }
        reading.end(&self.topology).await?;
        let mut page = DeadLetterPage::default();
        for (note, delivery) in kept.into_values() {
            if page.letters.len() == max {
                page.next = Some(DeadLetterId(note.id.into()));
                break;
            }
            page.letters.push(letter(scope, note, &delivery.properties, Bytes::from(delivery.data)));
        }
        Ok(page)
    }

    /// Each goes back to the queue of its group, in the order asked for; confirmed, before the letter is acked.
    pub(crate) async fn redrive(&self, scope: &DeadLetterScope, ids: &[DeadLetterId]) -> Vec<Result<()>> {
        self.settle(scope, ids, true).await
    }

    pub(crate) async fn purge(&self, scope: &DeadLetterScope, ids: &[DeadLetterId]) -> Vec<Result<()>> {
        self.settle(scope, ids, false).await
    }

    async fn settle(&self, scope: &DeadLetterScope, ids: &[DeadLetterId], back: bool) -> Vec<Result<()>> {
        let operation = if back { "redrive" } else { "purge" };
        match self.settle_found(scope, ids, back).await {
            Ok(outcomes) => {
                let missing = |id: &DeadLetterId| {
                    Error::new(ErrorKind::NotFound, operation, "there is no such dead letter").with("id", id)
                };
                outcomes.into_iter().zip(ids).map(|(outcome, id)| outcome.unwrap_or_else(|| Err(missing(id)))).collect()
            }
            Err(error) => ids.iter().map(|_| Err(error.duplicate())).collect(),
        }
    }

    /// `None` for one that is not there. An error means that nothing was done.
    async fn settle_found(
        &self,
        scope: &DeadLetterScope,
        ids: &[DeadLetterId],
        back: bool,
    ) -> Result<Vec<Option<Result<()>>>> {
        let operation = if back { "redrive" } else { "purge" };
        let (queue, _) = self.topology.expect_group(&scope.source, &scope.group, operation).await?;
        let _turn = self.turn(&queue).await;
        let mut reading = self.open(&queue).await?;
        let mut wanted: HashMap<&str, usize> = ids.iter().enumerate().map(|(index, id)| (&*id.0, index)).collect();
        let mut found: BTreeMap<usize, (Note, Delivery)> = BTreeMap::new();
        while !wanted.is_empty()
            && let Some(mut delivery) = reading.next().await?
        {
            let note = note_of(&delivery.properties, &queue);
            let Some(index) = wanted.remove(note.id.as_str()) else { continue };
            if !back {
                delivery.data = Vec::new();
            }
            found.insert(index, (note, delivery));
        }
        let deadline = Instant::now() + REQUEST;
        let board = Board::new(found.len());
        let mut taken: Vec<(usize, u64)> = Vec::with_capacity(found.len());
        for (place, (index, (note, delivery))) in found.into_iter().enumerate() {
            taken.push((index, delivery.delivery_tag));
            if !back {
                board.note(place, Answer::Stored);
                continue;
            }
            let hop = Hop { redrives: note.redrives + 1, ..Hop::default() };
            let message = decode(&scope.source, &delivery.properties, Bytes::from(delivery.data));
            let parcel = Parcel {
                exchange: "".into(),
                routing_key: queue.as_str().into(),
                properties: encode_message(&message, Some(&hop), &mut Vec::new()),
                payload: message.payload().cloned().unwrap_or_default(),
            };
            if let Err(error) = self.copies.send(parcel, (&board, place), deadline).await {
                board.note(place, Answer::Failed(error));
            }
        }
        board.wait(deadline).await;
        let mut outcomes: Vec<Option<Result<()>>> = ids.iter().map(|_| None).collect();
        let (mut settled, mut done) = (Vec::with_capacity(taken.len()), Vec::with_capacity(taken.len()));
        for (place, (index, tag)) in taken.into_iter().enumerate() {
            outcomes[index] = Some(match board.take(place, "redrive") {
                Answer::Stored => {
                    settled.push(tag);
                    done.push(index);
                    Ok(())
                }
                Answer::Unroutable => Err(self.topology.takes_nothing(&queue, "redrive", deadline).await),
                Answer::Failed(error) => Err(error),
            });
        }
        match reading.ack(settled).await {
            // What is done is done: that the rest could not be given back in time is not its failure.
            Ok(()) => {
                if let Err(error) = reading.end(&self.topology).await {
                    tracing::warn!(%error, "the reading of dead letters did not end in time");
                }
            }
            // The server has not said that it has taken the acks in.
            Err(error) => {
                for index in done {
                    outcomes[index] = Some(Err(error.duplicate().with_effect(Effect::Unknown)));
                }
            }
        }
        Ok(outcomes)
    }
}

fn letter(scope: &DeadLetterScope, note: Note, properties: &BasicProperties, payload: Bytes) -> DeadLetter {
    DeadLetter {
        message: decode(&scope.source, properties, payload),
        id: DeadLetterId(note.id.into()),
        group: scope.group.clone(),
        reason: Reason::from(note.reason.as_str()),
        error_type: note.error_type.map(ByteString::from),
        detail: note.detail.map(ByteString::from),
        attempts: note.attempts,
        first_at: note.first_at.map(Timestamp::from_millis),
        last_at: Timestamp::from_millis(note.last_at),
        redrives: note.redrives,
        position: None,
    }
}

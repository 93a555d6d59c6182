//! Dead letters: copies in a queue of their group. AMQP has no way to look without taking: reading leases the letters for as
//! long as it lasts, and gives them back in their order.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use anybroker_core::{
    ByteString, Bytes, DeadLetter, DeadLetterId, DeadLetterPage, DeadLetterScope, Error, ErrorKind, Message, Reason,
    Result, Timestamp, Verdict,
};
use futures_util::StreamExt;
use lapin::message::Delivery;
use lapin::options::{BasicConsumeOptions, BasicQosOptions};
use lapin::types::{AMQPValue, FieldTable, LongString};
use lapin::{BasicProperties, Channel, Consumer};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::sync::OwnedMutexGuard;
use tokio::time::{Instant, timeout};

use crate::codec::{Hop, LETTER, bytes_of, decode, encode as encode_message, notes, number};
use crate::error::failed;
use crate::feed::ack_alone;
use crate::link::{Link, bounded};
use crate::names::{Names, fnv1a};
use crate::outlet::{Answer, Board, Outlet, Parcel};
use crate::topology::Topology;

/// How long a request about letters may take.
const REQUEST: Duration = Duration::from_secs(20);
/// When nothing comes for that long, somebody else has the rest.
const SILENCE: Duration = Duration::from_secs(2);
/// Detail beyond that is cut: headers lie in one frame.
const LONGEST_DETAIL: usize = 4_096;
/// Groups whose turns are remembered.
const MOST_TURNS: usize = 64;
/// Letters that are read ahead beyond those that are looked for.
const AHEAD: usize = 64;

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
        id: uuid::Uuid::now_v7().simple().to_string(),
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
    let id = properties.message_id().as_ref().map_or("", |id| id.as_str());
    note.id = format!("x{:032x}", fnv1a(format!("{id}/{}", note.last_at).as_bytes()));
    note
}

/// Dead letters of one connection.
pub(crate) struct Letters {
    link: Arc<Link>,
    topology: Arc<Topology>,
    copies: Arc<Outlet>,
    /// Readers of this process take turns; those of others see less meanwhile.
    turns: Mutex<HashMap<String, Arc<tokio::sync::Mutex<()>>>>,
}

/// One reading: what it has taken goes back when it ends.
struct Reading {
    channel: Channel,
    consumer: Consumer,
    /// How many there are behind what was read.
    left: u64,
    letters: String,
    /// How many there were when it began, without those that it settled.
    total: u64,
}

impl Reading {
    /// The next letter; `None` behind the last.
    async fn next(&mut self) -> Result<Option<Delivery>> {
        let operation = "dead letters";
        if self.left == 0 {
            return Ok(None);
        }
        match timeout(SILENCE, self.consumer.next()).await {
            Ok(Some(Ok(delivery))) => {
                self.left -= 1;
                Ok(Some(delivery))
            }
            Ok(Some(Err(error))) => Err(failed(operation, &error)),
            Ok(None) => Err(Error::new(ErrorKind::Unavailable, operation, "the reading was ended by the server")),
            Err(_) => Ok(None),
        }
    }

    /// A letter that is settled for good.
    fn ack(&mut self, tag: u64) {
        self.total -= 1;
        ack_alone(&self.channel, tag);
    }

    /// Gives everything that is unacked back, in its order, and waits until it is there: the server takes it back a moment
    /// after the channel is closed, and hands what lies behind to whoever asks meanwhile.
    async fn end(self, topology: &Topology, deadline: Instant) -> Result<()> {
        let operation = "dead letters";
        bounded(operation, deadline, self.channel.close(200, "read".into())).await?;
        let (patience, mut pause) = (Instant::now() + SILENCE, Duration::from_millis(1));
        // Other processes may read too: then it is not complete for a while.
        while Instant::now() < patience {
            match topology.look(&self.letters, operation, deadline).await? {
                Some((ready, _)) if ready < self.total => tokio::time::sleep(pause).await,
                _ => break,
            }
            pause = (pause * 2).min(Duration::from_millis(50));
        }
        Ok(())
    }
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

    /// Begins to read; `ahead` is how many may be taken, all with `None`.
    async fn open(&self, queue: &str, ahead: Option<usize>, deadline: Instant) -> Result<Reading> {
        let operation = "dead letters";
        let letters = Names::letters(queue);
        let found = self.topology.look(&letters, operation, deadline).await?;
        let (total, _) =
            found.ok_or_else(|| Error::new(ErrorKind::NotFound, operation, "it has no queue of letters"))?;
        let channel = self.link.channel_until(operation, deadline).await?;
        let prefetch = ahead.and_then(|ahead| u16::try_from(ahead).ok()).unwrap_or(0);
        bounded(operation, deadline, channel.basic_qos(prefetch, BasicQosOptions::default())).await?;
        let (options, none) = (BasicConsumeOptions::default(), FieldTable::default());
        let consuming = channel.basic_consume(letters.as_str().into(), "".into(), options, none);
        let consumer = bounded(operation, deadline, consuming).await?;
        Ok(Reading { channel, consumer, left: total, letters, total })
    }

    pub(crate) async fn page(
        &self,
        scope: &DeadLetterScope,
        from: Option<&DeadLetterId>,
        max: usize,
    ) -> Result<DeadLetterPage> {
        let (queue, _) = self.topology.expect_group(&scope.source, &scope.group, "dead letters").await?;
        let _turn = self.turn(&queue).await;
        let deadline = Instant::now() + REQUEST;
        let ahead = from.is_none().then_some(max.saturating_add(1));
        let mut reading = self.open(&queue, ahead, deadline).await?;
        let mut page = DeadLetterPage::default();
        let mut is_there = from.is_none();
        let read = loop {
            let delivery = match reading.next().await {
                Ok(Some(delivery)) => delivery,
                Ok(None) => break Ok(()),
                Err(error) => break Err(error),
            };
            let note = note_of(&delivery.properties, &queue);
            is_there = is_there || from.is_some_and(|from| *from.0 == *note.id);
            if !is_there {
                continue;
            }
            if page.letters.len() == max {
                page.next = Some(DeadLetterId(note.id.into()));
                break Ok(());
            }
            page.letters.push(letter(scope, note, &delivery.properties, Bytes::from(delivery.data)));
        };
        // A reading that is not ended gives everything back with its channel.
        read?;
        reading.end(&self.topology, deadline).await?;
        Ok(page)
    }

    /// Each goes back to the queue of its group; confirmed, before the letter is acked.
    pub(crate) async fn redrive(&self, scope: &DeadLetterScope, ids: &[DeadLetterId]) -> Vec<Result<()>> {
        self.settle(scope, ids, true).await
    }

    pub(crate) async fn purge(&self, scope: &DeadLetterScope, ids: &[DeadLetterId]) -> Vec<Result<()>> {
        self.settle(scope, ids, false).await
    }

    async fn settle(&self, scope: &DeadLetterScope, ids: &[DeadLetterId], back: bool) -> Vec<Result<()>> {
        let operation = if back { "redrive" } else { "purge" };
        let found = self.topology.expect_group(&scope.source, &scope.group, operation).await;
        let queue = match found {
            Ok((queue, _)) => queue,
            Err(error) => return ids.iter().map(|_| Err(error.duplicate())).collect(),
        };
        let _turn = self.turn(&queue).await;
        let mut outcomes: Vec<Option<Result<()>>> = ids.iter().map(|_| None).collect();
        // Mostly they are the oldest; only when they are not, everything is read.
        for ahead in [Some(ids.len() + AHEAD), None] {
            let wanted: HashMap<String, usize> = ids
                .iter()
                .enumerate()
                .filter(|(index, _)| outcomes[*index].is_none())
                .map(|(index, id)| (id.0.to_string(), index))
                .collect();
            if wanted.is_empty() {
                break;
            }
            if let Err(error) = self.settle_some(scope, &queue, (wanted, ahead), back, &mut outcomes).await {
                for outcome in outcomes.iter_mut().filter(|outcome| outcome.is_none()) {
                    *outcome = Some(Err(error.duplicate()));
                }
            }
        }
        let missing = |id: &DeadLetterId| {
            Error::new(ErrorKind::NotFound, operation, "there is no such dead letter").with("id", id)
        };
        outcomes.into_iter().zip(ids).map(|(outcome, id)| outcome.unwrap_or_else(|| Err(missing(id)))).collect()
    }

    async fn settle_some(
        &self,
        scope: &DeadLetterScope,
        queue: &str,
        (mut wanted, ahead): (HashMap<String, usize>, Option<usize>),
        back: bool,
        outcomes: &mut [Option<Result<()>>],
    ) -> Result<()> {
        let deadline = Instant::now() + REQUEST;
        let mut reading = self.open(queue, ahead, deadline).await?;
        if let Some(ahead) = ahead {
            reading.left = reading.left.min(ahead as u64);
        }
        let board = Board::new(wanted.len());
        let mut taken: Vec<(usize, u64)> = Vec::new();
        while !wanted.is_empty()
            && let Some(delivery) = reading.next().await?
        {
            let note = note_of(&delivery.properties, queue);
            let Some(index) = wanted.remove(&note.id) else { continue };
            if back {
                let hop = Hop { redrives: note.redrives + 1, ..Hop::default() };
                let message = decode(&scope.source, &delivery.properties, Bytes::from(delivery.data));
                let parcel = Parcel {
                    exchange: "".into(),
                    routing_key: queue.into(),
                    properties: encode_message(&message, Some(&hop), &mut Vec::new()),
                    payload: message.payload().cloned().unwrap_or_default(),
                };
                if let Err(error) = self.copies.send(parcel, (&board, taken.len()), deadline).await {
                    board.note(taken.len(), Answer::Failed(error));
                }
            } else {
                board.note(taken.len(), Answer::Stored);
            }
            taken.push((index, delivery.delivery_tag));
        }
        for rest in taken.len()..taken.len() + wanted.len() {
            board.note(rest, Answer::Stored);
        }
        board.wait(deadline).await;
        for (place, (index, tag)) in taken.into_iter().enumerate() {
            outcomes[index] = Some(match board.take(place, "redrive") {
                Answer::Stored => {
                    reading.ack(tag);
                    Ok(())
                }
                Answer::Unroutable => Err(Error::new(ErrorKind::NotFound, "redrive", "the group's queue is gone")),
                Answer::Failed(error) => Err(error),
            });
        }
        reading.end(&self.topology, deadline).await
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

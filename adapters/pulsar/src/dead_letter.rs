//! Dead letters: a topic for each source and group. A letter is purged by acking it on the topic's own subscription, which
//! exists before the first letter does; letters are read past that subscription, by a reader that acks nothing.

use std::sync::Arc;
use std::time::Duration;

use anybroker_core::{
    ByteString, DeadLetter, DeadLetterId, DeadLetterPage, DeadLetterScope, Delivery, Destination, Error, ErrorKind,
    Position, Reason, Result, Timestamp, Verdict,
};
use pulsar::message::Payload;
use pulsar::proto::{self, BaseCommand, MessageIdData, base_command::Type, command_subscribe::SubType};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::time::Instant;

use crate::admin::Verb;
use crate::codec::{self, LETTER, Notes, property};
use crate::names::{LETTERS_SUBSCRIPTION, Names};
use crate::producer::Producer;
use crate::publisher::late;
use crate::settle::{origin, tell};
use crate::state::Taken;
use crate::topology::Topology;
use crate::wire::{Conn, Inbound, command};

/// How long a request about letters may take.
const REQUEST: Duration = Duration::from_secs(20);
/// Detail beyond that is cut: a letter must not be larger than the broker takes.
const LONGEST_DETAIL: usize = 4_096;
/// Letters that a reader asks for at once.
const READ_AHEAD: u32 = 500;

/// Ledger and entry.
type At = (u64, i64);

/// Why a message died, as its letter tells.
#[derive(Serialize, Deserialize)]
struct Note {
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
    origin: (u64, u64),
}

fn note_property(note: &Note) -> proto::KeyValue {
    property(LETTER, serde_json::to_string(note).expect("texts and numbers become JSON"))
}

/// A letter: the message as it was, and why it died.
pub(crate) fn encode(delivery: &Delivery, verdict: &Verdict, taken: &Taken) -> Payload {
    let cut = |text: &ByteString| {
        let end = (0..=text.len().min(LONGEST_DETAIL)).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(0);
        text[..end].to_owned()
    };
    let note = Note {
        reason: verdict.reason.as_str().to_owned(),
        error_type: verdict.error_type.as_ref().map(cut),
        detail: verdict.detail.as_ref().map(cut),
        attempts: delivery.attempt(),
        first_at: Some(taken.first_at.as_millis()),
        last_at: Timestamp::now().as_millis(),
        redrives: taken.notes.redrives,
        origin: origin(taken),
    };
    let mut payload = codec::encode(delivery.message(), None);
    payload.metadata.properties.push(note_property(&note));
    payload
}

/// A letter of what could not be read: its bytes as the broker has them.
pub(crate) fn malformed(destination: &Destination, id: &MessageIdData, payload: Payload, why: &str) -> Payload {
    let mut plain = payload;
    plain.metadata.compression = None;
    plain.metadata.num_messages_in_batch = None;
    let (message, _) = codec::decode(destination, id, plain);
    let now = Timestamp::now().as_millis();
    let note = Note {
        reason: Reason::Malformed.as_str().to_owned(),
        error_type: None,
        detail: Some(why.to_owned()),
        attempts: 0,
        first_at: Some(now),
        last_at: now,
        redrives: 0,
        origin: (id.ledger_id, id.entry_id),
    };
    let mut payload = codec::encode(&message, None);
    payload.metadata.properties.push(note_property(&note));
    payload
}

/// What is in a topic of letters: its entries without those that are acked.
struct Live {
    ledgers: Vec<(u64, i64)>,
    mark: At,
    deleted: Vec<(At, At)>,
}

impl Live {
    fn read(stats: &Value) -> Option<Self> {
        let cursor = &stats["cursors"][LETTERS_SUBSCRIPTION];
        let last = position(stats["lastConfirmedEntry"].as_str()?)?;
        let count = |ledger: &Value| {
            let id = ledger["ledgerId"].as_u64()?;
            // Of the ledger that is written, the list does not count the entries.
            let entries = if id == last.0 { last.1 + 1 } else { ledger["entries"].as_i64()? };
            Some((id, entries))
        };
        let ledgers = stats["ledgers"].as_array()?.iter().filter_map(count).collect();
        // Such as `[(3:0..3:1],(3:4..3:9]]`: open at the lower end.
        let ranges = cursor["individuallyDeletedMessages"].as_str()?.trim_matches(['[', ']']);
        let range = |text: &str| {
            let (low, high) = text.trim_matches(['(', ')', '[', ']', ',', ' ']).split_once("..")?;
            Some((position(low)?, position(high)?))
        };
        let deleted = ranges.split("],").filter(|text| !text.is_empty()).map(range).collect::<Option<Vec<_>>>()?;
        Some(Self { ledgers, mark: position(cursor["markDeletePosition"].as_str()?)?, deleted })
    }

    fn is_live(&self, at: At) -> bool {
        let exists = self.ledgers.iter().any(|(ledger, entries)| *ledger == at.0 && (0..*entries).contains(&at.1));
        exists && at > self.mark && !self.deleted.iter().any(|(low, high)| *low < at && at <= *high)
    }

    /// The letters from `from` on, oldest first, `max` at most.
    fn from(&self, from: At, max: usize) -> Vec<At> {
        let mut found = Vec::new();
        for (ledger, entries) in &self.ledgers {
            let mut entry = if *ledger < from.0 { *entries } else { 0 };
            if *ledger == from.0 {
                entry = from.1.max(0);
            }
            if *ledger == self.mark.0 {
                entry = entry.max(self.mark.1 + 1);
            } else if *ledger < self.mark.0 {
                continue;
            }
            while entry < *entries && found.len() < max {
                let at = (*ledger, entry);
                match self.deleted.iter().find(|(low, high)| *low < at && at <= *high) {
                    Some((_, high)) if high.0 == *ledger => entry = high.1 + 1,
                    Some(_) => break,
                    None => {
                        found.push(at);
                        entry += 1;
                    }
                }
            }
        }
        found
    }
}

fn position(text: &str) -> Option<At> {
    let (ledger, entry) = text.split_once(':')?;
    Some((ledger.parse().ok()?, entry.parse().ok()?))
}

/// Dead letters of one connection.
pub(crate) struct Letters {
    pub(crate) topology: Arc<Topology>,
}

impl Letters {
    pub(crate) async fn page(
        &self,
        scope: &DeadLetterScope,
        from: Option<&DeadLetterId>,
        max: usize,
    ) -> Result<DeadLetterPage> {
        let operation = "dead letters";
        let live = self.live(scope, operation).await?;
        let from = from.map_or((0, 0), |id| position(&id.0).unwrap_or((u64::MAX, 0)));
        let mut wanted = live.from(from, max.saturating_add(1));
        let next = (wanted.len() > max).then(|| wanted.pop()).flatten().map(id_of);
        let letters = self.read(scope, &wanted, operation).await?;
        let letters = letters.into_iter().map(|(at, payload)| letter(scope, at, payload)).collect();
        Ok(DeadLetterPage { letters, next })
    }

    /// Each goes back to its group by a topic that no other one reads; confirmed, before the letter is acked.
    pub(crate) async fn redrive(&self, scope: &DeadLetterScope, ids: &[DeadLetterId]) -> Vec<Result<()>> {
        let operation = "redrive";
        let moving = async {
            let wanted = self.chosen(scope, ids, operation).await?;
            let mut there: Vec<At> = wanted.iter().flatten().copied().collect();
            there.sort_unstable();
            let letters = self.read(scope, &there, operation).await?;
            let partitions = self.topology.expect(&scope.source, operation).await?;
            let back = self.topology.topics(&Names::back(&scope.source, &scope.group), partitions).into_iter();
            let back: Vec<_> = back.map(|topic| Producer::new(topic, self.topology.window.clone())).collect();
            let (mut places, mut writings) = (Vec::new(), Vec::new());
            for (at, payload) in letters {
                let letter = letter(scope, at, payload);
                let origin = letter.position.map_or((0, 0), |origin| (origin.major, origin.minor));
                let notes = Notes { redrives: letter.redrives + 1, origin, ..Notes::default() };
                let payload = codec::encode(&letter.message, Some(notes));
                let key = payload.metadata.partition_key.as_deref();
                let partition = key.map_or(0, |key| codec::partition_of(key, back.len()));
                places.push(at);
                writings.push((Arc::clone(&back[partition]), payload));
            }
            let written = self.topology.write(writings, Instant::now() + REQUEST, operation).await;
            back.iter().for_each(|producer| producer.close());
            let mut stored = Vec::new();
            let mut failed = Vec::new();
            for (at, written) in places.into_iter().zip(written) {
                match written {
                    Ok(()) => stored.push(at),
                    Err(error) => failed.push((at, error)),
                }
            }
            let acked = self.ack(scope, &stored, operation).await;
            Ok((wanted, stored, failed, acked))
        };
        let (wanted, stored, failed, acked) = match moving.await {
            Ok(moved) => moved,
            Err(error) => return ids.iter().map(|_| Err(Error::duplicate(&error))).collect(),
        };
        let outcome = |(id, wanted): (&DeadLetterId, Option<At>)| {
            let at = wanted.ok_or_else(|| missing(id))?;
            if let Some((_, error)) = failed.iter().find(|(other, _)| *other == at) {
                return Err(error.duplicate());
            }
            if !stored.contains(&at) {
                return Err(missing(id));
            }
            acked.as_ref().map_err(Error::duplicate).copied()
        };
        ids.iter().zip(wanted).map(outcome).collect()
    }

    pub(crate) async fn purge(&self, scope: &DeadLetterScope, ids: &[DeadLetterId]) -> Vec<Result<()>> {
        let operation = "purge";
        let wanted = match self.chosen(scope, ids, operation).await {
            Ok(wanted) => wanted,
            Err(error) => return ids.iter().map(|_| Err(error.duplicate())).collect(),
        };
        let there: Vec<At> = wanted.iter().flatten().copied().collect();
        let acked = self.ack(scope, &there, operation).await;
        let outcome = |(id, wanted): (&DeadLetterId, Option<At>)| match wanted {
            Some(_) => acked.as_ref().map_err(Error::duplicate).copied(),
            None => Err(missing(id)),
        };
        ids.iter().zip(wanted).map(outcome).collect()
    }

    /// Where these letters are; `None` for those that are gone.
    async fn chosen(
        &self,
        scope: &DeadLetterScope,
        ids: &[DeadLetterId],
        operation: &'static str,
    ) -> Result<Vec<Option<At>>> {
        let live = self.live(scope, operation).await?;
        Ok(ids.iter().map(|id| position(&id.0).filter(|at| live.is_live(*at))).collect())
    }

    async fn live(&self, scope: &DeadLetterScope, operation: &'static str) -> Result<Live> {
        self.topology.expect_group(&scope.source, &scope.group, operation).await?;
        let local = Names::letters(&scope.source, &scope.group);
        let answer = self.topology.admin.topic(operation, Verb::Get, &local, "/internalStats").await?;
        let stats: Value = answer.read(operation)?;
        Live::read(&stats).ok_or_else(|| {
            let text = "the broker's figures of the topic of dead letters cannot be read";
            Error::new(ErrorKind::Unexpected, operation, text).with("topic", &local)
        })
    }

    /// Reads these letters, which are in order, by a reader that lives for this request.
    async fn read(
        &self,
        scope: &DeadLetterScope,
        wanted: &[At],
        operation: &'static str,
    ) -> Result<Vec<(At, Payload)>> {
        let (Some(first), Some(last)) = (wanted.first(), wanted.last()) else { return Ok(Vec::new()) };
        let start = MessageIdData { ledger_id: first.0, entry_id: first.1.unsigned_abs(), ..Default::default() };
        let reading = async {
            let (conn, consumer, mut inbound) = self.attach(scope, Some(start), operation).await?;
            let mut found = Vec::with_capacity(wanted.len());
            let mut permits = 0;
            while found.len() < wanted.len() {
                if permits == 0 {
                    permits = READ_AHEAD;
                    let flow = proto::CommandFlow { consumer_id: consumer, message_permits: permits };
                    conn.tell(BaseCommand { flow: Some(flow), ..command(Type::Flow) });
                }
                let Some(Inbound::Message(arrived)) = inbound.recv().await else {
                    let text = "the broker closed the reader of the dead letters";
                    return Err(Error::new(ErrorKind::Unavailable, operation, text));
                };
                permits -= 1;
                let at = (arrived.id.ledger_id, i64::try_from(arrived.id.entry_id).unwrap_or(i64::MAX));
                if wanted.binary_search(&at).is_ok() {
                    found.push((at, arrived.payload));
                }
                if at >= *last {
                    break;
                }
            }
            let _ = conn.close_consumer(consumer).await;
            Ok(found)
        };
        tokio::time::timeout(REQUEST, reading).await.unwrap_or_else(|_| {
            let text = "the letters could not be read in time";
            Err(Error::new(ErrorKind::Timeout, operation, text))
        })
    }

    /// Acks letters on the subscription of their topic.
    async fn ack(&self, scope: &DeadLetterScope, at: &[At], operation: &'static str) -> Result<()> {
        if at.is_empty() {
            return Ok(());
        }
        let id = |at: &At| MessageIdData { ledger_id: at.0, entry_id: at.1.unsigned_abs(), ..Default::default() };
        let acking = async {
            let (conn, consumer, _inbound) = self.attach(scope, None, operation).await?;
            let told = tell(&conn, consumer, at.iter().map(id).collect(), operation).await;
            let _ = conn.close_consumer(consumer).await;
            told
        };
        tokio::time::timeout(REQUEST, acking).await.unwrap_or_else(|_| Err(late(operation)))
    }

    /// A reader from `start` on, or without one a consumer of the letters' subscription.
    async fn attach(
        &self,
        scope: &DeadLetterScope,
        start: Option<MessageIdData>,
        operation: &'static str,
    ) -> Result<(Arc<Conn>, u64, tokio::sync::mpsc::UnboundedReceiver<Inbound>)> {
        let topic = self.topology.names.full(&Names::letters(&scope.source, &scope.group));
        let conn = self.topology.link.serving(operation, &topic).await?;
        let consumer_id = conn.next_id();
        let inbound = conn.add_consumer(consumer_id);
        let name = uuid::Uuid::now_v7().simple().to_string();
        let is_reader = start.is_some();
        let subscribe = proto::CommandSubscribe {
            subscription: if is_reader { format!("anybroker-reader-{name}") } else { LETTERS_SUBSCRIPTION.to_owned() },
            sub_type: if is_reader { SubType::Exclusive } else { SubType::Shared } as i32,
            topic,
            consumer_id,
            consumer_name: Some(name),
            durable: Some(!is_reader),
            start_message_id: start,
            ..Default::default()
        };
        conn.subscribe(operation, subscribe).await?;
        Ok((conn, consumer_id, inbound))
    }
}

fn letter(scope: &DeadLetterScope, at: At, payload: Payload) -> DeadLetter {
    let note = payload.metadata.properties.iter().find(|property| property.key == LETTER);
    let note = note.and_then(|note| serde_json::from_str::<Note>(&note.value).ok()).unwrap_or_else(|| Note {
        reason: Reason::Malformed.as_str().to_owned(),
        error_type: None,
        detail: Some("its letter cannot be read".to_owned()),
        attempts: 0,
        first_at: None,
        last_at: i64::try_from(payload.metadata.publish_time).unwrap_or(0),
        redrives: 0,
        origin: (0, 0),
    });
    let id = MessageIdData { ledger_id: at.0, entry_id: at.1.unsigned_abs(), ..Default::default() };
    let (message, _) = codec::decode(&scope.source, &id, payload);
    DeadLetter {
        id: id_of(at),
        message,
        group: scope.group.clone(),
        reason: Reason::from(note.reason.as_str()),
        error_type: note.error_type.map(ByteString::from),
        detail: note.detail.map(ByteString::from),
        attempts: note.attempts,
        first_at: note.first_at.map(Timestamp::from_millis),
        last_at: Timestamp::from_millis(note.last_at),
        redrives: note.redrives,
        position: (note.origin != (0, 0)).then_some(Position { major: note.origin.0, minor: note.origin.1 }),
    }
}

fn id_of(at: At) -> DeadLetterId {
    DeadLetterId(format!("{}:{}", at.0, at.1).into())
}

fn missing(id: &DeadLetterId) -> Error {
    Error::new(ErrorKind::NotFound, "dead letters", "there is no such dead letter").with("id", id)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_is_acked_is_left_out_across_ledgers() {
        let stats = json!({
            "lastConfirmedEntry": "9:3",
            "ledgers": [{ "ledgerId": 3, "entries": 4 }, { "ledgerId": 5, "entries": 2 }, { "ledgerId": 9, "entries": 0 }],
            "cursors": { LETTERS_SUBSCRIPTION: {
                "markDeletePosition": "3:1", "individuallyDeletedMessages": "[(3:2..3:3],(5:-1..5:0],(9:0..9:2]]",
            } },
        });
        let live = Live::read(&stats).unwrap();
        assert_eq!(live.from((0, 0), 100), [(3, 2), (5, 1), (9, 0), (9, 3)]);
        assert_eq!(live.from((5, 0), 2), [(5, 1), (9, 0)]);
        assert_eq!(live.from((9, 1), 2), [(9, 3)]);
        assert!(live.is_live((9, 3)) && !live.is_live((9, 4)) && !live.is_live((3, 3)) && !live.is_live((3, 1)));
    }

    #[test]
    fn an_empty_topic_has_no_letters() {
        let stats = json!({
            "lastConfirmedEntry": "3:-1",
            "ledgers": [{ "ledgerId": 3, "entries": 0 }],
            "cursors": { LETTERS_SUBSCRIPTION: { "markDeletePosition": "3:-1", "individuallyDeletedMessages": "[]" } },
        });
        assert!(Live::read(&stats).unwrap().from((0, 0), 10).is_empty());
        assert!(Live::read(&json!({})).is_none());
    }
}

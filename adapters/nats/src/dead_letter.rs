//! Dead letters: one record for each in the stream of their group, read without touching them, deleted one by one.

use std::sync::Arc;
use std::time::Duration;

use anybroker_core::{
    ByteString, Bytes, DeadLetter, DeadLetterId, DeadLetterPage, DeadLetterScope, Effect, Error, ErrorKind, Message,
    Position, Reason, Result, Timestamp, Verdict,
};
use async_nats::{HeaderMap, Subject};
use futures_util::StreamExt;
use futures_util::future::join_all;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::codec::{self, LETTER, Stored};
use crate::link::Link;
use crate::publisher::confirmed;
use crate::state::Taken;
use crate::topology::Topology;

/// How long a request about letters may take.
const REQUEST: Duration = Duration::from_secs(20);
/// How long nobody may be there who brings what was just asked for, and how soon it is asked for again.
const UNHEARD: Duration = Duration::from_secs(2);
const AGAIN: Duration = Duration::from_millis(20);
/// Detail beyond that is cut: a letter must not be larger than the server takes.
const LONGEST_DETAIL: usize = 4_096;

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
    position: u64,
}

/// The headers of a letter: those of the message, and why it died.
pub(crate) fn encode(message: &Message, attempts: u32, verdict: &Verdict, taken: &Taken) -> HeaderMap {
    let cut = |text: &ByteString| {
        let end = (0..=text.len().min(LONGEST_DETAIL)).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(0);
        text[..end].to_owned()
    };
    let note = Note {
        reason: verdict.reason.as_str().to_owned(),
        error_type: verdict.error_type.as_ref().map(cut),
        detail: verdict.detail.as_ref().map(cut),
        attempts,
        first_at: taken.first_at.map(Timestamp::as_millis),
        last_at: Timestamp::now().as_millis(),
        redrives: taken.redrives,
        position: taken.sequence,
    };
    let mut headers = codec::encode(message, &mut Vec::new());
    let note = serde_json::to_string(&note).expect("texts and numbers become JSON");
    headers.insert(LETTER, note.as_str());
    headers
}

/// Dead letters of one connection.
pub(crate) struct Letters {
    pub(crate) link: Arc<Link>,
    pub(crate) topology: Arc<Topology>,
}

struct Found {
    sequence: u64,
    headers: HeaderMap,
    payload: Bytes,
}

impl Letters {
    pub(crate) async fn page(
        &self,
        scope: &DeadLetterScope,
        from: Option<&DeadLetterId>,
        max: usize,
    ) -> Result<DeadLetterPage> {
        let from = from.map_or(Ok(1), |id| sequence(id).ok_or_else(|| missing(id).with("expected", "a number")))?;
        let found = self.read(scope, from, max + 1).await?;
        let mut page = DeadLetterPage::default();
        for found in found {
            let id = DeadLetterId(found.sequence.to_string().into());
            if page.letters.len() == max {
                page.next = Some(id);
                break;
            }
            page.letters.push(self.letter(scope, id, found));
        }
        Ok(page)
    }

    fn letter(&self, scope: &DeadLetterScope, id: DeadLetterId, found: Found) -> DeadLetter {
        let note = found.headers.get(LETTER).and_then(|note| serde_json::from_str::<Note>(note.as_str()).ok());
        let note = note.unwrap_or_else(|| Note {
            reason: Reason::Malformed.as_str().to_owned(),
            error_type: None,
            detail: Some("its letter cannot be read".to_owned()),
            attempts: 0,
            first_at: None,
            last_at: 0,
            redrives: 0,
            position: 0,
        });
        let stream = self.topology.names.records(&scope.source, &scope.group);
        let stored = Stored { stream: &stream, sequence: found.sequence, time: Timestamp::from_millis(note.last_at) };
        DeadLetter {
            id,
            message: codec::decode(
                &scope.source,
                stored,
                Some(&found.headers),
                &codec::find(Some(&found.headers)),
                found.payload,
            ),
            group: scope.group.clone(),
            reason: Reason::from(note.reason.as_str()),
            error_type: note.error_type.map(ByteString::from),
            detail: note.detail.map(ByteString::from),
            attempts: note.attempts,
            first_at: note.first_at.map(Timestamp::from_millis),
            last_at: Timestamp::from_millis(note.last_at),
            redrives: note.redrives,
            position: Some(Position::new(note.position)),
        }
    }

    /// Reads through a consumer that lives for this request and acks nothing.
    async fn read(&self, scope: &DeadLetterScope, from: u64, max: usize) -> Result<Vec<Found>> {
        let operation = "dead letters";
        let (names, api) = (&self.topology.names, &self.topology.api);
        self.topology.expect_group(&scope.source, &scope.group, operation).await?;
        let stream = names.records(&scope.source, &scope.group);
        let name = uuid::Uuid::now_v7().simple().to_string();
        let mark = match self.link.client.server_info().cluster {
            // Where none may be stored, for want of room or of a permission, the copy is taken as it is.
            Some(_) => match self.mark(scope, operation).await {
                Err(error) if error.effect() == Effect::NotDone => None,
                mark => Some(mark?),
            },
            None => None,
        };
        let letters = format!("{}.l.>", names.record(&scope.source, &scope.group));
        let subjects: Vec<&str> =
            [letters.as_str()].into_iter().chain(mark.as_ref().map(|(subject, _)| subject.as_str())).collect();
        let config = json!({
            "name": name,
            "deliver_policy": "by_start_sequence",
            "opt_start_seq": from.max(1),
            "ack_policy": "none",
            "replay_policy": "instant",
            "filter_subjects": subjects,
            "inactive_threshold": 30_000_000_000_u64,
            "mem_storage": true,
            "num_replicas": 1,
        });
        let body = json!({ "stream_name": stream, "config": config, "action": "create" });
        let created: Value = api.call(operation, &format!("CONSUMER.CREATE.{stream}.{name}"), &body).await?;
        let pending = created["num_pending"].as_u64().unwrap_or(0);
        // What the consumer's server does not know of yet is not pending there, and lies before the mark.
        let wanted = if mark.is_some() { max } else { max.min(usize::try_from(pending).unwrap_or(usize::MAX)) };
        let until = mark.as_ref().map(|(_, sequence)| *sequence);
        let mut read = if wanted == 0 { Ok(Vec::new()) } else { self.pull(&stream, &name, wanted, until).await };
        if let Some((_, sequence)) = mark {
            // A mark that stays is in nobody's way.
            let _ = api.delete_message(operation, &stream, sequence).await;
        } else if read.as_ref().is_ok_and(|found| found.len() < wanted) {
            // Either somebody has purged some meanwhile, or the server did not bring them in time.
            let info: Result<Value> =
                api.call(operation, &format!("CONSUMER.INFO.{stream}.{name}"), &Value::Null).await;
            match info {
                Ok(info) if info["num_pending"].as_u64() == Some(0) => {}
                Ok(_) => {
                    let text = format!("the server did not bring {wanted} letters in time");
                    read = Err(Error::new(ErrorKind::Timeout, operation, text));
                }
                Err(error) => read = Err(error),
            }
        }
        // It would end by itself after a while.
        let _ = api.ask::<Value>(operation, &format!("CONSUMER.DELETE.{stream}.{name}"), &Value::Null).await;
        read
    }

    /// Stores a mark behind all letters. In a cluster a consumer may be on a server whose copy of the stream lags behind what was
    /// confirmed; copies have one order, so whoever has read the mark has read what was there before it. Found by the suite on three
    /// servers: a redrive right behind a burial moved nothing.
    async fn mark(&self, scope: &DeadLetterScope, operation: &'static str) -> Result<(String, u64)> {
        let subject = self.topology.names.mark(&scope.source, &scope.group);
        let deadline = Instant::now() + REQUEST;
        let answers = self.link.board.open(1, deadline);
        let reply = answers.reply(0, &Subject::from(subject.as_str()));
        let sending = self.link.client.publish_with_reply(subject.clone(), reply, Bytes::new());
        sending.await.map_err(|error| Error::new(ErrorKind::Unavailable, operation, error.to_string()))?;
        answers.wait(deadline).await;
        let (sequence, _) = confirmed(answers.take(0), operation)?;
        Ok((subject, sequence))
    }

    /// Up to `wanted` letters, or those up to a mark.
    async fn pull(&self, stream: &str, consumer: &str, wanted: usize, until: Option<u64>) -> Result<Vec<Found>> {
        let lost = |error: String| Error::new(ErrorKind::Unavailable, "dead letters", error);
        let client = &self.link.client;
        let inbox = client.new_inbox();
        let mut messages = client.subscribe(inbox.clone()).await.map_err(|error| lost(error.to_string()))?;
        let subject = format!("$JS.API.CONSUMER.MSG.NEXT.{stream}.{consumer}");
        let body =
            json!({ "batch": wanted + usize::from(until.is_some()), "expires": crate::topology::nanos(REQUEST / 2) })
                .to_string();
        let ask = || client.publish_with_reply(subject.clone(), inbox.clone(), body.clone().into());
        ask().await.map_err(|error| lost(error.to_string()))?;
        let begun = Instant::now();
        let deadline = begun + REQUEST;
        let mut found = Vec::with_capacity(wanted);
        while found.len() < wanted {
            let Ok(message) = tokio::time::timeout_at(deadline, messages.next()).await else {
                let text = "the letters could not be read in time";
                return Err(Error::new(ErrorKind::Timeout, "dead letters", text));
            };
            let Some(message) = message else { return Err(lost("the connection was closed".into())) };
            match message.status.map(|status| status.as_u16()) {
                None => {}
                Some(100) => continue,
                // Fewer than there were, or the mark has not come.
                Some(404 | 408) if until.is_none() => break,
                // In a cluster the server of this connection may not know yet that the one that made the consumer listens for it.
                Some(503) if found.is_empty() && begun.elapsed() < UNHEARD => {
                    tokio::time::sleep(AGAIN).await;
                    ask().await.map_err(|error| lost(error.to_string()))?;
                }
                Some(code) => return Err(lost(format!("the server ended the reading ({code})"))),
            }
            let sequence = message.reply.as_deref().and_then(crate::ack::sequence_of);
            if sequence.is_some() && sequence == until {
                break;
            }
            if let Some(sequence) = sequence {
                let headers = message.headers.unwrap_or_default();
                found.push(Found { sequence, headers, payload: message.payload });
            }
        }
        Ok(found)
    }

    /// Each goes back to its group by a subject that no other one reads; confirmed, before the letter is deleted.
    pub(crate) async fn redrive(&self, scope: &DeadLetterScope, ids: &[DeadLetterId]) -> Vec<Result<()>> {
        let letters = match self.of(scope, ids).await {
            Ok(letters) => letters,
            Err(error) => return ids.iter().map(|_| Err(error.duplicate())).collect(),
        };
        let names = &self.topology.names;
        let subject = Subject::from(names.back(&scope.source, &scope.group));
        let stream = names.records(&scope.source, &scope.group);
        let deadline = Instant::now() + REQUEST;
        let answers = self.link.board.open(ids.len(), deadline);
        let mut sent: Vec<Result<u64>> = Vec::with_capacity(ids.len());
        for (index, (id, found)) in ids.iter().zip(letters).enumerate() {
            let Some(found) = found else {
                answers.skip(index);
                sent.push(Err(missing(id)));
                continue;
            };
            let sequence = found.sequence;
            let letter = self.letter(scope, id.clone(), Found { headers: found.headers.clone(), ..found });
            let mut headers = codec::encode(&letter.message, &mut Vec::new());
            headers.insert(codec::REDRIVES, (letter.redrives + 1).to_string().as_str());
            // A hop of its own: the id alone would be swallowed as a second copy of the first publish. Repeated, the
            // same hop is stored once.
            let hop = format!("{};{stream};{sequence}", codec::dedup_key(letter.message.id()));
            headers.insert(codec::MESSAGE_ID, hop.as_str());
            let payload = letter.message.payload().cloned().unwrap_or_default();
            let sending = self.link.client.publish_with_reply_and_headers(
                subject.clone(),
                answers.reply(index, &subject),
                headers,
                payload,
            );
            sent.push(match tokio::time::timeout_at(deadline, sending).await {
                Ok(Ok(())) => Ok(sequence),
                Ok(Err(error)) => {
                    answers.skip(index);
                    Err(Error::new(ErrorKind::Unavailable, "redrive", error.to_string()))
                }
                Err(_) => {
                    answers.skip(index);
                    Err(Error::new(ErrorKind::RateLimited, "redrive", "the client's buffers stayed full"))
                }
            });
        }
        answers.wait(deadline).await;
        let deleting = sent.into_iter().enumerate().map(|(index, sent)| {
            let (answers, stream) = (&answers, &stream);
            async move {
                let sequence = sent?;
                confirmed(answers.take(index), "redrive")?;
                self.topology.api.delete_message("redrive", stream, sequence).await.map(drop)
            }
        });
        join_all(deleting).await
    }

    pub(crate) async fn purge(&self, scope: &DeadLetterScope, ids: &[DeadLetterId]) -> Vec<Result<()>> {
        let letters = match self.of(scope, ids).await {
            Ok(letters) => letters,
            Err(error) => return ids.iter().map(|_| Err(error.duplicate())).collect(),
        };
        let stream = self.topology.names.records(&scope.source, &scope.group);
        let deleting = ids.iter().zip(letters).map(|(id, found)| {
            let stream = &stream;
            async move {
                let sequence = found.ok_or_else(|| missing(id))?.sequence;
                match self.topology.api.delete_message("purge", stream, sequence).await? {
                    true => Ok(()),
                    false => Err(missing(id)),
                }
            }
        });
        join_all(deleting).await
    }

    /// The letters of these ids, in their order. Read by one consumer when they lie together, as they mostly do.
    async fn of(&self, scope: &DeadLetterScope, ids: &[DeadLetterId]) -> Result<Vec<Option<Found>>> {
        let mut wanted: Vec<Option<u64>> = ids.iter().map(sequence).collect();
        let mut found: Vec<Option<Found>> = ids.iter().map(|_| None).collect();
        while let Some(from) = wanted.iter().flatten().min().copied() {
            let page = self.read(scope, from, ids.len()).await?;
            let read_to = match page.last() {
                Some(last) if page.len() == ids.len() => last.sequence,
                _ => u64::MAX,
            };
            for letter in page {
                if let Some(index) = wanted.iter().position(|wanted| *wanted == Some(letter.sequence)) {
                    wanted[index] = None;
                    found[index] = Some(letter);
                }
            }
            // What was not among them is not there.
            for wanted in &mut wanted {
                if wanted.is_some_and(|sequence| sequence <= read_to) {
                    *wanted = None;
                }
            }
        }
        Ok(found)
    }
}

fn sequence(id: &DeadLetterId) -> Option<u64> {
    id.0.parse().ok().filter(|sequence| *sequence > 0)
}

fn missing(id: &DeadLetterId) -> Error {
    Error::new(ErrorKind::NotFound, "dead letters", "there is no such dead letter").with("id", id)
}

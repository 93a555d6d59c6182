//! Reading, redriving and purging dead letters. SQS cannot look without leasing, and finds nothing by its id: letters are
//! leased while they are read, and those to be moved or deleted are read until they come.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use anybroker_core::{
    ByteString, Bytes, DeadLetter, DeadLetterId, DeadLetterPage, DeadLetterScope, Effect, Error, ErrorKind, Reason,
    Result, Timestamp,
};
use aws_sdk_sqs::types::QueueAttributeName as Attribute;
use parking_lot::Mutex;
use tokio::time::Instant;

use crate::clients::Clients;
use crate::codec::{self, Carried, Decoded};
use crate::error::failed;
use crate::letters::Note;
use crate::parcel::{self, BATCH, Parcel, Route, lane_of};
use crate::queues::figure;
use crate::requests::{self, Leased};
use crate::settle::REQUEST;
use crate::source::{raw, receiving};
use crate::topology::{Prepared, Topology};

/// How long letters stay leased when a reader vanishes.
const LEASE: Duration = Duration::from_secs(60);
/// How long a reader that stopped at a full page may take to go on, before its letters are given back.
const PATIENCE: Duration = Duration::from_secs(2);
/// Readers that stopped in the middle and are remembered.
const READINGS: usize = 64;
/// Receives at a time where many letters are wanted.
const WIDTH: usize = 4;
/// With a wait of a second SQS asks all of its servers, so that an empty answer means empty.
const WAIT: i32 = 1;

/// The dead letters of a connection.
pub(crate) struct Letters {
    pub(crate) clients: Clients,
    pub(crate) topology: Arc<Topology>,
    pub(crate) is_total: bool,
    pub(crate) readings: Arc<Mutex<HashMap<String, Reading>>>,
}

/// A reader that stopped at a full page: SQS has no places, so the rest is what it has not seen.
#[derive(Default)]
pub(crate) struct Reading {
    url: String,
    seen: HashSet<String>,
    leased: Vec<Leased>,
}

/// A letter that is leased.
struct Found {
    id: String,
    leased: Leased,
    decoded: Decoded,
}

impl Letters {
    /// Reads up to `max` letters.
    pub(crate) async fn page(
        &self,
        scope: &DeadLetterScope,
        from: Option<DeadLetterId>,
        max: usize,
    ) -> Result<DeadLetterPage> {
        let operation = "dead letters";
        let url = self.topology.existing(&scope.source, &scope.group, operation).await?.letters;
        let mut reading = match from {
            None => {
                self.give_back_readings(&url).await;
                Reading { url: url.clone(), ..Reading::default() }
            }
            Some(place) => {
                let found = self.readings.lock().remove::<str>(&place.0);
                found.filter(|reading| reading.url == url).ok_or_else(|| {
                    let text = "there is no such place among the dead letters; read them from the oldest on";
                    Error::new(ErrorKind::NotFound, operation, text).with("from", &place)
                })?
            }
        };
        let mut page = DeadLetterPage::default();
        // What was given back since the page before comes once more, perhaps ahead of what is new: it is leased again, and passed over.
        let mut again: HashSet<String> = HashSet::new();
        let mut is_end = false;
        while page.letters.len() < max && !is_end {
            let wanted = max - page.letters.len();
            let found = match self.receive(&url, scope, wanted, operation).await {
                Ok(found) => found,
                Err(error) => {
                    self.give_back(&url, reading.leased).await;
                    return Err(error);
                }
            };
            // Also when all of it came in this call already: then leases have ended meanwhile, and it begins anew.
            is_end = true;
            for letter in found {
                reading.leased.push(letter.leased.clone());
                if reading.seen.insert(letter.id.clone()) {
                    is_end = false;
                    again.insert(letter.id.clone());
                    page.letters.push(described(scope, letter));
                } else if again.insert(letter.id) {
                    is_end = false;
                }
            }
        }
        page.letters.sort_by_key(|letter| letter.last_at);
        if is_end || self.readings.lock().len() >= READINGS {
            self.give_back(&url, std::mem::take(&mut reading.leased)).await;
        }
        if !is_end {
            page.next = Some(self.remember(reading));
        }
        Ok(page)
    }

    /// Keeps a reader's place, and gives its letters back when it does not go on soon.
    fn remember(&self, reading: Reading) -> DeadLetterId {
        let place = uuid::Uuid::new_v4().simple().to_string();
        let url = reading.url.clone();
        {
            let mut readings = self.readings.lock();
            if readings.len() >= READINGS {
                readings.retain(|_, other| !other.leased.is_empty());
            }
            readings.insert(place.clone(), reading);
        }
        let (readings, clients, key) = (Arc::clone(&self.readings), self.clients.clone(), place.clone());
        tokio::spawn(async move {
            tokio::time::sleep(PATIENCE).await;
            let leased = readings.lock().get_mut(&key).map(|reading| std::mem::take(&mut reading.leased));
            requests::give_letters_back(&clients, &url, leased.unwrap_or_default()).await;
        });
        DeadLetterId(ByteString::from(place))
    }

    /// What this connection's own readers hold of a queue.
    async fn give_back_readings(&self, url: &str) {
        let held = {
            let mut readings = self.readings.lock();
            let of_queue = readings.values_mut().filter(|reading| reading.url == url);
            of_queue.flat_map(|reading| std::mem::take(&mut reading.leased)).collect()
        };
        self.give_back(url, held).await;
    }

    /// Gives back what readers hold that do not go on: the next one would not see it before its lease ends.
    pub(crate) async fn close(&self) {
        let readings: Vec<Reading> = self.readings.lock().drain().map(|(_, reading)| reading).collect();
        futures_util::future::join_all(
            readings.into_iter().map(|reading| async move { self.give_back(&reading.url, reading.leased).await }),
        )
        .await;
    }

    async fn give_back(&self, url: &str, leased: Vec<Leased>) {
        requests::give_letters_back(&self.clients, url, leased).await;
    }

    /// Receives once, or several times at once where many are wanted; empty means that there are none.
    async fn receive(
        &self,
        url: &str,
        scope: &DeadLetterScope,
        wanted: usize,
        operation: &'static str,
    ) -> Result<Vec<Found>> {
        let width = wanted.div_ceil(BATCH).clamp(1, WIDTH);
        let share = wanted.min(BATCH);
        let receives = (0..width).map(|number| async move {
            // One of them waits, so that empty means empty; the others take what is there at once.
            let wait = if number == 0 { WAIT } else { 0 };
            let count = share.min(wanted - number * BATCH);
            let answer = receiving(&self.clients.queues, url, count, wait, LEASE).send().await;
            let messages = answer.map_err(|error| failed(operation, &error))?.messages.unwrap_or_default();
            Ok::<_, Error>((messages, Instant::now() + LEASE))
        });
        let mut found = Vec::new();
        let mut problem = None;
        for answer in futures_util::future::join_all(receives).await {
            match answer {
                Ok((messages, until)) => found.extend(messages.into_iter().filter_map(|mut message| {
                    let handle = Bytes::from(message.receipt_handle.take()?);
                    let raw = raw(message);
                    Some(Found {
                        id: raw.id.clone(),
                        leased: (handle, until),
                        decoded: codec::decode(raw, &scope.source),
                    })
                })),
                Err(error) => problem = Some(error),
            }
        }
        match problem {
            Some(error) if found.is_empty() => Err(error),
            _ => Ok(found),
        }
    }

    /// Leases the letters of these ids; the others are given back.
    async fn lease(
        &self,
        url: &str,
        scope: &DeadLetterScope,
        ids: &[DeadLetterId],
        operation: &'static str,
    ) -> Result<HashMap<String, Found>> {
        self.give_back_readings(url).await;
        let mut wanted: HashSet<&str> = ids.iter().map(|id| &*id.0).collect();
        let (mut chosen, mut others) = (HashMap::new(), Vec::new());
        let mut seen: HashSet<String> = HashSet::new();
        let mut problem = None;
        while !wanted.is_empty() {
            let found = match self.receive(url, scope, wanted.len().max(BATCH), operation).await {
                Ok(found) => found,
                Err(error) => {
                    problem = Some(error);
                    break;
                }
            };
            let mut is_new = false;
            for letter in found {
                is_new |= seen.insert(letter.id.clone());
                if wanted.remove(letter.id.as_str()) || chosen.contains_key(&letter.id) {
                    chosen.insert(letter.id.clone(), letter);
                } else {
                    others.push(letter.leased);
                }
            }
            if !is_new {
                break;
            }
        }
        self.give_back(url, others).await;
        if let Some(error) = problem {
            self.give_back(url, chosen.into_values().map(|letter| letter.leased).collect()).await;
            return Err(error);
        }
        Ok(chosen)
    }

    /// What an id that was not found answers: another reader may have leased it.
    async fn missing(&self, url: &str, operation: &'static str, leased: usize) -> Error {
        let attributes = self.topology.queues.attributes(url, operation).await.unwrap_or_default();
        let hidden = figure(&attributes, &Attribute::ApproximateNumberOfMessagesNotVisible);
        if hidden > leased as u64 {
            let text = "not found, and another reader has leased letters of this queue; try again later";
            return Error::new(ErrorKind::Unavailable, operation, text);
        }
        Error::new(ErrorKind::NotFound, operation, "there is no such dead letter")
    }

    /// Each goes back to the queue of its group, confirmed, before the letter is deleted.
    pub(crate) async fn redrive(&self, scope: &DeadLetterScope, ids: &[DeadLetterId]) -> Vec<Result<()>> {
        let operation = "redrive";
        let (prepared, mut found) = match self.open(scope, ids, operation).await {
            Ok(opened) => opened,
            Err(error) => return ids.iter().map(|_| Err(error.duplicate())).collect(),
        };
        let missing = self.absence(&prepared.letters, ids, &found, operation).await;
        let letters: Vec<Option<Found>> = ids.iter().map(|id| found.remove(&*id.0)).collect();
        let parcels = letters.iter().flatten().map(|letter| {
            let note = note(letter.decoded.letter.as_deref());
            let carried = Carried { redrives: note.map_or(0, |note| note.redrives) + 1, ..Carried::default() };
            let message = &letter.decoded.message;
            let mut parcel = Parcel::new(codec::encode(message, &carried, None));
            // A hop of its own: repeated within five minutes, it is stored once.
            let lane = || lane_of(message, self.is_total, format!("redrive-{}", letter.id));
            parcel.lane = self.topology.names.is_fifo.then(lane);
            parcel
        });
        let route = Route::Queue(prepared.queue.as_str().into());
        let sent = parcel::send_all(&self.clients, &route, parcels.collect(), REQUEST, operation).await;
        let mut sent = sent.into_iter();
        let mut outcomes: Vec<Result<()>> = Vec::with_capacity(ids.len());
        let (mut places, mut done, mut kept) = (Vec::new(), Vec::new(), Vec::new());
        for (place, letter) in letters.into_iter().enumerate() {
            outcomes.push(match letter {
                None => Err(missing.as_ref().map_or_else(|| Error::closed(operation), Error::duplicate)),
                Some(letter) => match sent.next().expect("one outcome per letter") {
                    Ok(_) => {
                        places.push(place);
                        done.push(letter.leased);
                        Ok(())
                    }
                    Err(error) => {
                        kept.push(letter.leased);
                        Err(error)
                    }
                },
            });
        }
        let deleted = requests::delete(&self.clients, &prepared.letters, &done).await;
        for (place, deleted) in places.into_iter().zip(deleted) {
            // Its message is back already: something has been done, whatever became of the letter.
            outcomes[place] = deleted.map_err(|error| error.with_effect(Effect::Unknown));
        }
        self.give_back(&prepared.letters, kept).await;
        outcomes
    }

    pub(crate) async fn purge(&self, scope: &DeadLetterScope, ids: &[DeadLetterId]) -> Vec<Result<()>> {
        let operation = "purge";
        let (prepared, mut found) = match self.open(scope, ids, operation).await {
            Ok(opened) => opened,
            Err(error) => return ids.iter().map(|_| Err(error.duplicate())).collect(),
        };
        let missing = self.absence(&prepared.letters, ids, &found, operation).await;
        let handles: Vec<Option<Leased>> =
            ids.iter().map(|id| found.remove(&*id.0).map(|letter| letter.leased)).collect();
        let present: Vec<Leased> = handles.iter().flatten().cloned().collect();
        let mut deleted = requests::delete(&self.clients, &prepared.letters, &present).await.into_iter();
        let absent = || missing.as_ref().map_or_else(|| Error::closed(operation), Error::duplicate);
        handles
            .into_iter()
            .map(|handle| handle.map_or_else(|| Err(absent()), |_| deleted.next().expect("one outcome per letter")))
            .collect()
    }

    async fn open(
        &self,
        scope: &DeadLetterScope,
        ids: &[DeadLetterId],
        operation: &'static str,
    ) -> Result<(Prepared, HashMap<String, Found>)> {
        let prepared = self.topology.existing(&scope.source, &scope.group, operation).await?;
        let found = self.lease(&prepared.letters, scope, ids, operation).await?;
        Ok((prepared, found))
    }

    async fn absence(
        &self,
        url: &str,
        ids: &[DeadLetterId],
        found: &HashMap<String, Found>,
        operation: &'static str,
    ) -> Option<Error> {
        let is_complete = ids.iter().all(|id| found.contains_key(&*id.0));
        if is_complete { None } else { Some(self.missing(url, operation, found.len()).await) }
    }
}

fn note(letter: Option<&str>) -> Option<Note> {
    serde_json::from_str(letter?).ok()
}

/// A message without a note was moved here by SQS itself.
fn described(scope: &DeadLetterScope, letter: Found) -> DeadLetter {
    let note = note(letter.decoded.letter.as_deref()).unwrap_or_else(|| Note {
        group: scope.group.to_string(),
        reason: Reason::BrokerLimit.as_str().to_owned(),
        error_type: None,
        detail: None,
        attempts: 0,
        first_at: None,
        last_at: letter.decoded.message.timestamp().as_millis(),
        redrives: 0,
    });
    DeadLetter {
        id: DeadLetterId(letter.id.into()),
        message: letter.decoded.message,
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

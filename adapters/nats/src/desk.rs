//! What is told to the server about deliveries, and waited for: records, dead letters, acks, nacks.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::Arc;
use std::time::Duration;

use anybroker_core::{Bytes, Effect, Error, ErrorKind, Result};
use async_nats::{HeaderMap, Subject};
use tokio::time::Instant;

use crate::board::Reply;
use crate::denials::refused;
use crate::link::{Link, by};
use crate::publisher::confirmed;
use crate::record::Record;
use crate::state::{Key, Shared, Surrendered};
use crate::topology::Topology;

/// After that long without a confirmation it is told again: the server may have forgotten the delivery, or not got it.
const AGAIN: Duration = Duration::from_millis(1_500);

/// Where things of one destination of the subscription are.
pub(crate) struct Scope {
    pub(crate) stream: String,
    pub(crate) consumer: String,
    /// The stream of the group's records, and what their subjects begin with.
    pub(crate) records: String,
    pub(crate) record: String,
}

impl Scope {
    fn failure(&self, sequence: u64) -> String {
        format!("{}.f.{sequence}", self.record)
    }

    pub(crate) fn letter(&self, sequence: u64) -> String {
        format!("{}.l.{sequence}", self.record)
    }
}

pub(crate) struct Desk {
    pub(crate) link: Arc<Link>,
    pub(crate) topology: Arc<Topology>,
    pub(crate) shared: Arc<Shared>,
    pub(crate) scopes: Vec<Scope>,
    pub(crate) settle_timeout: Duration,
}

/// Something to be told about a delivery.
pub(crate) struct Telling {
    pub(crate) feed: u32,
    /// The entry, where it is still here; its server may have renamed the delivery meanwhile.
    pub(crate) key: Option<Key>,
    pub(crate) ack: Subject,
    pub(crate) payload: Bytes,
}

/// A record or dead letter to be stored.
pub(crate) struct Writing {
    pub(crate) feed: u32,
    pub(crate) subject: String,
    pub(crate) headers: HeaderMap,
    pub(crate) payload: Bytes,
}

/// `+ACK`: done.
pub(crate) const ACK: Bytes = Bytes::from_static(b"+ACK");

/// `-NAK`: comes back, not before the delay.
pub(crate) fn nak(delay: Duration) -> Bytes {
    if delay.is_zero() {
        return Bytes::from_static(b"-NAK");
    }
    Bytes::from(format!("-NAK {{\"delay\": {}}}", crate::topology::nanos(delay)))
}

impl Desk {
    /// Tells the server, many at a time, and waits for its confirmations; one outcome for each.
    ///
    /// An ack is told again until it is confirmed: that a message is done stays true. What gives a message back is told
    /// once. By the time it were told again the message may be with somebody else, and the server would take it from there:
    /// it looks at the message, not at the delivery (nats-server 2.15, `processNak`). Found by the suite's faults.
    pub(crate) async fn tell(&self, tellings: &mut [Telling], deadline: Instant) -> Vec<Result<()>> {
        let mut outcomes: Vec<Option<Result<()>>> = tellings.iter().map(|_| None).collect();
        let mut state = self.link.state.clone();
        loop {
            let open: Vec<usize> = (0..tellings.len()).filter(|index| outcomes[*index].is_none()).collect();
            if open.is_empty() || Instant::now() >= deadline {
                break;
            }
            if !matches!(by(deadline, state.wait_for(|state| state.is_connected)).await, Some(Ok(_))) {
                break;
            }
            let epoch = state.borrow().epoch;
            let has_once = open.iter().any(|index| tellings[*index].payload != ACK);
            let round = if has_once { deadline } else { deadline.min(Instant::now() + AGAIN) };
            let answers = self.link.board.open(open.len(), round);
            self.shared
                .rename(tellings.iter_mut().zip(&outcomes).filter(|it| it.1.is_none()).map(|(telling, _)| telling));
            answers.expect(0, open.iter().map(|index| &tellings[*index].ack));
            for (place, index) in open.iter().enumerate() {
                let Telling { ack, payload, .. } = &tellings[*index];
                let sending = self.link.client.publish_with_reply(ack.clone(), answers.place(place), payload.clone());
                if !matches!(by(deadline, sending).await, Some(Ok(()))) {
                    answers.skip(place);
                }
            }
            tokio::select! {
                _ = answers.wait(round) => {}
                // Answers that were on a lost connection do not come.
                _ = state.wait_for(|state| state.epoch != epoch) => {}
            }
            let mut unserved = Vec::new();
            for (index, reply) in open.iter().zip(answers.take_all()) {
                match reply {
                    Some(reply) if reply.is_unserved => unserved.push(*index),
                    Some(Reply { denied: Some(subject), .. }) => {
                        outcomes[*index] = Some(Err(refused("settle", true, &subject)));
                    }
                    Some(_) => outcomes[*index] = Some(Ok(())),
                    None if tellings[*index].payload != ACK => outcomes[*index] = Some(Err(unconfirmed())),
                    None => {}
                }
            }
            if !unserved.is_empty() {
                self.explain(tellings, &unserved, &mut outcomes).await;
                tokio::time::sleep_until(deadline.min(Instant::now() + Duration::from_millis(100))).await;
            }
        }
        outcomes.into_iter().map(|outcome| outcome.unwrap_or_else(|| Err(unconfirmed()))).collect()
    }

    /// Nobody took an ack: the consumer is gone, or JetStream is for a moment.
    async fn explain(&self, tellings: &[Telling], unserved: &[usize], outcomes: &mut [Option<Result<()>>]) {
        for index in unserved {
            let scope = &self.scopes[tellings[*index].feed as usize];
            if let Ok(None) = self.topology.api.consumer("settle", &scope.stream, &scope.consumer).await {
                let text = "the group was deleted; there is nothing to settle any more";
                outcomes[*index] = Some(Err(Error::new(ErrorKind::StaleDelivery, "settle", text)));
            }
        }
    }

    /// Stores records or dead letters, many at a time; the place of each.
    pub(crate) async fn write(&self, writings: Vec<Writing>, deadline: Instant) -> Vec<Result<u64>> {
        let answers = self.link.board.open(writings.len(), deadline);
        let mut outcomes: Vec<Result<u64>> = Vec::with_capacity(writings.len());
        let mut feeds = Vec::with_capacity(writings.len());
        for (index, writing) in writings.into_iter().enumerate() {
            let Writing { feed, subject, headers, payload } = writing;
            feeds.push(feed);
            let subject = Subject::from(subject);
            let client = &self.link.client;
            let reply = answers.reply(index, &subject);
            let sending = client.publish_with_reply_and_headers(subject, reply, headers, payload);
            outcomes.push(match tokio::time::timeout_at(deadline, sending).await {
                Ok(Ok(())) => Ok(0),
                Ok(Err(error)) => {
                    answers.skip(index);
                    let kind = match error.kind() {
                        async_nats::client::PublishErrorKind::MaxPayloadExceeded => ErrorKind::TooLarge,
                        _ => ErrorKind::Unavailable,
                    };
                    Err(Error::new(kind, "settle", error.to_string()).with_effect(Effect::NotDone))
                }
                Err(_) => {
                    answers.skip(index);
                    Err(unconfirmed().with_effect(Effect::NotDone))
                }
            });
        }
        answers.wait(deadline).await;
        let mut unserved: HashMap<u32, Error> = HashMap::new();
        for (index, outcome) in outcomes.iter_mut().enumerate() {
            if outcome.is_ok() {
                let reply = answers.take(index);
                if !reply.as_ref().is_some_and(|reply| reply.is_unserved) {
                    *outcome = confirmed(reply, "settle").map(|(sequence, _)| sequence);
                    continue;
                }
                let error = match unserved.entry(feeds[index]) {
                    Entry::Occupied(known) => known.into_mut(),
                    Entry::Vacant(open) => open.insert(self.unserved(feeds[index], deadline).await),
                };
                *outcome = Err(error.duplicate());
            }
        }
        outcomes
    }

    /// Why nobody took something for the group's records: it was deleted, or JetStream does not serve it at the moment.
    async fn unserved(&self, feed: u32, deadline: Instant) -> Error {
        let looking = self.topology.api.stream("settle", &self.scopes[feed as usize].records);
        match tokio::time::timeout_at(deadline, looking).await {
            Ok(Ok(None)) => Error::new(ErrorKind::NotFound, "settle", "the group does not exist any more"),
            Ok(Ok(_)) | Err(_) => Error::new(
                ErrorKind::Unavailable,
                "settle",
                "JetStream does not serve the group's records at the moment",
            ),
            Ok(Err(error)) => error,
        }
        .with_effect(Effect::NotDone)
    }

    pub(crate) fn record_of(&self, feed: u32, sequence: u64, record: &Record) -> Writing {
        let subject = self.scopes[feed as usize].failure(sequence);
        Writing { feed, subject, headers: HeaderMap::new(), payload: record.encode().into() }
    }

    /// The record of a message, and its place.
    pub(crate) async fn read_record(&self, feed: u32, sequence: u64) -> Result<Option<(Record, u64)>> {
        let scope = &self.scopes[feed as usize];
        let query = serde_json::json!({ "last_by_subj": scope.failure(sequence) });
        let found = self.topology.api.message("receive", &scope.records, &query).await?;
        Ok(found.and_then(|found| Some((Record::decode(&found.payload())?, found.seq))))
    }

    /// Forgets the record of a message that is settled for good. Nobody waits for it: one that is left over is never
    /// read again.
    pub(crate) async fn forget_record(&self, feed: u32, place: u64) {
        let subject = format!("$JS.API.STREAM.MSG.DELETE.{}", self.scopes[feed as usize].records);
        let body = format!("{{\"seq\": {place}, \"no_erase\": true}}");
        let _ = self.link.client.publish(subject, body.into()).await;
    }

    /// Writes down, of what goes back, which deliveries reached no handler.
    pub(crate) async fn spare(&self, feed: u32, entries: &[Surrendered], deadline: Instant) -> Result<()> {
        let spared = entries.iter().filter_map(|entry| Some((entry.sequence, entry.spared.as_ref()?)));
        let writings: Vec<Writing> = spared.map(|(sequence, record)| self.record_of(feed, sequence, record)).collect();
        if !writings.is_empty() {
            for outcome in self.write(writings, deadline).await {
                outcome?;
            }
        }
        Ok(())
    }

    /// Gives everything of a feed back to the server, in order, without counting a failure; it comes again after `delay`.
    pub(crate) async fn give_back(
        &self,
        feed: u32,
        entries: Vec<Surrendered>,
        delay: Duration,
        deadline: Instant,
    ) -> Result<()> {
        self.spare(feed, &entries, deadline).await?;
        let mut tellings: Vec<Telling> =
            entries.into_iter().map(|entry| Telling { feed, key: None, ack: entry.ack, payload: nak(delay) }).collect();
        self.tell(&mut tellings, deadline).await.into_iter().collect()
    }
}

fn unconfirmed() -> Error {
    Error::new(ErrorKind::Timeout, "settle", "no confirmation from the server in time")
}

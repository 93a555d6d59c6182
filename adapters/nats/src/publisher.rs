//! Publishing: entries are handed to the client in call order, and the server's confirmations are collected on the board.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use anybroker_core::{
    Bytes, Confirms, Destination, Effect, Error, ErrorKind, Message, Position, PublishOrder, PublishOutcome,
    PublishTerms, Receipt, Result, Timestamp,
};
use async_nats::client::PublishErrorKind;
use async_nats::{HeaderMap, Subject};
use serde::Deserialize;
use tokio::time::Instant;

use crate::board::{Answers, Reply};
use crate::codec;
use crate::denials;
use crate::error::ApiError;
use crate::link::{Link, by};
use crate::topology::{Route, Topology};

/// What the server answers to a publish.
#[derive(Deserialize)]
struct PubAck {
    #[serde(default)]
    seq: u64,
    #[serde(default)]
    duplicate: bool,
    error: Option<ApiError>,
}

/// The confirmation in an answer.
pub(crate) fn confirmed(reply: Option<Reply>, operation: &'static str) -> Result<(u64, bool)> {
    match refused(reply, operation)? {
        Ok(stored) => Ok(stored),
        Err(error) => Err(error.into_error(operation)),
    }
}

/// As [`confirmed`], with the server's own refusal apart.
pub(crate) fn refused(
    reply: Option<Reply>,
    operation: &'static str,
) -> Result<std::result::Result<(u64, bool), ApiError>> {
    let Some(reply) = reply else {
        // It may be stored, or even be sent later: the client keeps it for the next connection.
        return Err(Error::new(ErrorKind::Timeout, operation, "no confirmation from the server in time"));
    };
    if let Some(subject) = reply.denied {
        return Err(denials::refused(operation, true, &subject));
    }
    if reply.is_unserved {
        let text = "no stream takes it: it does not exist, or JetStream does not serve it at the moment";
        return Err(Error::new(ErrorKind::Unavailable, operation, text).with_effect(Effect::NotDone));
    }
    let ack: PubAck = serde_json::from_slice(&reply.payload).map_err(|error| {
        Error::new(ErrorKind::Unexpected, operation, format!("a confirmation that cannot be read: {error}"))
    })?;
    Ok(ack.error.map_or(Ok((ack.seq, ack.duplicate)), Err))
}

/// Publishes on one connection.
pub(crate) struct Publisher {
    link: Arc<Link>,
    topology: Arc<Topology>,
    /// Whether ids are told to the server.
    dedups: bool,
    /// Batches are handed over one after the other, in call order: the first ones of a destination look it up, and those
    /// whose answer came first would overtake the others.
    turn: tokio::sync::Mutex<()>,
}

type Routes = Vec<(Destination, Result<Arc<Route>>)>;

impl Publisher {
    pub(crate) fn new(link: Arc<Link>, topology: Arc<Topology>, dedups: bool) -> Self {
        Self { link, topology, dedups, turn: tokio::sync::Mutex::default() }
    }

    pub(crate) async fn publish(&self, batch: Vec<Message>, terms: &PublishTerms) -> Confirms {
        let deadline = Instant::now() + terms.timeout;
        // It is fair: who comes first is first.
        let Some(_turn) = by(deadline, self.turn.lock()).await else {
            let trouble = self.link.authentication.trouble();
            let late = || {
                if let Some(error) = &trouble {
                    return error.duplicate();
                }
                let text = "the batches before it took until the deadline";
                Error::new(ErrorKind::RateLimited, "publish", text).with_effect(Effect::NotDone)
            };
            return Confirms::ready(batch.iter().map(|message| Err(late().with("id", message.id()))).collect());
        };
        let routes = self.routes(&batch, deadline).await;
        let answers = self.link.board.open(batch.len(), deadline);
        let mut named = Vec::with_capacity(batch.len());
        let mut refused: Vec<Option<Error>> = Vec::with_capacity(batch.len());
        let mut failed_keys: HashSet<(Destination, Bytes)> = HashSet::new();
        let mut scratch = Vec::with_capacity(64);
        for (index, message) in batch.iter().enumerate() {
            let place = || message.key_bytes().map(|key| (message.destination().clone(), key.clone()));
            let outcome = if !failed_keys.is_empty() && place().is_some_and(|place| failed_keys.contains(&place)) {
                Err(held_back())
            } else {
                match route(&routes, message.destination()) {
                    Err(error) => Err(error.duplicate()),
                    Ok(route) => {
                        let mut headers = codec::encode(message, &mut scratch);
                        if self.dedups {
                            headers.insert(codec::MESSAGE_ID, codec::dedup_key(message.id()).as_str());
                        }
                        let subject = self.instruct(message, &route.subject, &mut headers);
                        let payload = message.payload().cloned().unwrap_or_default();
                        self.hand_over(subject, &answers, index, headers, payload, deadline).await
                    }
                }
            };
            if outcome.is_err() {
                answers.skip(index);
                if terms.order == PublishOrder::Key {
                    failed_keys.extend(place());
                }
            }
            refused.push(outcome.err());
            named.push((message.id().clone(), message.destination().clone(), delay_of(message).is_some()));
        }
        drop(batch);
        let topology = Arc::clone(&self.topology);
        Confirms::waiting(async move {
            answers.wait(deadline).await;
            let mut outcomes: Vec<PublishOutcome> = Vec::with_capacity(named.len());
            for ((refusal, reply), (id, destination, is_delayed)) in
                refused.into_iter().zip(answers.take_all()).zip(named)
            {
                let is_unserved = reply.as_ref().is_some_and(|reply| reply.is_unserved);
                let mut outcome = match refusal {
                    Some(error) => Err(error),
                    // async-nats takes this for a missing stream; a JetStream that restarts looks the same. So a second
                    // look.
                    None if is_unserved => Err(topology.unserved(&destination).await),
                    None => confirmed(reply, "publish").map(|(sequence, duplicate)| {
                        // Where a delayed one will be is only known when its time has come.
                        let position = (!is_delayed).then(|| Position::new(sequence));
                        Receipt { position, duplicate }
                    }),
                };
                if let Err(error) = outcome {
                    outcome = Err(error.with("id", id).with("destination", destination));
                }
                outcomes.push(outcome);
            }
            outcomes
        })
    }

    /// Writes the instructions of a publish into its headers; answers where it is published.
    fn instruct(&self, message: &Message, subject: &Subject, headers: &mut HeaderMap) -> Subject {
        // A moment's milliseconds are cut off: one more, so that nothing is early.
        let end_of = |duration: Duration| Timestamp::now().after(duration + Duration::from_millis(1));
        if let Some(ttl) = message.ttl() {
            headers.insert(codec::EXPIRES, end_of(ttl).as_millis().to_string().as_str());
        }
        let Some(delay) = delay_of(message) else { return subject.clone() };
        headers.insert(codec::SCHEDULE, format!("@at {}", end_of(delay)).as_str());
        headers.insert(codec::SCHEDULE_TARGET, subject.as_str());
        Subject::from(self.topology.names.scheduled(message.destination()))
    }

    async fn routes(&self, batch: &[Message], deadline: Instant) -> Routes {
        let mut routes: Routes = Vec::with_capacity(1);
        for message in batch {
            let destination = message.destination();
            if routes.last().is_some_and(|(last, _)| last == destination)
                || routes.iter().any(|(other, _)| other == destination)
            {
                continue;
            }
            let found = self.topology.route(destination, deadline).await;
            routes.push((destination.clone(), found));
        }
        routes
    }

    /// Hands one message to the client; waits only while its buffers are full.
    pub(crate) async fn hand_over(
        &self,
        subject: Subject,
        answers: &Answers,
        index: usize,
        headers: HeaderMap,
        payload: Bytes,
        deadline: Instant,
    ) -> Result<()> {
        let full = || {
            let text = "the client's buffers stayed full: the server does not take messages";
            Error::new(ErrorKind::RateLimited, "publish", text)
        };
        self.link.authentication.passed(deadline).await?;
        if !self.link.board.room(deadline).await {
            return Err(full());
        }
        let reply = answers.reply(index, &subject);
        let sending = self.link.client.publish_with_reply_and_headers(subject, reply, headers, payload);
        match by(deadline, sending).await {
            None => Err(full()),
            Some(Ok(())) => Ok(()),
            Some(Err(error)) => {
                let kind = match error.kind() {
                    PublishErrorKind::MaxPayloadExceeded => ErrorKind::TooLarge,
                    PublishErrorKind::InvalidSubject => ErrorKind::InvalidMessage,
                    PublishErrorKind::Send => ErrorKind::Closed,
                };
                Err(Error::new(kind, "publish", error.to_string()).with_effect(Effect::NotDone))
            }
        }
    }
}

fn delay_of(message: &Message) -> Option<Duration> {
    message.delay().filter(|delay| !delay.is_zero())
}

fn route<'r>(routes: &'r Routes, destination: &Destination) -> &'r Result<Arc<Route>> {
    let found = routes.iter().find(|(other, _)| other == destination);
    &found.expect("every destination of the batch has been routed").1
}

fn held_back() -> Error {
    let text = "order: not attempted, because an earlier message of this key in the batch failed";
    Error::new(ErrorKind::Unavailable, "publish", text).with_effect(Effect::NotDone)
}

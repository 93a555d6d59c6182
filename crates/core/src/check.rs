//! What is checked before the adapter sees a call.

use std::collections::HashSet;

use crate::publish::held_back;
use crate::{
    Capabilities, Error, ErrorKind, Message, OnFailure, Order, PublishOrder, PublishOutcome, Result, Start,
    SubscribeSpec, capability::millis,
};

/// Names that only this library may set. A user header with such a name is refused, so that nobody can forge one.
pub const RESERVED_HEADER_PREFIX: &str = "anybroker-";

/// A batch after the check.
pub(crate) enum Screened {
    /// Nothing was wrong: the batch as it came.
    Good(Vec<Message>),
    /// Some entries are refused; their outcomes stand at their places, the places of the good ones are `None`.
    Mixed { good: Vec<Message>, outcomes: Vec<Option<PublishOutcome>> },
}

pub(crate) fn screen(batch: Vec<Message>, record: &Capabilities, order: PublishOrder) -> Screened {
    let Some(first) = batch.iter().position(|entry| message(entry, record).is_err()) else {
        return Screened::Good(batch);
    };
    let mut outcomes: Vec<Option<PublishOutcome>> = Vec::with_capacity(batch.len());
    let mut good = Vec::with_capacity(batch.len());
    let mut failed_keys = HashSet::new();
    for (index, entry) in batch.into_iter().enumerate() {
        let place = entry.key_bytes().map(|key| (entry.destination().clone(), key.clone()));
        let refusal = if index < first {
            None
        } else if order == PublishOrder::Key && place.as_ref().is_some_and(|place| failed_keys.contains(place)) {
            Some(held_back(entry.id(), entry.destination()))
        } else {
            message(&entry, record).err()
        };
        match refusal {
            None => {
                good.push(entry);
                outcomes.push(None);
            }
            Some(error) => {
                failed_keys.extend(place);
                outcomes.push(Some(Err(error)));
            }
        }
    }
    Screened::Mixed { good, outcomes }
}

/// Puts the outcomes of the good entries at their places.
pub(crate) fn merge(outcomes: Vec<Option<PublishOutcome>>, good: Vec<PublishOutcome>) -> Vec<PublishOutcome> {
    let mut good = good.into_iter();
    outcomes
        .into_iter()
        .map(|outcome| {
            outcome.unwrap_or_else(|| {
                good.next().unwrap_or_else(|| {
                    Err(Error::new(
                        ErrorKind::Unexpected,
                        "publish",
                        "the adapter answered for fewer messages than it got",
                    ))
                })
            })
        })
        .collect()
}

fn message(message: &Message, record: &Capabilities) -> Result<()> {
    let named = |error: Error| error.with("id", message.id()).with("destination", message.destination());
    let refuse = |kind, text: String| Err(named(Error::new(kind, "publish", text)));
    let limits = &record.limits;
    let over = |limit: Option<u64>, found: usize| limit.filter(|limit| found as u64 > *limit);
    if message.destination().is_empty() {
        return refuse(ErrorKind::InvalidMessage, "the destination is empty; expected a name".into());
    }
    if message.id().is_empty() {
        return refuse(ErrorKind::InvalidMessage, "the id is empty; expected a text".into());
    }
    match message.payload() {
        Some(payload) => {
            if let Some(limit) = over(limits.payload, payload.len()) {
                let text = format!("the payload has {} bytes; this endpoint carries {limit}", payload.len());
                return refuse(ErrorKind::TooLarge, text);
            }
        }
        None => {
            if let Some(remedy) = record.tombstones.note().filter(|_| !record.tombstones.is_given()) {
                return refuse(ErrorKind::InvalidMessage, format!("this endpoint has no tombstones; {remedy}"));
            }
        }
    }
    if let Some(key) = message.key()
        && let Some(limit) = over(limits.key, key.len())
    {
        return refuse(
            ErrorKind::InvalidMessage,
            format!("the key has {} bytes; this endpoint carries {limit}", key.len()),
        );
    }
    let headers = message.headers();
    if let Some(limit) = over(limits.header_count, headers.len()) {
        return refuse(ErrorKind::InvalidMessage, format!("{} headers; this endpoint carries {limit}", headers.len()));
    }
    if let Some(limit) = over(limits.headers, headers.byte_len()) {
        let text = format!("the headers have {} bytes; this endpoint carries {limit}", headers.byte_len());
        return refuse(ErrorKind::TooLarge, text);
    }
    for (name, _) in headers {
        if name.is_empty() {
            return refuse(ErrorKind::InvalidMessage, "a header has an empty name".into());
        }
        if let Some(limit) = over(limits.header_name, name.len()) {
            let text = format!("a header name has {} bytes; this endpoint carries {limit}", name.len());
            return refuse(ErrorKind::InvalidMessage, text);
        }
        let prefix = name.as_bytes().get(..RESERVED_HEADER_PREFIX.len());
        if prefix.is_some_and(|prefix| prefix.eq_ignore_ascii_case(RESERVED_HEADER_PREFIX.as_bytes())) {
            let text = format!("header `{name}`: names that begin with {RESERVED_HEADER_PREFIX} are reserved");
            return refuse(ErrorKind::InvalidMessage, text);
        }
    }
    if let Some(delay) = message.delay().filter(|delay| !delay.is_zero()) {
        record.delayed_publish.check("delayed publish", "publish").map_err(named)?;
        if let Some(limit) = limits.delay_max_ms.filter(|limit| millis(delay) > *limit) {
            return refuse(
                ErrorKind::InvalidMessage,
                format!("a delay of {delay:?}; this endpoint holds back {limit} ms at most"),
            );
        }
    }
    if message.ttl().is_some() {
        record.ttl.check("a time to live", "publish").map_err(named)?;
    }
    Ok(())
}

pub(crate) fn subscribe(spec: &SubscribeSpec, record: &Capabilities) -> Result<()> {
    match spec.order {
        Order::None => {}
        Order::Key => record.key_order.check("order per key", "subscribe")?,
        Order::Total => record.total_order.check("total order", "subscribe")?,
    }
    match spec.on_failure {
        OnFailure::GoPast => {}
        OnFailure::Block => record.block_on_failure.check("blocking a key on failure", "subscribe")?,
        OnFailure::Park => record.park_on_failure.check("parking a key behind its dead letter", "subscribe")?,
    }
    if spec.max_attempts.is_some() {
        record.dead_letter.check("dead letters (max_attempts)", "subscribe")?;
    }
    let lease = millis(spec.lease);
    let bounds = (record.limits.lease_min_ms.unwrap_or(1), record.limits.lease_max_ms.unwrap_or(u64::MAX));
    if record.lease.is_given() && !(bounds.0..=bounds.1).contains(&lease) {
        let text = format!("a lease of {lease} ms; this endpoint leases for {} to {} ms", bounds.0, bounds.1);
        return Err(Error::new(ErrorKind::ConfigInvalid, "subscribe", text));
    }
    start(spec.start, record, "subscribe")
}

pub(crate) fn start(start: Start, record: &Capabilities, operation: &'static str) -> Result<()> {
    match start {
        Start::Earliest => Ok(()),
        Start::Latest => record.start_latest.check("starting at the latest", operation),
        Start::Time(_) => record.replay.check("starting at a time", operation),
        Start::Position(_) => record.start_position.check("starting at a position", operation),
    }
}

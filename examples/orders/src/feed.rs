//! Reads orders from a file and publishes them.

use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::path::Path;

use anybroker::events::{Mode, TypedEvent};
use anybroker::{Bus, Effect, Message, Result, Timestamp};
use serde_json::Value;

use crate::ORDERS;
use crate::order::ORDER_CREATED;

/// How many messages are published together.
const BATCH: usize = 200;

/// What became of the lines.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Fed {
    /// Lines in the file.
    pub lines: u64,
    /// Events that the broker has confirmed.
    pub published: u64,
    /// Those of them that the broker already had (where it recognises them).
    pub known: u64,
    /// Numbers of the lines that cannot be published: no JSON, or nothing that names an order.
    pub unreadable: Vec<u64>,
    /// Messages that could not be published, and why.
    pub failed: Vec<(String, String)>,
}

/// Publishes every line of the file that can be read. Dropped, it stops; `fed` tells how far it came.
///
/// Whether a line is an order in the right shape is not the feed's business: that is judged by whoever works on it.
///
/// # Errors
/// When the file cannot be read.
pub async fn publish(bus: &Bus, file: &Path, fed: &mut Fed) -> io::Result<()> {
    let mut batch = Vec::with_capacity(BATCH);
    for line in BufReader::new(File::open(file)?).lines() {
        fed.lines += 1;
        match message_of(&line?) {
            Some(message) => batch.push(message),
            None => fed.unreadable.push(fed.lines),
        }
        if batch.len() == BATCH {
            send(bus, std::mem::replace(&mut batch, Vec::with_capacity(BATCH)), fed).await;
        }
    }
    send(bus, batch, fed).await;
    Ok(())
}

async fn send(bus: &Bus, batch: Vec<Message>, fed: &mut Fed) {
    // One more try for what failed: a message whose fate is unknown keeps its id, so that a second copy is recognised.
    let mut left = batch;
    for last in [false, true] {
        let again = left.clone();
        left = Vec::new();
        for (message, outcome) in again.iter().zip(bus.publish(again.clone()).await) {
            match outcome {
                Ok(receipt) => {
                    fed.published += 1;
                    fed.known += u64::from(receipt.duplicate);
                }
                Err(error) if last || error.retry() == anybroker::Retry::Never && error.effect() != Effect::Unknown => {
                    fed.failed.push((message.id().to_string(), error.to_string()));
                }
                Err(_) => left.push(message.clone()),
            }
        }
        if left.is_empty() {
            return;
        }
    }
}

/// The event for a line, unless nothing can be made of it.
fn message_of(line: &str) -> Option<Message> {
    let data: Value = serde_json::from_str(line).ok()?;
    event(data).ok().flatten()
}

fn event(data: Value) -> Result<Option<Message>> {
    let text = |field: &str| data.get(field).and_then(Value::as_str).map(ToOwned::to_owned);
    let Some(order) = text("order_id") else { return Ok(None) };
    let placed_at = text("placed_at").and_then(|text| text.parse::<Timestamp>().ok());
    // The id follows from the order: a line that comes twice, or a file that is read twice, gives the same event.
    let mut event = TypedEvent::new("/shop", ORDER_CREATED, data)
        .with_id(format!("{order}-created"))
        .with_subject(order)
        .with_schema_version("1");
    if let Some(placed_at) = placed_at {
        event = event.with_time(placed_at);
    }
    event.to_message(ORDERS, Mode::Binary).map(Some)
}

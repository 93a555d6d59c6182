//! Dead letters: written to a topic of their source and group, and read back from it.

use std::time::Duration;

use anybroker_core::{
    ByteString, DeadLetter, DeadLetterId, DeadLetterPage, DeadLetterScope, Delivery, Error, ErrorKind, Position,
    Reason, Result, Timestamp, Verdict,
};
use rdkafka::config::FromClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::message::{Header, Headers as _, Message as _, OwnedHeaders};
use rdkafka::{Offset, TopicPartitionList};
use serde_json::{Value, json};

use crate::codec::{self, Filling};
use crate::config::Settings;
use crate::error::failed;

/// The header that tells why a message is a dead letter. Peeled off before the message is shown.
const LETTER: &str = "anybroker-letter";

/// The record's headers: those of the message, and why it died.
pub(crate) fn encode(delivery: &Delivery, verdict: &Verdict) -> OwnedHeaders {
    let message = delivery.message();
    // The letter's own time is the broker's; the message keeps its timestamp inside.
    let (headers, _) = codec::encode(message, Timestamp::from_millis(i64::MAX), &mut Vec::new());
    let letter = json!({
        "source": message.destination(),
        "group": delivery.group(),
        "reason": verdict.reason.as_str(),
        "error_type": verdict.error_type.as_deref(),
        "detail": verdict.detail.as_deref(),
        "attempts": delivery.attempt(),
        "last_at": Timestamp::now(),
        "redrives": 0,
        "position": delivery.position().map(|position| position.to_string()),
    })
    .to_string();
    headers.insert(Header { key: LETTER, value: Some(letter.as_bytes()) })
}

/// Reads a page of letters. Blocks.
pub(crate) fn page(
    settings: &Settings,
    topic: &str,
    partitions: i32,
    scope: &DeadLetterScope,
    from: Option<&DeadLetterId>,
    max: usize,
) -> Result<DeadLetterPage> {
    let start = from.map_or(Ok((0, 0)), parse)?;
    let consumer: BaseConsumer = BaseConsumer::from_config(&settings.consumer("anybroker-dead-letters"))
        .map_err(|error| failed("dead letters", &error))?;
    let mut page = DeadLetterPage::default();
    // Partition by partition: oldest first within each. Ids stay comparable that way.
    for partition in start.0..partitions {
        let from = if partition == start.0 { start.1 } else { 0 };
        read_partition(&consumer, topic, partition, from, scope, max, &mut page)?;
        if page.next.is_some() {
            break;
        }
    }
    Ok(page)
}

fn parse(id: &DeadLetterId) -> Result<(i32, i64)> {
    let parsed =
        id.0.split_once(':').and_then(|(partition, offset)| Some((partition.parse().ok()?, offset.parse().ok()?)));
    parsed.ok_or_else(|| {
        Error::new(ErrorKind::NotFound, "dead letters", "no such dead letter; expected an id such as 0:17")
            .with("id", id)
    })
}

fn read_partition(
    consumer: &BaseConsumer,
    topic: &str,
    partition: i32,
    from: i64,
    scope: &DeadLetterScope,
    max: usize,
    page: &mut DeadLetterPage,
) -> Result<()> {
    let wait = Duration::from_secs(10);
    let (low, high) =
        consumer.fetch_watermarks(topic, partition, wait).map_err(|error| failed("dead letters", &error))?;
    let from = from.max(low);
    if from >= high {
        return Ok(());
    }
    let mut place = TopicPartitionList::new();
    place
        .add_partition_offset(topic, partition, Offset::Offset(from))
        .and_then(|()| consumer.assign(&place))
        .map_err(|error| failed("dead letters", &error))?;
    let deadline = std::time::Instant::now() + wait;
    let mut next = from;
    while next < high {
        if page.letters.len() == max {
            page.next = Some(DeadLetterId(format!("{partition}:{next}").into()));
            break;
        }
        match consumer.poll(Duration::from_millis(100)) {
            Some(Ok(record)) => {
                if record.offset() >= high {
                    break;
                }
                next = record.offset() + 1;
                let letter = record.headers().and_then(|headers| {
                    headers.iter().find(|header| header.key == LETTER).and_then(|header| header.value)
                });
                let letter = letter.and_then(|letter| serde_json::from_slice::<Value>(letter).ok()).unwrap_or_default();
                let mut message =
                    Filling::one(&record).finish(scope.source.clone(), format!("{topic}/{partition}")).message(0);
                message.headers_mut().remove(LETTER);
                page.letters.push(read(scope, &letter, message, format!("{partition}:{}", record.offset())));
            }
            Some(Err(error)) => return Err(failed("dead letters", &error)),
            None if std::time::Instant::now() >= deadline => {
                return Err(Error::new(ErrorKind::Timeout, "dead letters", "the letters could not be read in time"));
            }
            None => {}
        }
    }
    Ok(())
}

fn read(scope: &DeadLetterScope, letter: &Value, message: anybroker_core::Message, id: String) -> DeadLetter {
    let text = |name: &str| letter[name].as_str().map(ByteString::from);
    let number = |name: &str| letter[name].as_u64().and_then(|number| u32::try_from(number).ok()).unwrap_or_default();
    DeadLetter {
        id: DeadLetterId(id.into()),
        message,
        group: scope.group.clone(),
        reason: Reason::from(letter["reason"].as_str().unwrap_or("malformed")),
        error_type: text("error_type"),
        detail: text("detail"),
        attempts: number("attempts"),
        first_at: None,
        last_at: Timestamp::from_millis(letter["last_at"].as_i64().unwrap_or_default()),
        redrives: number("redrives"),
        position: letter["position"].as_str().and_then(|position| position.parse::<Position>().ok()),
    }
}

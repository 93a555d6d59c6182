//! Reading dead letters. SQS cannot look without leasing: letters are leased while they are read.

use std::time::Duration;

use anybroker_core::{
    ByteString, Bytes, DeadLetter, DeadLetterId, DeadLetterPage, DeadLetterScope, Reason, Result, Timestamp,
};
use aws_sdk_sqs::Client;
use serde_json::Value;

use crate::codec::{self, Decoded};
use crate::error::failed;
use crate::publisher::BATCH;
use crate::requests;

/// How long letters stay leased when reading ends early.
const LEASE: Duration = Duration::from_secs(30);
/// The place after a full page. SQS has no places: the letters read so far are leased, so the rest is what comes next.
const REST: &str = "rest";

/// Reads up to `max` letters.
pub(crate) async fn page(client: &Client, url: &str, scope: &DeadLetterScope, max: usize) -> Result<DeadLetterPage> {
    let mut page = DeadLetterPage::default();
    let mut handles: Vec<(Bytes, Duration)> = Vec::new();
    while page.letters.len() < max {
        let count = i32::try_from((max - page.letters.len()).min(BATCH)).expect("ten at most");
        let request = client
            .receive_message()
            .queue_url(url)
            .max_number_of_messages(count)
            // With a wait of a second SQS asks all of its servers, so that an empty answer means empty.
            .wait_time_seconds(1)
            .visibility_timeout(requests::seconds(LEASE))
            .message_attribute_names("All");
        let messages =
            request.send().await.map_err(|error| failed("dead letters", &error))?.messages.unwrap_or_default();
        if messages.is_empty() {
            break;
        }
        for mut message in messages {
            let id = message.message_id.clone().unwrap_or_default();
            handles.extend(message.receipt_handle.take().map(|handle| (Bytes::from(handle), Duration::ZERO)));
            let decoded = codec::decode(message, &scope.source);
            page.letters.push(read(scope, decoded, id));
        }
    }
    page.letters.sort_by_key(|letter| letter.last_at);
    if page.letters.len() >= max {
        page.next = Some(DeadLetterId(ByteString::from_static(REST)));
    } else {
        // Should it fail, their leases end by themselves.
        let _ = requests::change(client, url, &handles, "dead letters").await;
    }
    Ok(page)
}

fn read(scope: &DeadLetterScope, decoded: Decoded, id: String) -> DeadLetter {
    let letter: Value = decoded.letter.and_then(|letter| serde_json::from_str(&letter).ok()).unwrap_or_default();
    let text = |name: &str| letter[name].as_str().map(ByteString::from);
    let number = |name: &str| letter[name].as_u64().and_then(|number| u32::try_from(number).ok()).unwrap_or_default();
    DeadLetter {
        id: DeadLetterId(id.into()),
        message: decoded.message,
        group: scope.group.clone(),
        reason: Reason::from(letter["reason"].as_str().unwrap_or("broker_limit")),
        error_type: text("error_type"),
        detail: text("detail"),
        attempts: number("attempts"),
        first_at: None,
        last_at: Timestamp::from_millis(letter["last_at"].as_i64().unwrap_or_default()),
        redrives: number("redrives"),
        position: None,
    }
}

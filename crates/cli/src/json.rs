//! What `--json` prints: the shapes that scripts rely on.

use std::time::Duration;

use anybroker::{
    DeadLetter, Delivery, Description, Effect, Endpoint, Error, Figure, GroupDescription, Lag, Message, MessageId,
    PublishOutcome, Retry,
};
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::{Map, Value, json};

/// `kind`, `retry`, `effect`, `message`, and where it happened.
pub(crate) fn error(error: &Error) -> Value {
    let context: Map<String, Value> = error.context().map(|(name, value)| (name.to_owned(), value.into())).collect();
    let mut object = json!({
        "kind": error.kind().as_str(),
        "retry": error.retry().as_str(),
        "effect": error.effect().as_str(),
        "message": error.message(),
        "operation": error.operation(),
        "context": context,
    });
    if let Retry::Later(Some(hint)) = error.retry() {
        object["retry_after_ms"] = millis(hint);
    }
    object
}

/// `ok`, `failed` or `unknown`: the one word that a script decides on.
pub(crate) fn status(outcome: &PublishOutcome) -> &'static str {
    match outcome {
        Ok(_) => "ok",
        Err(error) => match error.effect() {
            Effect::Done => "ok",
            Effect::NotDone => "failed",
            Effect::Unknown => "unknown",
        },
    }
}

/// What became of a line of input.
pub(crate) fn receipt(line: u64, id: Option<&MessageId>, outcome: &PublishOutcome) -> Value {
    let mut object = json!({"line": line, "id": id.map(ToString::to_string), "status": status(outcome)});
    match outcome {
        Ok(receipt) => {
            object["position"] = receipt.position.map(|position| position.to_string()).into();
            object["duplicate"] = receipt.duplicate.into();
        }
        Err(failure) => object["error"] = error(failure),
    }
    object
}

/// A delivery: its message and what is known about the hand-over.
pub(crate) fn delivery(delivery: &Delivery) -> Value {
    let facts = delivery.facts();
    let mut object = message(delivery.message());
    object["group"] = delivery.group().as_str().into();
    object["attempt"] = facts.attempt.into();
    object["deliveries"] = facts.deliveries.into();
    object["position"] = facts.position.map(|position| position.to_string()).into();
    object["lane"] = facts.lane.index.into();
    object["lease_until"] = facts.lease_until.map(|until| until.to_string()).into();
    object
}

/// A dead letter: its message and why it died.
pub(crate) fn letter(letter: &DeadLetter) -> Value {
    let mut object = message(&letter.message);
    object["dead_letter_id"] = letter.id.to_string().into();
    object["source"] = letter.message.destination().as_str().into();
    object["group"] = letter.group.as_str().into();
    object["reason"] = letter.reason.as_str().into();
    object["error_type"] = letter.error_type.as_deref().into();
    object["detail"] = letter.detail.as_deref().into();
    object["attempts"] = letter.attempts.into();
    object["attempt"] = letter.attempts.into();
    object["redrives"] = letter.redrives.into();
    object["first_at"] = letter.first_at.map(|at| at.to_string()).into();
    object["last_at"] = letter.last_at.to_string().into();
    object["position"] = letter.position.map(|position| position.to_string()).into();
    object
}

fn message(message: &Message) -> Value {
    let headers: Vec<Value> = message
        .headers()
        .iter()
        .map(|(name, value)| {
            let mut header = json!({"name": name});
            text_or_base64(&mut header, "value", Some(value));
            header
        })
        .collect();
    let mut object = json!({
        "id": message.id().to_string(),
        "destination": message.destination().as_str(),
        "headers": headers,
        "content_type": message.content_type(),
        "timestamp": message.timestamp().to_string(),
    });
    // A key is always there, and null where there is none (or none that is text).
    object["key"] = Value::Null;
    text_or_base64(&mut object, "key", message.key());
    // A tombstone is a null payload.
    if message.is_tombstone() {
        object["payload"] = Value::Null;
    }
    text_or_base64(&mut object, "payload", message.payload().map(|payload| &payload[..]));
    object
}

/// `name` where the bytes are text, `name_base64` where they are not.
fn text_or_base64(object: &mut Value, name: &str, bytes: Option<&[u8]>) {
    let Some(bytes) = bytes else { return };
    match std::str::from_utf8(bytes) {
        Ok(text) => object[name] = text.into(),
        Err(_) => object[format!("{name}_base64")] = BASE64.encode(bytes).into(),
    }
}

/// The endpoint's names. It never holds a secret.
pub(crate) fn endpoint(endpoint: &Endpoint) -> Value {
    json!({
        "scheme": endpoint.scheme, "mode": endpoint.mode, "url": endpoint.url, "server": endpoint.server,
    })
}

/// A destination as the broker has it.
pub(crate) fn description(description: &Description, groups: &[&GroupDescription]) -> Value {
    let groups: Vec<Value> = groups
        .iter()
        .map(|group| {
            json!({
                "group": group.group.as_str(),
                "physical": group.physical,
                "dead_letters": group.dead_letters,
                "dead_letter_count": group.dead_letter_count,
                "lag": lag(&group.lag),
            })
        })
        .collect();
    json!({
        "destination": description.destination.as_str(),
        "physical": description.physical,
        "messages": description.messages,
        "settings": description.settings,
        "groups": groups,
    })
}

/// What is left to do; a figure that the endpoint cannot tell is null.
pub(crate) fn lag(lag: &Lag) -> Value {
    let count = |figure: Figure| figure.map(|(count, _)| count);
    let lanes: Vec<Value> = lag
        .lanes
        .iter()
        .map(|(name, lane)| {
            let mut object = self::lag(lane);
            object["lane"] = name.as_str().into();
            object
        })
        .collect();
    let mut object = json!({
        "ready": count(lag.ready),
        "in_flight": count(lag.in_flight),
        "delayed": count(lag.delayed),
        "total": lag.total(),
        "oldest_age_ms": lag.oldest_age.map(|(age, _)| millis(age)),
        "precision": {
            "ready": lag.ready.map(|(_, precision)| precision),
            "in_flight": lag.in_flight.map(|(_, precision)| precision),
            "delayed": lag.delayed.map(|(_, precision)| precision),
            "oldest_age": lag.oldest_age.map(|(_, precision)| precision),
        },
    });
    if !lanes.is_empty() {
        object["lanes"] = lanes.into();
    }
    object
}

fn millis(duration: Duration) -> Value {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX).into()
}

#[cfg(test)]
mod tests {
    use anybroker::ErrorKind;

    use super::*;

    #[test]
    fn bytes_that_are_no_text_are_base64() {
        let sent =
            Message::new("d", vec![0xff, 0x00]).with_key(vec![0xfe]).with_header("a", [0xfd]).with_header("b", "text");
        let object = message(&sent);
        assert_eq!(object["payload_base64"], "/wA=");
        assert!(object.get("payload").is_none());
        assert_eq!((&object["key"], &object["key_base64"]), (&Value::Null, &json!("/g==")));
        assert_eq!(object["headers"], json!([{"name": "a", "value_base64": "/Q=="}, {"name": "b", "value": "text"}]));
    }

    #[test]
    fn a_tombstone_is_null_and_an_empty_payload_is_empty() {
        assert_eq!(message(&Message::tombstone("d", "k"))["payload"], Value::Null);
        assert_eq!(message(&Message::new("d", ""))["payload"], "");
    }

    #[test]
    fn a_receipt_tells_failed_from_unknown() {
        let id = MessageId::from("a");
        let outcome = Err(Error::new(ErrorKind::Timeout, "publish", "no confirm"));
        assert_eq!(receipt(1, Some(&id), &outcome)["status"], "unknown");
        let outcome = Err(Error::new(ErrorKind::TooLarge, "publish", "too large").with("destination", "d"));
        let object = receipt(2, Some(&id), &outcome);
        assert_eq!((&object["status"], &object["id"]), (&json!("failed"), &json!("a")));
        assert_eq!(object["error"]["kind"], "too_large");
        assert_eq!(object["error"]["effect"], "not_done");
        assert_eq!(object["error"]["retry"], "never");
    }
}

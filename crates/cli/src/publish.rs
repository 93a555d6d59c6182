//! `anybroker publish`: one message per line of input, a receipt for each.

use std::time::Duration;

use anybroker::{
    Bus, Bytes, Error, ErrorKind, Headers, Message, MessageId, PublishOptions, PublishOrder, PublishOutcome, Timestamp,
};
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use futures_util::StreamExt;
use futures_util::future::BoxFuture;
use futures_util::stream::FuturesOrdered;
use serde_json::{Map, Value};

use crate::args::{Global, LineFormat, PublishArgs};
use crate::exit::{Exit, Failure, Tally};
use crate::input::{Content, Line, Lines, Share};
use crate::interrupt::Interrupt;
use crate::output::{Output, remark};
use crate::progress::Progress;
use crate::{connect, input, json};

/// Messages handed to the broker together, at most; fewer where the input brings fewer.
const BATCH: usize = 500;
/// Batches on their way at once.
const WINDOW: usize = 16;
/// The longest payload of an endpoint that states no limit.
const LONGEST: u64 = 256 * 1024 * 1024;

/// The outcome of one line.
struct Published {
    line: u64,
    id: Option<MessageId>,
    outcome: PublishOutcome,
    /// Given back once the outcome is printed.
    _share: Share,
}

#[derive(Default)]
struct Counts {
    ok: u64,
    failed: u64,
    unknown: u64,
}

pub(crate) async fn run(global: &Global, args: PublishArgs, output: &mut Output) -> Result<Exit, Failure> {
    let source = input::open(&args.file)?;
    let bus = connect::connect(global).await?;
    let mut interrupt = Interrupt::listen()?;
    let longest = bus.capabilities().limits.payload.unwrap_or(LONGEST).min(LONGEST);
    // As JSON the same payload takes more room: base64, escapes, and the other fields.
    let longest = if args.format == LineFormat::Json { longest * 2 + 64 * 1024 } else { longest };
    let mut lines = Lines::read(source, usize::try_from(longest).unwrap_or(usize::MAX))?;
    let progress = Progress::new("published", true);
    let (mut counts, mut tally) = (Counts::default(), Tally::default());
    let mut input_error = None;
    let mut waiting: FuturesOrdered<BoxFuture<'static, Vec<Published>>> = FuturesOrdered::new();
    let mut at_end = false;
    if args.id.is_some() {
        // Two messages of one id are a mistake: nothing is sent before it is clear that there is one line only.
        let mut first = lines.next(2).await;
        if first.len() < 2 && !first.is_empty() {
            first.extend(lines.next(1).await);
        }
        if first.len() > 1 && first.iter().all(Result::is_ok) {
            return Err(Failure::Usage("--id names one message, and the input has several lines".into()));
        }
        at_end = true;
        waiting.push_back(submit(&bus, &args, first, &mut input_error).await);
    }
    while !(at_end && waiting.is_empty()) {
        tokio::select! {
            biased;
            () = interrupt.requested(), if !at_end => at_end = true,
            Some(published) = waiting.next(), if !waiting.is_empty() => {
                print(published, &mut counts, &mut tally, output)?;
                progress.set(counts.ok);
            }
            batch = lines.next(BATCH), if !at_end && waiting.len() < WINDOW => {
                at_end = batch.is_empty() || batch.last().is_some_and(Result::is_err);
                waiting.push_back(submit(&bus, &args, batch, &mut input_error).await);
            }
        }
    }
    drop(progress);
    if !output.is_json() {
        let Counts { ok, failed, unknown } = counts;
        remark(false, &format!("{ok} published, {failed} failed, {unknown} unknown"), &Value::Null);
    }
    let exit = if interrupt.is_requested() { Exit::Interrupted } else { tally.exit() };
    let closed = connect::close_after(&bus, exit, output.is_json()).await;
    input_error.map_or(closed, |error| Err(Failure::Io("read input", error)))
}

/// Hands the lines over in their order; the future tells what became of each, bad ones included.
async fn submit(
    bus: &Bus,
    args: &PublishArgs,
    lines: Vec<std::io::Result<Line>>,
    input_error: &mut Option<std::io::Error>,
) -> BoxFuture<'static, Vec<Published>> {
    let mut entries = Vec::with_capacity(lines.len());
    let mut batch = Vec::with_capacity(lines.len());
    for line in lines {
        let Line { number, content, share } = match line {
            Ok(line) => line,
            Err(error) => {
                *input_error = Some(error);
                continue;
            }
        };
        match message(args, content) {
            Ok(message) => {
                entries.push((number, share, Some(message.id().clone()), None));
                batch.push(message);
            }
            Err(error) => entries.push((number, share, None, Some(error))),
        }
    }
    // How lines fall into batches is chance; whether a line is held back behind a failed one of its key must not be.
    let options = PublishOptions::default().with_order(PublishOrder::None);
    let confirms = bus.submit(batch, &options).await;
    Box::pin(async move {
        let mut outcomes = confirms.await.into_iter();
        let mut outcome_of = |refused: Option<Error>| match refused {
            Some(error) => Err(error),
            None => outcomes.next().unwrap_or_else(|| {
                Err(Error::new(ErrorKind::Unexpected, "publish", "the broker answered for fewer messages than it got"))
            }),
        };
        entries
            .into_iter()
            .map(|(line, _share, id, refused)| Published { line, id, outcome: outcome_of(refused), _share })
            .collect()
    })
}

fn print(
    published: Vec<Published>,
    counts: &mut Counts,
    tally: &mut Tally,
    output: &mut Output,
) -> Result<(), Failure> {
    for Published { line, id, outcome, _share } in published {
        let status = json::status(&outcome);
        match (status, &outcome) {
            ("ok", _) => {
                counts.ok += 1;
                tally.success();
            }
            (status, Err(error)) => {
                *(if status == "unknown" { &mut counts.unknown } else { &mut counts.failed }) += 1;
                tally.failure(error.kind());
            }
            (_, Ok(_)) => {}
        }
        if output.is_json() {
            output.object(&json::receipt(line, id.as_ref(), &outcome))?;
            continue;
        }
        let id = id.map_or_else(|| format!("line {line}"), |id| id.to_string());
        output.line(&match &outcome {
            Ok(receipt) => match receipt.position {
                Some(position) => format!("{status:<7} {id} at {position}"),
                None => format!("{status:<7} {id}"),
            },
            Err(error) => format!("{status:<7} {id}: {error}"),
        })?;
    }
    output.flush()
}

fn message(args: &PublishArgs, content: Content) -> Result<Message, Error> {
    let bytes = match content {
        Content::Bytes(bytes) => bytes,
        Content::TooLong(length) => {
            let text = format!("the line has {length} bytes, more than a message of this endpoint holds");
            return Err(Error::new(ErrorKind::TooLarge, "publish", text));
        }
    };
    let mut message = match args.format {
        LineFormat::Lines => Message::new(args.destination.as_str(), Bytes::from(bytes)),
        LineFormat::Json => from_json(args.destination.as_str(), &bytes)
            .map_err(|problem| Error::new(ErrorKind::InvalidMessage, "publish", problem))?,
    };
    if !args.headers.is_empty() {
        let own = std::mem::take(message.headers_mut());
        let mut headers: Headers = args.headers.iter().map(|(name, value)| (name, value)).collect();
        headers.extend(own.iter());
        *message.headers_mut() = headers;
    }
    // What a line says for itself goes before what holds for all of them.
    if message.key().is_none()
        && let Some(key) = &args.key
    {
        message = message.with_key(key.clone());
    }
    if message.content_type().is_none()
        && let Some(content_type) = &args.content_type
    {
        message = message.with_content_type(content_type.as_str());
    }
    if let Some(id) = &args.id {
        message = message.with_id(id.as_str());
    }
    if let (None, Some(delay)) = (message.delay(), args.delay) {
        message = message.with_delay(delay);
    }
    if let (None, Some(ttl)) = (message.ttl(), args.ttl) {
        message = message.with_ttl(ttl);
    }
    Ok(message)
}

/// What `consume --json` and `dlq peek --json` print beside the message, so that their lines can be published again.
const PRINTED_BESIDE: &[&str] = &[
    "attempt",
    "attempts",
    "dead_letter_id",
    "deliveries",
    "destination",
    "detail",
    "error_type",
    "first_at",
    "group",
    "lane",
    "last_at",
    "lease_until",
    "position",
    "reason",
    "redrives",
    "source",
];

fn from_json(destination: &str, bytes: &[u8]) -> Result<Message, String> {
    let value: Value = serde_json::from_slice(bytes).map_err(|error| {
        // The parser's own message may quote the line; the place is enough.
        format!("column {}: not valid JSON; expected one object per line", error.column())
    })?;
    let Value::Object(mut fields) = value else { return Err("expected a JSON object".into()) };
    let payload = match bytes_of(&mut fields, "payload")? {
        Some(payload) => payload,
        None => return Err("expected `payload` (a text, or null for a tombstone) or `payload_base64`".into()),
    };
    let id = text_of(&mut fields, "id")?.map_or_else(MessageId::new, MessageId::from);
    let timestamp = match text_of(&mut fields, "timestamp")? {
        Some(text) => text.parse().map_err(|_| "`timestamp`: expected RFC 3339".to_owned())?,
        None => Timestamp::now(),
    };
    let mut message = Message::from_parts(destination.into(), id, timestamp, payload.map(Bytes::from))
        .with_headers(headers_of(fields.remove("headers"))?);
    if let Some(Some(key)) = bytes_of(&mut fields, "key")? {
        message = message.with_key(key);
    }
    if let Some(content_type) = text_of(&mut fields, "content_type")? {
        message = message.with_content_type(content_type);
    }
    if let Some(delay) = duration_of(&mut fields, "delay")? {
        message = message.with_delay(delay);
    }
    if let Some(ttl) = duration_of(&mut fields, "ttl")? {
        message = message.with_ttl(ttl);
    }
    match fields.keys().find(|name| !PRINTED_BESIDE.contains(&name.as_str())) {
        Some(name) => Err(format!("unknown field `{name}`")),
        None => Ok(message),
    }
}

/// `name` as text or `name_base64`; `Some(None)` where it is null.
fn bytes_of(fields: &mut Map<String, Value>, name: &str) -> Result<Option<Option<Vec<u8>>>, String> {
    match (fields.remove(name), fields.remove(&format!("{name}_base64"))) {
        (None, None) => Ok(None),
        (Some(Value::String(text)), None) => Ok(Some(Some(text.into_bytes()))),
        (Some(Value::Null) | None, Some(Value::String(text))) => BASE64
            .decode(text)
            .map(|bytes| Some(Some(bytes)))
            .map_err(|_| format!("`{name}_base64`: expected base64 with padding")),
        (Some(Value::Null), None) => Ok(Some(None)),
        _ => Err(format!("expected either `{name}`, a text, or `{name}_base64`")),
    }
}

fn text_of(fields: &mut Map<String, Value>, name: &str) -> Result<Option<String>, String> {
    match fields.remove(name) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(_) => Err(format!("`{name}`: expected a text")),
    }
}

fn duration_of(fields: &mut Map<String, Value>, name: &str) -> Result<Option<Duration>, String> {
    text_of(fields, name)?
        .map(|text| humantime::parse_duration(&text).map_err(|_| format!("`{name}`: expected a duration such as 30s")))
        .transpose()
}

/// A list of `{name, value}` (or `value_base64`), or an object of names and texts.
fn headers_of(value: Option<Value>) -> Result<Headers, String> {
    let mut headers = Headers::new();
    match value {
        None | Some(Value::Null) => {}
        Some(Value::Object(pairs)) => {
            for (name, value) in pairs {
                let value = value.as_str().ok_or_else(|| format!("`headers`: expected a text under `{name}`"))?;
                headers.append(name, value);
            }
        }
        Some(Value::Array(list)) => {
            for header in list {
                let Value::Object(mut header) = header else {
                    return Err("`headers`: expected objects with name and value".into());
                };
                let name = text_of(&mut header, "name")?.ok_or("`headers`: a header has no name")?;
                let Some(Some(value)) = bytes_of(&mut header, "value")? else {
                    return Err(format!("`headers`: `{name}` has no value"));
                };
                headers.append(name, value);
            }
        }
        Some(_) => return Err("`headers`: expected a list of {name, value}".into()),
    }
    Ok(headers)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_json_line_says_everything_about_its_message() {
        let line = json!({
            "payload_base64": "/wA=", "key": "k", "id": "a", "headers": [{"name": "n", "value": "v"},
            {"name": "n", "value_base64": "/w=="}], "content_type": "x/y", "timestamp": "2026-01-01T00:00:00.000Z",
            "delay": "2s", "attempt": 3, "position": "7",
        });
        let message = from_json("d", line.to_string().as_bytes()).expect("valid");
        assert_eq!((message.bytes(), message.key()), (&[0xff, 0][..], Some(&b"k"[..])));
        assert_eq!((message.id().to_string().as_str(), message.content_type()), ("a", Some("x/y")));
        assert_eq!(message.headers().iter().collect::<Vec<_>>(), [("n", &b"v"[..]), ("n", &[0xff][..])]);
        assert_eq!(message.delay(), Some(Duration::from_secs(2)));
        assert_eq!(message.timestamp().to_string(), "2026-01-01T00:00:00.000Z");
    }

    #[test]
    fn a_bad_json_line_is_refused_and_not_repeated() {
        for line in [
            "MARKER",
            "[1]",
            "{}",
            r#"{"payload": 1}"#,
            r#"{"payload": "a", "payload_base64": "YQ=="}"#,
            r#"{"payload_base64": "MARKER!"}"#,
            r#"{"payload": "a", "colour": "MARKER"}"#,
            r#"{"payload": "a", "headers": 3}"#,
            r#"{"payload": "a", "headers": [{"name": "n"}]}"#,
            r#"{"payload": "a", "timestamp": "MARKER"}"#,
        ] {
            let problem = from_json("d", line.as_bytes()).expect_err(line);
            assert!(!problem.contains("MARKER"), "{problem}");
        }
    }

    #[test]
    fn null_is_a_tombstone() {
        assert!(from_json("d", br#"{"payload": null, "key": "k"}"#).expect("valid").is_tombstone());
    }
}

//! Events to messages and back, by the published protocol bindings.

use anybroker_core::{Destination, Message, MessageId, Result, Timestamp, lineage};
use cloudevents::event::{AttributeValue, AttributesReader, AttributesWriter, Data, EventBuilder, ExtensionValue};
use cloudevents::{Event, EventBuilderV10};
use serde_json::Value;

use crate::attributes::{self, is_name};
use crate::json::{mismatch, refuse, shape};
use crate::metadata::{CAUSATION_ID, CORRELATION_ID, PARTITION_KEY, TRACEPARENT, TRACESTATE};

/// The content type of a structured event.
pub const STRUCTURED_CONTENT_TYPE: &str = "application/cloudevents+json";

const STRUCTURED_FAMILY: &str = "application/cloudevents";

/// Extensions that core knows as headers of their own.
const LINEAGE: &[(&str, &str)] = &[
    (CORRELATION_ID, lineage::CORRELATION_ID),
    (CAUSATION_ID, lineage::CAUSATION_ID),
    (TRACEPARENT, lineage::TRACEPARENT),
    (TRACESTATE, lineage::TRACESTATE),
];

/// Where an event's attributes stand in its message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Mode {
    /// In headers; the payload is the data alone. Receivers that know nothing of CloudEvents can read it.
    #[default]
    Binary,
    /// In the payload, together with the data, as JSON.
    Structured,
}

/// The event as a message for `destination`.
///
/// # Errors
/// [`InvalidMessage`](anybroker_core::ErrorKind::InvalidMessage) when a required attribute is empty or an extension has a name that
/// the specification does not allow (it has lower-case letters and digits only), or one of an attribute's.
pub fn to_message(event: &Event, destination: impl Into<Destination>, mode: Mode) -> Result<Message> {
    valid(event)?;
    let payload = match mode {
        Mode::Binary => data_bytes(event)?,
        Mode::Structured => serde_json::to_vec(event)
            .map_err(|error| refuse("write event", format!("not JSON: {error}")).with_source(error))?,
    };
    let time = event.time().map(|time| Timestamp::from_millis(time.timestamp_millis()));
    let mut message = Message::from_parts(
        destination.into(),
        MessageId::from(event.id()),
        time.unwrap_or_else(Timestamp::now),
        Some(payload.into()),
    );
    if let Some(key) = key_of(event) {
        message = message.with_key(key);
    }
    match mode {
        Mode::Structured => message = message.with_content_type(STRUCTURED_CONTENT_TYPE),
        Mode::Binary => {
            // Without the attribute, JSON data is JSON only by the rule of the JSON format; here it has to be said.
            let implied = matches!(event.data(), Some(Data::Json(_))).then_some("application/json");
            if let Some(content_type) = event.datacontenttype().or(implied) {
                message = message.with_content_type(content_type);
            }
            let headers = message.headers_mut();
            for (name, value) in event.iter_attributes().filter(|(name, _)| *name != "datacontenttype") {
                attributes::write(headers, name, &text_of(&value));
            }
            let mut extensions: Vec<_> = event.iter_extensions().collect();
            extensions.sort_by_key(|(name, _)| *name); // The SDK keeps them in a hash map; bytes should not vary.
            for (name, value) in extensions {
                attributes::write(headers, name, &value.to_string());
            }
        }
    }
    for (extension, header) in LINEAGE {
        if let Some(value) = event.extension(extension) {
            message.headers_mut().append(header, value.to_string());
        }
    }
    Ok(message)
}

/// The event in a message: structured by its content type, binary otherwise.
///
/// It is lenient about form: attributes in the header form of any published binding, names in any case, optional
/// attributes missing, extensions that nobody knows. In binary mode the data are the payload's bytes
/// ([`Data::Binary`]), whatever the content type, so that nothing is lost; extensions are texts. What core keeps in
/// headers of its own (correlation, causation, trace) becomes an extension where the event has none; a key that is
/// neither the event's subject nor its `partitionkey` becomes a `partitionkey`.
///
/// # Errors
/// [`InvalidMessage`](anybroker_core::ErrorKind::InvalidMessage), with `error_type`
/// [`SCHEMA_MISMATCH`](crate::SCHEMA_MISMATCH): no CloudEvent, another version than 1.0, a required attribute
/// missing, a malformed time or schema address, an attribute that stands there twice with different values, a batch
/// or an event format other than JSON.
pub fn from_message(message: &Message) -> Result<Event> {
    let mut event = if is_structured(message) { structured(message)? } else { binary(message)? };
    for (extension, header) in LINEAGE {
        if event.extension(extension).is_none()
            && let Some(value) = message.headers().get_str(header)
        {
            event.set_extension(extension, value);
        }
    }
    if let Some(key) = message.key()
        && key_of(&event).is_none_or(|derived| derived.as_bytes() != key)
        && let Ok(key) = std::str::from_utf8(key)
    {
        event.set_extension(PARTITION_KEY, key);
    }
    valid(&event).map_err(|error| mismatch("read event", error.message().to_owned(), message))?;
    Ok(event)
}

/// Whether the content type is that of an event format.
pub(crate) fn is_structured(message: &Message) -> bool {
    content_type_of(message).is_some_and(|content_type| media_type(content_type).starts_with(STRUCTURED_FAMILY))
}

fn structured(message: &Message) -> Result<Event> {
    let format = content_type_of(message).map(media_type).unwrap_or_default();
    // The NATS binding names the family alone, and means JSON.
    if format != STRUCTURED_CONTENT_TYPE && format != STRUCTURED_FAMILY {
        let problem = format!("the event format `{format}` is not read here; expected {STRUCTURED_CONTENT_TYPE}");
        return Err(mismatch("read event", problem, message));
    }
    let malformed = |error: serde_json::Error| {
        mismatch("read event", format!("not a structured CloudEvent: {}", shape(&error)), message)
    };
    let mut value: Value = serde_json::from_slice(message.bytes()).map_err(malformed)?;
    expect_version(value.get("specversion").and_then(Value::as_str), message)?;
    // The SDK takes `data` for a text unless it knows the content type for JSON, and it does not know one with
    // parameters behind `+json`. Data that is JSON is set past it.
    let data = match value.get("data") {
        Some(data) if !data.is_string() && value.get("data_base64").is_none() => {
            value.as_object_mut().and_then(|object| object.remove("data"))
        }
        _ => None,
    };
    let mut event: Event = serde_json::from_value(value).map_err(malformed)?;
    if let Some(data) = data.filter(|data| !data.is_null()) {
        event.set_data_unchecked(data);
    }
    Ok(event)
}

fn binary(message: &Message) -> Result<Event> {
    let mut found = attributes::read(message)?;
    expect_version(found.remove("specversion").as_deref(), message)?;
    let content_type = found.remove("datacontenttype").or_else(|| content_type_of(message).map(ToOwned::to_owned));
    let mut builder = EventBuilderV10::new();
    let mut schema = None;
    for (name, value) in found {
        builder = match name.as_str() {
            "id" => builder.id(value),
            "source" => builder.source(value),
            "type" => builder.ty(value),
            "subject" => builder.subject(value),
            "time" => builder.time(value),
            "dataschema" => {
                schema = Some(value);
                builder
            }
            // No extension: the name is taken, and in binary mode the data are the payload.
            "data" => builder,
            extension => builder.extension(extension, value),
        };
    }
    // An event without data and one with empty data look alike; a content type tells that there is data.
    let payload = message.payload().filter(|payload| !payload.is_empty() || content_type.is_some());
    let data = payload.map(|payload| Data::Binary(payload.to_vec()));
    // The builder takes a schema only together with data and content type; those are put right below.
    builder = match schema {
        Some(schema) => builder.data_with_schema("", schema, Data::Binary(Vec::new())),
        None => builder.data("", Data::Binary(Vec::new())),
    };
    let mut event = builder.build().map_err(|error| {
        mismatch("read event", format!("not a CloudEvent in binary mode: {error}"), message).with_source(error)
    })?;
    let (_, schema, _) = event.take_data();
    event.set_dataschema(schema);
    event.set_datacontenttype(content_type);
    if let Some(data) = data {
        event.set_data_unchecked(data);
    }
    Ok(event)
}

fn expect_version(version: Option<&str>, message: &Message) -> Result<()> {
    match version {
        Some("1.0") => Ok(()),
        Some(other) => {
            let problem = format!("CloudEvents version `{other}`; expected 1.0");
            Err(mismatch("read event", problem, message))
        }
        None => Err(mismatch("read event", "no CloudEvent: it has no attribute `specversion`".into(), message)),
    }
}

fn content_type_of(message: &Message) -> Option<&str> {
    message.content_type().or_else(|| {
        // Senders on brokers without a content type of their own write a header (Kafka's binding does).
        let named = message.headers().iter().find(|(name, _)| name.eq_ignore_ascii_case("content-type"));
        named.and_then(|(_, value)| std::str::from_utf8(value).ok())
    })
}

fn media_type(content_type: &str) -> String {
    content_type.split(';').next().unwrap_or_default().trim().to_ascii_lowercase()
}

fn key_of(event: &Event) -> Option<String> {
    match event.extension(PARTITION_KEY) {
        Some(key) => Some(key.to_string()),
        None => event.subject().map(ToOwned::to_owned),
    }
}

fn data_bytes(event: &Event) -> Result<Vec<u8>> {
    Ok(match event.data() {
        None => Vec::new(),
        Some(Data::Binary(bytes)) => bytes.clone(),
        Some(Data::String(text)) => text.clone().into_bytes(),
        Some(Data::Json(value)) => serde_json::to_vec(value)
            .map_err(|error| refuse("write event", format!("not JSON: {error}")).with_source(error))?,
    })
}

fn text_of(value: &AttributeValue<'_>) -> String {
    match value {
        // The SDK prints an offset of +00:00; the canonical form of the specification's examples is Z.
        AttributeValue::Time(_) => {
            let text = value.to_string();
            text.strip_suffix("+00:00").map(|moment| format!("{moment}Z")).unwrap_or(text)
        }
        value => value.to_string(),
    }
}

/// What the specification demands of every event, and the SDK does not check.
fn valid(event: &Event) -> Result<()> {
    let attributes = [("id", event.id()), ("source", event.source().as_str()), ("type", event.ty())];
    if let Some((name, _)) = attributes.into_iter().find(|(_, value)| value.is_empty()) {
        return Err(refuse("write event", format!("the attribute `{name}` is empty; expected a text")));
    }
    const TAKEN: &[&str] =
        &["specversion", "id", "source", "type", "datacontenttype", "dataschema", "subject", "time", "data"];
    for (name, value) in event.iter_extensions() {
        if !is_name(name) || TAKEN.contains(&name) {
            let problem = format!("the extension `{name}`: expected lower-case letters and digits, and no attribute");
            return Err(refuse("write event", problem));
        }
        let empty = matches!(value, ExtensionValue::String(text) if text.is_empty());
        if empty && (LINEAGE.iter().any(|(extension, _)| extension == &name) || name == PARTITION_KEY) {
            return Err(refuse("write event", format!("the extension `{name}` is empty; expected a text")));
        }
    }
    Ok(())
}

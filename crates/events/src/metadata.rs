//! What travels with every event: who caused it, on whose behalf, in which trace, in which shape.

use anybroker_core::lineage::{self, TraceContext};
use anybroker_core::{Message, MessageId};
use cloudevents::Event;

/// The correlation extension: what all events of one business process share.
pub(crate) const CORRELATION_ID: &str = "correlationid";
/// The correlation extension: the event that caused this one.
pub(crate) const CAUSATION_ID: &str = "causationid";
/// The distributed tracing extension.
pub(crate) const TRACEPARENT: &str = "traceparent";
/// The distributed tracing extension's vendor part.
pub(crate) const TRACESTATE: &str = "tracestate";
/// The partitioning extension.
pub(crate) const PARTITION_KEY: &str = "partitionkey";
const USER_ID: &str = "userid";
const SCHEMA_VERSION: &str = "schemaversion";

/// The metadata of an event. In the envelope they are the extensions `correlationid`, `causationid`, `userid`,
/// `schemaversion`, `traceparent` and `tracestate`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Metadata {
    /// What all events of one business process share. An event without one starts a process.
    pub correlation_id: Option<MessageId>,
    /// The id of the event or message that caused this one.
    pub causation_id: Option<MessageId>,
    /// On whose behalf.
    pub user_id: Option<String>,
    /// The version of the data's shape, such as `1` or `1.2`.
    pub schema_version: Option<String>,
    /// The W3C trace context. A malformed one of somebody else's reads as none.
    pub trace: Option<TraceContext>,
    /// The W3C trace state, carried on unchanged.
    pub trace_state: Option<String>,
}

impl Metadata {
    /// The metadata of an event.
    #[must_use]
    pub fn of(event: &Event) -> Self {
        Self::read(|name| event.extension(name).map(ToString::to_string))
    }

    /// The metadata in a message, be it an event or not. What is malformed is left out.
    #[must_use]
    pub fn of_message(message: &Message) -> Self {
        let mut found = if crate::binding::is_structured(message) {
            crate::from_message(message).map(|event| Self::of(&event)).unwrap_or_default()
        } else {
            let mut attributes = crate::attributes::read(message).unwrap_or_default();
            Self::read(|name| attributes.remove(name))
        };
        let header = |name: &str| message.headers().get_str(name).map(ToOwned::to_owned);
        found.correlation_id = found.correlation_id.or_else(|| header(lineage::CORRELATION_ID).map(MessageId::from));
        found.causation_id = found.causation_id.or_else(|| message.causation_id());
        if found.trace.is_none() {
            found.trace = TraceContext::of(message);
            found.trace_state = header(lineage::TRACESTATE);
        }
        found
    }

    fn read(mut text: impl FnMut(&str) -> Option<String>) -> Self {
        let mut text = |name| text(name).filter(|text| !text.is_empty());
        Self {
            correlation_id: text(CORRELATION_ID).map(MessageId::from),
            causation_id: text(CAUSATION_ID).map(MessageId::from),
            user_id: text(USER_ID),
            schema_version: text(SCHEMA_VERSION),
            trace: text(TRACEPARENT).and_then(|text| text.parse().ok()),
            trace_state: text(TRACESTATE),
        }
    }

    /// What is caused by `parent`: its correlation id (or its own id, where it started the process), its id as cause,
    /// its user, and its trace in a new span. What is set already is kept.
    #[must_use]
    pub fn caused_by(mut self, parent: &Message) -> Self {
        let inherited = Self::of_message(parent);
        self.correlation_id = self.correlation_id.or(inherited.correlation_id).or_else(|| Some(parent.id().clone()));
        self.causation_id.get_or_insert_with(|| parent.id().clone());
        self.user_id = self.user_id.or(inherited.user_id);
        if self.trace.is_none() {
            self.trace = inherited.trace.map(TraceContext::child);
            self.trace_state = inherited.trace_state.filter(|_| self.trace.is_some());
        }
        self
    }

    /// Writes what is set into the event's extensions.
    pub fn write_to(&self, event: &mut Event) {
        let mut set = |name: &'static str, value: Option<String>| {
            if let Some(value) = value.filter(|value| !value.is_empty()) {
                event.set_extension(name, value);
            }
        };
        set(CORRELATION_ID, self.correlation_id.as_ref().map(ToString::to_string));
        set(CAUSATION_ID, self.causation_id.as_ref().map(ToString::to_string));
        set(USER_ID, self.user_id.clone());
        set(SCHEMA_VERSION, self.schema_version.clone());
        set(TRACEPARENT, self.trace.map(|trace| trace.to_string()));
        set(TRACESTATE, self.trace_state.clone());
    }
}

/// What this library adds to the SDK's [`Event`].
pub trait EventExt {
    /// The metadata that travel with it.
    fn metadata(&self) -> Metadata;

    /// Marks it as caused by the message `parent`: see [`Metadata::caused_by`].
    #[must_use]
    fn caused_by(self, parent: &Message) -> Self;
}

impl EventExt for Event {
    fn metadata(&self) -> Metadata {
        Metadata::of(self)
    }

    fn caused_by(mut self, parent: &Message) -> Self {
        Metadata::of(&self).caused_by(parent).write_to(&mut self);
        self
    }
}

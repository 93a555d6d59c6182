//! CloudEvents 1.0, typed payloads and event names for AnyBroker messages.
//!
//! ```
//! use anybroker_core::{Message, Result};
//! use anybroker_events::{Mode, TypedEvent};
//! use serde::{Deserialize, Serialize};
//!
//! #[derive(Debug, PartialEq, Serialize, Deserialize)]
//! struct Order { total_cents: u64 }
//!
//! # fn main() -> Result<()> {
//! let created = TypedEvent::new("/shop", "com.example.order.created", Order { total_cents: 1250 })
//!     .with_subject("order-17")
//!     .with_user_id("u-4");
//! let message: Message = created.to_message("orders", Mode::Binary)?;
//! assert_eq!(message.key(), Some(&b"order-17"[..])); // the subject is the partition key by default
//!
//! let received = TypedEvent::<Order>::from_message(&message)?;
//! assert_eq!(received.data.total_cents, 1250);
//!
//! // What a handler publishes because of it inherits the correlation id and names its cause.
//! let paid = TypedEvent::new("/payments", "com.example.payment.completed", ()).caused_by(&message);
//! assert_eq!(paid.metadata.causation_id.as_ref(), Some(message.id()));
//! # Ok(()) }
//! ```
//!
//! # How an event becomes a message
//!
//! | event | message |
//! |---|---|
//! | `id` | id |
//! | `time` | timestamp (whole milliseconds); the attribute itself keeps its full precision |
//! | extension `partitionkey`, else `subject` | key |
//! | `datacontenttype` | content type (binary mode) |
//! | `data` | payload (binary mode) |
//! | every other attribute and extension | header `ce-<name>`, percent-encoded (binary mode) |
//! | `correlationid`, `causationid`, `traceparent`, `tracestate` | also the headers of [`anybroker_core::lineage`] (both modes) |
//!
//! In [structured mode](Mode::Structured) the payload is the whole event as JSON, with the content type
//! `application/cloudevents+json`.
//!
//! The header form is that of the [HTTP][http] and [NATS][nats] bindings, on every broker. [`from_message`] reads all
//! published forms: `ce-` (HTTP, NATS), `ce_` ([Kafka][kafka]), `cloudEvents:` and `cloudEvents_` ([AMQP][amqp]).
//!
//! [http]: https://github.com/cloudevents/spec/blob/v1.0.2/cloudevents/bindings/http-protocol-binding.md
//! [nats]: https://github.com/cloudevents/spec/blob/main/cloudevents/bindings/nats-protocol-binding.md
//! [kafka]: https://github.com/cloudevents/spec/blob/v1.0.2/cloudevents/bindings/kafka-protocol-binding.md
//! [amqp]: https://github.com/cloudevents/spec/blob/v1.0.2/cloudevents/bindings/amqp-protocol-binding.md

mod attributes;
mod binding;
mod json;
mod metadata;
mod naming;
mod typed;

pub use binding::{Mode, STRUCTURED_CONTENT_TYPE, from_message, to_message};
pub use cloudevents;
pub use json::{Json, JsonExt, SCHEMA_MISMATCH};
pub use metadata::{EventExt, Metadata};
pub use naming::{NamingProblem, check_event_type};
pub use typed::TypedEvent;

//! How messages hang together: correlation, causation, and W3C trace context.

use std::fmt;
use std::str::FromStr;

use uuid::Uuid;

use crate::{Message, MessageId};

/// The header that all messages of one business process share.
pub const CORRELATION_ID: &str = "correlation-id";
/// The header that names the message which caused this one.
pub const CAUSATION_ID: &str = "causation-id";
/// The W3C trace context header.
pub const TRACEPARENT: &str = "traceparent";
/// The W3C trace state header, carried on unchanged.
pub const TRACESTATE: &str = "tracestate";

/// A W3C trace context (<https://www.w3.org/TR/trace-context/>, version 00).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct TraceContext {
    /// The trace, not zero.
    pub trace_id: u128,
    /// The span that the next one is a child of, not zero.
    pub span_id: u64,
    /// The flags; bit 0 is "sampled".
    pub flags: u8,
}

impl TraceContext {
    /// A new trace, not sampled.
    #[must_use]
    pub fn new_root() -> Self {
        Self { trace_id: Uuid::new_v4().as_u128(), span_id: random_span(), flags: 0 }
    }

    /// A new span in the same trace.
    #[must_use]
    pub fn child(self) -> Self {
        Self { span_id: random_span(), ..self }
    }

    /// The context that a message carries, where it is well formed.
    #[must_use]
    pub fn of(message: &Message) -> Option<Self> {
        message.headers().get_str(TRACEPARENT)?.parse().ok()
    }
}

fn random_span() -> u64 {
    // The low half of a UUIDv4 holds two fixed bits, so it is never zero.
    Uuid::new_v4().as_u64_pair().1
}

/// A `traceparent` that is not well formed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MalformedTraceparent;

impl fmt::Display for MalformedTraceparent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("expected a traceparent such as 00-<32 hex digits>-<16 hex digits>-<2 hex digits>")
    }
}

impl std::error::Error for MalformedTraceparent {}

impl FromStr for TraceContext {
    type Err = MalformedTraceparent;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let lower_hex = |part: &str| part.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte));
        let mut parts = text.split('-');
        let (Some(version), Some(trace), Some(span), Some(flags)) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(MalformedTraceparent);
        };
        let lengths = (version.len(), trace.len(), span.len(), flags.len()) == (2, 32, 16, 2);
        // Later versions may append parts; version ff is forbidden.
        let version_ok = version != "ff" && (version != "00" || parts.next().is_none());
        if !lengths || !version_ok || ![version, trace, span, flags].into_iter().all(lower_hex) {
            return Err(MalformedTraceparent);
        }
        let context = Self {
            trace_id: u128::from_str_radix(trace, 16).map_err(|_| MalformedTraceparent)?,
            span_id: u64::from_str_radix(span, 16).map_err(|_| MalformedTraceparent)?,
            flags: u8::from_str_radix(flags, 16).map_err(|_| MalformedTraceparent)?,
        };
        if context.trace_id == 0 || context.span_id == 0 { Err(MalformedTraceparent) } else { Ok(context) }
    }
}

impl fmt::Display for TraceContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "00-{:032x}-{:016x}-{:02x}", self.trace_id, self.span_id, self.flags)
    }
}

impl Message {
    /// The correlation id: the header, or the message's own id where it starts the process.
    #[must_use]
    pub fn correlation_id(&self) -> MessageId {
        self.headers().get_str(CORRELATION_ID).map_or_else(|| self.id().clone(), MessageId::from)
    }

    /// The id of the message that caused this one.
    #[must_use]
    pub fn causation_id(&self) -> Option<MessageId> {
        self.headers().get_str(CAUSATION_ID).map(MessageId::from)
    }

    /// Marks this message as caused by `parent`: it inherits the correlation id, names its cause, and goes on with
    /// the trace in a span of its own. What this message states already is kept.
    ///
    /// ```
    /// use anybroker_core::Message;
    /// let order = Message::new("orders", "…");
    /// let paid = Message::new("payments", "…").caused_by(&order);
    /// assert_eq!(paid.causation_id(), Some(order.id().clone()));
    /// assert_eq!(paid.correlation_id(), order.correlation_id());
    /// ```
    #[must_use]
    pub fn caused_by(mut self, parent: &Message) -> Self {
        if self.headers().get(CORRELATION_ID).is_none() {
            parent.correlation_id().with_str(|id| self.headers_mut().append(CORRELATION_ID, id).len());
        }
        if self.headers().get(CAUSATION_ID).is_none() {
            parent.id().with_str(|id| self.headers_mut().append(CAUSATION_ID, id).len());
        }
        if self.headers().get(TRACEPARENT).is_none()
            && let Some(context) = TraceContext::of(parent)
        {
            self.headers_mut().append(TRACEPARENT, context.child().to_string());
            if let Some(state) = parent.headers().get(TRACESTATE) {
                self.headers_mut().append(TRACESTATE, state);
            }
        }
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_traceparent_round_trips_and_malformed_ones_are_refused() {
        let text = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        assert_eq!(text.parse::<TraceContext>().expect("valid").to_string(), text);
        for text in [
            "",
            "00-0-0-0",
            "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
            "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-x",
        ] {
            assert!(text.parse::<TraceContext>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_chain_keeps_one_correlation_and_one_trace() {
        let first = Message::new("a", "").with_header(TRACEPARENT, TraceContext::new_root().to_string());
        let second = Message::new("b", "").caused_by(&first);
        let third = Message::new("c", "").caused_by(&second);
        assert_eq!(third.correlation_id(), *first.id());
        assert_eq!(third.causation_id(), Some(second.id().clone()));
        let (root, leaf) = (TraceContext::of(&first).expect("set"), TraceContext::of(&third).expect("inherited"));
        assert_eq!(root.trace_id, leaf.trace_id);
        assert_ne!(root.span_id, leaf.span_id);
    }
}

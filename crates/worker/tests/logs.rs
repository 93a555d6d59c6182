//! The log events that dashboards rely on, by name and field. In a process of its own: `tracing` caches for all threads
//! whether anybody listens to an event.
#![allow(clippy::unwrap_used, reason = "test code")]

mod support;

use std::io::Write;
use std::sync::Arc;

use parking_lot::Mutex;
use support::scenario::run;

#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<u8>>>);

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
fn the_log_events_have_their_names_and_fields() {
    let lines = Lines::default();
    let writer = lines.clone();
    let subscriber = tracing_subscriber::fmt()
        .json()
        .with_max_level(tracing::Level::DEBUG)
        .with_writer(move || writer.clone())
        .finish();
    tracing::subscriber::with_default(subscriber, run);
    let text = String::from_utf8(lines.0.lock().clone()).unwrap();
    let events: Vec<serde_json::Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let of = |name: &str| -> Vec<&serde_json::Value> {
        events.iter().filter(|event| event["fields"]["message"] == name).map(|event| &event["fields"]).collect()
    };
    for (name, count) in [
        ("message_consumed", 5),
        ("message_acked", 3),
        ("message_nacked", 1),
        ("message_dlq", 1),
        ("message_produced", 3),
    ] {
        assert_eq!(of(name).len(), count, "{name}");
    }
    for name in ["message_consumed", "message_acked", "message_nacked", "message_dlq"] {
        for event in of(name) {
            assert_eq!(event["topic"], "orders", "{name}");
            assert_eq!(event["consumer_group"], "payments", "{name}");
            assert!(event["partition"].is_u64(), "{name}: {event}");
            assert!(event["offset"].is_string(), "{name}: {event}");
        }
    }
    for name in ["message_acked", "message_nacked", "message_dlq", "message_produced"] {
        assert!(of(name).iter().all(|event| event["latency_ms"].is_u64()), "{name}");
    }
    assert_eq!(of("message_nacked")[0]["error_type"], "TIMEOUT");
    assert_eq!(of("message_dlq")[0]["error_type"], "VALIDATION_ERROR");
    assert_eq!(of("message_dlq")[0]["reason"], "rejected");
    assert!(!of("consumer_lag").is_empty());
}

//! What the log says of a dead letter that cannot be stored. In a process of its own, as `logs`.
#![allow(clippy::unwrap_used, reason = "test code")]

mod support;

use std::io::Write;
use std::sync::Arc;
use std::time::Duration;

use anybroker_core::{Error, ErrorKind, Settlement};
use anybroker_worker::{HandlerError, Worker};
use parking_lot::Mutex;
use support::faulty::Faults;
use support::{Recorder, Running, drained, message, publish, spec, turned};

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

async fn fails_three_times() {
    let (inner, clock) = turned();
    let faults = Faults::default();
    let mut failures = 3;
    faults.fail_settles(move |_, settlement| {
        (matches!(settlement, Settlement::DeadLetter(_)) && failures > 0).then(|| {
            failures -= 1;
            Error::new(ErrorKind::PermissionDenied, "dead_letter", "not your queue")
        })
    });
    publish(&inner, [message("x")]).await;
    let handler = Recorder::new(|_| Err(HandlerError::new("VALIDATION_ERROR", "no good")));
    let worker = Worker::new(faults.around(&inner)).with_clock(clock.clone()).handle(spec(), handler);
    let worker = Running::start(worker);
    let turning = async {
        loop {
            clock.advance(Duration::from_millis(100));
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::select! {
        () = turning => {}
        () = drained(&inner) => {}
    }
    worker.stop().await;
}

#[test]
fn a_letter_that_cannot_be_stored_is_told_once_with_what_and_where_and_why() {
    let lines = Lines::default();
    let writer = lines.clone();
    let subscriber = tracing_subscriber::fmt().json().with_writer(move || writer.clone()).finish();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    tracing::subscriber::with_default(subscriber, || runtime.block_on(fails_three_times()));
    let text = String::from_utf8(lines.0.lock().clone()).unwrap();
    let events: Vec<serde_json::Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let of = |name: &str| events.iter().filter(|event| event["fields"]["message"] == name).collect::<Vec<_>>();
    let [told] = of("message_unburied")[..] else { panic!("once: {text}") };
    assert_eq!(told["level"], "ERROR");
    let fields = &told["fields"];
    assert_eq!((&fields["topic"], &fields["consumer_group"]), (&"orders".into(), &"payments".into()));
    assert_eq!(fields["reason"], "rejected");
    assert!(fields["id"].is_string());
    assert!(fields["error"].as_str().unwrap().contains("not your queue"), "{fields}");
    assert_eq!(of("message_unsettled").len(), 2);
    assert_eq!(of("message_dlq").len(), 1);
}

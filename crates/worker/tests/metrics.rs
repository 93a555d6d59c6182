//! The metrics that dashboards rely on, by name and label.
#![allow(clippy::unwrap_used, reason = "test code")]

mod support;

use metrics_util::debugging::{DebugValue, DebuggingRecorder};
use support::scenario::run;

#[test]
fn the_metrics_have_the_names_and_labels_that_dashboards_rely_on() {
    let recorder = DebuggingRecorder::new();
    let snapshotter = recorder.snapshotter();
    metrics::with_local_recorder(&recorder, run);
    let mut counters = Vec::new();
    let (mut durations, mut lags) = (0, 0);
    for (key, _, _, value) in snapshotter.snapshot().into_vec() {
        let (_, key) = key.into_parts();
        let labels: Vec<String> = key.labels().map(|label| format!("{}={}", label.key(), label.value())).collect();
        match value {
            DebugValue::Counter(0) => {}
            DebugValue::Counter(count) => counters.push(format!("{}{{{}}} {count}", key.name(), labels.join(","))),
            DebugValue::Histogram(values) => {
                assert_eq!(key.name(), "message_processing_duration_seconds");
                assert_eq!(labels, ["topic=orders", "consumer_group=payments"]);
                durations += values.len();
            }
            DebugValue::Gauge(_) if key.name() == "consumer_lag" => {
                assert_eq!(labels[..2], ["topic=orders", "consumer_group=payments"]);
                assert!(labels[2].starts_with("partition="));
                lags += 1;
            }
            DebugValue::Gauge(_) => {}
        }
    }
    counters.sort();
    assert_eq!(
        counters,
        [
            "dlq_messages_total{topic=orders,error_type=VALIDATION_ERROR} 1",
            "messages_consumed_total{topic=orders,consumer_group=payments,status=dead_letter} 1",
            "messages_consumed_total{topic=orders,consumer_group=payments,status=retry} 1",
            "messages_consumed_total{topic=orders,consumer_group=payments,status=success} 3",
            "messages_produced_total{topic=bills,partition=} 3",
        ]
    );
    assert_eq!(durations, 5, "one for each attempt");
    assert!(lags > 0);
}

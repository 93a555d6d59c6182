//! What this slice gives. Everything else is refused, and says so.

use anybroker_core::{
    AckGranularity, AckLevel, AttemptCount, Browse, Capabilities, DeadLetterAtomicity, LagPrecision, LateAck, Limits,
    Parallelism, Support,
};

use crate::config::Settings;

/// Room for headers, key and this library's attribute within `message_max_bytes`.
const ENVELOPE: usize = 32 * 1024;
const TWELVE_HOURS_MS: u64 = 12 * 3600 * 1000;

pub(crate) fn capabilities(settings: &Settings) -> Capabilities {
    let unwritten = || Support::refused("not written yet in this adapter");
    let stored = || match &settings.endpoint {
        None => Support::Native,
        Some(_) => Support::refused("this is not Amazon's endpoint, and this adapter cannot see where it stores"),
    };
    let unordered = || Support::refused("standard queues have no order; mode = \"fifo\" is not written yet");
    Capabilities {
        at_least_once: Support::Native,
        key_order: unordered(),
        total_order: unordered(),
        block_on_failure: unordered(),
        park_on_failure: unordered(),
        parallelism: Parallelism::Any,
        ack_granularity: AckGranularity::Individual,
        ack_level: AckLevel::Confirmed,
        late_ack: LateAck::Refused,
        nack: Support::Native,
        nack_delay: Support::Native,
        release: Support::emulated("SQS counts the hand-over; only this connection subtracts it from the attempt"),
        lease: Support::Native,
        lease_extension: Support::Native,
        attempt_count: AttemptCount::Approximate,
        crash_count: Support::refused("SQS has one count for hand-overs and failures; RabbitMQ tells them apart"),
        dead_letter: Support::emulated("a second request, before the source is deleted"),
        dead_letter_atomicity: DeadLetterAtomicity::StoredFirst,
        dead_letter_browse: Browse::Leasing,
        redrive: unwritten(),
        purge: unwritten(),
        groups: Support::refused("a queue has one group; fan-out by SNS is not written yet in this adapter"),
        kept_before_group: Support::Native,
        replay: Support::refused("a queue forgets what is settled; Kafka and JetStream keep it"),
        start_latest: Support::refused(
            "a queue cannot pass over what is in it; purge it first, or start at the earliest",
        ),
        patterns: unwritten(),
        delayed_publish: unwritten(),
        ttl: unwritten(),
        publish_confirm: Support::Native,
        unroutable_detected: Support::Native,
        publish_dedup: Support::refused("standard queues do not look at ids; mode = \"fifo\" is not written yet"),
        transactions: Support::refused("SQS has none"),
        tombstones: Support::refused("a message of SQS has a body; Kafka has tombstones"),
        declare: Support::Native,
        describe: unwritten(),
        delete: Support::Native,
        // SQS counts what was nacked with a delay as in flight, or (ElasticMQ) as ready.
        lag: LagPrecision::default(),
        admin_needed: false,
        survives_process_kill: stored(),
        survives_power_loss: stored(),
        limits: Limits {
            // Base64 in the worst case.
            payload: Some(((settings.message_max_bytes - ENVELOPE) / 4 * 3) as u64),
            key: Some(4 * 1024),
            headers: Some(12 * 1024),
            header_count: Some(500),
            publish_batch: Some(10),
            receive_batch: Some(10),
            settle_batch: Some(10),
            lease_min_ms: Some(1_000),
            lease_max_ms: Some(TWELVE_HOURS_MS),
            delay_max_ms: Some(TWELVE_HOURS_MS),
            // Whole seconds, and the next poll.
            delay_precision_ms: Some(2_000),
            ..Limits::default()
        },
    }
}

//! What an embedded endpoint gives.

use anybroker_core::{
    AckGranularity, AckLevel, AttemptCount, Browse, Capabilities, DeadLetterAtomicity, LagPrecision, LateAck, Limits,
    Parallelism, Precision, Support,
};

use crate::config::{Durability, Settings};

/// The record of an endpoint with these settings.
pub(crate) fn record(settings: &Settings) -> Capabilities {
    let exact = Some(Precision::Exact);
    Capabilities {
        at_least_once: Support::Native,
        key_order: Support::Native,
        total_order: Support::Native,
        block_on_failure: Support::Native,
        park_on_failure: Support::Native,
        parallelism: Parallelism::Any,
        ack_granularity: AckGranularity::Individual,
        ack_level: AckLevel::Confirmed,
        late_ack: LateAck::Refused,
        nack: Support::Native,
        nack_delay: Support::Native,
        release: Support::Native,
        lease: Support::Native,
        lease_extension: Support::Native,
        attempt_count: AttemptCount::Exact,
        crash_count: Support::Native,
        dead_letter: Support::Native,
        dead_letter_atomicity: DeadLetterAtomicity::Atomic,
        dead_letter_browse: Browse::NonDestructive,
        redrive: Support::Native,
        purge: Support::Native,
        groups: Support::Native,
        kept_before_group: Support::Native,
        replay: Support::Native,
        start_position: Support::Native,
        start_latest: Support::Native,
        patterns: Support::refused("name the destinations one by one"),
        delayed_publish: Support::Native,
        ttl: Support::Native,
        publish_confirm: Support::Native,
        unroutable_detected: Support::Native,
        publish_dedup: Support::refused("make the consumer idempotent; JetStream remembers ids"),
        transactions: Support::refused("Kafka has transactions over destinations"),
        tombstones: Support::Native,
        declare: Support::Native,
        describe: Support::Native,
        delete: Support::Native,
        lag: LagPrecision { ready: exact, in_flight: exact, delayed: exact, oldest_age: exact },
        admin_needed: false,
        survives_process_kill: Support::Native,
        survives_power_loss: match settings.durability {
            Durability::Synced => Support::Native,
            Durability::Grouped => Support::refused(format!(
                "set durability=synced; as it is, a power loss may take what was confirmed in the last {:?} and the \
                 time of one sync",
                settings.group_window
            )),
            Durability::DangerUnsynced => Support::refused("set durability=synced; nothing is synced"),
        },
        limits: Limits {
            payload: Some(settings.max_payload),
            key: Some(64 << 10),
            headers: Some(1 << 20),
            delay_precision_ms: Some(10),
            ..Limits::default()
        },
    }
}

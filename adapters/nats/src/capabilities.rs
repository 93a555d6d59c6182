//! What JetStream gives through this adapter.

use std::time::Duration;

use anybroker_core::{
    AckGranularity, AckLevel, AttemptCount, Browse, Capabilities, DeadLetterAtomicity, LagPrecision, LateAck, Limits,
    Parallelism, Precision, Support, capability::millis,
};

use crate::config::Settings;

/// Room for key, headers, this library's own header and a dead letter's note within `max_payload`: all of them at their
/// limits, written as base64 where they must be.
pub(crate) const ENVELOPE: u64 = 98_304;
const LONGEST_KEY: u64 = 16_384;
const LONGEST_HEADERS: u64 = 24_576;
const MOST_HEADERS: u64 = 512;
/// The server keeps delays in nanoseconds; a year is far from their end.
const LONGEST_DELAY: Duration = Duration::from_secs(365 * 24 * 3600);

pub(crate) fn capabilities(settings: &Settings, max_payload: u64, schedules: bool) -> Capabilities {
    let unwritten = || Support::refused("not written yet in this adapter");
    let absent = |text: &str| Support::refused(text);
    let approximate = Some(Precision::Approximate);
    let ordered = || {
        Support::emulated("one member of the group works while order is kept, many keys at once; the others stand by")
    };
    let dedups = !settings.dedup_window.is_zero();
    Capabilities {
        at_least_once: Support::Native,
        key_order: ordered(),
        total_order: ordered(),
        block_on_failure: Support::emulated(
            "what waits for a failed message waits in this member, within max_in_flight",
        ),
        park_on_failure: unwritten(),
        parallelism: Parallelism::Any,
        ack_granularity: AckGranularity::Individual,
        ack_level: AckLevel::Confirmed,
        late_ack: LateAck::Refused,
        nack: Support::emulated("one small write for a failure, so that failures are told from hand-overs"),
        nack_delay: Support::Native,
        release: Support::emulated("handed out again by the same member"),
        lease: Support::Native,
        lease_extension: Support::Native,
        attempt_count: AttemptCount::Exact,
        crash_count: Support::Native,
        dead_letter: Support::emulated("a second write, to a stream of the source and group"),
        dead_letter_atomicity: DeadLetterAtomicity::StoredFirst,
        dead_letter_browse: Browse::NonDestructive,
        redrive: Support::emulated("a second write, to a subject that only this group reads"),
        purge: Support::Native,
        groups: Support::Native,
        kept_before_group: Support::Native,
        replay: Support::Native,
        start_position: Support::Native,
        start_latest: Support::Native,
        patterns: unwritten(),
        delayed_publish: match (schedules, settings.max_bytes) {
            (true, 0) => Support::Native,
            (true, _) => {
                absent("the server schedules no messages in streams that refuse when full; leave max_mib at 0")
            }
            (false, _) => absent("needs NATS 2.12 or later"),
        },
        ttl: Support::emulated("looked at when a member receives it; until then an expired message lies where it is"),
        publish_confirm: Support::Native,
        unroutable_detected: Support::Native,
        publish_dedup: if dedups { Support::Native } else { absent("set dedup_window, such as 2m") },
        transactions: absent("Kafka has transactions over destinations"),
        tombstones: Support::emulated("a flag in this library's header; other readers see an empty payload"),
        declare: Support::Native,
        describe: Support::Native,
        delete: Support::Native,
        lag: LagPrecision { ready: approximate, in_flight: approximate, delayed: None, oldest_age: approximate },
        admin_needed: false,
        survives_process_kill: Support::emulated(
            "what is stored survives; acks that were confirmed a moment before may be forgotten, and those messages come again",
        ),
        survives_power_loss: absent("needs `sync_interval: always` at the server, or replicas; clients cannot see it"),
        limits: Limits {
            payload: Some(max_payload.saturating_sub(ENVELOPE)),
            key: Some(LONGEST_KEY),
            headers: Some(LONGEST_HEADERS),
            header_count: Some(MOST_HEADERS),
            lease_min_ms: Some(250),
            delay_max_ms: Some(millis(LONGEST_DELAY)),
            delay_precision_ms: Some(500),
            dedup_window_ms: dedups.then(|| millis(settings.dedup_window)),
            ..Limits::default()
        },
    }
}

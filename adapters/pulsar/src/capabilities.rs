//! What Pulsar gives through this adapter.

use std::time::Duration;

use anybroker_core::{
    AckGranularity, AckLevel, AttemptCount, Browse, Capabilities, DeadLetterAtomicity, LagPrecision, LateAck, Limits,
    Parallelism, Precision, Support, capability::millis,
};

use crate::config::Settings;

/// Room for key, headers and a dead letter's note beside the payload, within the broker's largest message.
pub(crate) const ENVELOPE: u64 = 131_072;
const LONGEST_KEY: u64 = 16_384;
const LONGEST_HEADERS: u64 = 65_536;
const MOST_HEADERS: u64 = 1_024;
const LONGEST_DELAY: Duration = Duration::from_secs(365 * 24 * 3600);

pub(crate) fn capabilities(settings: &Settings, max_message: u64) -> Capabilities {
    let unwritten = || Support::refused("not written yet in this adapter");
    let approximate = Some(Precision::Approximate);
    let is_partitioned = settings.partitions > 1;
    Capabilities {
        at_least_once: Support::Native,
        key_order: match is_partitioned || settings.key_ranges > 1 {
            true => Support::emulated(
                "members share partitions or ranges of keys out among themselves; who joins waits for its share for about a second",
            ),
            false => Support::emulated(
                "one member of the group works while order is kept, many keys at once; key_ranges lets several work",
            ),
        },
        total_order: match is_partitioned {
            true => Support::refused("set partitions to 0: partitions keep order each for itself"),
            false => Support::emulated("one member of the group works; the others stand by"),
        },
        block_on_failure: Support::emulated(
            "what waits for a failed message waits in this member, up to 1,000 messages beyond max_in_flight; failures are \
             written to a topic of the group",
        ),
        park_on_failure: unwritten(),
        parallelism: Parallelism::Any,
        ack_granularity: AckGranularity::Individual,
        ack_level: AckLevel::Confirmed,
        late_ack: LateAck::Refused,
        nack: Support::emulated(
            "a second write, to a topic that only this group reads: Pulsar's own count is volatile",
        ),
        nack_delay: Support::emulated("as a nack; the copy is held back by the broker"),
        release: Support::emulated("handed out again by the same member"),
        lease: Support::emulated(
            "kept by the member; what a dead member held comes back when its connection ends; what comes back may be with two members at once unless the broker has dispatcherDispatchMessagesInSubscriptionThread=false",
        ),
        lease_extension: Support::emulated("kept by the member"),
        attempt_count: AttemptCount::Exact,
        crash_count: Support::emulated(
            "a note, stored before a message is handed out again; the first hand-over by each member may be missed",
        ),
        dead_letter: Support::emulated("a second write, to a topic of the source and group"),
        dead_letter_atomicity: DeadLetterAtomicity::StoredFirst,
        dead_letter_browse: Browse::NonDestructive,
        redrive: Support::emulated("a second write, to a topic that only this group reads"),
        purge: Support::Native,
        groups: Support::Native,
        kept_before_group: Support::Native,
        replay: Support::Native,
        start_position: match is_partitioned {
            true => Support::refused("set partitions to 0: a position is one partition's"),
            false => Support::Native,
        },
        start_latest: Support::Native,
        patterns: unwritten(),
        delayed_publish: Support::Native,
        ttl: unwritten(),
        publish_confirm: Support::Native,
        unroutable_detected: Support::Native,
        publish_dedup: Support::refused(
            "Pulsar dedups by a producer's sequence numbers, not by id; use JetStream or the inbox",
        ),
        transactions: Support::refused("Kafka has transactions over destinations"),
        tombstones: Support::Native,
        declare: Support::Native,
        describe: Support::Native,
        delete: Support::Native,
        lag: LagPrecision { ready: approximate, in_flight: approximate, delayed: approximate, oldest_age: approximate },
        admin_needed: true,
        survives_process_kill: Support::emulated(
            "what is stored survives; acks that were confirmed a moment before may be forgotten, and those messages come again",
        ),
        survives_power_loss: Support::refused(
            "depends on the bookies' journalSyncData and quorum, which clients cannot see",
        ),
        limits: Limits {
            payload: Some(max_message.saturating_sub(ENVELOPE)),
            key: Some(LONGEST_KEY),
            headers: Some(LONGEST_HEADERS),
            header_count: Some(MOST_HEADERS),
            lease_min_ms: Some(100),
            delay_max_ms: Some(millis(LONGEST_DELAY)),
            // Brokers look for what is due once a second by default (delayedDeliveryTickTimeMillis).
            delay_precision_ms: Some(1_000),
            ..Limits::default()
        },
    }
}

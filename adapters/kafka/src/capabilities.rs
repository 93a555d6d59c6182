//! What this adapter gives. Everything else is refused, and says so.

use anybroker_core::{
    AckGranularity, AckLevel, AttemptCount, Browse, Capabilities, DeadLetterAtomicity, LagPrecision, LateAck, Limits,
    Parallelism, Precision, Support, capability::millis,
};

use crate::config::Settings;
use crate::settle::NO_DELAY;

/// Room for key, headers and this library's own header within `message_max_bytes`.
const ENVELOPE: u64 = 65_536;
/// Nothing of Kafka's: what waits stands in the retry topic and in the memory of members.
const LONGEST_DELAY: std::time::Duration = std::time::Duration::from_secs(24 * 3600);

pub(crate) fn capabilities(settings: &Settings) -> Capabilities {
    let absent = |text: &str| Support::refused(text);
    let in_place = settings.nack_in_place;
    let held = "held in its member's memory, which keeps its partition uncommitted meanwhile; after a crash or a \
                rebalance it comes back at once";
    let copied = "a second write, to the retry topic of the group, confirmed before the source is settled";
    Capabilities {
        at_least_once: Support::Native,
        key_order: Support::Native,
        total_order: absent("a destination has several partitions; JetStream and the embedded broker give total order"),
        block_on_failure: match in_place {
            true => Support::emulated("what is behind the failed one of its key waits in its member's memory"),
            false => absent("a failed message leaves its place for the retry topic; nack=in_place keeps it"),
        },
        park_on_failure: absent("the embedded broker parks a key behind its dead letter"),
        parallelism: Parallelism::Lanes(settings.partitions.unsigned_abs()),
        ack_granularity: AckGranularity::Prefix,
        ack_level: AckLevel::Recorded,
        late_ack: LateAck::Refused,
        nack: Support::emulated(if in_place { held } else { copied }),
        nack_delay: match in_place {
            true => absent(NO_DELAY),
            false => Support::emulated(
                "held in a member's memory until its time, and on the retry topic until it is settled; clocks of \
                 members that differ shift it",
            ),
        },
        release: Support::emulated("handed out again by the same member"),
        lease: absent(
            "a partition belongs to its member as long as that lives; a queue (RabbitMQ, SQS) leases messages",
        ),
        lease_extension: absent("nothing is leased; a queue (RabbitMQ, SQS) leases messages"),
        attempt_count: if in_place { AttemptCount::Volatile } else { AttemptCount::Exact },
        crash_count: absent("Kafka does not count hand-overs; a queue (RabbitMQ, SQS) does"),
        dead_letter: Support::emulated("a second write, to a topic of the source and group"),
        dead_letter_atomicity: DeadLetterAtomicity::StoredFirst,
        dead_letter_browse: Browse::NonDestructive,
        redrive: Support::emulated("a copy to the retry topic of the group, then a mark on its dead-letter topic"),
        purge: Support::emulated("a mark on the dead-letter topic; its compaction deletes the letter"),
        groups: Support::Native,
        kept_before_group: Support::Native,
        replay: Support::Native,
        start_position: Support::Native,
        start_latest: Support::Native,
        patterns: absent("name the destinations one by one"),
        delayed_publish: absent("a log hands out what it holds; JetStream, SQS and Pulsar hold messages back"),
        ttl: absent(
            "the retention of the topic is its messages' time to live; JetStream and RabbitMQ have one for each message",
        ),
        publish_confirm: Support::Native,
        unroutable_detected: Support::Native,
        // Idempotence removes what the client itself sends twice, not a second publish of an id.
        publish_dedup: absent("Kafka does not look at ids; JetStream does"),
        transactions: Support::Native,
        tombstones: Support::Native,
        declare: Support::Native,
        describe: Support::Native,
        delete: Support::Native,
        lag: LagPrecision {
            ready: Some(Precision::Approximate),
            in_flight: Some(Precision::Approximate),
            delayed: Some(Precision::Approximate),
            oldest_age: None,
        },
        admin_needed: false,
        survives_process_kill: Support::Native,
        survives_power_loss: absent("replicate over machines; this adapter cannot see that a cluster does"),
        limits: Limits {
            payload: Some(settings.message_max_bytes - ENVELOPE),
            key: Some(ENVELOPE / 4),
            headers: Some(ENVELOPE / 2),
            delay_max_ms: Some(millis(LONGEST_DELAY)),
            delay_precision_ms: Some(100),
            ..Limits::default()
        },
    }
}

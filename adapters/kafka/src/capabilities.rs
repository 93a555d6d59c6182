//! What this slice gives. Everything else is refused, and says so.

use anybroker_core::{
    AckGranularity, AckLevel, AttemptCount, Browse, Capabilities, DeadLetterAtomicity, LagPrecision, LateAck, Limits,
    Parallelism, Support, capability::millis,
};

use crate::config::Settings;

/// Room for key, headers and this library's own header within `message_max_bytes`.
const ENVELOPE: u64 = 65_536;
/// Nothing of Kafka's: a day keeps due times far from overflow, and a rebalance forgets them long before.
const LONGEST_DELAY: std::time::Duration = std::time::Duration::from_secs(24 * 3600);

pub(crate) fn capabilities(settings: &Settings) -> Capabilities {
    let unwritten = || Support::refused("not written yet in this adapter");
    let absent = |text: &str| Support::refused(text);
    Capabilities {
        at_least_once: Support::Native,
        key_order: Support::Native,
        total_order: unwritten(),
        block_on_failure: unwritten(),
        park_on_failure: unwritten(),
        parallelism: Parallelism::Lanes(settings.partitions.unsigned_abs()),
        ack_granularity: AckGranularity::Prefix,
        ack_level: AckLevel::Recorded,
        late_ack: LateAck::Refused,
        nack: Support::emulated("held in this member's memory, which keeps its partition uncommitted meanwhile"),
        nack_delay: Support::emulated(
            "held in this member's memory: after a crash or a rebalance it comes back at once, at another member",
        ),
        release: Support::emulated("handed out again by the same member"),
        lease: absent(
            "a partition belongs to its member as long as that lives; a queue (RabbitMQ, SQS) leases messages",
        ),
        lease_extension: absent("nothing is leased; a queue (RabbitMQ, SQS) leases messages"),
        attempt_count: AttemptCount::Volatile,
        crash_count: absent("Kafka does not count hand-overs; a queue (RabbitMQ, SQS) does"),
        dead_letter: Support::emulated("a second write, to a topic of the source and group"),
        dead_letter_atomicity: DeadLetterAtomicity::StoredFirst,
        dead_letter_browse: Browse::NonDestructive,
        redrive: unwritten(),
        purge: unwritten(),
        groups: Support::Native,
        kept_before_group: Support::Native,
        replay: unwritten(),
        start_latest: Support::Native,
        patterns: unwritten(),
        delayed_publish: unwritten(),
        ttl: unwritten(),
        publish_confirm: Support::Native,
        unroutable_detected: Support::Native,
        // Idempotence removes what the client itself sends twice, not a second publish of an id.
        publish_dedup: absent("Kafka does not look at ids; SQS FIFO and JetStream do"),
        transactions: unwritten(),
        tombstones: Support::Native,
        declare: Support::Native,
        describe: unwritten(),
        delete: Support::Native,
        lag: LagPrecision::default(),
        admin_needed: false,
        survives_process_kill: Support::Native,
        survives_power_loss: absent("replicate over machines; this adapter cannot see that a cluster does"),
        limits: Limits {
            payload: Some(settings.message_max_bytes - ENVELOPE),
            key: Some(ENVELOPE / 4),
            headers: Some(ENVELOPE / 2),
            delay_max_ms: Some(millis(LONGEST_DELAY)),
            delay_precision_ms: Some(50),
            ..Limits::default()
        },
    }
}

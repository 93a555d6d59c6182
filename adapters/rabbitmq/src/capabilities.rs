//! What RabbitMQ's quorum queues give through this adapter, its classic ones, and its streams.

use std::time::Duration;

use anybroker_core::{
    AckGranularity, AckLevel, AttemptCount, Browse, Capabilities, DeadLetterAtomicity, LagPrecision, LateAck, Limits,
    Parallelism, Precision, Support, capability::millis,
};

use crate::config::{QueueType, Settings};

/// All headers of a message lie in one frame, 128 KiB by default: key, headers at their limits, and a dead letter's note.
const LONGEST_KEY: u64 = 16_384;
const LONGEST_HEADERS: u64 = 24_576;
const MOST_HEADERS: u64 = 512;
/// The server's times to live are milliseconds in 32 bits: 49 days.
pub(crate) const LONGEST_DELAY: Duration = Duration::from_secs(30 * 24 * 3600);

/// The server's default of `consumer_timeout`, which a stream cannot have of its own
/// (`rabbit_stream_queue:capabilities/0` of 4.0.5).
const SERVERS_TIMEOUT: Duration = Duration::from_secs(30 * 60);

pub(crate) fn capabilities(settings: &Settings) -> Capabilities {
    let unwritten = || Support::refused("not written yet in this adapter");
    let absent = |text: &str| Support::refused(text);
    let ordered = || {
        Support::emulated("one member of the group works while order is kept, many keys at once; the others stand by")
    };
    let has_admin = settings.admin.is_some();
    let is_log = settings.queue.is_log();
    let by_queue = |quorum: Support, classic: &str, stream: &str| match settings.queue {
        QueueType::Quorum => quorum,
        QueueType::Classic => absent(classic),
        QueueType::Stream => absent(stream),
    };
    let in_log = |given: Support, otherwise: Support| if is_log { given } else { otherwise };
    let approximate = Some(Precision::Approximate);
    let by_admin = || {
        if has_admin {
            Support::Native
        } else {
            absent("AMQP cannot list; set `admin` to the management plugin's address")
        }
    };
    Capabilities {
        at_least_once: Support::Native,
        key_order: ordered(),
        total_order: ordered(),
        block_on_failure: Support::emulated(
            "what waits for a failed message waits in this member, up to 1,000 messages beyond max_in_flight; failures are \
             written to a queue of the group",
        ),
        park_on_failure: unwritten(),
        parallelism: if is_log { Parallelism::One } else { Parallelism::Any },
        ack_granularity: AckGranularity::Individual,
        ack_level: if is_log { AckLevel::Recorded } else { AckLevel::Sent },
        late_ack: LateAck::Refused,
        nack: Support::emulated("a confirmed copy with its count, stored before the source is acked"),
        nack_delay: Support::emulated(
            "a confirmed copy in a queue of its range of delays; late by at most half its length, when a longer one of \
             the range is ahead",
        ),
        release: Support::emulated("handed out again by the same member"),
        lease: Support::emulated("kept by the member; ends early with its connection"),
        lease_extension: Support::emulated("kept by the member, up to the server's consumer timeout"),
        attempt_count: AttemptCount::Exact,
        crash_count: by_queue(
            Support::emulated("the queue's count, which what a close or a pause gives back raises too"),
            "classic queues do not count hand-overs; leave queue at \"quorum\"",
            "a stream does not count hand-overs; leave queue at \"quorum\"",
        ),
        dead_letter: Support::emulated("a confirmed copy in a queue of the source and group"),
        dead_letter_atomicity: DeadLetterAtomicity::StoredFirst,
        dead_letter_browse: Browse::Leasing,
        redrive: Support::emulated("a confirmed copy in the queue of this group alone"),
        purge: Support::Native,
        groups: Support::Native,
        kept_before_group: in_log(
            Support::Native,
            absent("declare the group first; a log (Kafka, JetStream) keeps messages for later groups"),
        ),
        replay: in_log(
            Support::emulated("looked up by the server to the second, and from there on by the clocks of publishers"),
            absent("a log (Kafka, JetStream) is read again"),
        ),
        start_position: in_log(Support::Native, absent("a log (Kafka, JetStream) is read again")),
        start_latest: Support::Native,
        patterns: unwritten(),
        delayed_publish: Support::emulated("it waits in a queue of its range of delays"),
        ttl: if settings.queue.buries_expired() {
            Support::Native
        } else {
            Support::emulated("looked at when it comes to a member, which buries it: until then it stays")
        },
        publish_confirm: Support::Native,
        unroutable_detected: Support::Native,
        publish_dedup: absent("JetStream dedups by id"),
        transactions: absent("Kafka has transactions over destinations"),
        tombstones: Support::emulated("a flag in this library's header; other readers see an empty payload"),
        declare: Support::Native,
        describe: by_admin(),
        delete: by_admin(),
        lag: LagPrecision {
            ready: approximate,
            in_flight: approximate.filter(|_| has_admin),
            delayed: approximate.filter(|_| has_admin),
            oldest_age: None,
        },
        admin_needed: true,
        survives_process_kill: Support::Native,
        // `rabbit_classic_queue_store_v2:sync/1` writes before a confirm, and does not flush the file. "Streams", "Data Safety":
        // "Streams do not flush to disk explicitly".
        survives_power_loss: by_queue(
            Support::Native,
            "a classic queue leaves writing through to the operating system; leave queue at \"quorum\"",
            "a stream leaves writing through to the operating system; leave queue at \"quorum\"",
        ),
        limits: Limits {
            payload: Some(settings.max_message),
            key: Some(LONGEST_KEY),
            headers: Some(LONGEST_HEADERS),
            header_count: Some(MOST_HEADERS),
            lease_min_ms: Some(100),
            lease_max_ms: Some(millis(if is_log { SERVERS_TIMEOUT } else { settings.consumer_timeout } / 2)),
            delay_max_ms: Some(millis(LONGEST_DELAY)),
            ..Limits::default()
        },
    }
}

//! What SQS gives through this adapter, in each mode.

use anybroker_core::{
    AckGranularity, AckLevel, AttemptCount, Browse, Capabilities, DeadLetterAtomicity, LagPrecision, LateAck, Limits,
    Parallelism, Precision, Support,
};

use crate::config::Settings;

/// Room for headers, key, this library's attribute and a letter's note within `message_max_bytes`.
const ENVELOPE: usize = 32 * 1024;
const TWELVE_HOURS_MS: u64 = 12 * 3600 * 1000;
/// An hour less than SQS's twelve: those run from the receive, and the handler takes its time too.
const LONGEST_DELAY_MS: u64 = 11 * 3600 * 1000;

/// Why a publish to a FIFO queue or topic is not delayed.
pub(crate) const NO_DELAY: &str = "FIFO queues delay whole queues, not messages; set mode = \"standard\"";

pub(crate) fn capabilities(settings: &Settings) -> Capabilities {
    let (is_fifo, has_topics) = (settings.names.is_fifo, settings.names.has_topics);
    let refused = |text: &str| Support::refused(text);
    let given = |is_given: bool, remedy: &str| if is_given { Support::Native } else { Support::refused(remedy) };
    let stored = || match &settings.endpoint {
        None => Support::Native,
        Some(_) => Support::refused("this is not Amazon's endpoint, and this adapter cannot see where it stores"),
    };
    let fifo = "standard queues have no order; set mode = \"fifo\"";
    let approximate = Some(Precision::Approximate);
    Capabilities {
        at_least_once: Support::Native,
        key_order: given(is_fifo, fifo),
        total_order: given(is_fifo && settings.is_total, "set mode = \"fifo\" and message_group = \"one\""),
        block_on_failure: refused(
            "left in its place a failed message has SQS's count of hand-overs only; JetStream and the embedded broker block",
        ),
        park_on_failure: refused("a queue cannot be asked for what is behind a message; the embedded broker parks"),
        // A message group is with one member at a time, and in total order there is one.
        parallelism: if settings.is_total { Parallelism::One } else { Parallelism::Any },
        ack_granularity: AckGranularity::Individual,
        ack_level: AckLevel::Confirmed,
        late_ack: LateAck::Refused,
        nack: Support::emulated(match is_fifo {
            false => "a copy that counts the failure, then the message is deleted: SQS counts hand-overs only",
            true => "a copy that counts the failure, at the end of its key; then the message is deleted",
        }),
        nack_delay: Support::emulated(match is_fifo {
            false => "SQS holds the copy back up to 900 s; beyond that it is received once and put back",
            true => "the copy waits in a standard queue of the group, because FIFO queues delay no single messages",
        }),
        release: Support::emulated("SQS counts the hand-over; only this connection does not"),
        lease: Support::Native,
        lease_extension: Support::Native,
        attempt_count: AttemptCount::Exact,
        crash_count: Support::emulated("SQS's count, with what other connections have prefetched and given back"),
        dead_letter: Support::emulated("a second request, before the source is deleted"),
        dead_letter_atomicity: DeadLetterAtomicity::StoredFirst,
        dead_letter_browse: Browse::Leasing,
        redrive: Support::emulated("letters are received until those that are wanted come; sent, then deleted"),
        purge: Support::emulated("letters are received until those that are wanted come, then deleted"),
        groups: given(has_topics, "a queue has one group; set fanout = \"sns\""),
        kept_before_group: given(
            !has_topics,
            "a topic keeps nothing; declare groups before publishing, or set fanout = \"none\"",
        ),
        replay: refused("a queue forgets what is settled; Kafka and JetStream keep it"),
        start_position: refused("a queue forgets what is settled; Kafka and JetStream keep it"),
        start_latest: given(
            has_topics,
            "a queue cannot pass over what is in it; purge it first, start at the earliest, or set fanout = \"sns\"",
        ),
        patterns: refused("a queue is read by its name; name the destinations one by one"),
        delayed_publish: match (is_fifo, has_topics) {
            (true, _) => refused(NO_DELAY),
            (false, true) => Support::emulated("received once by each group and put back until it is due"),
            (false, false) => Support::emulated("by SQS up to 900 s; beyond that received once and put back"),
        },
        ttl: Support::emulated("noticed when a member receives it"),
        publish_confirm: Support::Native,
        unroutable_detected: Support::Native,
        publish_dedup: match is_fifo {
            true => {
                refused("SQS does not tell a copy from a first one, so each publish has a deduplication id of its own")
            }
            false => refused("standard queues do not look at ids; JetStream tells copies"),
        },
        transactions: refused("SQS has none; Kafka has"),
        tombstones: refused("a message of SQS has a body; Kafka has tombstones"),
        declare: Support::Native,
        describe: Support::Native,
        delete: Support::Native,
        // What other connections have nacked with a delay counts as in flight. The age of the oldest is CloudWatch's.
        lag: LagPrecision { ready: approximate, in_flight: approximate, delayed: approximate, oldest_age: None },
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
            delay_max_ms: Some(LONGEST_DELAY_MS),
            // Whole seconds, and the next poll.
            delay_precision_ms: Some(2_000),
            ..Limits::default()
        },
    }
}

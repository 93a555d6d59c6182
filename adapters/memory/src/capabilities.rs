//! What a memory broker gives.

use anybroker_core::capability::{
    AckGranularity, AttemptCount, Browse, Capabilities, DeadLetterAtomicity, LagPrecision, LateAck, Limits,
    Parallelism, Support, millis,
};
use anybroker_core::{AckLevel, Figure, Lag, Precision};

use crate::config::Settings;
use crate::profile::Profile;

pub(crate) fn record(settings: &Settings) -> Capabilities {
    let native = || Support::Native;
    let gone = || Support::refused("messages live in this process; embedded or a server keeps them");
    let exact = Some(Precision::Exact);
    let window = settings.dedup_window;
    let exact_record = Capabilities {
        at_least_once: native(),
        key_order: native(),
        total_order: native(),
        block_on_failure: native(),
        park_on_failure: native(),
        parallelism: Parallelism::Any,
        ack_granularity: AckGranularity::Individual,
        ack_level: AckLevel::Confirmed,
        late_ack: LateAck::Refused,
        nack: native(),
        nack_delay: native(),
        release: native(),
        lease: native(),
        lease_extension: native(),
        attempt_count: AttemptCount::Exact,
        crash_count: native(),
        dead_letter: native(),
        dead_letter_atomicity: DeadLetterAtomicity::Atomic,
        dead_letter_browse: Browse::NonDestructive,
        redrive: native(),
        purge: native(),
        groups: native(),
        kept_before_group: native(),
        replay: native(),
        start_position: native(),
        start_latest: native(),
        patterns: Support::refused("name the destinations one by one"),
        delayed_publish: native(),
        ttl: native(),
        publish_confirm: native(),
        unroutable_detected: native(),
        publish_dedup: if window.is_zero() { Support::refused("set dedup_window, such as 2m") } else { native() },
        transactions: Support::refused("Kafka has transactions over destinations"),
        tombstones: native(),
        declare: native(),
        describe: native(),
        delete: native(),
        lag: LagPrecision { ready: exact, in_flight: exact, delayed: exact, oldest_age: exact },
        admin_needed: false,
        survives_process_kill: gone(),
        survives_power_loss: gone(),
        limits: Limits {
            payload: Some(settings.max_payload),
            delay_precision_ms: Some(1),
            lease_min_ms: Some(1),
            dedup_window_ms: (!window.is_zero()).then(|| millis(window)),
            ..Limits::default()
        },
    };
    in_profile(exact_record, settings.profile)
}

/// What is left of it in a profile.
fn in_profile(mut record: Capabilities, profile: Profile) -> Capabilities {
    let manner = profile.manner();
    record.attempt_count = manner.attempts;
    record.late_ack = manner.late_ack;
    if manner.prefix_acks {
        record.ack_granularity = AckGranularity::Prefix;
        record.ack_level = AckLevel::Recorded;
    }
    if manner.acks_are_sent {
        record.ack_level = AckLevel::Sent;
    }
    if manner.lanes > 1 {
        record.parallelism = Parallelism::Lanes(u32::try_from(manner.lanes).unwrap_or(u32::MAX));
        record.total_order = refused("a destination has several lanes; profile=exact keeps total order");
    }
    if !manner.hand_overs {
        record.crash_count = refused("hand-overs are not counted; profile=exact counts them");
    }
    if manner.attempts == AttemptCount::Approximate {
        record.crash_count = refused("hand-overs and failures are one count; profile=exact tells them apart");
    }
    if !manner.kept_before_group {
        record.kept_before_group = refused("declare the group first, or use profile=exact, kafka, jetstream or pulsar");
        record.replay = refused("nothing is kept to be replayed; profile=exact, kafka, jetstream and pulsar replay");
        record.start_position = record.replay.clone();
    }
    if profile != Profile::Exact {
        record.dead_letter_atomicity = DeadLetterAtomicity::StoredFirst;
    }
    let limits = &mut record.limits;
    let payload = limits.payload.unwrap_or(u64::MAX);
    let least = |broker: u64| Some(payload.min(broker));
    match profile {
        Profile::Exact => {}
        Profile::Kafka => {
            limits.payload = least(MIB);
            record.delayed_publish = refused("a log has no delay; profile=exact, sqs and pulsar hold messages back");
            record.ttl = refused("a log forgets by age, not by message; profile=exact and rabbitmq expire messages");
        }
        Profile::RabbitMq => {
            limits.payload = least(16 * MIB);
            record.key_order = Support::emulated("keys are spread over queues with a single active consumer each");
            record.delayed_publish = refused("needs a plugin; profile=exact, sqs and pulsar hold messages back");
            record.tombstones = refused("a body is never null; profile=exact, kafka and pulsar have tombstones");
            record.lag.oldest_age = None;
        }
        Profile::JetStream => {
            limits.payload = least(MIB);
            record.key_order = Support::emulated("subjects are spread over consumers that are pinned to one member");
            record.delayed_publish = refused("not in every version; profile=exact, sqs and pulsar hold messages back");
            record.ttl = refused("not in every version; profile=exact and rabbitmq expire messages");
            record.tombstones = refused("a body is never null; profile=exact, kafka and pulsar have tombstones");
        }
        Profile::Sqs => {
            limits.payload = least(MIB);
            limits.publish_batch = Some(10);
            limits.receive_batch = Some(10);
            limits.settle_batch = Some(10);
            limits.delay_max_ms = Some(15 * 60 * 1_000);
            limits.lease_max_ms = Some(12 * 60 * 60 * 1_000);
            let unordered = || refused("a standard queue has no order; a FIFO queue, or another profile, has");
            record.key_order = unordered();
            record.total_order = unordered();
            record.block_on_failure = unordered();
            record.park_on_failure = unordered();
            record.ttl = refused("a queue forgets by age, not by message; profile=exact and rabbitmq expire messages");
            record.tombstones = refused("a body is never null; profile=exact, kafka and pulsar have tombstones");
            let about = Some(Precision::Approximate);
            record.lag = LagPrecision { ready: about, in_flight: about, delayed: about, oldest_age: None };
        }
        Profile::Pulsar => {
            limits.payload = least(5 * MIB);
            record.ttl = refused("a subscription's, not a message's; profile=exact and rabbitmq expire messages");
        }
    }
    record
}

/// The figures that the record tells of, as exact as it says.
pub(crate) fn shown(lag: Lag, told: &LagPrecision) -> Lag {
    fn figure<T>(figure: Figure<T>, told: Option<Precision>) -> Figure<T> {
        Some((figure?.0, told?))
    }
    Lag {
        ready: figure(lag.ready, told.ready),
        in_flight: figure(lag.in_flight, told.in_flight),
        delayed: figure(lag.delayed, told.delayed),
        oldest_age: figure(lag.oldest_age, told.oldest_age),
        lanes: lag.lanes.into_iter().map(|(name, lag)| (name, shown(lag, told))).collect(),
    }
}

fn refused(remedy: &str) -> Support {
    Support::refused(remedy)
}

const MIB: u64 = 1024 * 1024;

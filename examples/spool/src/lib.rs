//! A broker over plain files: `spool:///absolute/folder`. Several processes may use one folder.
//!
//! ```text
//! <destination>/all/<number>               the messages, for ever
//! <destination>/groups/<group>/ready/…     what the group has to do: empty files whose names are the state
//! <destination>/groups/<group>/held/…      what is delivered and not settled
//! <destination>/groups/<group>/dead/…      its dead letters
//! ```
//!
//! A message is taken by renaming its mark from `ready` to `held`. A rename is atomic and the second one fails, so two
//! members never have the same message. What this cannot do is refused in its record, and the suite verifies that.

mod broker;
mod files;
mod member;

use std::path::PathBuf;
use std::sync::Arc;

use anybroker_core::capability::{
    AckGranularity, AttemptCount, Browse, Capabilities, DeadLetterAtomicity, LagPrecision, LateAck, Limits,
    Parallelism, Support,
};
use anybroker_core::config::{Field, Problem, Section};
use anybroker_core::{AckLevel, Broker, Driver, Precision, Result};
use async_trait::async_trait;

/// Connects `spool://` URLs.
#[derive(Debug, Clone, Copy, Default)]
pub struct SpoolDriver;

const FIELDS: &[Field] =
    &[Field::bool("create_destinations", "Whether publishing to a missing destination creates it.", "true")];

#[async_trait]
impl Driver for SpoolDriver {
    fn schemes(&self) -> &'static [&'static str] {
        &["spool"]
    }

    fn fields(&self) -> &'static [Field] {
        FIELDS
    }

    fn check(&self, section: &Section) -> Vec<Problem> {
        if section.url().path().len() > 1 {
            return Vec::new();
        }
        let message = "expected an absolute path, such as spool:///var/spool/events".into();
        vec![Problem { key: "url".into(), origin: "url".into(), message }]
    }

    async fn connect(&self, section: Section) -> Result<Arc<dyn Broker>> {
        let folder = PathBuf::from(section.url().path());
        let broker = broker::Spool::open(folder, section.url().to_string(), section.bool("create_destinations"))?;
        Ok(Arc::new(broker))
    }
}

/// What it gives. Modest on purpose: each `refused` here is a promise as well, and the suite holds the adapter to it.
fn record() -> Capabilities {
    let native = || Support::Native;
    let no_order = || Support::refused("files are taken in any order; memory, embedded and Kafka keep order");
    let exact = Some(Precision::Exact);
    Capabilities {
        at_least_once: native(),
        key_order: no_order(),
        total_order: no_order(),
        block_on_failure: no_order(),
        park_on_failure: no_order(),
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
        crash_count: Support::refused("hand-overs are not counted; embedded and RabbitMQ count them"),
        dead_letter: native(),
        dead_letter_atomicity: DeadLetterAtomicity::StoredFirst,
        dead_letter_browse: Browse::NonDestructive,
        redrive: native(),
        purge: native(),
        groups: native(),
        kept_before_group: native(),
        replay: Support::refused("a group starts at the earliest or the latest; embedded starts anywhere"),
        start_position: Support::refused("a group starts at the earliest or the latest; embedded starts anywhere"),
        start_latest: native(),
        patterns: Support::refused("name the destinations one by one"),
        delayed_publish: Support::refused("nothing is held back before its first delivery; embedded does"),
        ttl: Support::refused("nothing expires; embedded and RabbitMQ expire messages"),
        publish_confirm: native(),
        unroutable_detected: native(),
        publish_dedup: Support::refused("make the consumer idempotent; NATS JetStream remembers ids"),
        transactions: Support::refused("Kafka has transactions"),
        tombstones: Support::refused("a payload is never null; embedded and Kafka have tombstones"),
        declare: native(),
        describe: native(),
        delete: native(),
        lag: LagPrecision { ready: exact, in_flight: exact, delayed: exact, oldest_age: None },
        admin_needed: false,
        survives_process_kill: native(),
        survives_power_loss: Support::refused("files are not synced; embedded with durability=synced does"),
        limits: Limits {
            payload: Some(16 << 20),
            lease_min_ms: Some(1),
            delay_precision_ms: Some(20),
            ..Limits::default()
        },
    }
}

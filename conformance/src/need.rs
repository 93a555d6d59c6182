//! What a case needs of an endpoint, and how a refusal of it is verified.

use anybroker_core::Capabilities;
use futures_util::future::BoxFuture;

use crate::case::Proof;
use crate::env::Env;

/// A capability that a case needs.
#[derive(Clone, Copy)]
pub struct Need {
    /// The field of the record.
    pub name: &'static str,
    pub(crate) given: fn(&Capabilities) -> bool,
    /// Verifies the refusal: a typed `Unsupported`, no side effect, and the object is usable afterwards.
    pub(crate) refusal: for<'a> fn(&'a Env) -> BoxFuture<'a, Proof>,
}

impl std::fmt::Debug for Need {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name)
    }
}

macro_rules! needs {
    ($($constant:ident = $field:ident by $refusal:path;)+) => {
        $(pub(crate) const $constant: Need = Need {
            name: stringify!($field),
            given: |record| record.$field.is_given(),
            refusal: |env| Box::pin($refusal(env)),
        };)+

        /// Every need that there is.
        pub(crate) const ALL: &[Need] = &[$($constant),+, LAG];
    };
}

use crate::cases::refusals as r;

needs! {
    AT_LEAST_ONCE = at_least_once by r::cannot_be_called;
    KEY_ORDER = key_order by r::key_order;
    TOTAL_ORDER = total_order by r::total_order;
    BLOCK = block_on_failure by r::block;
    PARK = park_on_failure by r::park;
    NACK = nack by r::nack;
    NACK_DELAY = nack_delay by r::nack_delay;
    RELEASE = release by r::release;
    LEASE = lease by r::lease;
    EXTENSION = lease_extension by r::extension;
    CRASH_COUNT = crash_count by r::crash_count;
    DEAD_LETTER = dead_letter by r::dead_letter;
    REDRIVE = redrive by r::redrive;
    PURGE = purge by r::purge;
    GROUPS = groups by r::groups;
    KEPT_BEFORE_GROUP = kept_before_group by r::kept_before_group;
    REPLAY = replay by r::replay;
    START_POSITION = start_position by r::start_position;
    START_LATEST = start_latest by r::start_latest;
    PATTERNS = patterns by r::patterns;
    DELAYED_PUBLISH = delayed_publish by r::delayed_publish;
    TTL = ttl by r::ttl;
    UNROUTABLE = unroutable_detected by r::unroutable;
    DEDUP = publish_dedup by r::dedup;
    TRANSACTIONS = transactions by r::transactions;
    TOMBSTONES = tombstones by r::tombstones;
    DECLARE = declare by r::declare;
    DESCRIBE = describe by r::describe;
    DELETE = delete by r::delete;
    SURVIVES_KILL = survives_process_kill by r::cannot_be_called;
}

/// Any figure of lag at all.
pub(crate) const LAG: Need = Need {
    name: "lag",
    given: |record| record.lag != anybroker_core::LagPrecision::default(),
    refusal: |env| Box::pin(r::lag(env)),
};

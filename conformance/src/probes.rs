//! Which cases prove each field of the capability record, in both directions.
//!
//! A record can be wrong in two ways: it claims what is not there, or it refuses what works. For each field, and each figure of
//! `lag` and `limits`, this says what fails then, or why nothing can.

use crate::need;

/// How a field of the capability record is proven. See [`probes`].
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct Probe {
    /// The field, or `field.figure`.
    pub field: &'static str,
    /// What fails when the record claims more than there is.
    pub claimed: Evidence,
    /// What fails when it claims less.
    pub refused: Evidence,
}

/// What shows that a claim, or a refusal, is not true.
#[derive(Debug, Clone, Copy)]
pub enum Evidence {
    /// Among others, these cases.
    Cases(&'static [&'static str]),
    /// What the record refuses is tried: in place of every case that needs it, and in
    /// `topology/every-refused-verb-and-option-answers-unsupported-without-side-effect`.
    Refusal,
    /// Nothing can, because of this.
    Nothing(&'static str),
}

use Evidence::{Cases, Nothing, Refusal};

/// How each field is proven, in the order of the record.
#[must_use]
pub fn probes() -> &'static [Probe] {
    PROBES
}

impl Probe {
    /// Whether what the record refuses of this field is a call that is made.
    #[must_use]
    pub fn is_tried(&self) -> bool {
        // Guarantees that no single call asks for.
        const SILENT: &[&str] = &["at_least_once", "survives_process_kill"];
        !SILENT.contains(&self.field) && need::ALL.iter().any(|need| need.name == self.field)
    }
}

impl Probe {
    /// Whether it is tried past the check layer too, which refuses by the record: as if the record claimed it, a case has to fail.
    #[must_use]
    pub fn is_tried_behind_the_check(&self) -> bool {
        crate::cases::is_claimed(self.field)
    }
}

const fn probe(field: &'static str, claimed: Evidence, refused: Evidence) -> Probe {
    Probe { field, claimed, refused }
}

const NOBODY: Evidence = Nothing("no endpoint of this contract may refuse it");
const MAY: Evidence = Nothing("the lesser value says what may happen, not that it does");
const CAUTIOUS: Evidence = Nothing("a limit that is lower than the broker's is kept all the same");
const POWER: Evidence = Nothing("it takes a machine whose power can be cut");
const LAG: Evidence = Cases(&["lag/the-figures-equal-what-is-known"]);

const PROBES: &[Probe] = &[
    probe(
        "at_least_once",
        Cases(&["delivery/concurrent-publishers-lose-nothing", "lifecycle/a-consumer-that-vanishes-loses-nothing"]),
        NOBODY,
    ),
    probe(
        "key_order",
        Cases(&[
            "ordering/messages-of-a-key-come-in-the-order-they-were-published",
            "ordering/a-key-keeps-its-order-across-members",
        ]),
        Refusal,
    ),
    probe("total_order", Cases(&["ordering/total-order-holds-over-all-keys"]), Refusal),
    probe(
        "block_on_failure",
        Cases(&["ordering/under-block-later-messages-of-a-key-wait-for-the-failed-one"]),
        Refusal,
    ),
    probe(
        "park_on_failure",
        Cases(&["ordering/under-park-later-messages-of-a-key-follow-it-to-the-dead-letters"]),
        Refusal,
    ),
    probe(
        "parallelism",
        Cases(&["flow/as-many-members-work-at-once-as-the-record-says"]),
        Cases(&["flow/as-many-members-work-at-once-as-the-record-says"]),
    ),
    probe(
        "ack_granularity",
        Cases(&["lifecycle/an-ack-hole-before-a-close-brings-back-the-hole-or-the-rest-of-its-lane"]),
        MAY,
    ),
    probe(
        "ack_level",
        Cases(&[
            "settle/an-ack-answers-the-level-of-the-record",
            "lifecycle/a-consumer-that-vanishes-loses-nothing",
            "faults/an-ack-that-never-arrives-is-not-told-as-confirmed",
        ]),
        Cases(&["settle/an-ack-answers-the-level-of-the-record"]),
    ),
    probe(
        "late_ack",
        Cases(&["lease/a-late-ack-is-refused-as-stale-or-accepted-as-the-record-says"]),
        Cases(&["lease/a-late-ack-is-refused-as-stale-or-accepted-as-the-record-says"]),
    ),
    probe("nack", Cases(&["redelivery/a-nacked-message-comes-back-with-the-next-attempt"]), Refusal),
    probe("nack_delay", Cases(&["redelivery/a-delayed-nack-is-never-early"]), Refusal),
    probe("release", Cases(&["settle/what-was-released-comes-back-with-the-same-attempt"]), Refusal),
    probe("lease", Cases(&["lease/a-delivery-comes-back-when-its-lease-has-ended-and-not-before"]), Refusal),
    probe("lease_extension", Cases(&["lease/an-extended-lease-holds"]), Refusal),
    probe(
        "attempt_count",
        Cases(&[
            "redelivery/only-failures-count-whatever-else-happens-in-between",
            "lease/an-ended-lease-is-no-failed-attempt",
        ]),
        MAY,
    ),
    probe(
        "crash_count",
        Cases(&["dead-letter/a-message-that-kills-its-consumer-is-buried-by-the-crash-limit"]),
        Refusal,
    ),
    probe("dead_letter", Cases(&["dead-letter/a-letter-holds-the-message-untouched-and-why-it-died"]), Refusal),
    probe(
        "dead_letter_atomicity",
        Cases(&[
            "faults/a-mixed-schedule-buries-what-is-to-be-buried-and-loses-nothing",
            "faults/a-server-that-is-killed-while-messages-are-buried-loses-neither-letters-nor-messages",
        ]),
        MAY,
    ),
    probe("dead_letter_browse", Cases(&["dead-letter/reading-takes-nothing-away"]), MAY),
    probe(
        "redrive",
        Cases(&["dead-letter/a-redrive-returns-only-to-the-group-that-failed-at-attempt-one-with-its-id"]),
        Refusal,
    ),
    probe("purge", Cases(&["dead-letter/a-purge-deletes-what-it-chooses-for-good"]), Refusal),
    probe("groups", Cases(&["groups/each-group-sees-every-message"]), Refusal),
    probe(
        "kept_before_group",
        Cases(&["delivery/messages-published-before-the-group-exists-are-kept-for-it"]),
        Refusal,
    ),
    probe("replay", Cases(&["groups/a-group-can-start-at-a-time"]), Refusal),
    probe("start_position", Cases(&["groups/a-group-can-start-at-a-position"]), Refusal),
    probe("start_latest", Cases(&["groups/latest-is-fixed-when-subscribe-returns"]), Refusal),
    probe(
        "patterns",
        Nothing("no endpoint claims them, and what a pattern is belongs to the first that does"),
        Refusal,
    ),
    probe("delayed_publish", Cases(&["time/a-delayed-publish-is-never-early"]), Refusal),
    probe("ttl", Cases(&["time/what-is-not-settled-within-its-time-to-live-becomes-a-dead-letter"]), Refusal),
    probe(
        "publish_confirm",
        Cases(&[
            "delivery/a-fresh-client-gets-what-was-stored-before-it-came",
            "faults/connections-cut-while-publishing-lose-nothing-that-was-confirmed",
        ]),
        NOBODY,
    ),
    probe(
        "unroutable_detected",
        Cases(&["publish/a-client-that-creates-nothing-finds-no-missing-destination"]),
        Refusal,
    ),
    probe("publish_dedup", Cases(&["idempotency/a-second-publish-of-an-id-within-the-window-is-stored-once"]), Refusal),
    probe(
        "transactions",
        Cases(&[
            "transactions/nothing-is-seen-before-the-commit-and-all-of-it-afterwards",
            "transactions/an-abort-leaves-nothing-and-what-was-settled-comes-back",
            "transactions/what-was-consumed-and-what-was-made-of-it-are-committed-together",
            "faults/what-transactions-make-of-what-they-settle-is-there-exactly-once-whatever-is-cut",
            "faults/what-transactions-make-of-what-they-settle-is-there-exactly-once-when-the-server-is-killed",
        ]),
        Refusal,
    ),
    probe("tombstones", Cases(&["shapes/a-tombstone-is-not-an-empty-payload"]), Refusal),
    probe("declare", Cases(&["topology/declaring-twice-changes-nothing"]), Refusal),
    probe("describe", Cases(&["topology/describe-shows-groups-and-both-names"]), Refusal),
    probe("delete", Cases(&["topology/a-deleted-group-is-gone-and-others-stay"]), Refusal),
    probe("lag.ready", LAG, LAG),
    probe("lag.in_flight", LAG, LAG),
    probe("lag.delayed", LAG, LAG),
    probe("lag.oldest_age", LAG, LAG),
    probe(
        "admin_needed",
        Nothing("a second URL, without the admin endpoint, would show it; the suite is given one"),
        Nothing("as before"),
    ),
    probe(
        "survives_process_kill",
        Cases(&[
            "faults/a-server-that-is-killed-and-comes-back-loses-nothing-that-was-confirmed",
            "faults/what-lies-at-rest-survives-a-killed-server",
        ]),
        Nothing("a kill that happens to lose nothing proves nothing"),
    ),
    probe("survives_power_loss", POWER, POWER),
    probe("limits.payload", Cases(&["shapes/the-largest-payload-passes-and-one-byte-more-is-too-large"]), CAUTIOUS),
    probe("limits.key", Cases(&["shapes/keys-of-any-bytes-come-through"]), CAUTIOUS),
    probe("limits.headers", Cases(&["shapes/many-and-big-headers-come-through-or-are-refused-with-a-type"]), CAUTIOUS),
    probe(
        "limits.header_name",
        Cases(&["shapes/many-and-big-headers-come-through-or-are-refused-with-a-type"]),
        CAUTIOUS,
    ),
    probe(
        "limits.header_count",
        Cases(&["shapes/many-and-big-headers-come-through-or-are-refused-with-a-type"]),
        CAUTIOUS,
    ),
    probe("limits.publish_batch", Cases(&["publish/a-batch-of-thousands-is-stored-whole"]), CAUTIOUS),
    probe("limits.receive_batch", Cases(&["publish/a-batch-of-thousands-is-stored-whole"]), CAUTIOUS),
    probe("limits.settle_batch", Cases(&["publish/a-batch-of-thousands-is-stored-whole"]), CAUTIOUS),
    probe(
        "limits.lease_min_ms",
        Cases(&["lease/a-delivery-comes-back-when-its-lease-has-ended-and-not-before"]),
        CAUTIOUS,
    ),
    probe("limits.lease_max_ms", Nothing("it takes hours to wait for"), CAUTIOUS),
    probe("limits.delay_max_ms", Cases(&["time/a-delay-beyond-the-limit-is-refused"]), CAUTIOUS),
    probe(
        "limits.delay_precision_ms",
        Nothing("how late something is depends on the machine's load: it is measured, not asserted"),
        CAUTIOUS,
    ),
    probe(
        "limits.dedup_window_ms",
        Cases(&["idempotency/a-second-publish-of-an-id-within-the-window-is-stored-once"]),
        CAUTIOUS,
    ),
];

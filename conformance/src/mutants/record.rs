//! Mutants whose capability record is not true.

use std::sync::Arc;

use anybroker_core::{AckLevel, Capabilities, Settlement, Settling, Support};

use super::Mutant;
use super::tampered::{Entries, Fault, Inner};

pub(super) const MUTANTS: &[Mutant] = &[
    Mutant {
        name: "unsupported-no-op",
        fault: "giving back is refused by the record, and answers Ok without doing anything",
        killed_by: "topology/every-refused-verb-and-option-answers-unsupported-without-side-effect",
        make: || Arc::new(UnsupportedNoOp),
    },
    Mutant {
        name: "too-modest",
        fault: "delayed nacks are refused by the record, and work",
        killed_by: "redelivery/a-delayed-nack-is-never-early",
        make: || Arc::new(Record(|record| record.nack_delay = refused())),
    },
    Mutant {
        name: "hides-delayed-publishes",
        fault: "delayed publishes are refused by the record, and work",
        killed_by: "topology/what-the-record-refuses-does-not-work-behind-it",
        make: || Arc::new(Record(|record| record.delayed_publish = refused())),
    },
    Mutant {
        name: "claims-dedup",
        fault: "publish dedup is claimed by the record, and there is none",
        killed_by: "idempotency/a-second-publish-of-an-id-within-the-window-is-stored-once",
        make: || Arc::new(Record(|record| record.publish_dedup = Support::Native)),
    },
    Mutant {
        name: "claims-late-acks",
        fault: "late acks are accepted, says the record",
        killed_by: "lease/a-late-ack-is-refused-as-stale-or-accepted-as-the-record-says",
        make: || Arc::new(Record(|record| record.late_ack = anybroker_core::LateAck::Accepted)),
    },
];

fn refused() -> Support {
    Support::refused("it is not true")
}

pub(super) struct Record(pub(super) fn(&mut Capabilities));

impl Fault for Record {
    fn record(&self, mut record: Capabilities) -> Capabilities {
        (self.0)(&mut record);
        record
    }
}

struct UnsupportedNoOp;

impl Fault for UnsupportedNoOp {
    fn record(&self, record: Capabilities) -> Capabilities {
        Capabilities { release: refused(), ..record }
    }

    fn settle(&self, inner: &Inner, batch: Entries) -> Settling {
        if batch.iter().all(|(_, settlement)| matches!(settlement, Settlement::Release)) {
            return Settling::ready(batch.iter().map(|_| Ok(AckLevel::Confirmed)).collect());
        }
        inner.settler.settle(batch)
    }
}

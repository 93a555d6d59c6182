//! What a report counts of a case.

use std::ops::AddAssign;

use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Counts {
    pub(crate) published_ok: u64,
    pub(crate) published_failed: u64,
    pub(crate) published_unknown: u64,
    pub(crate) delivered: u64,
    pub(crate) duplicates_justified: u64,
    pub(crate) duplicates_unjustified: u64,
    pub(crate) faults: u64,
    pub(crate) faults_met: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) recovery_ms: Option<u64>,
}

impl Counts {
    /// The longest recovery, in seconds.
    pub(crate) fn recovery(self) -> String {
        self.recovery_ms.map_or("–".into(), |millis| format!("{:.1}", millis as f64 / 1_000.0))
    }
}

impl AddAssign for Counts {
    fn add_assign(&mut self, other: Self) {
        self.published_ok += other.published_ok;
        self.published_failed += other.published_failed;
        self.published_unknown += other.published_unknown;
        self.delivered += other.delivered;
        self.duplicates_justified += other.duplicates_justified;
        self.duplicates_unjustified += other.duplicates_unjustified;
        self.faults += other.faults;
        self.faults_met += other.faults_met;
        self.recovery_ms = self.recovery_ms.max(other.recovery_ms);
    }
}

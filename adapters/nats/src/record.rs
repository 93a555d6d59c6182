//! What the server does not count: how often a message failed in a group, and until when it waits.
//!
//! JetStream counts hand-overs (`num_delivered`), which closes, crashes and ended leases raise too. A failure is written
//! down, confirmed, before it is told to the server; the message's next delivery reads it back.

use anybroker_core::Timestamp;
use serde::{Deserialize, Serialize};

/// The failures of one message in one group.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Record {
    /// Failed attempts.
    #[serde(rename = "f")]
    pub(crate) failures: u32,
    /// Deliveries that reached no handler: prefetched and given back, or too early.
    #[serde(rename = "s")]
    pub(crate) spare: u32,
    /// The server's count when this was written.
    #[serde(rename = "d")]
    pub(crate) delivered: u32,
    /// Not before this moment, in milliseconds.
    #[serde(rename = "n")]
    pub(crate) not_before: i64,
    /// When the group first received it, in milliseconds; 0 where that is not known.
    #[serde(rename = "t")]
    pub(crate) first: i64,
}

impl Record {
    pub(crate) fn first_at(&self) -> Option<Timestamp> {
        (self.first != 0).then(|| Timestamp::from_millis(self.first))
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("numbers become JSON")
    }

    pub(crate) fn decode(text: &[u8]) -> Option<Self> {
        serde_json::from_slice(text).ok()
    }
}

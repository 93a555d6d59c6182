//! What a group has left to do.

use std::time::Duration;

/// How exact a figure is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Precision {
    /// Right at some moment during the call.
    Exact,
    /// An estimate of the broker's.
    Approximate,
}

/// A figure that may be missing, with its precision.
pub type Figure<T = u64> = Option<(T, Precision)>;

/// What a group has left to do on a destination: in total and per lane. Each figure is missing where the
/// endpoint cannot tell it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Lag {
    /// Ready to be delivered.
    pub ready: Figure,
    /// Delivered and not settled.
    pub in_flight: Figure,
    /// Waiting for their delay to end.
    pub delayed: Figure,
    /// How long the oldest unsettled message has been stored.
    pub oldest_age: Figure<Duration>,
    /// The same per lane, where the endpoint has lanes to tell of.
    pub lanes: Vec<(String, Lag)>,
}

impl Lag {
    /// Everything not settled, where at least the ready figure is known.
    #[must_use]
    pub fn total(&self) -> Option<u64> {
        let of = |figure: Figure| figure.map_or(0, |(count, _)| count);
        self.ready.map(|(ready, _)| ready.saturating_add(of(self.in_flight)).saturating_add(of(self.delayed)))
    }
}

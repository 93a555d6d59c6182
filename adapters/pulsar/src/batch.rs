//! The outcomes of what was handed over together.

use std::sync::Arc;

use anybroker_core::{Error, Position, Result};
use parking_lot::Mutex;
use tokio::sync::{Notify, Semaphore};
use tokio::time::Instant;

/// How much may be on its way, in units of 1 KiB; a message counts as one at least.
const WINDOW: usize = 32_768;

/// Bounds what is on its way on one endpoint.
#[derive(Clone)]
pub(crate) struct Window(Arc<Semaphore>);

impl Window {
    pub(crate) fn new() -> Self {
        Self(Arc::new(Semaphore::new(WINDOW)))
    }

    /// Waits for room; false when there is none by the deadline.
    pub(crate) async fn enter(&self, weight: u32, deadline: Instant) -> bool {
        if let Ok(permit) = self.0.try_acquire_many(weight) {
            permit.forget();
            return true;
        }
        match tokio::time::timeout_at(deadline, self.0.acquire_many(weight)).await {
            Ok(Ok(permit)) => {
                permit.forget();
                true
            }
            _ => false,
        }
    }

    pub(crate) fn leave(&self, weight: u32) {
        self.0.add_permits(weight as usize);
    }

    /// Waits until nothing is on its way; false at the deadline.
    pub(crate) async fn emptied(&self, deadline: Instant) -> bool {
        let all = u32::try_from(WINDOW).expect("a small number");
        matches!(tokio::time::timeout_at(deadline, self.0.acquire_many(all)).await, Ok(Ok(_)))
    }
}

/// What a payload of that many bytes counts as.
pub(crate) fn weight(bytes: usize) -> u32 {
    u32::try_from(1 + bytes / 1_024).unwrap_or(u32::MAX).min(WINDOW as u32)
}

/// One outcome for each entry of a batch.
pub(crate) struct Batch {
    slots: Mutex<(usize, Vec<Option<Result<Position>>>)>,
    done: Notify,
}

impl Batch {
    pub(crate) fn new(count: usize) -> Arc<Self> {
        Arc::new(Self { slots: Mutex::new((count, (0..count).map(|_| None).collect())), done: Notify::new() })
    }

    pub(crate) fn set(&self, index: usize, outcome: Result<Position>) {
        let mut slots = self.slots.lock();
        if slots.1[index].is_none() {
            slots.1[index] = Some(outcome);
            slots.0 -= 1;
            if slots.0 == 0 {
                self.done.notify_one();
            }
        }
    }

    /// The outcomes; what has none by the deadline answers `late`.
    pub(crate) async fn wait(&self, deadline: Instant, late: impl Fn() -> Error) -> Vec<Result<Position>> {
        while self.slots.lock().0 > 0 {
            if tokio::time::timeout_at(deadline, self.done.notified()).await.is_err() {
                break;
            }
        }
        let mut slots = self.slots.lock();
        slots.1.iter_mut().map(|slot| slot.take().unwrap_or_else(|| Err(late()))).collect()
    }
}

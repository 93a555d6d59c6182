//! A bound on what is handed out, for peers that have none of their own: a service bounds how many handlers it runs.

use std::sync::Arc;
use std::time::Duration;

use anybroker_core::Result;
use async_trait::async_trait;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::{Held, Parcel};

/// The bound of one subscription.
#[derive(Clone)]
pub struct InFlight(Arc<Semaphore>);

impl InFlight {
    /// At most so many.
    #[must_use]
    pub fn new(most: usize) -> Self {
        Self(Arc::new(Semaphore::new(most.min(Semaphore::MAX_PERMITS))))
    }

    /// Waits for room for one.
    ///
    /// # Panics
    /// Never: the semaphore is not closed.
    pub async fn room(&self) -> OwnedSemaphorePermit {
        Arc::clone(&self.0).acquire_owned().await.expect("the semaphore is never closed")
    }

    /// Room for one more, where there is some.
    #[must_use]
    pub fn more(&self) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.0).try_acquire_owned().ok()
    }
}

/// A delivery that has its room until it is settled or dropped.
pub struct Counted<H> {
    held: H,
    room: OwnedSemaphorePermit,
}

impl<H: Held + 'static> Counted<H> {
    /// Of a delivery.
    #[must_use]
    pub fn boxed(held: H, room: OwnedSemaphorePermit) -> Box<dyn Held> {
        Box::new(Self { held, room })
    }
}

#[async_trait]
impl<H: Held> Held for Counted<H> {
    fn parcel(&self) -> Parcel {
        self.held.parcel()
    }

    fn count(&self) -> Option<u32> {
        self.held.count()
    }

    async fn ack(self: Box<Self>) -> Result<()> {
        let Self { held, room } = *self;
        let done = Box::new(held).ack().await;
        drop(room);
        done
    }

    async fn extend(&mut self, lease: Duration) -> Result<()> {
        self.held.extend(lease).await
    }

    async fn nack(self: Box<Self>, delay: Duration) -> Result<()> {
        let Self { held, room } = *self;
        let done = Box::new(held).nack(delay).await;
        drop(room);
        done
    }
}

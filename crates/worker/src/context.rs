//! What a handler sees of its message and of the worker.

use std::future::Future;
use std::sync::Arc;

use anybroker_core::{Bus, Delivery, Group, Lane, Message, PublishOutcome, Receipt, Result};

use crate::drain::Stage;
use crate::lanes::Held;
use crate::telemetry::Telemetry;

/// What a handler sees: the message, what is known about its delivery, whether the worker is stopping, and a way to
/// publish what the message causes. The delivery itself stays with the worker, which settles it.
pub struct Context {
    pub(crate) held: Held,
    pub(crate) scope: Arc<Scope>,
}

/// What all contexts of a subscription share.
pub(crate) struct Scope {
    pub(crate) bus: Bus,
    pub(crate) stage: tokio::sync::watch::Receiver<Stage>,
    pub(crate) telemetry: Arc<Telemetry>,
}

impl Context {
    /// The message, as it was published.
    #[must_use]
    pub fn message(&self) -> &Message {
        self.delivery().message()
    }

    /// Which attempt this is: 1 + failed outcomes of this message in this group.
    #[must_use]
    pub fn attempt(&self) -> u32 {
        self.delivery().attempt()
    }

    /// After how many failed attempts it becomes a dead letter.
    #[must_use]
    pub fn max_attempts(&self) -> Option<u32> {
        self.delivery().context().max_attempts
    }

    /// Whether a failure of this attempt makes it a dead letter.
    #[must_use]
    pub fn is_last_attempt(&self) -> bool {
        self.max_attempts().is_some_and(|max| self.attempt() >= max)
    }

    /// The group it was received in.
    #[must_use]
    pub fn group(&self) -> &Group {
        self.delivery().group()
    }

    /// Its lane and epoch.
    #[must_use]
    pub fn lane(&self) -> Lane {
        self.delivery().lane()
    }

    /// The delivery, to be looked at.
    #[must_use]
    pub fn delivery(&self) -> &Delivery {
        self.held.delivery()
    }

    /// The connection the message came by. What is published here directly does not know its cause; see
    /// [`send`](Self::send).
    #[must_use]
    pub fn bus(&self) -> &Bus {
        &self.scope.bus
    }

    /// Whether the worker is stopping. The handler may go on until the grace ends.
    #[must_use]
    pub fn is_draining(&self) -> bool {
        *self.scope.stage.borrow() != Stage::Running
    }

    /// Waits until the worker is stopping: for handlers that can end early. A handler that does not look at it
    /// is not disturbed until the grace ends; then it is dropped, and its message comes back uncounted.
    pub fn draining(&self) -> impl Future<Output = ()> + Send + 'static {
        let mut stage = self.scope.stage.clone();
        async move {
            // An error means that the worker is gone, which is as good as stopping.
            let _ = stage.wait_for(|stage| *stage != Stage::Running).await;
        }
    }

    /// Publishes a message that this one caused: it inherits the correlation id, names its cause, and goes on with the
    /// trace ([`Message::caused_by`]). Not bound to the settlement of this message: a handler that fails afterwards
    /// has published, and its next attempt publishes again.
    ///
    /// # Errors
    /// As [`Bus::send`].
    pub async fn send(&self, message: Message) -> Result<Receipt> {
        self.publish(vec![message]).await.pop().expect("one outcome per message")
    }

    /// Publishes several messages that this one caused; one outcome per message, in the order given.
    pub async fn publish(&self, messages: Vec<Message>) -> Vec<PublishOutcome> {
        let parent = self.message();
        let messages: Vec<Message> = messages.into_iter().map(|message| message.caused_by(parent)).collect();
        let sent = self.scope.telemetry.producing(&messages);
        let outcomes = self.scope.bus.publish(messages).await;
        self.scope.telemetry.produced(sent, &outcomes);
        outcomes
    }
}

impl std::fmt::Debug for Context {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Context").field("delivery", self.delivery()).finish_non_exhaustive()
    }
}

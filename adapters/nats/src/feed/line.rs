//! The line to the server: lost, made anew, silent.

use anybroker_core::{Result, SubscriptionEvent};
use futures_util::FutureExt;
use tokio::time::Instant;

use super::{Feed, Fresh, LAST};
use crate::inbox::Inbox;

impl Feed {
    /// The server has forgotten a pull, or this side of the connection is dead.
    pub(super) async fn on_silence(&mut self) {
        self.heard = Instant::now();
        let is_waiting = self.desk.shared.lock().feeds[self.index as usize].asked > 0;
        if !is_waiting || !self.link.borrow().is_connected {
            return;
        }
        tracing::debug!(destination = %self.destination, "a pull was forgotten; asking anew");
        if let Err(error) = self.check_consumer().await {
            return self.desk.shared.fail(error);
        }
        self.desk.shared.unasked(self.index, None);
    }

    pub(super) async fn on_link(&mut self) {
        let state = *self.link.borrow_and_update();
        if state.epoch != self.epoch {
            self.take_buffered();
            self.epoch = state.epoch;
            (self.is_ready, self.has_agreed) = (false, false);
            if let Some(unordered) = &mut self.unordered {
                unordered.keepers.forget();
            }
            if self.owner.is_none() {
                // Not handed out before it is known whether the server still knows that it is here, and whether others keep order.
                self.desk.shared.hold(self.index, true);
            }
            if !state.is_connected {
                // The client would subscribe to the old one again before anything else, and the server may know a pull for it
                // still: what that pull is sent would be nobody's until its lease ends. What nobody reads any more it does not
                // subscribe to again (async-nats 0.51, `handle_reconnect`). Found by the suite's lone member.
                let _ = tokio::time::timeout(LAST, self.renew_inbox()).await;
            }
            if !std::mem::replace(&mut self.is_degraded, true) {
                let cause = "the connection is lost; it is made anew".to_owned();
                self.desk.shared.tell(SubscriptionEvent::Degraded { cause });
            }
        }
        if state.is_connected && self.is_degraded {
            // A new inbox: a pull that the server still knows must not fill beside the new one.
            if self.renew_inbox().await.is_ok() {
                self.is_degraded = false;
                if self.owner.is_none() {
                    self.look_at_server().await;
                }
                self.desk.shared.tell(SubscriptionEvent::Recovered);
            }
        }
    }

    /// A killed server may have forgotten what it sent, and give it to others at once. Under order there are none, and what is
    /// here keeps its place.
    async fn look_at_server(&mut self) {
        let client = &self.desk.link.client;
        // The client says that it is connected before it says to which server (async-nats 0.51, `connector.rs`); what it is told
        // to do comes after both.
        let is_told = tokio::time::timeout(LAST, client.flush()).await.is_ok_and(|flushed| flushed.is_ok());
        let server = client.server_info().server_id;
        if !is_told || server != self.server {
            self.desk.shared.forget_prefetched(self.index);
        }
        self.server = server;
        if self.has_agreed {
            self.desk.shared.hold(self.index, false);
        }
    }

    /// What came before the connection was lost.
    fn take_buffered(&mut self) {
        while let Some(Some(message)) = self.inbox.next().now_or_never() {
            if message.status.is_none() {
                self.read(message);
            }
        }
        self.arrive();
    }

    pub(super) async fn renew_inbox(&mut self) -> Result<()> {
        self.fresh = Fresh::new(Instant::now(), Some(&self.fresh));
        self.inbox = Inbox::open(&self.desk.link.client).await?;
        self.desk.shared.unasked(self.index, None);
        Ok(())
    }
}

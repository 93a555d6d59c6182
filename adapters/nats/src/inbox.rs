//! Where the server sends what a feed pulls.

use anybroker_core::{Bytes, Error, ErrorKind, Result};
use async_nats::{Client, Message, Subject, Subscriber};
use futures_util::StreamExt;

/// Heartbeats and ends of pulls that may be on their way beside messages.
const STATUSES: u64 = 64;

/// A subject of its own, and what comes there.
pub(crate) struct Inbox {
    client: Client,
    subscriber: Subscriber,
    pub(crate) subject: Subject,
    /// What has come out of it.
    came: u64,
}

impl Inbox {
    pub(crate) async fn open(client: &Client) -> Result<Self> {
        let subject = Subject::from(client.new_inbox());
        let subscriber = client.subscribe(subject.clone()).await.map_err(|error| gone(&error))?;
        Ok(Self { client: client.clone(), subscriber, subject, came: 0 })
    }

    /// The next message or status; `None` after the end. Cancel-safe.
    pub(crate) async fn next(&mut self) -> Option<Message> {
        let message = self.subscriber.next().await;
        self.came += u64::from(message.is_some());
        message
    }

    /// Ends it: what the server has sent until it knows that still comes out, and then `None`. `asked` is how many
    /// messages may be on their way.
    ///
    /// The client's own `drain` does not wait for the server: it forgets the subscription the next time that anything is
    /// read, and drops what the server had sent by then (async-nats 0.51, `ProcessFut`). Those messages would only come
    /// back when their leases end. So the end is a count that both sides keep: empty messages of this client's own fill
    /// up what the server has not sent.
    pub(crate) async fn end(&mut self, asked: usize) -> Result<()> {
        let missing = asked as u64 + STATUSES;
        self.subscriber.unsubscribe_after(self.came + missing).await.map_err(|error| gone(&error))?;
        for _ in 0..missing {
            self.client.publish(self.subject.clone(), Bytes::new()).await.map_err(|error| gone(&error))?;
        }
        Ok(())
    }
}

fn gone(error: &dyn std::error::Error) -> Error {
    Error::new(ErrorKind::Closed, "receive", error.to_string())
}

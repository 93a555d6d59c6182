//! Whether the members of a group agree about order.
//!
//! Members that keep order work one at a time, by a record that one of them renews ([`crate::owner`]); members that keep none
//! just pull. Together they would break the order that some of them have promised. So each shows itself, by that record or by a
//! subscription that answers, and looks for the others then: of two that come at the same time one sees the other at least.

use std::time::Duration;

use anybroker_core::{Bytes, Error, ErrorKind, Result};
use async_nats::Subject;
use async_nats::client::RequestErrorKind;
use futures_util::StreamExt;
use serde_json::json;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::link::Link;
use crate::owner::Owner;
use crate::topology::Topology;

/// How long a member that is there may take to say so, and one that has gone to be forgotten.
const PATIENCE: Duration = Duration::from_secs(2);
/// How soon is looked again.
const PAUSE: Duration = Duration::from_millis(200);

/// Where the members without order of a group are asked whether they are there. Below the inboxes, because every user may
/// subscribe and publish there.
fn meeting(records: &str) -> Subject {
    Subject::from(format!("_INBOX.{records}.unordered"))
}

/// How a member stands in its group.
pub(crate) enum Stand {
    InTurn(Owner),
    Any(Unordered),
}

/// A member without order shows that it is there, for as long as this lives and the server knows its connection.
struct Presence(JoinHandle<()>);

impl Presence {
    async fn new(link: &Link, records: &str) -> Result<Self> {
        let lost = |error: String| Error::new(ErrorKind::Unavailable, "subscribe", error);
        let client = link.client.clone();
        let showing = async {
            let asked = client.subscribe(meeting(records)).await.map_err(|error| lost(error.to_string()))?;
            // Before anything else is asked for on this connection.
            client.flush().await.map_err(|error| lost(error.to_string()))?;
            Ok(asked)
        };
        let shown = tokio::time::timeout(PATIENCE, showing).await;
        let mut asked = shown.unwrap_or_else(|_| Err(lost(format!("the server took nothing within {PATIENCE:?}"))))?;
        Ok(Self(tokio::spawn(async move {
            while let Some(question) = asked.next().await {
                if let Some(reply) = question.reply {
                    let _ = client.publish(reply, Bytes::new()).await;
                }
            }
        })))
    }
}

impl Drop for Presence {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// What a member without order keeps.
pub(crate) struct Unordered {
    pub(crate) keepers: Keepers,
    _presence: Presence,
}

impl Unordered {
    /// Shows itself, and is refused where others keep order.
    pub(crate) async fn new(link: &Link, topology: &Topology, mut keepers: Keepers) -> Result<Self> {
        // One that is refused is not seen by anybody.
        keepers.wait_until_gone(topology).await?;
        let presence = Presence::new(link, &keepers.stream).await?;
        // Somebody who came meanwhile shows his claim by now, or has seen this one.
        keepers.wait_until_gone(topology).await?;
        Ok(Self { keepers, _presence: presence })
    }
}

/// Whether a member without order is there. Not known where this user may not ask: then as if there was none.
pub(crate) async fn is_unordered(link: &Link, records: &str, operation: &'static str) -> Result<bool> {
    let meeting = meeting(records);
    let denied = link.denials.of(operation, &meeting, Instant::now());
    let asking = tokio::time::timeout(PATIENCE, link.client.request(meeting.clone(), Bytes::new()));
    let answer = tokio::select! {
        answer = asking => answer,
        error = denied => {
            tracing::warn!(%error, "whether the group has members without order is not known");
            return Ok(false);
        }
    };
    match answer {
        Ok(Ok(_)) => Ok(true),
        Ok(Err(error)) if error.kind() == RequestErrorKind::NoResponders => Ok(false),
        // A member that stands still, or a server that does: nothing is claimed meanwhile.
        _ => Err(Error::new(ErrorKind::Unavailable, operation, format!("no answer within {PATIENCE:?}"))),
    }
}

/// Refuses a member that keeps order where others keep none. Where one works that keeps it, the others are those that are refused.
pub(crate) async fn expect_no_unordered(link: &Link, topology: &Topology, mut keepers: Keepers) -> Result<()> {
    let patience = PATIENCE.max(keepers.timeout / 4 + PAUSE * 2);
    let until = Instant::now() + patience;
    while is_unordered(link, &keepers.stream, "subscribe").await? {
        if keepers.are_gone(topology, "subscribe").await.is_err_and(|error| error.kind() == ErrorKind::AlreadyExists) {
            return Ok(());
        }
        if Instant::now() + PAUSE >= until {
            return Err(disagreed("no order", "subscribe").with("records", &keepers.stream));
        }
        tokio::time::sleep(PAUSE).await;
    }
    Ok(())
}

/// Looks for a member that keeps order, by the record that it renews.
pub(crate) struct Keepers {
    /// The stream of the group's records, and the subject of that one.
    stream: String,
    subject: String,
    timeout: Duration,
    /// The record, and since when it has not changed.
    seen: Option<(u64, Instant)>,
}

impl Keepers {
    pub(crate) fn new(stream: &str, subject: String, timeout: Duration) -> Self {
        Self { stream: stream.to_owned(), subject, timeout, seen: None }
    }

    /// Begins anew: how long a record has not changed is not known any more.
    pub(crate) fn forget(&mut self) {
        self.seen = None;
    }

    /// Refuses a member without order where others keep it; `false` while that is not known yet.
    pub(crate) async fn are_gone(&mut self, topology: &Topology, operation: &'static str) -> Result<bool> {
        let query = json!({ "last_by_subj": self.subject });
        let Some(record) = topology.api.message(operation, &self.stream, &query).await? else {
            self.seen = None;
            return Ok(true);
        };
        match self.seen {
            None => self.seen = Some((record.seq, Instant::now())),
            Some((seen, since)) if seen == record.seq => {
                if since.elapsed() >= self.timeout {
                    // Whoever has written it is silent for so long that others would take its turn. Without the record it cannot
                    // renew its claim, should it go on, and has to make a new one like everybody else.
                    topology.api.delete_message(operation, &self.stream, seen).await?;
                    self.seen = None;
                }
            }
            Some(_) => {
                self.seen = None;
                return Err(disagreed("order", operation).with("records", &self.stream));
            }
        }
        Ok(false)
    }

    async fn wait_until_gone(&mut self, topology: &Topology) -> Result<()> {
        while !self.are_gone(topology, "subscribe").await? {
            tokio::time::sleep(PAUSE).await;
        }
        Ok(())
    }
}

fn disagreed(others: &str, operation: &'static str) -> Error {
    let text = format!("the group has members that keep {others}; ask for the same, or end them first");
    Error::new(ErrorKind::AlreadyExists, operation, text)
}

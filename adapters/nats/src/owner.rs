//! Who works where order is kept: one member of a group at a time, by a record that it renews.
//!
//! The server's own `pinned_client` (2.11) moves the pin while the old member's messages are still unacked, and hands
//! later ones of their keys to the new member at once. Here a new member waits until they can come back first.

use std::sync::Arc;
use std::time::Duration;

use anybroker_core::{Bytes, Result};
use async_nats::{HeaderMap, Subject};
use serde_json::json;
use tokio::time::Instant;

use crate::agreement;
use crate::error::WRONG_LAST_SEQUENCE;
use crate::link::Link;
use crate::publisher::refused;
use crate::topology::Topology;

/// How often a member that stands by looks whether it is its turn.
const STAND_BY: Duration = Duration::from_millis(200);
/// How long the server may take to confirm a claim.
const ANSWER: Duration = Duration::from_secs(5);
const EXPECTED: &str = "Nats-Expected-Last-Subject-Sequence";

/// The subject of a group's claim.
pub(crate) fn claim(record: &str) -> String {
    format!("{record}.o")
}

/// The claim of one member on one destination of a group.
pub(crate) struct Owner {
    link: Arc<Link>,
    topology: Arc<Topology>,
    /// The stream of the group's records, and the subject of this one.
    stream: String,
    subject: String,
    member: String,
    timeout: Duration,
    held: Option<u64>,
    renewed: Instant,
    /// The record of somebody else, and since when it has not changed.
    seen: Option<(u64, Instant)>,
}

/// What became of a claim.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Change {
    None,
    /// Nobody had it, or who had it gave it up and everything back.
    Gained,
    /// Who had it was silent for too long. What the server has sent to it, and may send to it still, comes back later.
    TakenOver,
    Renewed,
    Lost,
}

impl Owner {
    pub(crate) fn new(
        link: Arc<Link>,
        topology: Arc<Topology>,
        (stream, subject): (String, String),
        timeout: Duration,
    ) -> Self {
        let member = uuid::Uuid::now_v7().to_string();
        let (held, seen, renewed) = (None, None, Instant::now());
        Self { link, topology, stream, subject, member, timeout, held, renewed, seen }
    }

    /// Until when no other member works.
    pub(crate) fn fence(&self) -> Instant {
        self.renewed + self.timeout * 3 / 4
    }

    /// When to look again.
    pub(crate) fn next(&self) -> Duration {
        if self.held.is_some() { self.timeout / 4 } else { STAND_BY }
    }

    /// Claims, renews, or finds that somebody else has it.
    pub(crate) async fn look(&mut self) -> Result<Change> {
        if let Some(held) = self.held {
            if self.write(held).await? {
                return Ok(Change::Renewed);
            }
            // An earlier renewal may have been stored although its confirmation was lost.
            let query = json!({ "last_by_subj": self.subject });
            let found = self.topology.api.message("receive", &self.stream, &query).await?;
            let own = found.filter(|record| record.payload() == self.member.as_bytes());
            if let Some(own) = own
                && self.write(own.seq).await?
            {
                return Ok(Change::Renewed);
            }
            self.held = None;
            return Ok(Change::Lost);
        }
        let query = json!({ "last_by_subj": self.subject });
        let found = self.topology.api.message("receive", &self.stream, &query).await?;
        let expected = match found {
            None => 0,
            Some(record) => {
                let since = match self.seen {
                    Some((sequence, since)) if sequence == record.seq => since,
                    _ => {
                        let now = Instant::now();
                        self.seen = Some((record.seq, now));
                        now
                    }
                };
                // An earlier claim may have been stored although its confirmation was lost.
                let is_own = record.payload() == self.member.as_bytes();
                if !is_own && since.elapsed() < self.timeout {
                    return Ok(Change::None);
                }
                record.seq
            }
        };
        if agreement::is_unordered(&self.link, &self.stream, "receive").await? || !self.write(expected).await? {
            return Ok(Change::None);
        }
        // Now that the claim shows, nobody without order comes any more; somebody may have come before it did. Then the claim is
        // not renewed, and the next one counts as taken over.
        let held = self.held.take();
        if agreement::is_unordered(&self.link, &self.stream, "receive").await? {
            return Ok(Change::None);
        }
        self.held = held;
        Ok(if expected == 0 { Change::Gained } else { Change::TakenOver })
    }

    /// Gives the claim up, so that the next member need not wait.
    pub(crate) async fn release(&mut self) -> Result<()> {
        if let Some(held) = self.held.take() {
            self.topology.api.delete_message("close", &self.stream, held).await?;
        }
        Ok(())
    }

    /// Writes the record, unless somebody else did since `expected`.
    async fn write(&mut self, expected: u64) -> Result<bool> {
        let begun = Instant::now();
        let mut state = self.link.state.clone();
        let epoch = state.borrow().epoch;
        let answers = self.link.board.open(1, begun + ANSWER);
        let mut headers = HeaderMap::new();
        headers.insert(EXPECTED, expected.to_string().as_str());
        let subject = Subject::from(self.subject.as_str());
        let payload = Bytes::copy_from_slice(self.member.as_bytes());
        let reply = answers.reply(0, &subject);
        let sending = self.link.client.publish_with_reply_and_headers(subject, reply, headers, payload);
        sending.await.map_err(|error| {
            anybroker_core::Error::new(anybroker_core::ErrorKind::Closed, "receive", error.to_string())
        })?;
        // What was sent on a connection that is lost may be answered never: then it is found out anew on the next one.
        tokio::select! {
            _ = answers.wait(begun + ANSWER) => {}
            _ = state.wait_for(|state| state.epoch != epoch) => {}
        }
        match refused(answers.take(0), "receive")? {
            Ok((sequence, _)) => {
                (self.held, self.renewed, self.seen) = (Some(sequence), begun, None);
                Ok(true)
            }
            Err(error) if error.is(WRONG_LAST_SEQUENCE) => Ok(false),
            Err(error) => Err(error.into_error("receive")),
        }
    }
}

//! Publishing: requests of up to ten messages, several on their way at a time. A task for a request, not for a message.

use std::sync::Arc;
use std::time::Duration;

use anybroker_core::{Confirms, Effect, Error, ErrorKind, Message, PublishOutcome, PublishTerms, Receipt, Result};
use aws_sdk_sqs::Client;
use aws_sdk_sqs::types::SendMessageBatchRequestEntry;
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::codec::{self, Encoded};
use crate::config::Settings;
use crate::error::{failed, failed_entry, unmentioned};
use crate::queues::Queues;

/// SQS's limit of a batch.
pub(crate) const BATCH: usize = 10;

/// Sends to queues.
pub(crate) struct Publisher {
    /// Does not retry by itself.
    sender: Client,
    queues: Arc<Queues>,
    /// Bounds the requests on their way, and thereby what is buffered.
    requests: Arc<Semaphore>,
    request_count: u32,
    request_bytes: usize,
}

/// A request that is being filled.
#[derive(Default)]
struct Request {
    url: String,
    entries: Vec<SendMessageBatchRequestEntry>,
    /// Where in the batch each entry stood.
    places: Vec<usize>,
    bytes: usize,
}

impl Publisher {
    pub(crate) fn new(sender: Client, queues: &Arc<Queues>, settings: &Settings) -> Self {
        Self {
            sender,
            queues: Arc::clone(queues),
            requests: Arc::new(Semaphore::new(settings.requests)),
            request_count: u32::try_from(settings.requests).expect("the field's bounds are within u32"),
            request_bytes: settings.message_max_bytes,
        }
    }

    /// Hands a batch over, in order; waits only while as many requests as allowed are on their way.
    pub(crate) async fn publish(&self, batch: &[Message], terms: &PublishTerms) -> Confirms {
        let deadline = Instant::now() + terms.timeout;
        let mut outcomes: Vec<Option<PublishOutcome>> = Vec::new();
        outcomes.resize_with(batch.len(), || None);
        let mut sent: Vec<(Vec<usize>, JoinHandle<Vec<PublishOutcome>>)> = Vec::new();
        let mut request = Request::default();
        for (place, message) in batch.iter().enumerate() {
            let encoded = codec::encode(message, None);
            let url = match self.accept(message, &encoded, deadline).await {
                Ok(url) => url,
                Err(error) => {
                    let error = error.with("id", message.id()).with("destination", message.destination());
                    outcomes[place] = Some(Err(error));
                    continue;
                }
            };
            let is_full = request.entries.len() == BATCH || request.bytes + encoded.size > self.request_bytes;
            if !request.entries.is_empty() && (is_full || request.url != url) {
                self.send(std::mem::take(&mut request), deadline, &mut sent, &mut outcomes).await;
            }
            request.url = url;
            request.push(place, encoded);
        }
        if !request.entries.is_empty() {
            self.send(request, deadline, &mut sent, &mut outcomes).await;
        }
        if sent.is_empty() {
            return Confirms::ready(outcomes.into_iter().flatten().collect());
        }
        Confirms::waiting(async move {
            for (places, answer) in sent {
                let answers = answer.await.expect("sending cannot panic, and nobody aborts it");
                for (place, answer) in places.into_iter().zip(answers) {
                    outcomes[place] = Some(answer);
                }
            }
            outcomes.into_iter().flatten().collect()
        })
    }

    /// The queue's URL, unless the message is too large or the queue cannot be found in time.
    async fn accept(&self, message: &Message, encoded: &Encoded, deadline: Instant) -> Result<String> {
        if encoded.size > self.request_bytes {
            let text = format!("encoded it has {} bytes; this endpoint carries {}", encoded.size, self.request_bytes);
            return Err(Error::new(ErrorKind::TooLarge, "publish", text));
        }
        match tokio::time::timeout_at(deadline, self.queues.route(message.destination())).await {
            Ok(routed) => routed.map_err(|error| error.with_effect(Effect::NotDone)),
            Err(_) => {
                let text = "the queue could not be looked up in time";
                Err(Error::new(ErrorKind::Unavailable, "publish", text))
            }
        }
    }

    async fn send(
        &self,
        request: Request,
        deadline: Instant,
        sent: &mut Vec<(Vec<usize>, JoinHandle<Vec<PublishOutcome>>)>,
        outcomes: &mut [Option<PublishOutcome>],
    ) {
        let waiting = Arc::clone(&self.requests).acquire_owned();
        let permit = match tokio::time::timeout_at(deadline, waiting).await {
            Ok(Ok(permit)) => permit,
            _ => {
                let refused = || {
                    let text = "the requests before it took until the deadline";
                    Error::new(ErrorKind::RateLimited, "publish", text)
                };
                request.places.iter().for_each(|place| outcomes[*place] = Some(Err(refused())));
                return;
            }
        };
        let Request { url, entries, places, .. } = request;
        let client = self.sender.clone();
        // Not of the caller's future: dropping that must not cut a request off in the middle.
        let work = async move {
            let count = entries.len();
            let answers = tokio::time::timeout_at(deadline, send_batch(&client, &url, entries)).await;
            drop(permit);
            answers.unwrap_or_else(|_| {
                let late = || Err(Error::new(ErrorKind::Timeout, "publish", "no answer from SQS in time"));
                (0..count).map(|_| late()).collect()
            })
        };
        sent.push((places, tokio::spawn(work)));
    }

    /// Waits until nothing is on its way.
    pub(crate) async fn flush(&self, grace: Duration) -> Result<()> {
        match tokio::time::timeout(grace, self.requests.acquire_many(self.request_count)).await {
            Ok(_) => Ok(()),
            Err(_) => Err(Error::new(ErrorKind::Timeout, "close", "requests are still on their way")),
        }
    }

    /// Sends one dead letter and waits for the answer.
    pub(crate) async fn send_letter(
        &self,
        url: &str,
        message: &Message,
        letter: &str,
        timeout: Duration,
    ) -> PublishOutcome {
        let encoded = codec::encode(message, Some(letter));
        let mut request = Request::default();
        request.push(0, encoded);
        match tokio::time::timeout(timeout, send_batch(&self.sender, url, request.entries)).await {
            Ok(mut outcomes) => outcomes.pop().expect("one outcome per entry"),
            Err(_) => Err(Error::new(ErrorKind::Timeout, "dead_letter", "no answer from SQS in time")),
        }
    }
}

impl Request {
    fn push(&mut self, place: usize, encoded: Encoded) {
        self.bytes += encoded.size;
        self.places.push(place);
        let entry = SendMessageBatchRequestEntry::builder()
            .id(self.entries.len().to_string())
            .message_body(encoded.body)
            .set_message_attributes(Some(encoded.attributes))
            .build()
            .expect("id and body are set");
        self.entries.push(entry);
    }
}

/// One request; success of the whole says nothing of the entries.
async fn send_batch(client: &Client, url: &str, entries: Vec<SendMessageBatchRequestEntry>) -> Vec<PublishOutcome> {
    let count = entries.len();
    let answer = match client.send_message_batch().queue_url(url).set_entries(Some(entries)).send().await {
        Ok(answer) => answer,
        Err(error) => {
            let error = failed("publish", &error);
            return (0..count).map(|_| Err(error.duplicate())).collect();
        }
    };
    let mut outcomes: Vec<PublishOutcome> = (0..count).map(|_| Err(unmentioned("publish"))).collect();
    for entry in answer.successful() {
        if let Some(outcome) = entry.id().parse::<usize>().ok().and_then(|index| outcomes.get_mut(index)) {
            *outcome = Ok(Receipt { position: None, duplicate: false });
        }
    }
    for entry in answer.failed() {
        if let Some(outcome) = entry.id().parse::<usize>().ok().and_then(|index| outcomes.get_mut(index)) {
            *outcome = Err(failed_entry("publish", entry));
        }
    }
    outcomes
}

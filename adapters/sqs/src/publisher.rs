//! Publishing: requests of up to ten messages, several on their way at a time. A task for a request, not for a message.
//!
//! In mode `fifo` the messages of a key go one request after the other: keys are spread over lanes, and the requests of a
//! lane follow one another in call order.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anybroker_core::naming::fnv1a;
use anybroker_core::{
    Confirms, Destination, Effect, Error, ErrorKind, Message, PublishOrder, PublishOutcome, PublishTerms, Result,
    Timestamp,
};
use parking_lot::Mutex;
use tokio::sync::{Semaphore, oneshot};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::clients::Clients;
use crate::codec::{self, Carried};
use crate::config::Settings;
use crate::parcel::{self, BATCH, LONGEST_DELAY, Parcel, Route, lane_of};
use crate::topology::Topology;

/// How many requests to one FIFO queue may be on their way.
const LANES: u128 = 8;
/// The way of messages that have no order: their requests wait for no other.
const LOOSE: u8 = u8::MAX;

/// Sends to queues and topics.
pub(crate) struct Publisher {
    clients: Clients,
    topology: Arc<Topology>,
    /// Bounds the requests on their way, and thereby what is buffered.
    requests: Arc<Semaphore>,
    request_count: u32,
    is_fifo: bool,
    is_total: bool,
    /// Begins the deduplication ids of this publisher.
    nonce: String,
    sent: AtomicU64,
    /// In mode `fifo` batches are handed over one after the other: the first ones wait until a queue is found, and would
    /// overtake one another.
    handing_over: tokio::sync::Mutex<()>,
    /// The last request of each lane: the next one waits until it is done.
    lanes: Mutex<HashMap<(Route, u8), oneshot::Receiver<()>>>,
}

/// A request that is being filled.
struct Request {
    destination: Destination,
    parcels: Vec<Parcel>,
    /// Where in the batch each stood.
    places: Vec<usize>,
    bytes: usize,
}

/// A request on its way.
type Sent = (Vec<usize>, JoinHandle<Vec<PublishOutcome>>);

/// A message group of a destination: the same key elsewhere is another one.
type Place = (Destination, String);

/// Message groups of which an earlier message of the batch failed.
type Failed = Arc<Mutex<HashSet<Place>>>;

impl Publisher {
    pub(crate) fn new(clients: &Clients, topology: &Arc<Topology>, settings: &Settings) -> Self {
        Self {
            clients: clients.clone(),
            topology: Arc::clone(topology),
            requests: Arc::new(Semaphore::new(settings.requests)),
            request_count: u32::try_from(settings.requests).expect("the field's bounds are within u32"),
            is_fifo: settings.names.is_fifo,
            is_total: settings.is_total,
            nonce: uuid::Uuid::new_v4().simple().to_string(),
            sent: AtomicU64::new(0),
            handing_over: tokio::sync::Mutex::default(),
            lanes: Mutex::default(),
        }
    }

    /// Hands a batch over, in order; waits only while as many requests as allowed are on their way.
    pub(crate) async fn publish(&self, batch: &[Message], terms: &PublishTerms) -> Confirms {
        let deadline = Instant::now() + terms.timeout;
        let _turn = if self.is_fifo {
            // It is fair: who comes first is first.
            match tokio::time::timeout_at(deadline, self.handing_over.lock()).await {
                Ok(turn) => Some(turn),
                Err(_) => {
                    let late = |_| {
                        let text = "the batches before it took until the deadline";
                        Err(Error::new(ErrorKind::RateLimited, "publish", text).with_effect(Effect::NotDone))
                    };
                    return Confirms::ready(batch.iter().map(late).collect());
                }
            }
        } else {
            None
        };
        let failed = (self.is_fifo && terms.order == PublishOrder::Key).then(Failed::default);
        let mut outcomes: Vec<Option<PublishOutcome>> = Vec::new();
        outcomes.resize_with(batch.len(), || None);
        let mut sent: Vec<Sent> = Vec::new();
        let mut open: HashMap<(Route, u8), Request> = HashMap::new();
        // Of which one is not even sent. Earlier ones are not on their way yet, and nothing of this is in theirs.
        let mut refused: HashSet<Place> = HashSet::new();
        // Without a key it waits for nothing, nor does anything for it.
        let has_place = |message: &Message| failed.is_some() && (self.is_total || message.key().is_some());
        let place_of =
            |message: &Message| (message.destination().clone(), lane_of(message, self.is_total, String::new()).0);
        for (place, message) in batch.iter().enumerate() {
            if !refused.is_empty() && has_place(message) && refused.contains(&place_of(message)) {
                outcomes[place] = Some(Err(held_back()));
                continue;
            }
            let (route, parcel) = match self.accept(message, deadline).await {
                Ok(accepted) => accepted,
                Err(error) => {
                    if has_place(message) {
                        refused.insert(place_of(message));
                    }
                    let error = error.with("id", message.id()).with("destination", message.destination());
                    outcomes[place] = Some(Err(error));
                    continue;
                }
            };
            let lane = match &parcel.lane {
                Some((group, _)) if self.is_total || message.key().is_some() => {
                    u8::try_from(fnv1a(group.as_bytes()) % LANES).expect("few lanes")
                }
                _ => LOOSE,
            };
            let request = open.entry((route.clone(), lane)).or_insert_with(|| Request::new(message.destination()));
            let is_full =
                request.parcels.len() == BATCH || request.bytes + parcel.encoded.size > self.clients.request_bytes;
            if is_full && !request.parcels.is_empty() {
                let full = std::mem::replace(request, Request::new(message.destination()));
                request.push(place, parcel);
                self.send((route, lane), full, deadline, failed.as_ref(), &mut sent, &mut outcomes).await;
            } else {
                request.push(place, parcel);
            }
        }
        for (way, request) in open {
            self.send(way, request, deadline, failed.as_ref(), &mut sent, &mut outcomes).await;
        }
        if sent.is_empty() {
            return Confirms::ready(outcomes.into_iter().flatten().collect());
        }
        let places: Vec<_> = batch.iter().map(|message| message.destination().clone()).collect();
        let topology = Arc::clone(&self.topology);
        Confirms::waiting(async move {
            for (entries, answer) in sent {
                let answers = answer.await.expect("sending cannot panic, and nobody aborts it");
                for (place, answer) in entries.into_iter().zip(answers) {
                    if answer.as_ref().is_err_and(|error| error.kind() == ErrorKind::NotFound) {
                        topology.forget(&places[place]);
                    }
                    outcomes[place] = Some(answer);
                }
            }
            outcomes.into_iter().flatten().collect()
        })
    }

    /// Where the message goes and in what form, unless it is too large or the queue cannot be found in time.
    async fn accept(&self, message: &Message, deadline: Instant) -> Result<(Route, Parcel)> {
        let refused = |kind, text: String| Err(Error::new(kind, "publish", text).with_effect(Effect::NotDone));
        let route = match tokio::time::timeout_at(deadline, self.topology.route(message.destination())).await {
            Ok(routed) => routed.map_err(|error| error.with_effect(Effect::NotDone))?,
            Err(_) => return refused(ErrorKind::Unavailable, "the queue could not be looked up in time".into()),
        };
        let delay = message.delay().unwrap_or_default();
        if self.is_fifo && !delay.is_zero() {
            return refused(ErrorKind::Unsupported, crate::capabilities::NO_DELAY.into());
        }
        let mut carried = Carried::default();
        if let Some(ttl) = message.ttl() {
            carried.expires_at = Some(Timestamp::now().after(ttl));
        }
        let held = match &route {
            Route::Queue(_) => delay.min(LONGEST_DELAY),
            Route::Topic(_) => Duration::ZERO,
        };
        if held < delay {
            carried.not_before = Some(Timestamp::now().after(delay));
        }
        let mut parcel = Parcel::new(codec::encode(message, &carried, None));
        parcel.delay = held;
        let (size, most) = (parcel.encoded.size, self.clients.request_bytes);
        if size > most {
            return refused(ErrorKind::TooLarge, format!("encoded it has {size} bytes; this endpoint carries {most}"));
        }
        if self.is_fifo {
            // Of this call: SQS would swallow a second publish of an id within five minutes without telling so.
            let dedup = format!("{}-{}", self.nonce, self.sent.fetch_add(1, Ordering::Relaxed));
            parcel.lane = Some(lane_of(message, self.is_total, dedup));
        }
        Ok((route, parcel))
    }

    async fn send(
        &self,
        way: (Route, u8),
        request: Request,
        deadline: Instant,
        failed: Option<&Failed>,
        sent: &mut Vec<Sent>,
        outcomes: &mut [Option<PublishOutcome>],
    ) {
        let waiting = Arc::clone(&self.requests).acquire_owned();
        let Ok(Ok(permit)) = tokio::time::timeout_at(deadline, waiting).await else {
            for (place, parcel) in request.places.iter().zip(&request.parcels) {
                let group = parcel.lane.as_ref().map(|(group, _)| group.clone());
                note_failed(failed, group.map(|group| (request.destination.clone(), group)));
                let text = "the requests before it took until the deadline";
                outcomes[*place] = Some(Err(Error::new(ErrorKind::RateLimited, "publish", text)));
            }
            return;
        };
        let Request { destination, parcels, places, .. } = request;
        // In call order: the lane's next request waits for this one.
        let (done, turn) = match way.1 != LOOSE {
            true => {
                let (done, next) = oneshot::channel();
                (Some(done), self.lanes.lock().insert(way.clone(), next))
            }
            false => (None, None),
        };
        let (clients, failed) = (self.clients.clone(), failed.cloned());
        // Not of the caller's future: dropping that must not cut a request off in the middle.
        let work = async move {
            let is_late = match turn {
                Some(turn) => tokio::time::timeout_at(deadline, turn).await.is_err(),
                None => false,
            };
            let answers = if is_late {
                let text = "the requests before it took until the deadline";
                parcels.iter().map(|_| Err(Error::new(ErrorKind::RateLimited, "publish", text))).collect()
            } else {
                attempt(&clients, (&way.0, &destination), parcels, deadline, failed.as_ref()).await
            };
            drop(done);
            drop(permit);
            answers
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
}

/// Sends a request, without those whose key failed before.
async fn attempt(
    clients: &Clients,
    (route, destination): (&Route, &Destination),
    parcels: Vec<Parcel>,
    deadline: Instant,
    failed: Option<&Failed>,
) -> Vec<PublishOutcome> {
    let group_of =
        |parcel: &Parcel| failed.and(parcel.lane.as_ref()).map(|(group, _)| (destination.clone(), group.clone()));
    let groups: Vec<Option<Place>> = parcels.iter().map(group_of).collect();
    let is_held = |group: &Option<Place>| {
        group.as_ref().is_some_and(|group| failed.is_some_and(|failed| failed.lock().contains(group)))
    };
    let held: Vec<bool> = groups.iter().map(is_held).collect();
    let attempted: Vec<Parcel> =
        parcels.into_iter().zip(&held).filter(|(_, held)| !**held).map(|(parcel, _)| parcel).collect();
    let count = attempted.len();
    let answers = match count {
        0 => Vec::new(),
        _ => match tokio::time::timeout_at(deadline, parcel::send(clients, route, attempted, "publish")).await {
            Ok(answers) => answers,
            Err(_) => (0..count).map(|_| Err(Error::new(ErrorKind::Timeout, "publish", "no answer in time"))).collect(),
        },
    };
    let mut answers = answers.into_iter();
    let mut outcomes = Vec::with_capacity(groups.len());
    for (group, held) in groups.into_iter().zip(held) {
        let outcome = match held {
            true => Err(held_back()),
            false => answers.next().expect("one outcome per parcel"),
        };
        if outcome.is_err() {
            note_failed(failed, group);
        }
        outcomes.push(outcome);
    }
    outcomes
}

fn note_failed(failed: Option<&Failed>, group: Option<Place>) {
    if let (Some(failed), Some(group)) = (failed, group) {
        failed.lock().insert(group);
    }
}

fn held_back() -> Error {
    let text = "order: not attempted, because an earlier message of this key in the batch failed";
    Error::new(ErrorKind::Unavailable, "publish", text).with_effect(Effect::NotDone)
}

impl Request {
    fn new(destination: &Destination) -> Self {
        Self {
            destination: destination.clone(),
            parcels: Vec::with_capacity(BATCH),
            places: Vec::with_capacity(BATCH),
            bytes: 0,
        }
    }

    fn push(&mut self, place: usize, parcel: Parcel) {
        self.bytes += parcel.encoded.size;
        self.places.push(place);
        self.parcels.push(parcel);
    }
}

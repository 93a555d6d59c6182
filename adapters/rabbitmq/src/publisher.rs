//! Publishing: entries are handed to the client in call order, one channel for each destination.
//!
//! A missing exchange closes the channel that published to it, with everything on its way (AMQP 0-9-1). So destinations do
//! not share one.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use anybroker_core::{
    Bytes, Confirms, Destination, Effect, Error, ErrorKind, Message, PublishOrder, PublishTerms, Receipt, Result,
    Timestamp,
};
use parking_lot::Mutex;
use tokio::time::{Instant, timeout_at};

use crate::codec::{Hop, encode};
use crate::delay::millis;
use crate::error::{late, untaken};
use crate::link::Link;
use crate::outlet::{Answer, Board, Outlet, Parcel};
use crate::topology::Topology;

/// Destinations with a channel at the same time. A connection has 2,047 channels by default.
const MOST_ROUTES: usize = 256;

/// One destination.
struct Route {
    exchange: String,
    outlet: Outlet,
    /// Batches take their turn; also while the destination is looked up, or later ones would overtake.
    turn: tokio::sync::Mutex<()>,
    is_known: AtomicBool,
    /// Whether a group has taken something.
    has_stored: AtomicBool,
    used: AtomicU64,
}

/// Publishes on one connection.
pub(crate) struct Publisher {
    link: Arc<Link>,
    topology: Arc<Topology>,
    creates: bool,
    routes: Mutex<HashMap<Destination, Arc<Route>>>,
    clock: AtomicU64,
}

impl Publisher {
    pub(crate) fn new(link: Arc<Link>, topology: Arc<Topology>, creates: bool) -> Self {
        Self { link, topology, creates, routes: Mutex::default(), clock: AtomicU64::new(0) }
    }

    fn route(&self, destination: &Destination) -> Arc<Route> {
        let now = self.clock.fetch_add(1, Ordering::Relaxed);
        let mut routes = self.routes.lock();
        if !routes.contains_key(destination) {
            if routes.len() >= MOST_ROUTES {
                // The one that was idle for longest; when none is idle, there is one more for a while.
                let idle = routes.iter().filter(|(_, route)| Arc::strong_count(route) == 1 && route.outlet.is_idle());
                let oldest = idle.min_by_key(|(_, route)| route.used.load(Ordering::Relaxed));
                if let Some(oldest) = oldest.map(|(destination, _)| destination.clone()) {
                    routes.remove(&oldest);
                }
            }
            let route = Route {
                exchange: self.topology.names.exchange(destination),
                outlet: Outlet::new(Arc::clone(&self.link), "publish"),
                turn: tokio::sync::Mutex::default(),
                is_known: AtomicBool::new(false),
                has_stored: AtomicBool::new(false),
                used: AtomicU64::new(now),
            };
            routes.insert(destination.clone(), Arc::new(route));
        }
        let route = Arc::clone(&routes[destination]);
        route.used.store(now, Ordering::Relaxed);
        route
    }

    /// Whether nothing is on its way.
    pub(crate) fn is_idle(&self) -> bool {
        self.routes.lock().values().all(|route| route.outlet.is_idle())
    }

    pub(crate) async fn publish(&self, batch: Vec<Message>, terms: &PublishTerms) -> Confirms {
        let deadline = Instant::now() + terms.timeout;
        let board = Board::new(batch.len());
        let mut failed_keys: HashSet<(Destination, Bytes)> = HashSet::new();
        let mut scratch = Vec::with_capacity(64);
        let mut named = Vec::with_capacity(batch.len());
        let mut entries = batch.into_iter().enumerate().peekable();
        while let Some((_, first)) = entries.peek() {
            // Neighbours of one destination share a turn.
            let destination = first.destination().clone();
            let route = self.route(&destination);
            let turn = timeout_at(deadline, route.turn.lock()).await;
            while let Some((index, message)) = entries.next_if(|(_, next)| *next.destination() == destination) {
                let place = || message.key_bytes().map(|key| (destination.clone(), key.clone()));
                let sent = if turn.is_err() {
                    Err(late("publish").with_effect(Effect::NotDone))
                } else if !failed_keys.is_empty() && place().is_some_and(|place| failed_keys.contains(&place)) {
                    Err(held_back())
                } else {
                    self.send(&route, &message, (&board, index), &mut scratch, deadline).await
                };
                if let Err(error) = sent {
                    if terms.order == PublishOrder::Key {
                        failed_keys.extend(place());
                    }
                    board.note(index, Answer::Failed(error));
                }
                named.push((message.id().clone(), Arc::clone(&route), destination.clone()));
            }
        }
        let topology = Arc::clone(&self.topology);
        Confirms::waiting(async move {
            board.wait(deadline).await;
            let mut without_queue: Vec<(Arc<Route>, Error)> = Vec::new();
            let mut outcomes = Vec::with_capacity(named.len());
            for (index, (id, route, destination)) in named.into_iter().enumerate() {
                let outcome = match board.take(index, "publish") {
                    Answer::Stored => {
                        route.has_stored.store(true, Ordering::Relaxed);
                        Ok(Receipt { position: None, duplicate: false })
                    }
                    Answer::Unroutable => {
                        let known = without_queue.iter().find(|(other, _)| Arc::ptr_eq(other, &route));
                        let error = match known {
                            Some((_, error)) => error.duplicate(),
                            None => {
                                let error = takes_nothing(&topology, &route, deadline).await;
                                without_queue.push((Arc::clone(&route), error.duplicate()));
                                error
                            }
                        };
                        Err(error)
                    }
                    Answer::Failed(error) => {
                        if error.kind() == ErrorKind::NotFound {
                            // Deleted underneath: the next publish looks again.
                            route.is_known.store(false, Ordering::Release);
                        }
                        Err(error)
                    }
                };
                outcomes.push(outcome.map_err(|error| error.with("id", id).with("destination", destination)));
            }
            outcomes
        })
    }

    async fn send(
        &self,
        route: &Route,
        message: &Message,
        place: (&Arc<Board>, usize),
        scratch: &mut Vec<u8>,
        deadline: Instant,
    ) -> Result<()> {
        if !route.is_known.load(Ordering::Acquire) {
            let ensured = self.topology.ensure(message.destination(), self.creates, "publish", deadline).await;
            ensured.map_err(|error| error.with_effect(Effect::NotDone))?;
            route.is_known.store(true, Ordering::Release);
        }
        let begins = message.delay().unwrap_or_default();
        let after = |wait: Duration| Timestamp::now().after(begins.saturating_add(wait)).as_millis();
        let is_log = self.topology.queue.is_log();
        let hop = (message.ttl().is_some() || is_log).then(|| Hop {
            expires: message.ttl().map_or(0, after),
            published: if is_log { after(Duration::ZERO) } else { 0 },
            ..Hop::default()
        });
        let mut properties = encode(message, hop.as_ref(), scratch);
        let payload = message.payload().cloned().unwrap_or_default();
        let delay = message.delay().filter(|delay| !delay.is_zero());
        let (exchange, routing_key) = match delay {
            None => (route.exchange.clone(), String::new()),
            Some(delay) => {
                let waiting = self.topology.ensure_waiting(&route.exchange, true, delay, "publish", deadline).await;
                (String::new(), waiting.map_err(|error| error.with_effect(Effect::NotDone))?)
            }
        };
        if let Some(wait) = delay.or(message.ttl().filter(|_| self.topology.queue.buries_expired())) {
            properties = properties.with_expiration(expiration(wait));
        }
        let parcel = Parcel {
            exchange: exchange.as_str().into(),
            routing_key: routing_key.as_str().into(),
            properties,
            payload,
        };
        route.outlet.send(parcel, place, deadline).await
    }
}

/// A time as AMQP's `expiration`: milliseconds as a text, below 2^32.
pub(crate) fn expiration(wait: Duration) -> lapin::types::ShortString {
    millis(wait).min(u64::from(u32::MAX)).to_string().as_str().into()
}

/// Why nothing took a message. A server that was killed may serve before all its queues and streams do, and a message finds none
/// until then; nobody has deleted them.
async fn takes_nothing(topology: &Topology, route: &Route, deadline: Instant) -> Error {
    if route.has_stored.load(Ordering::Relaxed) && route.outlet.is_young() {
        // Also the list of what is bound may not be whole yet.
        let text = "the destination had a group before the connection was lost, and takes nothing yet: its server may be starting";
        return Error::new(ErrorKind::Unavailable, "publish", text).with_effect(Effect::NotDone);
    }
    let (found, none, not_yet) = if topology.queue.is_log() {
        // The next publish looks again.
        route.is_known.store(false, Ordering::Release);
        let found = topology.is_there(&route.exchange, "publish", deadline).await;
        (found, "the destination has no stream any more", "the destination's stream takes nothing yet")
    } else {
        let found = topology.has_group(&route.exchange, "publish", deadline).await;
        let none = "the destination has no group, and nothing is kept before one exists; declare a group first";
        (found, none, "the destination's groups take nothing yet")
    };
    untaken(found, "publish", none, not_yet)
}

fn held_back() -> Error {
    let text = "order: not attempted, because an earlier message of this key in the batch failed";
    Error::new(ErrorKind::Unavailable, "publish", text).with_effect(Effect::NotDone)
}

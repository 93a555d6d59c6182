//! Receiving and settling.

use std::collections::HashMap;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::time::Duration;

use anybroker_core::{
    AckLevel, Delivery, DeliveryContext, DeliveryFacts, Error, ErrorKind, Lane, Position, Received, Result,
    SettleError, Settlement, Settler, Settling, SubscribeSpec, Subscription, Timestamp, Token,
};
use async_trait::async_trait;
use parking_lot::Mutex;
use tokio::task::{JoinHandle, spawn_blocking};
use tokio::time::{Instant, timeout_at};

use crate::files::{self, Letter, Mark, Topic, io_error};

/// How often folders are looked at while nothing comes.
const PAUSE: Duration = Duration::from_millis(10);

/// How much longer than it was to wait a receive stays with a disk that is slow. What is read after that is the next one's.
const SLOW: Duration = Duration::from_secs(1);

/// One member of a group: what it holds.
pub(crate) struct Member {
    spec: SubscribeSpec,
    /// A destination, and its group's folder.
    places: Vec<(Topic, PathBuf)>,
    /// By number of the delivery: its place, and its mark in `held`.
    held: Mutex<HashMap<u64, (usize, Mark)>>,
    next: AtomicU64,
    closed: AtomicBool,
    context: OnceLock<Weak<DeliveryContext>>,
}

/// The receiving end.
pub(crate) struct SpoolSubscription {
    member: Arc<Member>,
    context: Arc<DeliveryContext>,
    paused: bool,
    first: usize,
    /// What is being read. Files are not touched on the threads of the runtime, where everybody else would stand still too.
    taking: Option<JoinHandle<Result<Vec<Delivery>>>>,
}

impl SpoolSubscription {
    pub(crate) fn new(spec: SubscribeSpec, places: Vec<(Topic, PathBuf)>) -> Self {
        let (held, next) = (Mutex::default(), AtomicU64::new(0));
        let (closed, context) = (AtomicBool::new(false), OnceLock::new());
        let member = Arc::new(Member { spec, places, held, next, closed, context });
        let settler: Arc<dyn Settler> = member.clone();
        let context = DeliveryContext::new(member.spec.group.clone(), member.spec.max_attempts, settler);
        // Weak: the context holds the member already.
        let _ = member.context.set(Arc::downgrade(&context));
        Self { member, context, paused: false, first: 0, taking: None }
    }

    pub(crate) fn member(&self) -> Weak<Member> {
        Arc::downgrade(&self.member)
    }

    /// What is there, read by a thread for that. A receive that is dropped meanwhile has taken nothing: the next one has it, or the
    /// end of the subscription, which gives it back.
    fn take(&mut self, max: usize) -> &mut JoinHandle<Result<Vec<Delivery>>> {
        self.taking.get_or_insert_with(|| {
            self.first = self.first.wrapping_add(1) % self.member.places.len();
            let (member, context, first) = (Arc::clone(&self.member), Arc::clone(&self.context), self.first);
            spawn_blocking(move || member.take(&context, first, max))
        })
    }
}

impl Member {
    fn is_open(&self) -> Result<()> {
        if self.closed.load(Ordering::Acquire) {
            return Err(Error::closed("receive").with("group", &self.spec.group));
        }
        Ok(())
    }

    fn take(&self, context: &Arc<DeliveryContext>, first: usize, max: usize) -> Result<Vec<Delivery>> {
        let mut taken = Vec::new();
        let places = self.places.len();
        for round in 0..2 {
            for offset in 0..places {
                // Everyone gets an equal share first; what is left over goes to whoever has more.
                let limit = if round == 0 { max.min(taken.len() + max.div_ceil(places)) } else { max };
                let place = (first + offset) % places;
                self.take_from(place, limit, context, &mut taken).map_err(|error| {
                    let (topic, _) = &self.places[place];
                    io_error("receive", error).with("destination", &topic.name).with("group", &self.spec.group)
                })?;
            }
            if taken.len() >= max || places == 1 {
                break;
            }
        }
        Ok(taken)
    }

    fn take_from(
        &self,
        place: usize,
        limit: usize,
        context: &Arc<DeliveryContext>,
        taken: &mut Vec<Delivery>,
    ) -> io::Result<()> {
        let (topic, group) = &self.places[place];
        let (ready, held) = (group.join("ready"), group.join("held"));
        let now = Timestamp::now();
        // What somebody held for too long comes back, whoever that was. The attempt stays: nobody said that it failed.
        for mark in files::marks(&held)?.into_iter().filter(|mark| mark.until <= now.as_millis()) {
            files::renamed(&held.join(mark.name()), &ready.join(mark.due().name()))?;
        }
        let waiting = files::marks(&ready)?;
        for mark in waiting.into_iter().filter(|mark| mark.until <= now.as_millis()) {
            if taken.len() >= limit {
                break;
            }
            let lease_until = now.after(self.spec.lease);
            let mine = Mark { until: lease_until.as_millis(), ..mark };
            if !files::renamed(&ready.join(mark.name()), &held.join(mine.name()))? {
                continue;
            }
            let message = topic.message(mark.number)?;
            let number = self.next.fetch_add(1, Ordering::Relaxed);
            {
                let mut held = self.held.lock();
                // Whoever closes gives back what stands here; what comes later is given back here.
                if self.closed.load(Ordering::Acquire) {
                    self.put_back(place, mine, mine.due())?;
                    break;
                }
                held.insert(number, (place, mine));
            }
            let mut facts = DeliveryFacts::new(Token::Pair(number, 0));
            facts.attempt = mark.attempt;
            facts.position = Some(Position::new(mark.number));
            facts.lease_until = Some(lease_until);
            facts.lane.index = u32::try_from(place).unwrap_or(u32::MAX);
            taken.push(Delivery::new(message, facts, context));
        }
        Ok(())
    }
}

#[async_trait]
impl Subscription for SpoolSubscription {
    fn context(&self) -> &Arc<DeliveryContext> {
        &self.context
    }

    async fn receive(&mut self, max: usize, wait: Duration) -> Result<Received> {
        let deadline = Instant::now() + wait;
        let max = if self.paused { 0 } else { max };
        loop {
            self.member.is_open()?;
            let Ok(taken) = timeout_at(deadline + SLOW, self.take(max)).await else { return Ok(Received::default()) };
            self.taking = None;
            let mut deliveries = taken.map_err(|error| io_error("receive", error.into()))??;
            // Read for an earlier receive, which wanted more: what is dropped goes back.
            deliveries.truncate(max);
            if !deliveries.is_empty() || Instant::now() >= deadline {
                return Ok(Received { deliveries, events: Vec::new() });
            }
            tokio::time::sleep_until(deadline.min(Instant::now() + PAUSE)).await;
        }
    }

    async fn pause(&mut self, paused: bool) -> Result<()> {
        self.paused = paused;
        Ok(())
    }

    async fn close(self: Box<Self>, _grace: Duration) -> Result<()> {
        // Settles are done in the call: there is nothing to flush. The drop does the rest.
        Ok(())
    }
}

impl Drop for SpoolSubscription {
    fn drop(&mut self) {
        self.member.close();
    }
}

impl Member {
    /// Ends it: what it holds goes back at once, uncounted, and is stale for whoever still has it in hand.
    pub(crate) fn close(&self) {
        self.closed.store(true, Ordering::Release);
        if let Some(context) = self.context.get().and_then(Weak::upgrade) {
            context.close();
        }
        let held = std::mem::take(&mut *self.held.lock());
        for (place, mark) in held.into_values() {
            // What cannot be given back comes back by its lease.
            let _ = self.put_back(place, mark, mark.due());
        }
    }

    fn put_back(&self, place: usize, held: Mark, ready: Mark) -> io::Result<bool> {
        let group = &self.places[place].1;
        files::renamed(&group.join("held").join(held.name()), &group.join("ready").join(ready.name()))
    }

    /// What is held under that token, while its lease lasts.
    fn claim(&self, token: &Token, keep: bool) -> Option<(usize, Mark)> {
        let Token::Pair(number, _) = token else { return None };
        let mut held = self.held.lock();
        let found = if keep { held.get(number).copied() } else { held.remove(number) };
        found.filter(|(_, mark)| mark.until > Timestamp::now().as_millis())
    }

    /// Whether it was still this member's to settle.
    fn settle_one(&self, place: usize, mark: Mark, settlement: &Settlement) -> io::Result<bool> {
        let held = self.places[place].1.join("held").join(mark.name());
        match settlement {
            Settlement::Ack => files::removed(&held),
            Settlement::Release => self.put_back(place, mark, mark.due()),
            Settlement::Nack(nack) => {
                // Up to the next millisecond: a delay is never early.
                let late = i64::from(!nack.delay.is_zero());
                let until = Timestamp::now().after(nack.delay).as_millis() + late;
                self.put_back(place, mark, Mark { until, attempt: mark.attempt + 1, ..mark })
            }
            Settlement::DeadLetter(verdict) => {
                if !held.exists() {
                    return Ok(false);
                }
                let letter = Letter {
                    reason: verdict.reason.to_string(),
                    error_type: verdict.error_type.as_ref().map(ToString::to_string),
                    detail: verdict.detail.as_ref().map(ToString::to_string),
                    attempts: mark.attempt,
                    redrives: mark.redrives,
                    at: Timestamp::now().as_millis(),
                };
                // The letter is there before the mark goes: a crash in between doubles it and loses nothing.
                let file = self.places[place].1.join("dead").join(format!("{:020}", mark.number));
                files::write_whole(&file, &serde_json::to_vec(&letter)?)?;
                files::removed(&held)
            }
        }
    }
}

#[async_trait]
impl Settler for Member {
    fn settle(&self, batch: Vec<(Delivery, Settlement)>) -> Settling {
        let settle = |(delivery, settlement): (Delivery, Settlement)| {
            let done = match self.claim(delivery.token(), false) {
                Some((place, mark)) => self.settle_one(place, mark, &settlement),
                None => Ok(false),
            };
            match done {
                Ok(true) => Ok(AckLevel::Confirmed),
                Ok(false) => Err(stale("settle", delivery)),
                Err(error) => Err(SettleError::new(delivery, io_error("settle", error))),
            }
        };
        Settling::ready(batch.into_iter().map(settle).collect())
    }

    async fn extend(&self, deliveries: &[&Delivery], lease: Duration) -> Vec<Result<()>> {
        let extend = |delivery: &&Delivery| {
            let (Token::Pair(number, _), Some((place, mark))) = (delivery.token(), self.claim(delivery.token(), true))
            else {
                return Err(stale_error("extend", delivery));
            };
            let longer = Mark { until: Timestamp::now().after(lease).as_millis(), ..mark };
            let held = self.places[place].1.join("held");
            match files::renamed(&held.join(mark.name()), &held.join(longer.name())) {
                Ok(true) => {
                    self.held.lock().insert(*number, (place, longer));
                    Ok(())
                }
                Ok(false) => Err(stale_error("extend", delivery)),
                Err(error) => Err(io_error("extend", error)),
            }
        };
        deliveries.iter().map(extend).collect()
    }

    fn abandoned(&self, token: &Token, _lane: Lane) {
        if let Some((place, mark)) = self.claim(token, false) {
            let _ = self.put_back(place, mark, mark.due());
        }
    }
}

fn stale(operation: &'static str, delivery: Delivery) -> SettleError {
    let error = stale_error(operation, &delivery);
    SettleError::new(delivery, error)
}

fn stale_error(operation: &'static str, delivery: &Delivery) -> Error {
    Error::new(ErrorKind::StaleDelivery, operation, "its lease, or its group, is gone")
        .with("group", delivery.group())
        .with("id", delivery.message().id())
}

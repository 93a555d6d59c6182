//! Receiving.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::time::Duration;

use anybroker_core::{
    AttemptCount, DeliveryContext, Error, Lane, Order, Received, Result, SubscribeSpec, Subscription,
    SubscriptionEvent, Timestamp, TopologyMode, TopologySpec,
};
use async_trait::async_trait;
use rand::RngExt;
use rand::seq::SliceRandom;
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::profile::Disturbance;
use crate::store::{LaneEvent, Return, Seat, Store, Taking, no_group};
use crate::topology;

/// One member of a group: its seats in the lanes of its destinations.
pub(crate) struct Membership {
    pub(crate) store: Arc<Store>,
    pub(crate) spec: SubscribeSpec,
    pub(crate) seats: Vec<Seat>,
    wake: Arc<Notify>,
    /// Receives that bring something before a profile lets something go wrong; endless without a seed.
    until_disturbed: AtomicU64,
    closed: AtomicBool,
    context: OnceLock<Weak<DeliveryContext>>,
}

/// The receiving end of a [`Membership`].
pub(crate) struct MemorySubscription {
    membership: Arc<Membership>,
    context: Arc<DeliveryContext>,
    paused: bool,
    /// Which seat is served first; it moves on, so that no destination starves another.
    first: usize,
}

/// Joins the group in every destination of the spec.
pub(crate) fn subscribe(store: &Arc<Store>, spec: SubscribeSpec) -> Result<MemorySubscription> {
    let now = store.clock.now();
    let mut names = spec.destinations.clone();
    names.sort_unstable();
    names.dedup();
    for name in &names {
        let topology = TopologySpec::group(name, &spec.group).with_start(spec.start);
        match spec.topology {
            TopologyMode::Declare => drop(topology::declare(store, &topology)),
            _ => topology::verify(store, &topology, "subscribe")?,
        }
    }
    let wake = Arc::new(Notify::new());
    let mut membership = Membership {
        store: Arc::clone(store),
        seats: Vec::new(),
        wake,
        until_disturbed: AtomicU64::new(match store.settings.seed {
            0 => u64::MAX,
            _ => store.random.lock().random_range(store.settings.undisturbed()),
        }),
        closed: AtomicBool::new(false),
        context: OnceLock::new(),
        spec,
    };
    for name in &names {
        let joined = store.topic(name, "subscribe")?.join(&membership.spec, &membership.wake, now);
        match joined {
            Some(Some(seats)) => membership.seats.extend(seats),
            refused => {
                membership.leave();
                return Err(match refused {
                    None => no_group(name, &membership.spec.group, "subscribe"),
                    Some(_) => topology::other_order(name, &membership.spec.group),
                });
            }
        }
    }
    let membership = Arc::new(membership);
    let settler = Arc::clone(&membership);
    let context = DeliveryContext::new(membership.spec.group.clone(), membership.spec.max_attempts, settler);
    membership.context.set(Arc::downgrade(&context)).expect("set once, here");
    Ok(MemorySubscription { membership, context, paused: false, first: 0 })
}

impl Membership {
    /// Ends it: what is out comes back, uncounted, and is stale for whoever still holds it.
    pub(crate) fn close(&self) {
        if self.closed.swap(true, Ordering::AcqRel) {
            return;
        }
        if let Some(context) = self.context.get().and_then(Weak::upgrade) {
            context.close();
        }
        self.leave();
        self.wake.notify_one();
    }

    /// Where lanes belong to members: this one is alive, and those that held something for too long are not.
    fn settle_lanes(&self, now: Timestamp) {
        for seat in &self.seats {
            let mut lane = seat.topic.lane(seat.lane);
            let Some((group, log)) = lane.seated(seat) else { continue };
            group.advance(log, now);
            let (dead, suspects) = (group.is_dead(seat.member), group.take_suspects());
            drop(lane);
            if dead {
                seat.topic.set_dead(seat, seat.member, false, now);
            }
            for member in suspects.into_iter().filter(|member| *member != seat.member) {
                seat.topic.set_dead(seat, member, true, now);
            }
        }
    }

    /// What a profile lets go wrong now and then, where there is a seed.
    fn disturb(&self, disturbance: Disturbance, now: Timestamp) -> Vec<SubscriptionEvent> {
        let settings = &self.store.settings;
        if self.until_disturbed.load(Ordering::Relaxed) > 0 || disturbance == Disturbance::None {
            return Vec::new();
        }
        let mut random = self.store.random.lock();
        self.until_disturbed.store(random.random_range(settings.undisturbed()), Ordering::Relaxed);
        let by = random.random_range(0..8);
        drop(random);
        if disturbance == Disturbance::Rebalance {
            self.seats.iter().for_each(|seat| seat.topic.shift(seat, by, now));
            return Vec::new();
        }
        // A consumer that is gone is forgotten where counts are volatile, and counted as a failure otherwise.
        let how = match settings.profile.manner().attempts {
            AttemptCount::Volatile => Return::Gone,
            _ => Return::Lost,
        };
        for seat in &self.seats {
            let mut lane = seat.topic.lane(seat.lane);
            if let Some((group, log)) = lane.seated(seat) {
                group.disconnect(log, seat.member, &how, now);
            }
        }
        let cause = format!("the connection was lost (profile {}, by its seed)", settings.profile.word());
        vec![SubscriptionEvent::Degraded { cause }, SubscriptionEvent::Recovered]
    }

    fn leave(&self) {
        let now = self.store.clock.now();
        for seats in self.seats.chunk_by(|one, other| Arc::ptr_eq(&one.topic, &other.topic)) {
            seats[0].topic.leave(seats.iter(), now);
        }
    }
}

impl MemorySubscription {
    /// For the connection, which closes it.
    pub(crate) fn member(&self) -> Weak<Membership> {
        Arc::downgrade(&self.membership)
    }

    /// Takes what is there. Where there is nothing: until when there surely is nothing, unless it is woken.
    fn take(&mut self, max: usize) -> Result<Taken> {
        let membership = &*self.membership;
        if membership.closed.load(Ordering::Acquire) {
            return Err(Error::closed("receive").with("group", &membership.spec.group));
        }
        let now = membership.store.clock.now();
        let manner = membership.store.settings.profile.manner();
        let max = if self.paused { 0 } else { max.min(manner.receive_batch) };
        let lease_until = membership.store.clock.deadline(membership.spec.lease);
        let seats = &membership.seats;
        let mut events = membership.disturb(manner.disturbance, now);
        if manner.lanes > 1 {
            membership.settle_lanes(now);
        }
        let mut out = Vec::with_capacity(max.min(1024));
        let mut due: Option<Timestamp> = None;
        // Everyone gets an equal share first; what is left over goes to whoever has more.
        let share = max.div_ceil(seats.len().max(1));
        for round in 0..2 {
            for offset in 0..seats.len() {
                let number = (self.first + offset) % seats.len();
                let seat = &seats[number];
                let mut lane = seat.topic.lane(seat.lane);
                let Some((group, log)) = lane.seated(seat) else {
                    return Err(no_group(&seat.topic.name, &membership.spec.group, "receive"));
                };
                group.advance(log, now);
                let number = u32::try_from(number).expect("fewer seats than a u32 counts");
                let mut taking = Taking {
                    member: seat.member,
                    seat: number,
                    max_attempts: membership.spec.max_attempts,
                    now,
                    lease_until,
                    context: &self.context,
                    limit: if round == 0 { max.min(out.len() + share) } else { max },
                    out: &mut out,
                };
                group.take(log, &mut taking);
                events.extend(group.events(seat.member).into_iter().map(|event| told(event, number, seat)));
                if out.is_empty() {
                    group.wait(seat.member);
                    due = due.into_iter().chain(group.next_due()).min();
                }
                seat.topic.tell_room(&mut lane);
            }
            if out.len() >= max || out.is_empty() || seats.len() == 1 {
                break;
            }
        }
        self.first = self.first.wrapping_add(1) % seats.len().max(1);
        if manner.shuffles && membership.store.settings.seed != 0 && membership.spec.order == Order::None {
            out.shuffle(&mut *membership.store.random.lock());
        }
        if !out.is_empty() && manner.disturbance != Disturbance::None {
            membership.until_disturbed.fetch_sub(1, Ordering::Relaxed);
        }
        if out.is_empty() && events.is_empty() {
            return Ok(Taken::Nothing(due));
        }
        Ok(Taken::Some(Received { deliveries: out, events }))
    }
}

/// A lane's event as the member sees it.
fn told(event: LaneEvent, index: u32, seat: &Seat) -> SubscriptionEvent {
    match event {
        LaneEvent::Assigned { epoch } => SubscriptionEvent::Assigned {
            lane: Lane { index, epoch },
            name: format!("{}/{}", seat.topic.name, seat.lane),
        },
        LaneEvent::Revoking { epoch, deadline } => {
            SubscriptionEvent::Revoking { lane: Lane { index, epoch }, deadline }
        }
        LaneEvent::Lost { epoch } => SubscriptionEvent::Lost { lane: Lane { index, epoch } },
    }
}

enum Taken {
    Some(Received),
    Nothing(Option<Timestamp>),
}

#[async_trait]
impl Subscription for MemorySubscription {
    fn context(&self) -> &Arc<DeliveryContext> {
        &self.context
    }

    async fn receive(&mut self, max: usize, wait: Duration) -> Result<Received> {
        // Taking and answering are one step without an await between them: a dropped call has taken nothing.
        let mut deadline = None;
        loop {
            let due = match self.take(max)? {
                Taken::Some(received) => return Ok(received),
                Taken::Nothing(_) if wait.is_zero() => return Ok(Received::default()),
                Taken::Nothing(due) => due,
            };
            let deadline = *deadline.get_or_insert_with(|| Instant::now() + wait);
            let clock = &self.membership.store.clock;
            tokio::select! {
                () = self.membership.wake.notified() => {}
                () = async { clock.sleep_until(due.unwrap_or_default()).await }, if due.is_some() => {}
                () = tokio::time::sleep_until(deadline) => return Ok(Received::default()),
            }
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

impl Drop for MemorySubscription {
    fn drop(&mut self) {
        self.membership.close();
    }
}

//! The loop of one subscription: receives, settles, keeps leases, follows events, drains.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use anybroker_core::{
    Delivery, Error, ErrorKind, Received, Result, SettleOutcome, Settlement, Subscriber, SubscriptionEvent, Timestamp,
};
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use crate::breaker::Gate;
use crate::drain::Stage;
use crate::handler::BoxFuture;
use crate::lanes::LaneId;
use crate::rules::Cause;
use crate::settle::{Again, Flight, Notes};
use crate::slot::{self, Concluding, Shared};
use crate::watch::Letters;
use crate::{Counts, SubscriptionReport};

/// How long one receive waits. Only a bound: it is dropped when the worker stops.
const WAIT: Duration = Duration::from_secs(30);
/// Receive errors are retried after that long, then twice as long, up to the longest.
const FIRST_BACKOFF: Duration = Duration::from_millis(100);
const LONGEST_BACKOFF: Duration = Duration::from_secs(30);
/// How long handlers that were told to end are waited for: those that compute without an `await` cannot be dropped.
const STUCK: Duration = Duration::from_secs(1);
/// How long the last settlements may take.
const LAST_SETTLEMENTS: Duration = Duration::from_secs(5);

/// One subscription at work.
pub(crate) struct Loop {
    pub(crate) shared: Arc<Shared>,
    pub(crate) concluding: mpsc::UnboundedReceiver<Concluding>,
    /// Of this subscription; the worker's is followed.
    pub(crate) stage: watch::Sender<Stage>,
    pub(crate) releases: bool,
    pub(crate) grace: Duration,
    /// Told when dead letters were written, one for each destination.
    pub(crate) letters: Vec<Arc<Letters>>,
    pub(crate) work: Work,
}

/// What is on its way.
#[derive(Default)]
pub(crate) struct Work {
    pub(crate) flights: FuturesUnordered<Flight>,
    pub(crate) again: Vec<Again>,
    /// Concluded, while their leases are still being extended.
    pub(crate) concluded: Vec<Concluded>,
    pub(crate) renewal: Option<BoxFuture<'static, Renewed>>,
    pub(crate) renew_at: Option<Timestamp>,
    revoking: Vec<(anybroker_core::Lane, Timestamp)>,
    receive_failures: u32,
    receive_at: Option<Timestamp>,
    alarm: Option<(Timestamp, BoxFuture<'static, ()>)>,
    paused: bool,
    /// Nothing is tried again any more.
    pub(crate) last: bool,
    pub(crate) counts: Counts,
}

pub(crate) struct Concluded {
    pub(crate) delivery: Arc<Delivery>,
    pub(crate) settlement: Settlement,
    pub(crate) cause: Option<Box<Cause>>,
    /// The lane that waits for its outcome.
    pub(crate) lane: Option<LaneId>,
}

pub(crate) type Renewed = Vec<(Arc<Delivery>, Result<()>)>;

#[allow(clippy::large_enum_variant, reason = "moved, not kept: a box would be an allocation per message")]
enum Event {
    Concluding(Concluding),
    Settled(Vec<SettleOutcome>, Notes),
    Renewed(Renewed),
    Alarm,
}

impl Loop {
    /// Runs until it is told to stop or cannot go on.
    pub(crate) async fn run(
        mut self,
        mut subscriber: Subscriber,
        mut worker: watch::Receiver<Stage>,
    ) -> SubscriptionReport {
        let (destinations, group) = (subscriber.spec().destinations.clone(), subscriber.spec().group.clone());
        let mut slots = JoinSet::new();
        for id in 0..self.shared.wakers.len() {
            slots.spawn(slot::run(Arc::clone(&self.shared), id));
        }
        self.schedule_renewal();
        let error = self.receive(&mut subscriber, &mut worker).await;
        if let Some(error) = &error {
            tracing::error!(consumer_group = %group, %error, "the subscription ends");
        }
        self.drain(slots, &mut worker).await;
        let close_error = subscriber.close(self.grace.max(STUCK)).await.err();
        if let Some(error) = close_error.as_ref().filter(|_| error.is_none()) {
            tracing::warn!(consumer_group = %group, %error, "closing failed; what is unsettled comes back by lease");
        }
        SubscriptionReport { destinations, group, counts: self.work.counts, error, close_error }
    }

    /// Receives until the worker stops (`None`) or the subscription cannot go on.
    async fn receive(&mut self, subscriber: &mut Subscriber, worker: &mut watch::Receiver<Stage>) -> Option<Error> {
        loop {
            self.follow_gate(subscriber).await;
            let want = self.want();
            let mut receiving = pin!(receive(subscriber, want));
            let received = loop {
                tokio::select! {
                    biased;
                    () = left(worker, Stage::Running) => return None,
                    event = self.event() => {
                        self.on(event);
                        if self.must_look(want) {
                            break None;
                        }
                    }
                    received = &mut receiving => break Some(received),
                }
            };
            match received {
                Some(Ok(received)) => self.arrived(received),
                Some(Err(error)) if is_fatal(error.kind()) => return Some(error),
                Some(Err(error)) => self.back_off(&error),
                None => {}
            }
        }
    }

    /// How many deliveries to ask for now.
    fn want(&self) -> usize {
        if self.work.receive_at.is_some() {
            return 0;
        }
        let mut state = self.shared.state.lock();
        if matches!(state.gate(), Some(Gate::Open(_))) && !self.work.paused {
            // The broker could not be told to pause: then nothing is asked for.
            return 0;
        }
        let room = state.room();
        state.hungry = room == 0;
        room
    }

    /// Whether what is asked for is not what should be asked for any more.
    fn must_look(&self, want: usize) -> bool {
        let open = matches!(self.shared.state.lock().gate(), Some(Gate::Open(_)));
        open != self.work.paused || (want == 0) != (self.want() == 0)
    }

    /// Pauses the subscription when the breaker has opened, and resumes it when it is half-open.
    async fn follow_gate(&mut self, subscriber: &mut Subscriber) {
        let open = matches!(self.shared.state.lock().gate(), Some(Gate::Open(_)));
        if open == self.work.paused {
            return;
        }
        if open {
            self.work.counts.breaker_opened += 1;
            tracing::warn!(consumer_group = %subscriber.spec().group, "circuit breaker open: consumption pauses");
            let waiting = self.shared.state.lock().lanes.take_all();
            self.release(waiting);
        } else {
            tracing::info!(consumer_group = %subscriber.spec().group, "circuit breaker half-open: consumption resumes");
        }
        match subscriber.pause(open).await {
            Ok(()) => self.work.paused = open,
            Err(error) => self.back_off(&error),
        }
    }

    fn arrived(&mut self, received: Received) {
        self.work.receive_failures = 0;
        if !received.deliveries.is_empty() {
            let until = self.shared.clock.now().after(self.shared.rules.lease);
            let stragglers = self.shared.state.lock().arrive(received.deliveries, until);
            self.release(stragglers);
            self.shared.wake();
        }
        received.events.into_iter().for_each(|event| self.happened(event));
        self.shared.state.lock().lanes.received();
    }

    fn happened(&mut self, event: SubscriptionEvent) {
        let telemetry = Arc::clone(&self.shared.scope.telemetry);
        match event {
            SubscriptionEvent::Assigned { lane, name } => {
                telemetry.rebalance("assigned", lane, &name);
                // A revocation may be called off: then the lane is assigned again in its old epoch.
                self.work.revoking.retain(|(revoked, _)| revoked.index != lane.index);
                self.shared.restore(lane);
            }
            SubscriptionEvent::Revoking { lane, deadline } => {
                telemetry.rebalance("revoking", lane, "");
                self.work.counts.revoked += 1;
                // What has not begun goes back at once; what runs may end until the deadline.
                let waiting = self.shared.state.lock().lanes.take_lane(lane);
                self.release(waiting);
                self.hurry(|again| again.held.delivery().lane() == lane);
                self.work.revoking.push((lane, deadline));
            }
            SubscriptionEvent::Lost { lane } => {
                telemetry.rebalance("lost", lane, "");
                let waiting = self.shared.state.lock().lanes.take_lane(lane);
                self.work.counts.stale += waiting.len() as u64;
                drop(waiting);
                self.forget(|again| again.held.delivery().lane() == lane);
                let announced = self.work.revoking.len();
                self.work.revoking.retain(|(revoked, _)| *revoked != lane);
                self.work.counts.revoked += u64::from(announced == self.work.revoking.len());
                // Somebody else has the lane: what still runs here would run twice at once.
                self.shared.interrupt(lane);
            }
            SubscriptionEvent::Degraded { cause } => {
                tracing::warn!(consumer_group = %telemetry.group(), cause, "subscription degraded");
            }
            SubscriptionEvent::Recovered => {
                tracing::info!(consumer_group = %telemetry.group(), "subscription recovered");
            }
            other => tracing::info!(consumer_group = %telemetry.group(), event = ?other, "subscription event"),
        }
    }

    /// Tries at once what was to be settled once more later.
    fn hurry(&mut self, is_chosen: impl Fn(&Again) -> bool) {
        let now = self.shared.clock.now();
        self.work.again.iter_mut().filter(|again| is_chosen(again)).for_each(|again| again.at = now);
    }

    fn back_off(&mut self, error: &Error) {
        let pause = FIRST_BACKOFF.saturating_mul(2_u32.saturating_pow(self.work.receive_failures)).min(LONGEST_BACKOFF);
        self.work.receive_failures += 1;
        self.work.receive_at = Some(self.shared.clock.now().after(pause));
        let group = self.shared.scope.telemetry.group();
        tracing::warn!(consumer_group = %group, %error, retry_in = ?pause, "receiving failed");
    }

    /// The next thing that happens inside. Cancel-safe.
    async fn event(&mut self) -> Event {
        self.set_alarm();
        let work = &mut self.work;
        tokio::select! {
            biased;
            Some(concluding) = self.concluding.recv() => Event::Concluding(concluding),
            Some((outcomes, notes)) = work.flights.next(), if !work.flights.is_empty() => {
                Event::Settled(outcomes, notes)
            }
            renewed = optional(&mut work.renewal) => {
                work.renewal = None;
                Event::Renewed(renewed)
            }
            () = alarm(&mut work.alarm) => {
                work.alarm = None;
                Event::Alarm
            }
        }
    }

    fn on(&mut self, event: Event) {
        match event {
            Event::Concluding(concluding) => self.concluding(concluding),
            Event::Settled(outcomes, notes) => self.settled(outcomes, notes),
            Event::Renewed(renewed) => self.renewed(renewed),
            Event::Alarm => self.alarmed(),
        }
    }

    fn alarmed(&mut self) {
        let now = self.shared.clock.now();
        let due = |at: &Option<Timestamp>| at.is_some_and(|at| at <= now);
        if due(&self.work.receive_at) {
            self.work.receive_at = None;
        }
        if due(&self.work.renew_at) && self.work.renewal.is_none() {
            self.renew(now);
        }
        self.shared.state.lock().half_open_if_due(now);
        let (ended, open): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.work.revoking).into_iter().partition(|(_, deadline)| *deadline <= now);
        self.work.revoking = open;
        ended.into_iter().for_each(|(lane, _)| self.shared.interrupt(lane));
        self.settle_again();
    }

    fn set_alarm(&mut self) {
        let work = &mut self.work;
        let renewal = work.renew_at.filter(|_| work.renewal.is_none());
        let gate = match self.shared.state.lock().gate() {
            Some(Gate::Open(until)) => Some(until),
            _ => None,
        };
        // What is being extended is settled when that is over.
        let again = work.again.iter().filter(|again| !again.is_shared()).map(|again| again.at).min();
        let revoking = work.revoking.iter().map(|(_, deadline)| *deadline).min();
        let next = [renewal, gate, again, revoking, work.receive_at].into_iter().flatten().min();
        if work.alarm.as_ref().map(|(at, _)| *at) != next {
            work.alarm = next.map(|at| {
                let clock = Arc::clone(&self.shared.clock);
                (at, Box::pin(async move { clock.sleep_until(at).await }) as BoxFuture<'static, ()>)
            });
        }
    }

    /// Lets handlers finish, gives the rest back, settles what is to be settled.
    async fn drain(&mut self, mut slots: JoinSet<()>, worker: &mut watch::Receiver<Stage>) {
        self.stage.send_replace(Stage::Draining);
        let waiting = {
            let mut state = self.shared.state.lock();
            state.stop();
            state.lanes.take_all()
        };
        self.release(waiting);
        self.hurry(|_| true);
        self.shared.wake();
        let clock = Arc::clone(&self.shared.clock);
        let end = clock.now().after(self.grace);
        let (mut over, mut ended) = (false, false);
        loop {
            if ended {
                while let Ok(concluding) = self.concluding.try_recv() {
                    self.on(Event::Concluding(concluding));
                }
                // A failure that cannot be settled is worth the rest of the grace: given back, it is handled again.
                if over || !self.insists() {
                    break;
                }
            }
            tokio::select! {
                biased;
                joined = slots.join_next(), if !ended => ended = joined.is_none(),
                event = self.event() => self.on(event),
                () = left(worker, Stage::Draining), if !over => over = true,
                () = clock.sleep_until(end), if !over => over = true,
                () = tokio::time::sleep(STUCK), if over => {
                    let running = self.shared.state.lock().running();
                    tracing::error!(running, "handlers that do not yield are left behind; their messages come back");
                    break;
                }
            }
            if over && *self.stage.borrow() != Stage::Over {
                self.stage.send_replace(Stage::Over);
            }
        }
        self.work.last = true;
        while let Ok(concluding) = self.concluding.try_recv() {
            self.on(Event::Concluding(concluding));
        }
        self.alarmed();
        let settling = async {
            while !(self.work.flights.is_empty() && self.work.concluded.is_empty() && self.work.again.is_empty()) {
                let event = self.event().await;
                self.on(event);
            }
        };
        if tokio::time::timeout(LAST_SETTLEMENTS, settling).await.is_err() {
            tracing::error!("some settlements had no answer; their messages may come back");
        }
    }
}

/// Whether it makes no sense to try again.
fn is_fatal(kind: ErrorKind) -> bool {
    matches!(
        kind,
        ErrorKind::NotFound
            | ErrorKind::Closed
            | ErrorKind::PermissionDenied
            | ErrorKind::Unauthenticated
            | ErrorKind::ConfigInvalid
            | ErrorKind::Unsupported
    )
}

async fn receive(subscriber: &mut Subscriber, want: usize) -> Result<Received> {
    if want == 0 {
        return std::future::pending().await;
    }
    subscriber.receive_all(want, WAIT).await
}

/// When the worker has gone on from `stage`.
async fn left(worker: &mut watch::Receiver<Stage>, stage: Stage) {
    // An error means that the worker is gone.
    let _ = worker.wait_for(|now| *now > stage).await;
}

async fn optional<T>(future: &mut Option<BoxFuture<'static, T>>) -> T {
    match future {
        Some(future) => future.await,
        None => std::future::pending().await,
    }
}

async fn alarm(alarm: &mut Option<(Timestamp, BoxFuture<'static, ()>)>) {
    match alarm {
        Some((_, ringing)) => ringing.await,
        None => std::future::pending().await,
    }
}

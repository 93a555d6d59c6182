//! Settlements on their way, and what became of them.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use anybroker_core::{
    Delivery, Destination, Effect, Error, ErrorKind, MessageId, Retry, SettleOutcome, Settlement, Settling, Timestamp,
};

use crate::lanes::{Held, LaneId};
use crate::rules::{Cause, Rules};
use crate::slot::Batch;
use crate::telemetry::{Status, Subject, Telemetry, Topic};
use crate::{Counts, ErrorClass};

/// An ack or a release that failed for the moment is tried that often, with delays that double from the first one on.
const TRIES: u32 = 6;
const FIRST_PAUSE: Duration = Duration::from_millis(200);
/// The longest delay of what is tried for as long as its lease is held.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// A batch that has been handed to the broker.
pub(crate) struct Flight {
    settling: Settling,
    notes: Option<Notes>,
}

/// What is remembered of a batch, to make sense of the outcomes.
pub(crate) struct Notes {
    started: Instant,
    tries: u32,
    /// Those that are not plain acks (and, while debug logs are on, those too), by index, ascending.
    marks: Vec<Mark>,
    acks: Vec<(Arc<Topic>, u64)>,
}

struct Mark {
    index: usize,
    settlement: Settlement,
    cause: Option<Box<Cause>>,
    subject: Subject,
    /// The lane that waits for the outcome.
    lane: Option<LaneId>,
    /// What comes after it in its lane goes back, too.
    follow: bool,
}

/// A settlement that is tried again later.
pub(crate) struct Again {
    pub(crate) at: Timestamp,
    /// Until when it is leased for certain.
    pub(crate) until: Timestamp,
    pub(crate) held: Held,
    settlement: Settlement,
    cause: Option<Box<Cause>>,
    pub(crate) lane: Option<LaneId>,
    tries: u32,
}

/// Whether it is tried until it is done, or the delivery is not this member's any more. The handler has failed: if the
/// delivery went back instead, the handler would fail again, as often as the broker hands it out, and no attempt of it would
/// be counted.
pub(crate) fn insists(settlement: &Settlement) -> bool {
    matches!(settlement, Settlement::Nack(_) | Settlement::DeadLetter(_))
}

/// What the loop has to do about outcomes.
#[derive(Default)]
pub(crate) struct Aftermath {
    /// To be tried again.
    pub(crate) again: Vec<Again>,
    /// Lanes whose failure is settled, and has become a dead letter that nothing follows: they go on.
    pub(crate) settled: Vec<LaneId>,
    /// Lanes whose message is back at the broker: what comes after it goes back as well.
    pub(crate) back: Vec<(LaneId, MessageId)>,
    /// Dead letters were written: their sources.
    pub(crate) letters: Vec<Destination>,
}

impl Flight {
    /// Hands a batch to the broker. `holder` is the lane that waits for the outcome of the first entry.
    pub(crate) fn begin(
        batch: Batch,
        holder: Option<LaneId>,
        tries: u32,
        rules: &Rules,
        telemetry: &Telemetry,
    ) -> Self {
        let Batch { entries, causes } = batch;
        let logged = tracing::enabled!(tracing::Level::DEBUG);
        let mut marks = Vec::with_capacity(causes.len());
        let mut acks: Vec<(Arc<Topic>, u64)> = Vec::with_capacity(1);
        let mut causes = causes.into_iter().peekable();
        for (index, (delivery, settlement)) in entries.iter().enumerate() {
            let cause = causes.next_if(|(at, _)| *at == index).map(|(_, cause)| cause);
            let is_ack = matches!(settlement, Settlement::Ack);
            if is_ack {
                let destination = delivery.message().destination();
                match acks.last_mut() {
                    Some((topic, count)) if topic.destination == *destination => *count += 1,
                    _ => acks.push((telemetry.topic(destination), 1)),
                }
            }
            if !is_ack || logged {
                let subject = Subject::of(delivery, cause.as_ref().map(|cause| cause.text.clone()));
                let lane = holder.filter(|_| index == 0);
                let follow = rules.sends_followers_back(settlement);
                marks.push(Mark { index, settlement: settlement.clone(), cause, subject, lane, follow });
            }
        }
        let notes = Notes { started: Instant::now(), tries, marks, acks };
        Self { settling: anybroker_core::settle(entries), notes: Some(notes) }
    }

    /// Whether something of it is tried until it is done.
    pub(crate) fn insists(&self) -> bool {
        self.notes.as_ref().is_some_and(|notes| notes.marks.iter().any(|mark| insists(&mark.settlement)))
    }
}

impl Future for Flight {
    type Output = (Vec<SettleOutcome>, Notes);

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let outcomes = ready!(Pin::new(&mut self.settling).poll(cx));
        Poll::Ready((outcomes, self.notes.take().expect("polled to its end once")))
    }
}

impl Again {
    pub(crate) fn insists(&self) -> bool {
        insists(&self.settlement)
    }

    pub(crate) fn settlement(&self) -> &Settlement {
        &self.settlement
    }

    /// Whether its lease is being extended at this moment: then it cannot be settled.
    pub(crate) fn is_shared(&self) -> bool {
        matches!(&self.held, Held::Shared(delivery) if Arc::strong_count(delivery) > 1)
    }

    /// Shares it, so that its lease can be extended, and takes it to be leased until `until` from now on.
    pub(crate) fn share(mut self, until: Timestamp) -> (Self, Arc<Delivery>) {
        let delivery = match self.held {
            Held::Own(delivery) => Arc::new(delivery),
            Held::Shared(delivery) => delivery,
        };
        (self.held, self.until) = (Held::Shared(Arc::clone(&delivery)), until);
        (self, delivery)
    }

    pub(crate) fn is(&self, other: &Arc<Delivery>) -> bool {
        matches!(&self.held, Held::Shared(delivery) if Arc::ptr_eq(delivery, other))
    }

    /// Itself while it [is shared](Self::is_shared).
    #[allow(clippy::result_large_err, reason = "moved once for each try, and rare")]
    pub(crate) fn into_batch(mut self) -> Result<(Batch, Option<LaneId>, u32), Self> {
        match self.held.into_own() {
            Ok(delivery) => {
                let mut batch = Batch::default();
                batch.push(delivery, self.settlement, self.cause);
                Ok((batch, self.lane, self.tries))
            }
            Err(delivery) => {
                self.held = Held::Shared(delivery);
                Err(self)
            }
        }
    }
}

/// Counts the outcomes, logs them, and tells what is left to do. With `last`, nothing is tried again.
pub(crate) fn conclude(
    outcomes: Vec<SettleOutcome>,
    notes: Notes,
    counts: &mut Counts,
    telemetry: &Telemetry,
    now: Timestamp,
    last: bool,
) -> Aftermath {
    let mut aftermath = Aftermath::default();
    let latency = notes.started.elapsed();
    let mut marks = notes.marks.into_iter().peekable();
    let mut acks = notes.acks;
    for (index, outcome) in outcomes.into_iter().enumerate() {
        let mark = marks.next_if(|mark| mark.index == index);
        match (outcome, mark) {
            (Ok(_), None) => {}
            (Ok(_), Some(mark)) => done(&mark, counts, telemetry, latency, &mut aftermath),
            (Err(error), mark) => {
                let (delivery, error) = error.into_parts();
                if mark.as_ref().is_none_or(|mark| matches!(mark.settlement, Settlement::Ack)) {
                    let destination = delivery.message().destination();
                    let same =
                        |(topic, count): &&mut (Arc<Topic>, u64)| *count > 0 && topic.destination == *destination;
                    if let Some((_, count)) = acks.iter_mut().find(same) {
                        *count -= 1;
                    }
                }
                let failed = Failed { delivery, error, mark, tries: notes.tries };
                failed.conclude(counts, telemetry, (!last).then_some(now), &mut aftermath);
            }
        }
    }
    for (topic, count) in acks {
        topic.consumed(Status::Success, count);
        counts.processed += count;
    }
    aftermath
}

fn done(mark: &Mark, counts: &mut Counts, telemetry: &Telemetry, latency: Duration, aftermath: &mut Aftermath) {
    let topic = || telemetry.topic(mark.subject.destination());
    let class = mark.cause.as_ref().map_or(ErrorClass::UNCLASSIFIED, |cause| cause.class.clone());
    match &mark.settlement {
        Settlement::Ack => telemetry.acked(&mark.subject, latency),
        Settlement::Nack(nack) => {
            counts.retried += 1;
            topic().consumed(Status::Retry, 1);
            telemetry.nacked(&mark.subject, &class, nack.delay, latency);
        }
        Settlement::DeadLetter(verdict) => {
            *counts.dead_lettered.entry(class.clone()).or_default() += 1;
            topic().consumed(Status::DeadLetter, 1);
            telemetry.buried(&mark.subject, &class, verdict.reason.as_str(), latency);
            aftermath.letters.push(mark.subject.destination().clone());
        }
        Settlement::Release => {
            counts.released += 1;
            topic().consumed(Status::Released, 1);
        }
    }
    if let Some(lane) = mark.lane {
        if mark.follow {
            aftermath.back.push((lane, mark.subject.id().clone()));
        } else {
            aftermath.settled.push(lane);
        }
    }
}

struct Failed {
    delivery: Delivery,
    error: Error,
    mark: Option<Mark>,
    tries: u32,
}

impl Failed {
    /// Without a `now` it is not tried again.
    fn conclude(self, counts: &mut Counts, telemetry: &Telemetry, now: Option<Timestamp>, aftermath: &mut Aftermath) {
        let Self { delivery, error, mark, tries } = self;
        let (settlement, cause, lane) = match mark {
            Some(mark) => (mark.settlement, mark.cause, mark.lane),
            None => (Settlement::Ack, None, None),
        };
        let insists = insists(&settlement);
        let gone = match error.kind() {
            ErrorKind::StaleDelivery | ErrorKind::Closed => true,
            // For a letter and a nack it is their own destination that is not there.
            ErrorKind::NotFound => !insists,
            _ => false,
        };
        let later = !gone && error.effect() != Effect::Done;
        let later = later && (insists || matches!(error.retry(), Retry::Later(_)) && tries + 1 < TRIES);
        match &settlement {
            Settlement::DeadLetter(verdict) if !gone && tries == 0 => {
                telemetry.unburied(&delivery, verdict.reason.as_str(), &error);
            }
            _ => telemetry.unsettled(&delivery, &error),
        }
        if let Some(now) = now.filter(|_| later) {
            let pause = FIRST_PAUSE.saturating_mul(2_u32.saturating_pow(tries)).min(LONGEST_PAUSE);
            // How much of the lease is left nobody here knows: it is extended with the next ones.
            let (at, until, tries) = (now.after(pause), now, tries.saturating_add(1));
            aftermath.again.push(Again { at, until, held: Held::Own(delivery), settlement, cause, lane, tries });
            return;
        }
        let status = if gone { Status::Stale } else { Status::Unsettled };
        *(if gone { &mut counts.stale } else { &mut counts.unsettled }) += 1;
        telemetry.topic(delivery.message().destination()).consumed(status, 1);
        aftermath.back.extend(lane.map(|lane| (lane, delivery.message().id().clone())));
        // Dropped here, it comes back: at once where the broker can, by its lease otherwise.
        drop(delivery);
    }
}

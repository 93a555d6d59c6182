//! Burials of messages that met the crash limit: those on their way, and those that failed and are tried again.

use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::task::Poll;
use std::time::Duration;

use tokio::time::Instant;

use crate::{
    Delivery, Effect, ErrorKind, Lane, Reason, Retry, SettleOutcome, Settlement, Settling, SubscriptionEvent, Verdict,
    settle,
};

/// A burial that failed is tried again after that long, then after twice as long, up to the longest.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// What a subscription buries by itself.
///
/// A delivery whose burial failed is held here, in flight, so that the broker does not hand it out again at once, and
/// for ever, before everything else. It goes when it is buried, when its lease or lane is gone, or with the subscription.
pub(crate) struct Burials {
    /// Hand-overs without an outcome.
    limit: u32,
    on_their_way: Vec<Burial>,
    held: Vec<Held>,
    /// Lanes that have gone away while something was on its way.
    gone: Vec<Lane>,
}

/// A batch of dead letters that was handed to the adapter.
struct Burial {
    settling: Settling,
    /// Of each entry: the pause after which it was tried; zero for the first time.
    pauses: Vec<Duration>,
}

/// A delivery that could not be buried.
struct Held {
    delivery: Delivery,
    at: Instant,
    pause: Duration,
}

impl Burials {
    /// Allocates nothing before something is buried.
    pub(crate) fn new(limit: Option<u32>) -> Self {
        Self { limit: limit.unwrap_or_default(), on_their_way: Vec::new(), held: Vec::new(), gone: Vec::new() }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.on_their_way.is_empty() && self.held.is_empty()
    }

    /// Buries deliveries that met the limit. They count as in flight.
    pub(crate) fn bury(&mut self, deliveries: Vec<Delivery>) {
        self.begin(deliveries.into_iter().map(|delivery| (delivery, Duration::ZERO)).collect());
    }

    /// Looks after the burials until `other` is over. Cancel-safe, as far as `other` is.
    pub(crate) async fn meanwhile<T>(&mut self, other: impl Future<Output = T>) -> T {
        let mut other = pin!(other);
        loop {
            tokio::select! {
                biased;
                () = self.turn() => {}
                done = &mut other => return done,
            }
        }
    }

    /// A lane that goes away takes along what is held of it: a revocation must not wait for that.
    pub(crate) fn follow(&mut self, events: &[SubscriptionEvent]) {
        for event in events {
            if let SubscriptionEvent::Revoking { lane, .. } | SubscriptionEvent::Lost { lane } = event {
                self.held.retain(|held| held.delivery.lane() != *lane);
                self.gone.push(*lane);
            }
        }
    }

    /// The next thing that happens to them; with none of them it never ends. Cancel-safe.
    async fn turn(&mut self) {
        let due = self.held.iter().map(|held| held.at).min();
        tokio::select! {
            biased;
            (index, outcomes) = answered(&mut self.on_their_way) => {
                let Burial { pauses, .. } = self.on_their_way.swap_remove(index);
                self.conclude(outcomes, &pauses);
            }
            () = sleep_until(due) => self.try_due(),
        }
    }

    fn try_due(&mut self) {
        let now = Instant::now();
        let (due, later): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.held).into_iter().partition(|held| held.at <= now);
        self.held = later;
        self.begin(due.into_iter().map(|held| (held.delivery, held.pause)).collect());
    }

    /// Each delivery with the pause after which it is tried.
    fn begin(&mut self, deliveries: Vec<(Delivery, Duration)>) {
        let limit = self.limit;
        let verdict = || Verdict::new(Reason::CrashLimit).with_detail(format!("{limit} hand-overs without an outcome"));
        let (batch, pauses): (Vec<_>, Vec<_>) = deliveries
            .into_iter()
            .map(|(delivery, pause)| ((delivery, Settlement::DeadLetter(Box::new(verdict()))), pause))
            .unzip();
        match settle(batch).try_ready() {
            Ok(outcomes) => self.conclude(outcomes, &pauses),
            Err(settling) => self.on_their_way.push(Burial { settling, pauses }),
        }
    }

    fn conclude(&mut self, outcomes: Vec<SettleOutcome>, pauses: &[Duration]) {
        let now = Instant::now();
        for (outcome, last) in outcomes.into_iter().zip(pauses) {
            let Err(failed) = outcome else { continue };
            let (delivery, error) = failed.into_parts();
            let is_gone = matches!(error.kind(), ErrorKind::StaleDelivery | ErrorKind::Closed);
            if is_gone || error.effect() == Effect::Done || self.gone.contains(&delivery.lane()) {
                continue; // Dropped: it is not this member's any more, is to go to another one, or is done.
            }
            let mut pause = last.saturating_mul(2).clamp(FIRST_PAUSE, LONGEST_PAUSE);
            if let Retry::Later(Some(hint)) = error.retry() {
                pause = pause.max(hint).min(LONGEST_PAUSE);
            }
            if last.is_zero() {
                tracing::error!(
                    topic = %delivery.message().destination(),
                    partition = delivery.lane().index,
                    consumer_group = %delivery.group(),
                    id = %delivery.message().id(),
                    reason = Reason::CrashLimit.as_str(),
                    %error,
                    retry_in = ?pause,
                    "message_unburied"
                );
            }
            self.held.push(Held { delivery, at: now + pause, pause });
        }
        if self.is_empty() {
            self.gone.clear();
        }
    }
}

/// The first burial that has its answer, and its place.
async fn answered(burials: &mut [Burial]) -> (usize, Vec<SettleOutcome>) {
    poll_fn(|context| {
        for (index, burial) in burials.iter_mut().enumerate() {
            if let Poll::Ready(outcomes) = Pin::new(&mut burial.settling).poll(context) {
                return Poll::Ready((index, outcomes));
            }
        }
        Poll::Pending
    })
    .await
}

async fn sleep_until(moment: Option<Instant>) {
    match moment {
        Some(moment) => tokio::time::sleep_until(moment).await,
        None => std::future::pending().await,
    }
}

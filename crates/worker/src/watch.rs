//! What is watched beside the messages: the group's lag, and the depth of its dead-letter queue.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anybroker_core::{Browse, Bus, Clock, DeadLetterScope, Destination, Group};
use tokio::sync::Notify;

use crate::telemetry::Telemetry;

/// Between two looks at a dead-letter queue is at least that long.
const PAUSE: Duration = Duration::from_secs(1);

/// A dead-letter queue has reached its threshold.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct DeadLetterAlert {
    /// Whose queue.
    pub scope: DeadLetterScope,
    /// At least that many letters are in it.
    pub letters: usize,
    /// The threshold.
    pub threshold: usize,
}

pub(crate) type AlertHook = Arc<dyn Fn(&DeadLetterAlert) + Send + Sync>;

/// Logs and measures the lag, every `interval`.
pub(crate) async fn lag(
    bus: Bus,
    destination: Destination,
    group: Group,
    interval: Duration,
    clock: Arc<dyn Clock>,
    telemetry: Arc<Telemetry>,
) {
    loop {
        match bus.lag(&destination, &group).await {
            Ok(lag) => telemetry.lag(&destination, &lag),
            Err(error) => tracing::warn!(topic = %destination, consumer_group = %group, %error, "no lag"),
        }
        clock.sleep_until(clock.now().after(interval)).await;
    }
}

/// The dead letters of one source that this worker has written.
pub(crate) struct Letters {
    pub(crate) source: Destination,
    count: AtomicUsize,
    more: Notify,
}

impl Letters {
    pub(crate) fn new(source: &Destination) -> Arc<Self> {
        Arc::new(Self { source: source.clone(), count: AtomicUsize::new(0), more: Notify::new() })
    }

    pub(crate) fn written(&self) {
        self.count.fetch_add(1, Ordering::Relaxed);
        self.more.notify_one();
    }
}

/// Looks at a dead-letter queue now, and whenever letters were written; raises the alert once each time that the
/// threshold is reached.
pub(crate) struct DeadLetterWatch {
    pub(crate) bus: Bus,
    pub(crate) scope: DeadLetterScope,
    pub(crate) threshold: usize,
    pub(crate) written: Arc<Letters>,
    pub(crate) hook: Option<AlertHook>,
}

impl DeadLetterWatch {
    pub(crate) async fn run(self) {
        let (topic, group) = (self.scope.source.as_str().to_owned(), self.scope.group.as_str().to_owned());
        let gauge = metrics::gauge!("dlq_alert", "topic" => topic, "consumer_group" => group);
        let mut raised = false;
        loop {
            let letters = self.letters().await;
            let reached = letters >= self.threshold;
            gauge.set(f64::from(u8::from(reached)));
            if reached && !raised {
                self.raise(letters);
            }
            raised = reached;
            let again = tokio::time::Instant::now() + PAUSE;
            self.written.more.notified().await;
            tokio::time::sleep_until(again).await;
        }
    }

    /// How many letters there are, up to the threshold. Where looking at them would take them away from whoever reads
    /// them, those that this worker has written are counted instead.
    async fn letters(&self) -> usize {
        if self.bus.capabilities().dead_letter_browse == Browse::Leasing {
            return self.written.count.load(Ordering::Relaxed);
        }
        let letters = match self.bus.dead_letters(&self.scope.source, &self.scope.group) {
            Ok(letters) => letters,
            Err(_) => return 0,
        };
        let mut found = 0;
        let mut from = None;
        while found < self.threshold {
            match letters.page(from.take(), self.threshold - found).await {
                Ok(page) => {
                    found += page.letters.len();
                    match page.next {
                        Some(next) => from = Some(next),
                        None => break,
                    }
                }
                Err(error) => {
                    tracing::debug!(topic = %self.scope.source, %error, "dead letters could not be counted");
                    break;
                }
            }
        }
        found
    }

    fn raise(&self, letters: usize) {
        tracing::error!(
            topic = %self.scope.source,
            consumer_group = %self.scope.group,
            letters,
            threshold = self.threshold,
            "dlq_alert"
        );
        if let Some(hook) = &self.hook {
            hook(&DeadLetterAlert { scope: self.scope.clone(), letters, threshold: self.threshold });
        }
    }
}

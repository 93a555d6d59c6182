//! What becomes of a message, decided by how its handler ended.

use std::time::Duration;

use anybroker_core::{Nack, OnFailure, Order, Reason, Settlement};

use crate::breaker::Health;
use crate::{ErrorClass, ErrorClasses, HandlerError, Outcome, RetryPolicy};

/// How a handler ended.
pub(crate) enum Ended<T> {
    Answered(T),
    Panicked(String),
    TimedOut(Duration),
    /// It was dropped: the grace is over, or its lane was taken away.
    Cancelled,
}

/// The failure behind a settlement.
pub(crate) struct Cause {
    pub(crate) class: ErrorClass,
    pub(crate) text: String,
    pub(crate) how: How,
}

/// How an attempt failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum How {
    /// By what the handler answered.
    Answered,
    Panicked,
    TimedOut,
    /// Not at all: the handler was dropped.
    Cancelled,
}

/// What a subscription decides by.
pub(crate) struct Rules {
    pub(crate) order: Order,
    pub(crate) on_failure: OnFailure,
    pub(crate) max_attempts: Option<u32>,
    pub(crate) timeout: Option<Duration>,
    pub(crate) retry: RetryPolicy,
    pub(crate) classes: ErrorClasses,
    /// The longest delay of the endpoint.
    pub(crate) delay_max: Option<Duration>,
    pub(crate) lease: Duration,
    /// The endpoint has leases.
    pub(crate) leases: bool,
    /// Leases are extended while handlers run and wait.
    pub(crate) extends: bool,
    /// How many are received and settled at once.
    pub(crate) batch: usize,
}

/// What becomes of a message.
pub(crate) struct Decision {
    pub(crate) settlement: Settlement,
    /// `None` for acks.
    pub(crate) cause: Option<Box<Cause>>,
    pub(crate) health: Health,
}

impl Rules {
    pub(crate) fn decide(&self, attempt: u32, ended: Ended<Outcome>) -> Decision {
        let (failure, how) = match ended {
            Ended::Answered(Ok(())) => {
                return Decision { settlement: Settlement::Ack, cause: None, health: Health::Good };
            }
            Ended::Answered(Err(failure)) => (failure, How::Answered),
            Ended::Panicked(text) => (HandlerError::new(ErrorClass::PANIC, text), How::Panicked),
            Ended::TimedOut(limit) => {
                (HandlerError::new(ErrorClass::TIMEOUT, format!("no answer within {limit:?}")), How::TimedOut)
            }
            Ended::Cancelled => {
                let cause = Cause { class: ErrorClass::UNCLASSIFIED, text: String::new(), how: How::Cancelled };
                let cause = Some(Box::new(cause));
                return Decision { settlement: Settlement::Release, cause, health: Health::Unknown };
            }
        };
        let class = failure.counted_class();
        let cause = Some(Box::new(Cause { class: class.clone(), text: failure.message().to_owned(), how }));
        let retryable = failure.dead_letter_reason().is_none() && self.classes.is_retryable(&class);
        let health = if retryable { Health::Bad } else { Health::Unknown };
        if retryable && self.max_attempts.is_none_or(|max| attempt < max) {
            let delay = failure.retry_after().unwrap_or_else(|| self.retry.delay(attempt));
            let delay = self.delay_max.map_or(delay, |max| delay.min(max));
            let settlement = Settlement::Nack(Nack { delay, error_type: Some(class.text()) });
            return Decision { settlement, cause, health };
        }
        // The core would turn the last nack into a dead letter too, but it does not know the detail.
        let reason = if retryable { Reason::AttemptsExhausted } else { Reason::Rejected };
        let failure = if failure.dead_letter_reason().is_none() { failure.with_class(class) } else { failure };
        Decision { settlement: Settlement::DeadLetter(Box::new(failure.into_verdict(reason))), cause, health }
    }

    /// Whether the rest of its key waits until this is settled.
    pub(crate) fn holds_its_key(&self, settlement: &Settlement) -> bool {
        match settlement {
            Settlement::Ack => false,
            Settlement::Nack(_) | Settlement::DeadLetter(_) => {
                self.order != Order::None && self.on_failure != OnFailure::GoPast
            }
            // What was cancelled comes back before later ones of its key.
            Settlement::Release => self.order != Order::None,
        }
    }

    /// Whether what the worker holds of the key goes back behind this.
    pub(crate) fn sends_followers_back(&self, settlement: &Settlement) -> bool {
        match settlement {
            Settlement::Ack => false,
            Settlement::Nack(_) | Settlement::Release => true,
            // The broker sends them after it; under `Block` they go on here.
            Settlement::DeadLetter(_) => self.on_failure == OnFailure::Park,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules() -> Rules {
        Rules {
            order: Order::Key,
            on_failure: OnFailure::GoPast,
            max_attempts: Some(5),
            timeout: None,
            retry: RetryPolicy::fixed(Duration::from_secs(7)),
            classes: ErrorClasses::default(),
            delay_max: None,
            lease: Duration::from_secs(30),
            leases: true,
            extends: true,
            batch: 100,
        }
    }

    fn failed(class: &'static str) -> Ended<Outcome> {
        Ended::Answered(Err(HandlerError::new(class, "x")))
    }

    #[test]
    fn the_last_attempt_is_not_given_back() {
        let nack = rules().decide(4, failed("TIMEOUT")).settlement;
        assert!(matches!(nack, Settlement::Nack(nack) if nack.delay == Duration::from_secs(7)));
        let Settlement::DeadLetter(verdict) = rules().decide(5, failed("TIMEOUT")).settlement else {
            panic!("expected a dead letter");
        };
        assert_eq!(verdict.reason, Reason::AttemptsExhausted);
    }

    #[test]
    fn delays_stay_within_what_the_endpoint_can_hold_back() {
        let rules = Rules { delay_max: Some(Duration::from_secs(3)), ..rules() };
        let nack = rules.decide(1, failed("TIMEOUT")).settlement;
        assert!(matches!(nack, Settlement::Nack(nack) if nack.delay == Duration::from_secs(3)));
    }

    #[test]
    fn a_cancelled_handler_is_no_failure() {
        let decision = rules().decide(5, Ended::Cancelled);
        assert!(matches!(decision.settlement, Settlement::Release));
        assert_eq!(decision.health, Health::Unknown);
    }
}

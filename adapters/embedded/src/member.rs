//! A member of a group: what the writer and a subscription share.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use anybroker_core::{
    DeliveryFacts, Destination, Error, Message, OnFailure, Order, SubscribeSpec, SubscriptionEvent, Token,
};
use parking_lot::Mutex;
use tokio::sync::Notify;

/// How many bits of a claim number the member's own numbers have.
const CLAIM_BITS: u32 = 32;

/// A destination with the group that a member belongs to.
#[derive(Debug, Clone)]
pub(crate) struct Source {
    pub(crate) destination: Destination,
    pub(crate) dest: i64,
    pub(crate) group: i64,
}

/// One subscription of one process.
pub(crate) struct Member {
    /// Never used twice in a file: it tells this subscription's claims from all others, in every process.
    pub(crate) id: i64,
    pub(crate) sources: Vec<Source>,
    pub(crate) order: Order,
    pub(crate) on_failure: OnFailure,
    pub(crate) lease: Duration,
    /// How many deliveries a waiting receive asks for; zero when nobody waits.
    pub(crate) want: AtomicUsize,
    /// Under an order: which of the commands that may bring a message back have to be done before anything is brought.
    pub(crate) needs: AtomicU64,
    /// When something falls due that nobody commits: the end of a lease, a delay, a time to live. Milliseconds.
    pub(crate) next_due: AtomicI64,
    pub(crate) shelf: Mutex<Brought>,
    /// Something was brought, or `next_due` has changed.
    pub(crate) awake: Notify,
    pub(crate) gone: AtomicBool,
    /// The number of the last look that was asked for, and of the last that the writer has taken.
    pub(crate) asked: AtomicU64,
    pub(crate) looked: AtomicU64,
    claims: AtomicU32,
}

/// What the writer has brought and no receive has taken yet.
#[derive(Default)]
pub(crate) struct Brought {
    pub(crate) ready: VecDeque<Ready>,
    pub(crate) events: Vec<SubscriptionEvent>,
    /// How many commands that may bring a message back had been done before.
    pub(crate) returns: u64,
    /// The subscription cannot go on.
    pub(crate) error: Option<Error>,
    /// The last event said that the broker does not serve.
    pub(crate) degraded: bool,
}

/// A delivery before it is handed out.
pub(crate) struct Ready {
    pub(crate) message: Message,
    pub(crate) facts: DeliveryFacts,
}

/// A delivery as the writer knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Handle {
    pub(crate) claim: i64,
    pub(crate) seq: i64,
    pub(crate) source: usize,
}

impl Handle {
    pub(crate) fn of(token: &Token, lane: anybroker_core::Lane) -> Option<Self> {
        match token {
            Token::Pair(claim, seq) => {
                Some(Self { claim: claim.cast_signed(), seq: seq.cast_signed(), source: lane.index as usize })
            }
            Token::Bytes(_) => None,
        }
    }

    pub(crate) fn token(self) -> Token {
        Token::Pair(self.claim.cast_unsigned(), self.seq.cast_unsigned())
    }
}

impl Member {
    pub(crate) fn new(id: i64, sources: Vec<Source>, spec: &SubscribeSpec) -> Self {
        Self {
            id,
            sources,
            order: spec.order,
            on_failure: spec.on_failure,
            lease: spec.lease,
            want: AtomicUsize::new(0),
            needs: AtomicU64::new(0),
            next_due: AtomicI64::new(i64::MAX),
            shelf: Mutex::default(),
            awake: Notify::new(),
            gone: AtomicBool::new(false),
            asked: AtomicU64::new(0),
            looked: AtomicU64::new(0),
            claims: AtomicU32::new(0),
        }
    }

    /// A number for the next claim.
    pub(crate) fn next_claim(&self) -> i64 {
        self.id << CLAIM_BITS | i64::from(self.claims.fetch_add(1, Ordering::Relaxed))
    }

    /// The claims that this member may have.
    pub(crate) fn claim_range(&self) -> (i64, i64) {
        (self.id << CLAIM_BITS, (self.id + 1) << CLAIM_BITS)
    }

    /// Whose claim that is.
    pub(crate) fn of_claim(claim: i64) -> i64 {
        claim >> CLAIM_BITS
    }

    pub(crate) fn owns(&self, claim: i64) -> bool {
        Self::of_claim(claim) == self.id
    }

    /// Whether what is looked for now is in order, when so many commands that may bring a message back are done.
    pub(crate) fn may_have(&self, returns: u64) -> bool {
        self.order == Order::None || returns >= self.needs.load(Ordering::Acquire)
    }

    pub(crate) fn wants(&self) -> usize {
        self.want.load(Ordering::Acquire)
    }

    /// Brings deliveries to the subscription.
    pub(crate) fn bring(&self, ready: Vec<Ready>, returns: u64) {
        let mut shelf = self.shelf.lock();
        if std::mem::take(&mut shelf.degraded) {
            shelf.events.push(SubscriptionEvent::Recovered);
        }
        shelf.ready.extend(ready);
        shelf.returns = returns;
        // Under the lock, as it is set: what was asked for is there, and is not brought twice.
        self.want.store(0, Ordering::Release);
        drop(shelf);
        self.awake.notify_one();
    }

    /// The writer has looked for it, up to that number.
    pub(crate) fn has_looked(&self, number: u64) {
        if self.looked.fetch_max(number, Ordering::AcqRel) < number {
            self.awake.notify_one();
        }
    }

    /// Ends the subscription with an error.
    pub(crate) fn fail(&self, error: Error) {
        let mut shelf = self.shelf.lock();
        shelf.error = Some(error);
        // Under the lock, as it is set. A receive that still waits has not been told yet: nothing is claimed for it any
        // more, least of all what its own member gives back as it leaves.
        self.want.store(0, Ordering::Release);
        drop(shelf);
        self.awake.notify_one();
    }

    /// The broker does not serve for now; said once.
    pub(crate) fn degrade(&self, error: &Error) {
        let mut shelf = self.shelf.lock();
        if !std::mem::replace(&mut shelf.degraded, true) {
            shelf.events.push(SubscriptionEvent::Degraded { cause: error.to_string() });
        }
        drop(shelf);
        self.awake.notify_one();
    }

    /// Nothing is ready; something will be at `next_due`.
    pub(crate) fn nothing_until(&self, next_due: i64) {
        let mut shelf = self.shelf.lock();
        let recovered = std::mem::take(&mut shelf.degraded);
        if recovered {
            shelf.events.push(SubscriptionEvent::Recovered);
        }
        drop(shelf);
        if self.next_due.swap(next_due, Ordering::AcqRel) != next_due || recovered {
            self.awake.notify_one();
        }
    }
}

//! Receiving: a waiting receive says how much it wants; the writer claims it and brings it.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anybroker_core::{
    Delivery, DeliveryContext, Error, Order, Received, Result, SubscribeSpec, Subscription, Timestamp,
};
use async_trait::async_trait;
use tokio::sync::oneshot;
use tokio::time::Instant;

use crate::broker::Keeper;
use crate::clock::FileClock;
use crate::inbox::Command;
use crate::member::{Handle, Member};
use crate::settle::Courier;
use crate::wake;

/// What a receive finds.
enum Taken {
    Something(Received),
    Nothing,
    /// What was there went back; it has to be asked for anew.
    GaveBack,
}

/// How often a receive looks again while the file cannot be used.
const TROUBLED: Duration = Duration::from_millis(250);

/// How much longer than its wait a receive waits for its look. A look takes as long as the file is somebody else's
/// (`busy_timeout`), which is no reason to keep the receive.
const LONGEST_LOOK: Duration = Duration::from_secs(1);

/// An open subscription: a member of its group until it is closed or dropped.
pub(crate) struct FileSubscription {
    keeper: Arc<Keeper>,
    clock: FileClock,
    member: Arc<Member>,
    context: Arc<DeliveryContext>,
    paused: bool,
}

impl FileSubscription {
    pub(crate) fn new(keeper: Arc<Keeper>, clock: FileClock, member: Member, spec: &SubscribeSpec) -> Self {
        let member = Arc::new(member);
        let courier = Courier { inbox: Arc::clone(&keeper.inbox), member: Arc::clone(&member) };
        let context = DeliveryContext::new(spec.group.clone(), spec.max_attempts, Arc::new(courier));
        // Refused only when the connection is closed, which the first receive finds out.
        let _ = keeper.inbox.send(Command::Join(Arc::clone(&member)));
        Self { keeper, clock, member, context, paused: false }
    }

    /// Takes what the writer has brought, or says how much is wanted.
    fn take(&self, max: usize) -> Result<Taken> {
        let mut shelf = self.member.shelf.lock();
        if let Some(error) = &shelf.error {
            return Err(error.duplicate());
        }
        let now = Timestamp::from_millis(self.clock.now());
        // What was brought for a receive that was cancelled may have lost half of its lease, or all of it. Where order
        // is kept, what was given back since may have to come first.
        let late = !self.member.may_have(shelf.returns);
        let good =
            |until: Option<Timestamp>| !late && until.is_none_or(|until| until.since(now) * 2 >= self.member.lease);
        let mut stale = Vec::new();
        let mut received = Received { deliveries: Vec::new(), events: std::mem::take(&mut shelf.events) };
        while received.deliveries.len() < max {
            let Some(ready) = shelf.ready.pop_front() else { break };
            if good(ready.facts.lease_until) {
                received.deliveries.push(Delivery::new(ready.message, ready.facts, &self.context));
            } else {
                stale.extend(Handle::of(&ready.facts.token, ready.facts.lane));
            }
        }
        let nothing = received.deliveries.is_empty() && received.events.is_empty();
        if nothing && stale.is_empty() {
            // Under the lock: more is asked for only when nothing is left, so that the two never add up. And not before
            // what goes back is handed over: its keys are this member's until then, and later messages would be brought.
            self.member.want.store(max, Ordering::Release);
        }
        drop(shelf);
        let gave_back = !stale.is_empty();
        if gave_back {
            self.give_back(stale);
        }
        Ok(match nothing {
            false => Taken::Something(received),
            true if gave_back => Taken::GaveBack,
            true => Taken::Nothing,
        })
    }

    /// Nobody had these: they go back as if they had never been handed out.
    fn give_back(&self, handles: Vec<Handle>) {
        // After a close of the connection everything has gone back already.
        let _ =
            self.keeper.inbox.send(Command::GiveBack { member: Arc::clone(&self.member), handles, handed_over: false });
    }

    fn give_back_unread(&self) {
        let mut shelf = self.member.shelf.lock();
        self.member.want.store(0, Ordering::Release);
        let unread: Vec<_> =
            shelf.ready.drain(..).filter_map(|ready| Handle::of(&ready.facts.token, ready.facts.lane)).collect();
        drop(shelf);
        if !unread.is_empty() {
            self.give_back(unread);
        }
    }

    /// Nothing is brought from here on before what was given back by now.
    fn mark(&self) {
        if self.member.order != Order::None {
            self.member.needs.store(self.keeper.inbox.returns(), Ordering::Release);
        }
    }

    /// Asks the writer to look; the number of that look.
    fn ask(&self) -> Result<u64> {
        let number = self.member.asked.fetch_add(1, Ordering::AcqRel) + 1;
        let asked = self.keeper.inbox.send(Command::Fetch(Arc::clone(&self.member), number));
        asked.map(|()| number).map_err(|_| Error::closed("receive"))
    }

    /// How long to wait at most before looking again, should nobody say anything.
    fn patience(&self) -> Duration {
        if self.member.shelf.lock().degraded { TROUBLED } else { self.keeper.safety }
    }
}

/// A receive that waits; however it ends, nothing more is claimed for it.
struct Waiting<'a>(&'a Member);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.want.store(0, Ordering::Release);
    }
}

#[async_trait]
impl Subscription for FileSubscription {
    fn context(&self) -> &Arc<DeliveryContext> {
        &self.context
    }

    async fn receive(&mut self, max: usize, wait: Duration) -> Result<Received> {
        let deadline = Instant::now() + wait.min(Duration::from_secs(365 * 24 * 3600));
        if self.paused {
            if let Some(error) = &self.member.shelf.lock().error {
                return Err(error.duplicate());
            }
            tokio::time::sleep_until(deadline).await;
            return Ok(Received::default());
        }
        let member = Arc::clone(&self.member);
        let _waiting = Waiting(&member);
        self.mark();
        // The number of the look that is asked for, 0 when none is.
        let (mut asked, mut expired) = (0, false);
        loop {
            // Read first: what a look has brought lies there before the look is told of.
            let looked = asked > 0 && member.looked.load(Ordering::Acquire) >= asked;
            match self.take(max)? {
                Taken::Something(received) => return Ok(received),
                Taken::Nothing if looked && expired => {
                    // What is brought from here on is for the next receive to judge.
                    return Ok(Received::default());
                }
                Taken::Nothing => {}
                Taken::GaveBack => {
                    // A look that was asked for before that may be taken before it, too.
                    self.mark();
                    asked = 0;
                    continue;
                }
            }
            if asked == 0 {
                asked = self.ask()?;
            }
            let looked = member.looked.load(Ordering::Acquire) >= asked;
            let next_due = member.next_due.load(Ordering::Acquire);
            tokio::select! {
                biased;
                () = member.awake.notified() => {}
                // However short the wait, one look is taken: what is there is brought.
                () = tokio::time::sleep_until(deadline), if !expired => expired = true,
                // What it brings later is for the next receive.
                () = tokio::time::sleep_until(deadline + LONGEST_LOOK), if expired => return Ok(Received::default()),
                () = self.clock.sleep_until(next_due), if looked => asked = 0,
                () = tokio::time::sleep(self.patience()) => asked = 0,
            }
        }
    }

    async fn pause(&mut self, paused: bool) -> Result<()> {
        self.paused = paused;
        if paused {
            self.give_back_unread();
        }
        Ok(())
    }

    async fn close(self: Box<Self>, grace: Duration) -> Result<()> {
        self.give_back_unread();
        self.member.gone.store(true, Ordering::Release);
        let (answer, answered) = oneshot::channel();
        let leave = Command::Leave { member: Arc::clone(&self.member), answer: Some(answer) };
        if self.keeper.inbox.send(leave).is_err() {
            return Ok(()); // The connection was closed, and this with it.
        }
        match tokio::time::timeout(grace.max(Duration::from_millis(1)), answered).await {
            Ok(Ok(left)) => left,
            Ok(Err(_)) => Ok(()),
            Err(_) => Err(Error::new(
                anybroker_core::ErrorKind::Timeout,
                "close",
                format!("the file took longer than {grace:?}; what is unsettled comes back when its lease ends"),
            )),
        }
    }
}

impl Drop for FileSubscription {
    fn drop(&mut self) {
        if !self.member.gone.swap(true, Ordering::AcqRel) {
            self.give_back_unread();
            // Refused when the connection is closed: then this went with it.
            let _ = self.keeper.inbox.send(Command::Leave { member: Arc::clone(&self.member), answer: None });
        }
        self.context.close();
    }
}

/// How often a waiting receive looks by itself.
pub(crate) fn safety(notified: bool) -> Duration {
    if notified { wake::SAFETY } else { wake::UNNOTIFIED }
}

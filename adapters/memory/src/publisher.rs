//! Publishing.

use std::collections::{HashMap, HashSet, VecDeque};
use std::iter::Peekable;
use std::sync::Arc;
use std::time::Duration;
use std::vec::IntoIter;

use anybroker_core::{
    Bytes, Confirms, Destination, Effect, Error, ErrorKind, Message, MessageId, Position, PublishOrder, PublishOutcome,
    PublishTerms, Receipt, Result, Timestamp, held_back,
};
use tokio::time::Instant;

use crate::store::{GroupState, Store, Topic};

/// The ids that were published lately.
#[derive(Debug, Default)]
pub(crate) struct Dedup {
    places: HashMap<MessageId, u64, foldhash::fast::RandomState>,
    ages: VecDeque<(Timestamp, MessageId)>,
}

impl Dedup {
    fn find(&mut self, id: &MessageId, now: Timestamp) -> Option<u64> {
        while self.ages.front().is_some_and(|(until, _)| *until <= now) {
            if let Some((_, old)) = self.ages.pop_front() {
                self.places.remove(&old);
            }
        }
        self.places.get(id).copied()
    }

    fn remember(&mut self, id: MessageId, sequence: u64, until: Timestamp) {
        self.ages.push_back((until, id.clone()));
        self.places.insert(id, sequence);
    }
}

/// Keys of which a message of this batch failed: later ones of theirs are not attempted.
#[derive(Default)]
struct Failed(HashSet<(Destination, Bytes)>);

impl Failed {
    fn note(&mut self, message: &Message, order: PublishOrder) {
        if let (PublishOrder::Key, Some(key)) = (order, message.key_bytes()) {
            self.0.insert((message.destination().clone(), key.clone()));
        }
    }

    fn holds_back(&self, message: &Message) -> bool {
        let place = || message.key_bytes().map(|key| (message.destination().clone(), key.clone()));
        !self.0.is_empty() && place().is_some_and(|place| self.0.contains(&place))
    }
}

/// Publishes a batch in order. Runs of one destination are stored under one lock.
pub(crate) async fn publish(store: &Store, batch: Vec<Message>, terms: PublishTerms) -> Confirms {
    let mut outcomes = Vec::with_capacity(batch.len());
    let mut batch = batch.into_iter().peekable();
    let mut deadline = None;
    let mut failed = Failed::default();
    while let Some(next) = batch.peek() {
        if failed.holds_back(next) {
            outcomes.push(Err(held_back(next.id(), next.destination())));
            batch.next();
            continue;
        }
        let topic = match find(store, next.destination()) {
            Ok(topic) => topic,
            Err(error) => {
                outcomes.push(Err(error.with("id", next.id())));
                failed.note(next, terms.order);
                batch.next();
                continue;
            }
        };
        let room = topic.room.notified();
        if let Run::Full(due) = store_run(store, &topic, &mut batch, &failed, &mut outcomes) {
            let deadline = *deadline.get_or_insert_with(|| Instant::now() + terms.timeout);
            let in_time = wait_for_room(store, room, due, deadline).await;
            if !in_time && let Some(message) = batch.next() {
                failed.note(&message, terms.order);
                outcomes.push(Err(no_room(&message, terms.timeout)));
            }
        }
    }
    Confirms::ready(outcomes)
}

fn find(store: &Store, name: &Destination) -> Result<Arc<Topic>> {
    if store.settings.create_destinations {
        Ok(store.topic_or_new(name).0)
    } else {
        store.topic(name, "publish").map_err(|error| error.with("create_destinations", false))
    }
}

enum Run {
    /// The batch ended, turned to another destination or to a key that is held back (or this destination was deleted: to
    /// be looked for again).
    Done,
    /// There is no room before somebody settles, or before that moment.
    Full(Option<Timestamp>),
}

fn store_run(
    store: &Store,
    topic: &Topic,
    batch: &mut Peekable<IntoIter<Message>>,
    failed: &Failed,
    outcomes: &mut Vec<PublishOutcome>,
) -> Run {
    let now = store.clock.now();
    let window = store.settings.dedup_window;
    let kept_before_group = store.settings.profile.manner().kept_before_group;
    let is_next = |next: &&Message| *next.destination() == topic.name && !failed.holds_back(next);
    while let Some(number) = batch.peek().filter(is_next).map(|next| topic.lane_of(next)) {
        let mut lane = topic.lane(number);
        if lane.removed {
            return Run::Done;
        }
        if !kept_before_group && !lane.has_groups() {
            if let Some(message) = batch.next() {
                outcomes.push(Err(no_group_yet(&message)));
            }
            continue;
        }
        let mut room = lane.room();
        if room == 0 {
            lane.advance(now);
            room = lane.room();
        }
        let in_lane = |next: &Message| is_next(&next) && topic.lane_of(next) == number;
        while room > 0
            && let Some(message) = batch.next_if(in_lane)
        {
            if !window.is_zero()
                && let Some(sequence) = lane.dedup.find(message.id(), now)
            {
                outcomes.push(Ok(Receipt { position: Some(Position::new(sequence)), duplicate: true }));
                continue;
            }
            let id = (!window.is_zero()).then(|| message.id().clone());
            let sequence = lane.store(message, &*store.clock, now);
            if let Some(id) = id {
                lane.dedup.remember(id, sequence, now.after(window));
            }
            outcomes.push(Ok(Receipt { position: Some(Position::new(sequence)), duplicate: false }));
            room -= 1;
        }
        lane.groups().for_each(GroupState::wake);
        if room == 0 && batch.peek().is_some_and(in_lane) {
            lane.full = true;
            return Run::Full(lane.next_due());
        }
    }
    Run::Done
}

/// Whether there may be room before the deadline.
async fn wait_for_room(
    store: &Store,
    room: impl Future<Output = ()>,
    due: Option<Timestamp>,
    deadline: Instant,
) -> bool {
    let due = async {
        match due {
            Some(moment) => store.clock.sleep_until(moment).await,
            None => std::future::pending().await,
        }
    };
    let change = async {
        tokio::select! {
            () = room => {}
            () = due => {}
        }
    };
    tokio::time::timeout_at(deadline, change).await.is_ok()
}

fn no_group_yet(message: &Message) -> Error {
    let text = "no group exists yet, and this endpoint keeps nothing for groups to come; declare one first";
    Error::new(ErrorKind::NotFound, "publish", text).with("destination", message.destination()).with("id", message.id())
}

fn no_room(message: &Message, timeout: Duration) -> Error {
    let text = format!("the destination is full and stayed so for {timeout:?}; see max_messages");
    Error::new(ErrorKind::RateLimited, "publish", text)
        .with("destination", message.destination())
        .with("id", message.id())
        .with_effect(Effect::NotDone)
}

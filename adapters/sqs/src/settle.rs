//! Settling: acks delete, failures change the visibility, dead letters are stored first. In requests of ten.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use anybroker_core::{
    AckLevel, Bytes, Delivery, Effect, Error, ErrorKind, Lane, Result, SettleError, SettleOutcome, Settlement, Settler,
    Settling, Token, Verdict,
};
use async_trait::async_trait;
use futures_util::future::join_all;
use tokio::runtime::Handle;
use tokio::sync::RwLock;
use tokio::time::Instant;

use crate::leases::{Back, Lease, Taken};
use crate::letters::bury;
use crate::requests::{self, Change, Leased};
use crate::retry::send_copies;
use crate::source::{Source, not_back};

/// How long a copy or a dead letter may take to be stored.
pub(crate) const REQUEST: Duration = Duration::from_secs(30);

pub(crate) struct SqsSettler {
    /// By lane.
    pub(crate) sources: Vec<Arc<Source>>,
    pub(crate) runtime: Handle,
    /// Read while settles are on their way; closing waits for them by writing.
    pub(crate) on_their_way: Arc<RwLock<()>>,
}

/// A delivery on its way to being settled.
pub(crate) struct Entry {
    pub(crate) place: usize,
    pub(crate) delivery: Delivery,
    pub(crate) handle: Bytes,
    pub(crate) lease: Lease,
}

/// Entries of one source, by what becomes of them.
#[derive(Default)]
struct Share {
    acks: Vec<Entry>,
    /// Those that go back to their place.
    changes: Vec<Entry>,
    /// Failures of which a copy comes back.
    copies: Vec<(Entry, Duration)>,
    letters: Vec<(Entry, Box<Verdict>)>,
    /// Message groups of which something goes back to its place.
    returning: Vec<String>,
    /// What is behind that, where nothing of its message group is out.
    behind: Vec<Back>,
    /// Message groups of which a lease was over.
    over: Vec<String>,
}

#[async_trait]
impl Settler for SqsSettler {
    fn settle(&self, batch: Vec<(Delivery, Settlement)>) -> Settling {
        // Not of the caller's future: the requests go out whether or not somebody waits for them. A close waits for them.
        let on_its_way = Arc::clone(&self.on_their_way).try_read_owned();
        let mut outcomes: Vec<Option<SettleOutcome>> = Vec::with_capacity(batch.len());
        let mut shares: Vec<Share> = Vec::new();
        shares.resize_with(self.sources.len(), Share::default);
        for (place, (delivery, settlement)) in batch.into_iter().enumerate() {
            let lane = delivery.lane().index as usize;
            let taken = handle(delivery.token())
                .zip(self.sources.get(lane))
                .map(|(handle, source)| (handle.clone(), source.leases.lock().take(&handle)));
            match taken {
                Some((handle, Taken::Held(lease))) => {
                    outcomes.push(None);
                    shares[lane].add(Entry { place, delivery, handle, lease }, settlement, &self.sources[lane]);
                    continue;
                }
                Some((_, Taken::Over(group))) => shares[lane].over.extend(group),
                Some((_, Taken::Unknown)) | None => {}
            }
            outcomes.push(Some(Err(stale(delivery))));
        }
        for (share, source) in shares.iter_mut().zip(&self.sources).filter(|(_, source)| source.is_fifo()) {
            // Held back from this moment on, not from when the request is answered.
            let behind = source.take_behind(&share.returning);
            share.put_off(behind, source, &mut outcomes);
        }
        if outcomes.iter().all(Option::is_some) && shares.iter().all(|share| share.over.is_empty()) {
            return Settling::ready(outcomes.into_iter().flatten().collect());
        }
        let work = self.sources.iter().zip(shares).map(|(source, share)| share.settle(Arc::clone(source)));
        let work: Vec<_> = work.collect();
        let work = self.runtime.spawn(async move {
            let settled = join_all(work).await;
            drop(on_its_way);
            settled
        });
        Settling::waiting(async move {
            for (place, outcome) in
                work.await.expect("settling cannot panic, and nobody aborts it").into_iter().flatten()
            {
                outcomes[place] = Some(outcome);
            }
            outcomes.into_iter().flatten().collect()
        })
    }

    async fn extend(&self, deliveries: &[&Delivery], lease: Duration) -> Vec<Result<()>> {
        let mut outcomes: Vec<Result<()>> = Vec::with_capacity(deliveries.len());
        let mut shares: Vec<(Vec<usize>, Vec<Change>)> = vec![Default::default(); self.sources.len()];
        for (place, delivery) in deliveries.iter().enumerate() {
            let lane = delivery.lane().index as usize;
            let held = handle(delivery.token()).and_then(|handle| self.sources.get(lane)?.leases.lock().held(&handle));
            if let Some(leased) = held {
                shares[lane].0.push(place);
                shares[lane].1.push((leased, lease));
            }
            outcomes.push(Err(stale_error(delivery)));
        }
        for (source, (places, changes)) in self.sources.iter().zip(shares) {
            let until = Instant::now() + lease;
            let answers = source.change(&changes, "extend").await;
            for ((place, answer), ((handle, _), _)) in places.into_iter().zip(answers).zip(&changes) {
                if answer.is_ok() {
                    source.leases.lock().extend(handle, until);
                }
                outcomes[place] = answer;
            }
        }
        outcomes
    }

    fn abandoned(&self, token: &Token, lane: Lane) {
        let Some(handle) = handle(token) else { return };
        let Some(source) = self.sources.get(lane.index as usize).map(Arc::clone) else { return };
        let on_its_way = Arc::clone(&self.on_their_way).try_read_owned();
        // A hand-over without an outcome: it counts towards the crash limit.
        let backs = source.drop_out(handle);
        if backs.is_empty() {
            return;
        }
        self.runtime.spawn(async move {
            source.put_back_quietly(backs).await;
            drop(on_its_way);
        });
    }
}

impl Share {
    fn add(&mut self, entry: Entry, settlement: Settlement, source: &Source) {
        match settlement {
            Settlement::Ack => self.acks.push(entry),
            Settlement::DeadLetter(verdict) => self.letters.push((entry, verdict)),
            Settlement::Release => {
                source.forgiven.lock().forgive(entry.lease.message_id.clone());
                self.returning.extend(entry.lease.group.clone());
                self.changes.push(entry);
            }
            Settlement::Nack(nack) => self.copies.push((entry, nack.delay)),
        }
    }

    /// What goes back while others of its message group are out waits for them: recorded here, and SQS's lease behind it. So does
    /// what is behind it.
    fn put_off(&mut self, behind: Vec<Back>, source: &Source, outcomes: &mut [Option<SettleOutcome>]) {
        let mut leases = source.leases.lock();
        self.behind = behind.into_iter().filter_map(|back| leases.return_later(back)).collect();
        self.changes.retain(|entry| {
            let goes_now = leases.return_later(entry.lease.back(entry.handle.clone())).is_some();
            if !goes_now {
                outcomes[entry.place] = Some(Ok(AckLevel::Recorded));
            }
            goes_now
        });
    }

    /// The message groups of all that is settled.
    fn groups(&self) -> Vec<String> {
        let all = self.acks.iter().chain(&self.changes).chain(self.copies.iter().map(|(entry, _)| entry));
        let all = all.chain(self.letters.iter().map(|(entry, _)| entry)).filter_map(|entry| entry.lease.group.clone());
        all.chain(self.over.iter().cloned()).collect()
    }

    async fn settle(self, source: Arc<Source>) -> Vec<(usize, SettleOutcome)> {
        let groups = self.groups();
        let (acks, copies, letters) =
            tokio::join!(delete(self.acks, &source), send_copies(self.copies, &source), bury(self.letters, &source));
        // Behind the others: in a FIFO queue what goes back could be with another member before they are gone.
        let changes = give_back(self.changes, self.behind, &groups, &source).await;
        acks.into_iter().chain(changes).chain(copies).chain(letters).collect()
    }
}

/// Deletes, and tells what became of each.
pub(crate) async fn delete(entries: Vec<Entry>, source: &Source) -> Vec<(usize, SettleOutcome)> {
    let leased: Vec<Leased> = entries.iter().map(|entry| (entry.handle.clone(), entry.lease.until)).collect();
    let answers = requests::delete(&source.clients, &source.queues.queue, &leased).await;
    entries
        .into_iter()
        .zip(answers)
        .map(|(entry, answer)| {
            let answer = answer.or_else(|error| match entry.is_deleted(&error) {
                true => Ok(()),
                false => Err(error),
            });
            entry.outcome(answer, source)
        })
        .collect()
}

/// As [`delete`], of messages of which a copy or a dead letter is stored already: something has been done, whatever the answer.
pub(crate) async fn delete_copied(entries: Vec<Entry>, source: &Source) -> Vec<(usize, SettleOutcome)> {
    let told = |error: SettleError| {
        let (delivery, error) = error.into_parts();
        SettleError::new(delivery, error.with_effect(Effect::Unknown))
    };
    let deleted = delete(entries, source).await.into_iter();
    deleted.map(|(place, outcome)| (place, outcome.map_err(told))).collect()
}

/// Gives back, and with it what waited until nothing of these message groups was out.
async fn give_back(
    entries: Vec<Entry>,
    behind: Vec<Back>,
    groups: &[String],
    source: &Source,
) -> Vec<(usize, SettleOutcome)> {
    let mut outcomes = Vec::with_capacity(entries.len());
    let mut asked: HashMap<u64, Entry> = HashMap::new();
    let backs = {
        let mut leases = source.leases.lock();
        let mut backs = leases.take_returning(groups);
        // What was settled beside them may have failed, and be out again.
        backs.extend(behind.into_iter().filter_map(|back| leases.return_later(back)));
        for entry in entries {
            match leases.return_later(entry.lease.back(entry.handle.clone())) {
                None => outcomes.push((entry.place, Ok(AckLevel::Recorded))),
                Some(back) => {
                    asked.insert(back.place, entry);
                    backs.push(back);
                }
            }
        }
        backs
    };
    for (place, answer) in source.put_back(backs, "settle").await {
        outcomes.extend(match (asked.remove(&place), answer) {
            // It may be with another member already: whatever was asked for now could be done to that one's.
            (Some(entry), Err(error)) if error.effect() == Effect::Unknown => Some(entry.failed(error)),
            (Some(entry), answer) => Some(entry.outcome(answer, source)),
            (None, answer) => {
                not_back(answer);
                None
            }
        });
    }
    outcomes
}

impl Entry {
    /// Whether "no such receipt handle" is the answer to the second of two deletes of which the first was done: while the
    /// lease holds nobody else can have got the message, and with it the handle that counts. ElasticMQ answers so; at Amazon
    /// such a request succeeds
    /// (<https://docs.aws.amazon.com/AWSSimpleQueueService/latest/APIReference/API_DeleteMessage.html>).
    fn is_deleted(&self, error: &Error) -> bool {
        let may_be = error.kind() == ErrorKind::StaleDelivery && error.effect() == Effect::Unknown;
        may_be && self.lease.until > Instant::now()
    }

    pub(crate) fn outcome(self, answer: Result<()>, source: &Source) -> (usize, SettleOutcome) {
        match answer {
            Ok(()) => (self.place, Ok(AckLevel::Confirmed)),
            Err(error) => {
                if error.kind() != ErrorKind::StaleDelivery {
                    source.leases.lock().hand_out(self.handle.clone(), self.lease.clone());
                }
                self.failed(error)
            }
        }
    }

    fn failed(self, error: Error) -> (usize, SettleOutcome) {
        let error = error.with("group", self.delivery.group()).with("id", self.delivery.message().id());
        (self.place, Err(SettleError::new(self.delivery, error)))
    }
}

fn handle(token: &Token) -> Option<Bytes> {
    match token {
        Token::Bytes(handle) => Some(handle.clone()),
        Token::Pair(..) => None,
    }
}

fn stale_error(delivery: &Delivery) -> Error {
    Error::new(ErrorKind::StaleDelivery, "settle", "its lease is over; the message comes back")
        .with("group", delivery.group())
        .with("id", delivery.message().id())
}

fn stale(delivery: Delivery) -> SettleError {
    let error = stale_error(&delivery);
    SettleError::new(delivery, error)
}

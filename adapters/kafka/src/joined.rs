//! What a subscription does for transactions: its records join them, and its offsets are committed by them.
//!
//! A group's offsets are committed by its member and by transactions, on different connections. Of two commits of a partition
//! the one that was appended last counts, also when the other one's transaction commits later (Kafka's
//! `OffsetMetadataManager`). So from the moment a transaction's offsets are worked out until its outcome is known, nobody else
//! commits that partition, and no earlier commit may still be on its way.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use anybroker_core::{Error, ErrorKind, Result};
use parking_lot::{Mutex, MutexGuard};
use rdkafka::TopicPartitionList;
use rdkafka::consumer::{BaseConsumer, Consumer, ConsumerGroupMetadata};

use crate::error::failed;
use crate::feeder::offsets;
use crate::groups;
use crate::lanes::{Log, Partition, Stage};
use crate::member::Member;
use crate::progress::Commit;
use crate::state::{Place, Scope, Shared, State};

/// How often a transaction looks whether another one has let go of its partitions.
const LOOK: Duration = Duration::from_millis(5);
/// How long one question for the group's offsets may take.
const ASK: Duration = Duration::from_secs(2);

type Client = BaseConsumer<Member>;

/// See the module's documentation.
#[derive(Default)]
pub(crate) struct Joining {
    /// Held while a member commits.
    turn: Mutex<()>,
    /// There have been transactions.
    is_used: AtomicBool,
    /// The clients that read, by feeder. They end on their own threads.
    clients: Mutex<Vec<(usize, Weak<Client>)>>,
}

impl Joining {
    /// It reads from now on, and no other one of that feeder.
    pub(crate) fn reads(&self, feeder: usize, client: &Arc<Client>) {
        let mut clients = self.clients.lock();
        clients.retain(|(number, _)| *number != feeder);
        clients.push((feeder, Arc::downgrade(client)));
    }

    /// For a member that is about to commit.
    pub(crate) fn turn(&self, patience: Duration) -> Option<MutexGuard<'_, ()>> {
        self.turn.try_lock_for(patience)
    }

    /// Once there have been transactions, what they commit is not committed again only because other things are out now.
    pub(crate) fn is_used(&self) -> bool {
        self.is_used.load(Ordering::Acquire)
    }

    fn client(&self, feeder: usize) -> Option<Arc<Client>> {
        self.clients.lock().iter().find(|(number, _)| *number == feeder).and_then(|(_, client)| client.upgrade())
    }
}

/// The offsets of one consumer group in a transaction.
pub(crate) struct Offsets {
    pub(crate) group: String,
    pub(crate) member: ConsumerGroupMetadata,
    pub(crate) list: TopicPartitionList,
    /// What they settle: each record, and which of the list it belongs to.
    pub(crate) places: Vec<(Place, usize)>,
}

impl Shared {
    /// Works out what a transaction commits when `places` are settled, and keeps everybody else from committing there until
    /// [`finish`](Self::finish). Blocks, until `deadline` at most.
    pub(crate) fn freeze(&self, id: u32, places: &[Place], deadline: Instant) -> Result<Vec<Offsets>> {
        let mut feeders: Vec<usize> = {
            let state = self.lock();
            places.iter().map(|place| state.partitions[place.lane.index as usize].feeder).collect()
        };
        feeders.sort_unstable();
        feeders.dedup();
        let mut members = Vec::with_capacity(feeders.len());
        for feeder in feeders {
            let client = self.joining.client(feeder).ok_or_else(stale)?;
            // Before ownership is looked at: when it changes afterwards, the group's generation does too, and the broker
            // refuses the offsets (KIP-447). An assignment that was lost has an empty member, which is not refused.
            let member = client.group_metadata().ok_or_else(stale)?;
            if client.assignment_lost() {
                return Err(stale());
            }
            members.push((feeder, client, member));
        }
        let commits = loop {
            let _turn = self.joining.turn.try_lock_until(deadline).ok_or_else(busy)?;
            for (feeder, client, _) in &members {
                self.quieten(*feeder, client, deadline)?;
            }
            let mut state = self.lock();
            if !state.is_frozen(places) {
                break state.offsets(id, places)?;
            }
            drop(state);
            if Instant::now() >= deadline {
                return Err(busy());
            }
            std::thread::sleep(LOOK);
        };
        let listed = members.into_iter().map(|(feeder, client, member)| {
            let context = client.context();
            let of_feeder: Vec<&Settled> = commits.iter().filter(|settled| settled.feeder == feeder).collect();
            let commits: Vec<(Log, i32, Commit)> = of_feeder.iter().map(|settled| settled.commit.clone()).collect();
            let list = offsets(&context.named(&commits)).map_err(|error| failed("commit", &error))?;
            let places = of_feeder.iter().enumerate();
            let places = places.flat_map(|(index, settled)| settled.places.iter().map(move |place| (*place, index)));
            Ok(Offsets { group: context.group.clone(), member, list, places: places.collect() })
        });
        listed.collect()
    }

    /// Makes sure that the broker has what was committed without waiting for it: librdkafka tells no outcome of that, and a
    /// commit that waits does so for ever when the coordinator goes away. The coordinator answers the requests of a
    /// connection in their order.
    fn quieten(&self, feeder: usize, client: &Client, deadline: Instant) -> Result<()> {
        self.joining.is_used.store(true, Ordering::Release);
        let member = client.context();
        loop {
            let expected = self.lock().unconfirmed(feeder);
            if expected.is_empty() {
                return Ok(());
            }
            let asked = offsets(&member.named(&expected)).map_err(|error| failed("commit", &error))?;
            let found = groups::found(client, &asked, left(deadline).min(ASK));
            let is_there = found.is_ok_and(|found| {
                let expected = expected.iter().map(|(_, _, commit)| Some((commit.offset, commit.metadata.clone())));
                found.into_iter().eq(expected)
            });
            if is_there {
                self.lock().confirmed(feeder);
                return Ok(());
            }
            if Instant::now() >= deadline {
                return Err(busy());
            }
            // It may have been refused meanwhile.
            self.uncommitted(feeder);
            member.commit_in_turn(client, &Scope::Changed)?;
            std::thread::sleep(LOOK);
        }
    }

    /// A transaction has ended: these are settled, or come back.
    pub(crate) fn finish(&self, id: u32, places: impl Iterator<Item = (Place, bool)>) {
        let mut state = self.lock();
        for (place, is_settled) in places {
            let Some(partition) = state.joined(id, place) else { continue };
            if partition.frozen_by == Some(id) {
                partition.frozen_by = None;
                Log::BOTH.into_iter().for_each(|log| partition.track(log).end_transaction(is_settled));
            }
            match is_settled {
                true => state.done(place),
                false => state.give_back(place),
            }
            self.has_settled(&mut state);
        }
        drop(state);
        self.arrived.notify_one();
    }

    /// The record leaves the transaction, and is with the application again.
    pub(crate) fn leave_transaction(&self, id: u32, place: Place) {
        let mut state = self.lock();
        if let Some(partition) = state.joined(id, place)
            && let Some(entry) = partition.track(place.log).find(place.offset)
        {
            entry.stage = Stage::Out;
        }
    }
}

/// What a transaction settles of one log of a partition.
struct Settled {
    feeder: usize,
    commit: (Log, i32, Commit),
    places: Vec<Place>,
}

impl State {
    /// The record of a delivery joins a transaction.
    pub(crate) fn join(&mut self, id: u32, place: Place) {
        let track = self.partitions[place.lane.index as usize].track(place.log);
        if let Some(entry) = track.find(place.offset) {
            entry.stage = Stage::Joined(id);
        }
    }

    /// The partition of a record, when it is still in the transaction.
    fn joined(&mut self, id: u32, place: Place) -> Option<&mut Partition> {
        let partition = &mut self.partitions[place.lane.index as usize];
        let is_current = partition.is_owned && partition.lane.epoch == place.lane.epoch;
        let entry = partition.track(place.log).find(place.offset)?;
        (is_current && entry.stage == Stage::Joined(id)).then_some(partition)
    }

    /// What a feeder's partitions have committed, and may still be on its way.
    fn unconfirmed(&mut self, feeder: usize) -> Vec<(Log, i32, Commit)> {
        let mut commits = Vec::new();
        for owned in self.partitions.iter_mut().filter(|owned| owned.feeder == feeder && owned.is_owned) {
            for log in Log::BOTH {
                let partition = owned.partition;
                commits.extend(owned.track(log).unconfirmed().map(|commit| (log, partition, commit.clone())));
            }
        }
        commits
    }

    fn confirmed(&mut self, feeder: usize) {
        for owned in self.partitions.iter_mut().filter(|owned| owned.feeder == feeder) {
            Log::BOTH.into_iter().for_each(|log| owned.track(log).confirmed());
        }
    }

    fn is_frozen(&self, places: &[Place]) -> bool {
        places.iter().any(|place| self.partitions[place.lane.index as usize].frozen_by.is_some())
    }

    /// What is committed when `places` are settled; their partitions are frozen from here on.
    fn offsets(&mut self, id: u32, places: &[Place]) -> Result<Vec<Settled>> {
        let mut places = places.to_vec();
        places.sort_unstable();
        for place in &places {
            self.joined(id, *place).ok_or_else(stale)?;
        }
        let mut commits = Vec::new();
        for of_track in places.chunk_by(|one, next| (one.lane, one.log) == (next.lane, next.log)) {
            let owned = &mut self.partitions[of_track[0].lane.index as usize];
            let offsets: Vec<i64> = of_track.iter().map(|place| place.offset).collect();
            let log = of_track[0].log;
            let commit = owned.track(log).commit_with(&offsets).ok_or_else(|| {
                let text =
                    "too much is unsettled in between: what is settled above a hole does not fit into the commit";
                Error::new(ErrorKind::Unavailable, "commit", text)
            })?;
            owned.track(log).transacted(commit.clone());
            let commit = (log, owned.partition, commit);
            commits.push(Settled { feeder: owned.feeder, commit, places: of_track.to_vec() });
        }
        for place in &places {
            self.partitions[place.lane.index as usize].frozen_by = Some(id);
        }
        Ok(commits)
    }
}

fn left(deadline: Instant) -> Duration {
    deadline.saturating_duration_since(Instant::now())
}

fn stale() -> Error {
    let text = "what was settled in the transaction belongs to another member now; it comes back there";
    Error::new(ErrorKind::StaleDelivery, "commit", text)
}

fn busy() -> Error {
    let text = "other transactions of these partitions did not end in time";
    Error::new(ErrorKind::Unavailable, "commit", text)
}

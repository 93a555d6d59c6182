//! Settling: a batch is one piece of work for the writer, and one row for each claim it touches.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use anybroker_core::{
    AckLevel, Delivery, Error, ErrorKind, Lane, Nack, OnFailure, Order, Reason, Result, SettleError, Settlement,
    Settler, Settling, Token, Verdict,
};
use async_trait::async_trait;

use crate::dead_letter::{Death, bury};
use crate::error::Step;
use crate::fetch::Bits;
use crate::inbox::{Command, Inbox, Settles};
use crate::lanes;
use crate::member::{Handle, Member, Source};
use crate::retention;
use crate::store::{Store, lane};

/// Hands the settlements of one subscription to the writer.
pub(crate) struct Courier {
    pub(crate) inbox: Arc<Inbox>,
    pub(crate) member: Arc<Member>,
}

#[async_trait]
impl Settler for Courier {
    fn settle(&self, batch: Vec<(Delivery, Settlement)>) -> Settling {
        let (answer, outcomes) = tokio::sync::oneshot::channel();
        let count = batch.len();
        let settles = Settles { member: Arc::clone(&self.member), batch, results: Vec::new(), answer: Some(answer) };
        if let Err(Command::Settle(settles)) = self.inbox.send(Command::Settle(settles)) {
            let refused = || Error::new(ErrorKind::StaleDelivery, "settle", "the connection is closed");
            let outcomes = settles.batch.into_iter();
            return Settling::ready(outcomes.map(|(delivery, _)| Err(SettleError::new(delivery, refused()))).collect());
        }
        Settling::waiting(async move { outcomes.await.unwrap_or_else(|_| Vec::with_capacity(count)) })
    }

    async fn extend(&self, deliveries: &[&Delivery], lease: Duration) -> Vec<Result<()>> {
        let handles: Vec<_> = deliveries.iter().map(|delivery| Handle::of(delivery.token(), delivery.lane())).collect();
        let member = Arc::clone(&self.member);
        let count = handles.len();
        let extended = self.inbox.call("extend", move |store| extend(store, &member, &handles, lease)).await;
        extended.unwrap_or_else(|error| (0..count).map(|_| Err(error.duplicate())).collect())
    }

    fn abandoned(&self, token: &Token, lane: Lane) {
        if let Some(handle) = Handle::of(token, lane) {
            // Once the connection is closed, so are its subscriptions, and everything of theirs has gone back.
            let _ = self.inbox.send(Command::GiveBack {
                member: Arc::clone(&self.member),
                handles: vec![handle],
                handed_over: true,
            });
        }
    }
}

/// The outcomes for those who wait; failed deliveries go back to them.
pub(crate) fn outcomes(
    batch: Vec<(Delivery, Settlement)>,
    results: Vec<Result<()>>,
) -> Vec<anybroker_core::SettleOutcome> {
    let each = batch.into_iter().zip(results);
    each.map(|((delivery, _), result)| match result {
        Ok(()) => Ok(AckLevel::Confirmed),
        Err(error) => Err(SettleError::new(delivery, error)),
    })
    .collect()
}

/// A run of messages that was handed out together, while it is being settled.
struct Run {
    bits: Bits,
    first: i64,
    last: i64,
    open: i64,
    claimed_at: i64,
    changed: bool,
}

/// A row of `pending` that is out.
struct Out {
    lane: Option<i64>,
    attempt: u32,
    deliveries: u32,
    redrives: u32,
    first_at: Option<i64>,
    error_type: Option<String>,
}

/// What one transaction settles for one member.
struct Ledger<'a, 'c> {
    store: &'a Store<'c>,
    member: &'a Member,
    runs: HashMap<i64, Option<Run>>,
}

/// Settles a batch; one result per entry.
pub(crate) fn settle(store: &Store<'_>, member: &Member, batch: &[(Delivery, Settlement)]) -> Step<Vec<Result<()>>> {
    let mut ledger = Ledger { store, member, runs: HashMap::new() };
    let mut results = Vec::with_capacity(batch.len());
    for (delivery, settlement) in batch {
        let done = match Handle::of(delivery.token(), delivery.lane()) {
            Some(handle) => ledger.entry(handle, settlement, delivery.message().key())?,
            None => false,
        };
        results.push(if done { Ok(()) } else { Err(stale("settle").with("id", delivery.message().id())) });
    }
    ledger.write()?;
    Ok(results)
}

/// Gives deliveries back that nobody settled. `handed_over` tells whether an application had them.
pub(crate) fn give_back(store: &Store<'_>, member: &Member, handles: &[Handle], handed_over: bool) -> Step<()> {
    let mut ledger = Ledger { store, member, runs: HashMap::new() };
    for handle in handles {
        let Some(source) = member.sources.get(handle.source) else { continue };
        if let Some(run) = ledger.run(*handle)? {
            run.settle(handle.seq);
            let claimed_at = run.claimed_at;
            let lane = store.lane_of(member.order, source.dest, handle.seq)?;
            let waiting = Return { attempt: 1, deliveries: u32::from(handed_over), due_at: store.at_once(), lane };
            ledger.wait_again(source, handle.seq, &waiting, claimed_at, None)?;
        } else if let Some(out) = ledger.out(source, *handle)? {
            ledger.back(source, handle.seq, &out, u32::from(!handed_over))?;
        }
    }
    ledger.write()
}

/// Everything that a member holds goes back as if it had not been handed over: its subscription is closed.
pub(crate) fn give_back_all(store: &Store<'_>, member: &Member) -> Step<()> {
    let (from, to) = member.claim_range();
    for source in &member.sources {
        let claims = store.all(
            "SELECT id FROM claims WHERE grp = ?1 AND id >= ?2 AND id < ?3",
            (source.group, from, to),
            |row| row.get::<_, i64>(0),
        )?;
        for claim in &claims {
            crate::fetch::return_claim(store, member.order, source, *claim, 0)?;
        }
        store.run("DELETE FROM members WHERE grp = ?1 AND id = ?2", (source.group, member.id))?;
        let rows = store.run(
            "UPDATE pending SET state = 0, claim = 0, due_at = ?4, deliveries = max(deliveries - 1, 0)
             WHERE grp = ?1 AND state = 1 AND claim >= ?2 AND claim < ?3",
            (source.group, from, to, store.at_once()),
        )?;
        if rows > 0 || !claims.is_empty() {
            store.touch_group(source.group);
        }
    }
    Ok(())
}

/// Keeps leases; one result per handle.
fn extend(store: &Store<'_>, member: &Member, handles: &[Option<Handle>], lease: Duration) -> Step<Vec<Result<()>>> {
    let until = store.after(lease);
    let mut ledger = Ledger { store, member, runs: HashMap::new() };
    let mut results = Vec::with_capacity(handles.len());
    let mut of_run: HashMap<i64, Vec<Handle>> = HashMap::new();
    for handle in handles {
        let Some((handle, source)) = handle.and_then(|handle| Some((handle, member.sources.get(handle.source)?)))
        else {
            results.push(Err(stale("extend")));
            continue;
        };
        let kept = if ledger.run(handle)?.is_some() {
            of_run.entry(handle.claim).or_default().push(handle);
            true
        } else {
            store.run(
                "UPDATE pending SET due_at = ?4
                 WHERE grp = ?1 AND seq = ?2 AND claim = ?3 AND state = 1 AND due_at > ?5",
                (source.group, handle.seq, handle.claim, until, store.now),
            )? == 1
        };
        results.push(if kept { Ok(()) } else { Err(stale("extend")) });
    }
    for (claim, mut handles) in of_run {
        handles.sort_by_key(|handle| handle.seq);
        handles.dedup();
        let Some(Some(run)) = ledger.runs.get_mut(&claim) else { continue };
        if i64::try_from(handles.len()).unwrap_or(0) == run.open {
            store.run("UPDATE claims SET lease_until = ?2 WHERE id = ?1", (claim, until))?;
            continue;
        }
        // Only some of the run: those get leases of their own.
        let claimed_at = run.claimed_at;
        handles.iter().for_each(|handle| run.settle(handle.seq));
        for handle in handles {
            let source = &member.sources[handle.source];
            let lane = store.lane_of(member.order, source.dest, handle.seq)?;
            store.run(
                "INSERT INTO pending (grp, seq, state, due_at, lane, claim, attempt, deliveries, redrives, first_at)
                 VALUES (?1, ?2, 1, ?3, ?4, ?5, 1, 1, 0, ?6)",
                (source.group, handle.seq, until, lane, claim, claimed_at),
            )?;
        }
    }
    ledger.write()?;
    for source in &member.sources {
        store.touch_group(source.group);
    }
    Ok(results)
}

fn stale(operation: &'static str) -> Error {
    Error::new(ErrorKind::StaleDelivery, operation, "the lease has ended, or the delivery was given back")
}

impl Run {
    fn settle(&mut self, seq: i64) {
        self.bits.set(seq);
        self.open -= 1;
        self.changed = true;
    }
}

/// How a message comes back.
struct Return {
    attempt: u32,
    deliveries: u32,
    due_at: i64,
    lane: Option<i64>,
}

impl Ledger<'_, '_> {
    /// Settles one delivery; false when it is not this member's any more.
    fn entry(&mut self, handle: Handle, settlement: &Settlement, key: Option<&[u8]>) -> Step<bool> {
        let member = self.member;
        let Some(source) = member.sources.get(handle.source) else { return Ok(false) };
        if let Some(run) = self.run(handle)? {
            run.settle(handle.seq);
            let claimed_at = run.claimed_at;
            self.fresh_entry(source, handle.seq, settlement, key, claimed_at)?;
            return Ok(true);
        }
        let Some(out) = self.out(source, handle)? else { return Ok(false) };
        match settlement {
            Settlement::Ack => {
                self.remove(source, handle.seq, &out)?;
                retention::release(self.store, source.dest, handle.seq)?;
            }
            Settlement::Nack(nack) => self.failed(source, handle.seq, &out, nack)?,
            Settlement::Release => return self.back(source, handle.seq, &out, 1).map(|()| true),
            Settlement::DeadLetter(verdict) => {
                self.remove(source, handle.seq, &out)?;
                let mut verdict = Verdict::clone(verdict);
                verdict.error_type = verdict.error_type.or_else(|| out.error_type.as_deref().map(Into::into));
                let death = Death {
                    lane: lane(member.order, key).filter(|_| member.on_failure == OnFailure::Park),
                    redrives: out.redrives,
                    first_at: out.first_at,
                    ..Death::new(handle.seq, verdict, out.attempt)
                };
                self.bury(source, death)?;
            }
        }
        self.lane_moved(source, out.lane)?;
        Ok(true)
    }

    /// The first outcome of a message that was handed out in a run.
    fn fresh_entry(
        &self,
        source: &Source,
        seq: i64,
        settlement: &Settlement,
        key: Option<&[u8]>,
        claimed_at: i64,
    ) -> Step<()> {
        let lane = lane(self.member.order, key);
        let due_at = self.store.at_once();
        match settlement {
            Settlement::Ack => {
                self.store.count_settled(source.dest, 1);
                Ok(())
            }
            Settlement::Nack(nack) => {
                let waiting = Return { attempt: 2, deliveries: 1, due_at: self.after(nack.delay), lane };
                self.wait_again(source, seq, &waiting, claimed_at, nack.error_type.as_deref())
            }
            Settlement::Release => {
                let waiting = Return { attempt: 1, deliveries: 0, due_at, lane };
                self.wait_again(source, seq, &waiting, claimed_at, None)
            }
            Settlement::DeadLetter(verdict) => {
                let death = Death { first_at: Some(claimed_at), ..Death::new(seq, Verdict::clone(verdict), 1) };
                self.bury(source, death)
            }
        }
    }

    fn bury(&self, source: &Source, mut death: Death) -> Step<()> {
        // Its consumer died, over and over: that is no failed attempt.
        if death.verdict.reason == Reason::CrashLimit {
            death.attempts -= 1;
        }
        bury(self.store, source, &death)
    }

    /// A nack without delay is due at once.
    fn after(&self, delay: Duration) -> i64 {
        if delay.is_zero() { self.store.at_once() } else { self.store.after(delay) }
    }

    fn wait_again(
        &self,
        source: &Source,
        seq: i64,
        waiting: &Return,
        first_at: i64,
        error_type: Option<&str>,
    ) -> Step<()> {
        self.store.run(
            "INSERT INTO pending
                 (grp, seq, state, due_at, lane, claim, attempt, deliveries, redrives, first_at, error_type)
             VALUES (?1, ?2, 0, ?3, ?4, 0, ?5, ?6, 0, ?7, ?8)",
            (
                source.group,
                seq,
                waiting.due_at,
                waiting.lane,
                waiting.attempt,
                waiting.deliveries,
                first_at,
                error_type,
            ),
        )?;
        self.store.touch_group(source.group);
        Ok(())
    }

    fn failed(&self, source: &Source, seq: i64, out: &Out, nack: &Nack) -> Step<()> {
        self.store.run(
            "UPDATE pending SET state = 0, claim = 0, due_at = ?3, attempt = ?4, error_type = coalesce(?5, error_type)
             WHERE grp = ?1 AND seq = ?2",
            (source.group, seq, self.after(nack.delay), out.attempt + 1, nack.error_type.as_deref()),
        )?;
        self.store.touch_group(source.group);
        Ok(())
    }

    /// Back without a failure; `uncounted` hand-overs are taken back with it.
    fn back(&self, source: &Source, seq: i64, out: &Out, uncounted: u32) -> Step<()> {
        self.store.run(
            "UPDATE pending SET state = 0, claim = 0, due_at = ?3, deliveries = ?4 WHERE grp = ?1 AND seq = ?2",
            (source.group, seq, self.store.at_once(), out.deliveries.saturating_sub(uncounted)),
        )?;
        self.store.touch_group(source.group);
        self.lane_moved(source, out.lane)
    }

    fn remove(&self, source: &Source, seq: i64, out: &Out) -> Step<()> {
        let cursor = "SELECT cursor FROM consumers WHERE id = ?1";
        // It expired and was put back before the cursor came by: the cursor must not take it for fresh.
        if out.redrives > 0 && self.store.number(cursor, [source.group])? <= seq {
            let mark = "UPDATE pending SET state = 3, due_at = 0, claim = 0, lane = NULL WHERE grp = ?1 AND seq = ?2";
            self.store.run(mark, (source.group, seq))?;
        } else {
            self.store.run("DELETE FROM pending WHERE grp = ?1 AND seq = ?2", (source.group, seq))?;
        }
        self.store.count_settled(source.dest, 1);
        Ok(())
    }

    fn lane_moved(&self, source: &Source, lane: Option<i64>) -> Step<()> {
        if self.member.order == Order::None {
            return Ok(());
        }
        if self.member.order == Order::Total {
            self.store.touch_group(source.group);
        }
        match lane {
            Some(lane) => lanes::advance(self.store, source, lane, self.member.on_failure),
            None => Ok(()),
        }
    }

    /// The run that holds the delivery, unsettled and within its lease.
    fn run(&mut self, handle: Handle) -> Step<Option<&mut Run>> {
        if self.member.order != Order::None {
            return Ok(None);
        }
        let run = match self.runs.entry(handle.claim) {
            std::collections::hash_map::Entry::Occupied(entry) => entry.into_mut(),
            std::collections::hash_map::Entry::Vacant(entry) => entry.insert(load(self.store, handle.claim)?),
        };
        Ok(run.as_mut().filter(|run| (run.first..=run.last).contains(&handle.seq) && !run.bits.is_set(handle.seq)))
    }

    fn out(&self, source: &Source, handle: Handle) -> Step<Option<Out>> {
        Ok(self.store.one(
            "SELECT lane, attempt, deliveries, redrives, first_at, error_type FROM pending
             WHERE grp = ?1 AND seq = ?2 AND claim = ?3 AND state = 1 AND due_at > ?4",
            (source.group, handle.seq, handle.claim, self.store.now),
            |row| {
                Ok(Out {
                    lane: row.get(0)?,
                    attempt: row.get(1)?,
                    deliveries: row.get(2)?,
                    redrives: row.get(3)?,
                    first_at: row.get(4)?,
                    error_type: row.get(5)?,
                })
            },
        )?)
    }

    /// Writes the runs back that were changed.
    fn write(self) -> Step<()> {
        for (claim, run) in self.runs {
            match run.filter(|run| run.changed) {
                Some(run) if run.open <= 0 => {
                    self.store.run("DELETE FROM claims WHERE id = ?1", [claim])?;
                }
                Some(run) => {
                    self.store.run(
                        "UPDATE claims SET open = ?2, done = ?3 WHERE id = ?1",
                        (claim, run.open, run.bits.as_bytes()),
                    )?;
                }
                None => {}
            }
        }
        Ok(())
    }
}

fn load(store: &Store<'_>, claim: i64) -> Step<Option<Run>> {
    Ok(store.one(
        "SELECT first, last, open, claimed_at, done FROM claims WHERE id = ?1 AND lease_until > ?2",
        (claim, store.now),
        |row| {
            let (first, last) = (row.get(0)?, row.get(1)?);
            Ok(Run {
                bits: Bits::new(first, last, row.get(4)?),
                first,
                last,
                open: row.get(2)?,
                claimed_at: row.get(3)?,
                changed: false,
            })
        },
    )?)
}

//! The one thread of a process that touches the file. It takes everything that waits (publishes, settlements,
//! receives) into one transaction and answers after its commit: many callers share one sync.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use anybroker_core::{Error, ErrorKind, Result};
use rusqlite::Connection;
use tokio::sync::oneshot;

use crate::clock::FileClock;
use crate::config::{Durability, Settings};
use crate::error::{Step, commit_failed, failed, translate};
use crate::fetch::{self, Fetched};
use crate::inbox::{Command, Inbox};
use crate::member::Member;
use crate::retention;
use crate::store::Store;
use crate::wake::{Bell, GroupSync};

/// A member as the writer sees it.
struct Seat {
    member: Arc<Member>,
    /// The last look that was asked for.
    look: u64,
    /// The state of the file in which nothing was ready for it.
    idle_at: Option<u64>,
    /// With which destination its next fetch begins.
    turn: usize,
}

/// The thread's state.
pub(crate) struct Writer {
    connection: Connection,
    settings: Settings,
    clock: FileClock,
    inbox: Arc<Inbox>,
    seats: Vec<Seat>,
    /// SQLite's counter of other connections' commits.
    data_version: i64,
    /// Grows with every commit, ours or another process's.
    state: u64,
    /// How many commands that may bring a message back were taken.
    returns: u64,
    /// Settled messages since a destination was trimmed.
    settled: HashMap<i64, usize>,
    group_sync: Option<GroupSync>,
    bell: Bell,
    /// Whether commits are synced at the moment.
    syncing: bool,
}

/// What a transaction brought to whom.
struct Brought {
    seats: Vec<(usize, Fetched, Option<i64>)>,
    /// Others may find something now.
    touched: bool,
}

impl Writer {
    /// Starts the thread.
    pub(crate) fn start(
        connection: Connection,
        settings: Settings,
        clock: FileClock,
        inbox: Arc<Inbox>,
        group_sync: Option<GroupSync>,
        bell: Bell,
    ) -> std::io::Result<()> {
        let writer = Self {
            syncing: settings.durability == Durability::Synced,
            connection,
            settings,
            clock,
            inbox,
            seats: Vec::new(),
            data_version: 0,
            state: 1,
            returns: 0,
            settled: HashMap::new(),
            group_sync,
            bell,
        };
        std::thread::Builder::new().name("anybroker-embedded".into()).spawn(move || writer.run()).map(drop)
    }

    fn run(mut self) {
        let guard = Ending(Arc::clone(&self.inbox));
        let mut closing = None;
        while let Some((commands, _)) = self.inbox.take() {
            closing = self.round(commands);
            if closing.is_some() {
                break;
            }
        }
        self.inbox.close();
        let Self { connection, group_sync, .. } = self;
        let synced = group_sync.map_or(Ok(()), GroupSync::end);
        let closed = connection.close().map_err(|(_, error)| translate("close", error));
        drop(guard);
        if let Some(answer) = closing {
            let _ = answer.send(synced.and(closed));
        }
    }

    /// One round of work; answers the sender of a `Close`.
    fn round(&mut self, commands: Vec<Command>) -> Option<oneshot::Sender<Result<()>>> {
        let mut closing = None;
        let mut work = Vec::with_capacity(commands.len());
        let mut asks = Vec::new();
        let mut looks = Vec::new();
        for command in commands {
            self.returns += u64::from(command.returns());
            match command {
                Command::Fetch(member, number) => {
                    if let Some(seat) = self.seats.iter().position(|seat| Arc::ptr_eq(&seat.member, &member)) {
                        asks.push(seat);
                        self.seats[seat].look = self.seats[seat].look.max(number);
                    }
                    looks.push((number, member));
                }
                Command::Join(member) => self.seats.push(Seat { member, look: 0, idle_at: None, turn: 0 }),
                Command::Close(answer) => closing = Some(answer),
                command => work.push(command),
            }
        }
        if closing.is_some() {
            for seat in &self.seats {
                work.push(Command::Leave { member: Arc::clone(&seat.member), answer: None });
                seat.member.fail(Error::closed("receive"));
            }
            asks.clear();
        }
        if self.changed_elsewhere() {
            self.state += 1;
            asks = (0..self.seats.len()).collect();
        }
        let now = self.clock.now();
        asks.sort_unstable();
        asks.dedup();
        asks.retain(|seat| self.seats[*seat].may_find(self.state, now));
        if !work.is_empty() || !asks.is_empty() {
            self.work(work, &asks);
        }
        for (number, member) in looks {
            member.has_looked(number);
        }
        closing
    }

    /// Does the work in one transaction, or, when that fails, each piece in one of its own: nobody fails because of
    /// somebody else.
    fn work(&mut self, mut work: Vec<Command>, asks: &[usize]) {
        match self.transact(&mut work, asks) {
            Ok(brought) => {
                self.bring(brought);
                work.into_iter().for_each(|command| self.finish(command, Ok(())));
            }
            Err(Broken { error, begun }) if !begun || work.len() + asks.len() == 1 => {
                work.into_iter().for_each(|command| self.finish(command, Err(&error)));
                asks.iter().for_each(|seat| self.trouble(*seat, &error));
            }
            Err(_) => {
                // By name: a member that leaves moves the seats of the others.
                let asks: Vec<_> = asks.iter().map(|seat| Arc::clone(&self.seats[*seat].member)).collect();
                for command in work {
                    let mut single = vec![command];
                    let done = self.transact(&mut single, &[]).map(|brought| self.bring(brought));
                    let done = done.map_err(|broken| broken.error);
                    single.into_iter().for_each(|command| self.finish(command, done.as_ref().copied()));
                }
                for member in asks {
                    let Some(seat) = self.seats.iter().position(|seat| Arc::ptr_eq(&seat.member, &member)) else {
                        continue;
                    };
                    match self.transact(&mut [], &[seat]) {
                        Ok(brought) => self.bring(brought),
                        Err(broken) => self.trouble(seat, &broken.error),
                    }
                }
            }
        }
    }

    fn transact(&mut self, work: &mut [Command], asks: &[usize]) -> Result<Brought, Broken> {
        // A claim that a power loss takes back is a message that is handed out again, to a consumer that starts
        // anew after it. So claims alone need no sync; the next synced commit takes them along.
        self.sync_commits(!work.is_empty()).map_err(Broken::before)?;
        if let Some(error) = self.group_sync.as_ref().and_then(GroupSync::failure) {
            return Err(Broken { error, begun: false });
        }
        let begin = |connection: &Connection| connection.prepare_cached("BEGIN IMMEDIATE")?.execute([]);
        begin(&self.connection).map_err(Broken::before)?;
        let changes = self.connection.total_changes();
        let done = self.steps(work, asks);
        let committed = done.map_err(|fault| fault.into_error("commit")).and_then(|brought| {
            let commit = |connection: &Connection| connection.prepare_cached("COMMIT")?.execute([]);
            commit(&self.connection).map(|_| brought).map_err(commit_failed)
        });
        match committed {
            Ok(brought) => {
                if self.connection.total_changes() != changes {
                    self.state += 1;
                    if let Some(group_sync) = &self.group_sync {
                        group_sync.committed();
                    }
                    if brought.touched {
                        self.bell.ring();
                    }
                }
                Ok(brought)
            }
            Err(error) => {
                if !self.connection.is_autocommit()
                    && let Err(stuck) = self.connection.execute_batch("ROLLBACK")
                {
                    tracing::error!(error = %stuck, "a failed transaction could not be taken back");
                }
                Err(Broken { error, begun: true })
            }
        }
    }

    fn steps(&mut self, work: &mut [Command], asks: &[usize]) -> Step<Brought> {
        let store = Store::new(&self.connection, &self.settings, &self.clock);
        for command in work {
            command.execute(&store)?;
        }
        let mut brought = Brought { seats: Vec::new(), touched: false };
        for (index, seat) in self.seats.iter().enumerate() {
            let wanted = seat.member.wants();
            let touched = || {
                let touched = store.touched.borrow();
                seat.member
                    .sources
                    .iter()
                    .any(|source| touched.destinations.contains(&source.dest) || touched.groups.contains(&source.group))
            };
            if wanted == 0 || !seat.member.may_have(self.returns) || !(asks.contains(&index) || touched()) {
                continue;
            }
            let fetched = fetch::fetch(&store, &seat.member, wanted, seat.turn)?;
            let idle = fetched.ready.is_empty() && !fetched.more && fetched.gone.is_none();
            let next_due = if idle {
                let mut next = i64::MAX;
                for source in &seat.member.sources {
                    next = next.min(fetch::next_due(&store, source)?);
                }
                Some(next)
            } else {
                None
            };
            brought.seats.push((index, fetched, next_due));
        }
        let touched = store.touched.borrow();
        brought.touched = !(touched.destinations.is_empty() && touched.groups.is_empty());
        for (dest, count) in &touched.settled {
            let sum = self.settled.entry(*dest).or_default();
            *sum += count;
            if *sum >= retention::WORTH && !retention::trim(&store, *dest)? {
                *sum = 0;
            }
        }
        Ok(brought)
    }

    /// Brings what was committed to its members.
    fn bring(&mut self, brought: Brought) {
        for (index, fetched, next_due) in brought.seats {
            let seat = &mut self.seats[index];
            seat.turn = seat.turn.wrapping_add(1);
            seat.idle_at = next_due.map(|_| self.state);
            if let Some(source) = fetched.gone {
                let text = "the destination or the group was deleted";
                let error = Error::new(ErrorKind::NotFound, "receive", text)
                    .with("destination", &seat.member.sources[source].destination);
                seat.member.fail(error);
            } else if let Some(next_due) = next_due {
                seat.member.nothing_until(next_due);
            } else if fetched.ready.is_empty() {
                // It had much to look at and found nothing yet.
                let _ = self.inbox.send(Command::Fetch(Arc::clone(&seat.member), seat.look));
            } else {
                seat.member.bring(fetched.ready, self.returns);
            }
        }
    }

    fn finish(&mut self, command: Command, done: Result<(), &Error>) {
        match command {
            Command::Publish(publish) => publish.finish(done),
            Command::Settle(settles) => settles.finish(done),
            Command::Call(call) => call.finish(done),
            Command::GiveBack { .. } => {
                if let Err(error) = done {
                    tracing::warn!(%error, "deliveries could not be given back; they come back when their lease ends");
                }
            }
            Command::Leave { member, answer } => {
                self.seats.retain(|seat| !Arc::ptr_eq(&seat.member, &member));
                if let Some(answer) = answer {
                    let _ = answer.send(done.map_err(Error::duplicate));
                }
            }
            Command::Fetch(..) | Command::Join(_) | Command::Close(_) => {}
        }
    }

    /// A member's fetch failed: it waits for better times, or ends.
    fn trouble(&self, seat: usize, error: &Error) {
        let Some(seat) = self.seats.get(seat) else { return };
        match error.kind() {
            ErrorKind::Unavailable => seat.member.degrade(error),
            _ => seat.member.fail(error.duplicate()),
        }
    }

    /// Whether another connection has committed something since the last look.
    fn changed_elsewhere(&mut self) -> bool {
        let read = |connection: &Connection| {
            connection.prepare_cached("PRAGMA data_version")?.query_row([], |row| row.get::<_, i64>(0))
        };
        match read(&self.connection) {
            Ok(version) => std::mem::replace(&mut self.data_version, version) != version,
            Err(error) => {
                tracing::warn!(%error, "the file's version cannot be read");
                true
            }
        }
    }

    fn sync_commits(&mut self, wanted: bool) -> rusqlite::Result<()> {
        if self.settings.durability == Durability::Synced && self.syncing != wanted {
            let level = if wanted { "PRAGMA synchronous = FULL" } else { "PRAGMA synchronous = NORMAL" };
            self.connection.execute_batch(level)?;
            self.syncing = wanted;
        }
        Ok(())
    }
}

impl Seat {
    /// False when nothing was ready in this state of the file, and nothing fell due since.
    fn may_find(&self, state: u64, now: i64) -> bool {
        let due = self.member.next_due.load(Ordering::Acquire);
        self.member.wants() > 0 && (self.idle_at != Some(state) || now >= due)
    }
}

/// A transaction that failed.
struct Broken {
    error: Error,
    /// It had begun: single pieces of it may still succeed.
    begun: bool,
}

impl Broken {
    fn before(error: rusqlite::Error) -> Self {
        Self { begun: failed(&error).is_none(), error: translate("begin", error) }
    }
}

/// However the thread ends, nobody waits for it any more.
struct Ending(Arc<Inbox>);

impl Drop for Ending {
    fn drop(&mut self) {
        self.0.abandon();
    }
}

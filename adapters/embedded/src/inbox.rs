//! What waits for the writer, and what becomes of it.

use std::any::Any;
use std::collections::VecDeque;
use std::sync::Arc;

use anybroker_core::{Delivery, Error, ErrorKind, Message, PublishOutcome, Result, SettleOutcome, Settlement};
use parking_lot::{Condvar, Mutex};
use tokio::sync::{OwnedSemaphorePermit, oneshot};

use crate::error::{Fault, Step};
use crate::member::{Handle, Member};
use crate::store::Store;
use crate::{publisher, settle};

/// Commands, and bytes of messages, that one transaction takes.
const COMMANDS: usize = 1_024;
const BYTES: usize = 16 << 20;

/// What the writer is asked for.
pub(crate) enum Command {
    Publish(Publish),
    Settle(Settles),
    /// Deliveries that nobody settled go back.
    GiveBack {
        member: Arc<Member>,
        handles: Vec<Handle>,
        handed_over: bool,
    },
    /// A receive waits, and asks for the look of that number.
    Fetch(Arc<Member>, u64),
    Join(Arc<Member>),
    /// A subscription closes: everything it holds goes back.
    Leave {
        member: Arc<Member>,
        answer: Option<oneshot::Sender<Result<()>>>,
    },
    Call(Call),
    /// The connection closes: so do all subscriptions.
    Close(oneshot::Sender<Result<()>>),
}

/// A batch to be stored.
pub(crate) struct Publish {
    pub(crate) batch: Vec<Message>,
    pub(crate) outcomes: Vec<PublishOutcome>,
    pub(crate) answer: Option<oneshot::Sender<Vec<PublishOutcome>>>,
    pub(crate) weight: usize,
    /// The buffer's room, given back when the batch is answered.
    pub(crate) room: OwnedSemaphorePermit,
}

/// A batch to be settled.
pub(crate) struct Settles {
    pub(crate) member: Arc<Member>,
    pub(crate) batch: Vec<(Delivery, Settlement)>,
    pub(crate) results: Vec<Result<()>>,
    pub(crate) answer: Option<oneshot::Sender<Vec<SettleOutcome>>>,
}

type Answer = Box<dyn Any + Send>;
type Work = Box<dyn FnMut(&Store<'_>) -> Step<Answer> + Send>;

/// Any other piece of work.
pub(crate) struct Call {
    operation: &'static str,
    work: Work,
    result: Option<Result<Answer>>,
    answer: Option<oneshot::Sender<Result<Answer>>>,
}

/// What waits for the writer.
#[derive(Default)]
pub(crate) struct Inbox {
    waiting: Mutex<Waiting>,
    arrived: Condvar,
}

#[derive(Default)]
struct Waiting {
    commands: VecDeque<Command>,
    /// The file may have been changed by another process.
    look: bool,
    closed: bool,
    /// How many commands so far may bring a message back.
    returns: u64,
}

impl Inbox {
    /// Hands a command over; gives it back once the connection is closed.
    pub(crate) fn send(&self, command: Command) -> Result<(), Command> {
        let mut waiting = self.waiting.lock();
        if waiting.closed {
            return Err(command);
        }
        waiting.returns += u64::from(command.returns());
        waiting.commands.push_back(command);
        drop(waiting);
        self.arrived.notify_one();
        Ok(())
    }

    /// How many commands that may bring a message back were sent so far. They are taken in that order.
    pub(crate) fn returns(&self) -> u64 {
        self.waiting.lock().returns
    }

    /// The file may have changed.
    pub(crate) fn look(&self) {
        self.waiting.lock().look = true;
        self.arrived.notify_one();
    }

    /// No more commands; what waits is done first.
    pub(crate) fn close(&self) {
        self.waiting.lock().closed = true;
        self.arrived.notify_one();
    }

    /// Nobody works any more: whoever waits is told by the loss of its answer.
    pub(crate) fn abandon(&self) {
        let mut waiting = self.waiting.lock();
        waiting.closed = true;
        waiting.commands.clear();
    }

    /// Runs `work` within a transaction and brings its answer. It may run twice: a transaction in which somebody
    /// else's work failed is taken back.
    pub(crate) async fn call<T: Send + 'static>(
        &self,
        operation: &'static str,
        mut work: impl FnMut(&Store<'_>) -> Step<T> + Send + 'static,
    ) -> Result<T> {
        let (answer, answered) = oneshot::channel();
        let call = Call {
            operation,
            work: Box::new(move |store| work(store).map(|found| Box::new(found) as Answer)),
            result: None,
            answer: Some(answer),
        };
        if self.send(Command::Call(call)).is_err() {
            return Err(Error::closed(operation));
        }
        let found = answered.await.map_err(|_| Error::closed(operation))??;
        Ok(*found.downcast().expect("the work's own type"))
    }

    /// Waits for something to do; `None` when there will be nothing any more.
    pub(crate) fn take(&self) -> Option<(Vec<Command>, bool)> {
        let mut waiting = self.waiting.lock();
        while waiting.commands.is_empty() && !waiting.look {
            if waiting.closed {
                return None;
            }
            self.arrived.wait(&mut waiting);
        }
        let look = std::mem::take(&mut waiting.look);
        let (mut count, mut bytes) = (0, 0);
        for command in waiting.commands.iter().take(COMMANDS) {
            if let Command::Publish(publish) = command {
                bytes += publish.weight;
            }
            if bytes > BYTES && count > 0 {
                break;
            }
            count += 1;
        }
        Some((waiting.commands.drain(..count).collect(), look))
    }
}

impl Command {
    /// Whether it may bring a message back, which then comes before later ones of its lane.
    pub(crate) fn returns(&self) -> bool {
        match self {
            // A redrive is a call.
            Self::GiveBack { .. } | Self::Leave { .. } | Self::Call(_) => true,
            Self::Settle(settles) => settles.batch.iter().any(|(_, settlement)| !matches!(settlement, Settlement::Ack)),
            Self::Publish(_) | Self::Fetch(..) | Self::Join(_) | Self::Close(_) => false,
        }
    }

    /// Does its part of a transaction. It may be done again, when the transaction was taken back.
    pub(crate) fn execute(&mut self, store: &Store<'_>) -> Step<()> {
        match self {
            Self::Publish(publish) => publish.outcomes = publisher::store(store, &publish.batch)?,
            Self::Settle(settles) => settles.results = settle::settle(store, &settles.member, &settles.batch)?,
            Self::GiveBack { member, handles, handed_over } => {
                settle::give_back(store, member, handles, *handed_over)?;
            }
            Self::Leave { member, .. } => settle::give_back_all(store, member)?,
            Self::Call(call) => call.execute(store)?,
            Self::Fetch(..) | Self::Join(_) | Self::Close(_) => {}
        }
        Ok(())
    }
}

impl Publish {
    pub(crate) fn finish(self, done: Result<(), &Error>) {
        let outcomes = match done {
            Ok(()) => self.outcomes,
            Err(error) => self.batch.iter().map(|message| Err(error.duplicate().with("id", message.id()))).collect(),
        };
        drop(self.room);
        if let Some(answer) = self.answer {
            let _ = answer.send(outcomes);
        }
    }
}

impl Settles {
    pub(crate) fn finish(self, done: Result<(), &Error>) {
        let results = match done {
            Ok(()) => self.results,
            Err(error) => self.batch.iter().map(|_| Err(error.duplicate())).collect(),
        };
        let outcomes = settle::outcomes(self.batch, results);
        if let Some(answer) = self.answer {
            let _ = answer.send(outcomes);
        }
    }
}

impl Call {
    /// Runs the work; when it answers with an error of its own, what it did so far is taken back.
    fn execute(&mut self, store: &Store<'_>) -> Step<()> {
        store.run("SAVEPOINT call", [])?;
        match (self.work)(store) {
            Ok(answer) => {
                store.run("RELEASE call", [])?;
                self.result = Some(Ok(answer));
            }
            Err(Fault::Broker(error)) => {
                store.run("ROLLBACK TO call", [])?;
                store.run("RELEASE call", [])?;
                self.result = Some(Err(error));
            }
            Err(fault) => return Err(fault),
        }
        Ok(())
    }

    pub(crate) fn finish(self, done: Result<(), &Error>) {
        let result = match (done, self.result) {
            (Ok(()), Some(result)) => result,
            (Err(error), _) => Err(error.duplicate()),
            (Ok(()), None) => Err(Error::new(ErrorKind::Unexpected, self.operation, "the work did not run")),
        };
        if let Some(answer) = self.answer {
            let _ = answer.send(result);
        }
    }
}

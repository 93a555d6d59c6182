//! Publishers and members in processes of their own, which end at a named point: nothing of them runs any more, no destructor
//! and no close, as after a SIGKILL. What they did and saw until then goes to the case's history, event by event.

use std::io::Write;
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anybroker_core::{
    AckLevel, Bus, Destination, Error, ErrorKind, Group, Nack, PublishOptions, Reason, RedriveOptions, Result,
    Settlement, SubscribeSpec, Verdict,
};
use futures_util::future::{BoxFuture, join};
use rand::RngExt;
use rand::rngs::StdRng;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, BufReader};
use tokio::process::Command;
use tokio::sync::oneshot;
use tokio::time::Instant;

use crate::UrlHarness;
use crate::case::{Breach, Proof, ensure, fail};
use crate::checker::may_be_under_way;
use crate::client::Client;
use crate::consumer::{Held, ack_all, settle};
use crate::env::Env;
use crate::history::{Event, History, What, micros};

/// The environment variable that tells a process of [`Harness::child`](crate::Harness::child) what to do.
pub const CHILD_JOB: &str = "CONFORMANCE_CHILD_JOB";

/// Begins each line of a process that is one of its events. Others are not looked at.
const MARK: &str = "conformance-event ";
/// What the history calls the faults.
const ENDED: &str = "process killed";
const STOPPED: &str = "process stopped";
/// Numbers of calls, deliveries and subscriptions that one process may use.
const NUMBERS: u64 = 1 << 20;
/// How much of what a process says of its own failure is told.
const TOLD: u64 = 4_000;
const BATCH: usize = 20;
const KEYS: u32 = 8;
/// How many deliveries a member has when it ends, and as many it has acked before.
const HELD: usize = 4;
/// How long what a process has begun goes on before it ends, at most.
const ON_ITS_WAY: Duration = Duration::from_millis(4);
/// How many each second of those that are left.
const REDRIVE_RATE: f64 = 80.0;
/// How long it may take a broker to miss a process that is stopped: two heartbeats of RabbitMQ's default, and a session of Kafka's,
/// are shorter.
pub(crate) const MISSED: Duration = Duration::from_secs(240);
/// How many letters a process puts back, twice, before the redrive in which it ends.
const REDRIVEN: usize = 4;

/// Where a process ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Point {
    /// A batch was handed over, and no confirm was read.
    Publishing,
    /// All confirms were read.
    Confirmed,
    /// With deliveries in its hands, some acked before.
    Holding,
    /// Acks were asked for, and no answer was read.
    Acking,
    /// Every ack was answered.
    Acked,
    /// Nacks were asked for.
    Nacking,
    /// Dead letters were asked for.
    Burying,
    /// Asked to close, with deliveries in its hands.
    Closing,
    /// Nacks with a delay of [`LATER`] were answered.
    Nacked,
    /// Releases were answered.
    Released,
    /// Dead letters were answered.
    Buried,
    /// A redrive of all dead letters was asked for.
    Redriving,
    /// With deliveries in its hands, stopped there by SIGSTOP, and ended when it has settled them after a SIGCONT and the end of its
    /// standard input.
    Stopped,
    /// Of [`BESIDE_HOLE`] messages of one key all acks but that of the one at [`HOLE`] were answered.
    Hole,
}

/// The delay of a nack that is answered before its process ends: longer than the lease, so that one that has lost its delay is back before.
pub(crate) const LATER: Duration = Duration::from_secs(8);
/// How long a process waits before it ends, where acks are sent or recorded only: until the broker has been told of them.
const TAKEN_IN: Duration = Duration::from_millis(2_500);
/// How many messages of one key are out together, where all of them but one are acked.
const BESIDE_HOLE: usize = 10;
/// The place of that one.
pub(crate) const HOLE: usize = 4;

impl Point {
    /// A word for names.
    pub(crate) fn label(self) -> String {
        format!("{self:?}").to_lowercase()
    }

    fn is_of_publisher(self) -> bool {
        matches!(self, Self::Publishing | Self::Confirmed)
    }
}

/// What a process is told.
#[derive(Serialize, Deserialize)]
struct Job {
    point: Point,
    destination: Destination,
    group: Group,
    scope: String,
    seed: u64,
    client: u32,
    first_number: u64,
    /// When the history began, in microseconds since 1970.
    began: u64,
    lease: Duration,
    quiet: Duration,
    patience: Duration,
}

/// Starts a process that works on the destination until it ends at that point, and takes in what it tells. Answers which client
/// it was.
/// Several that end at the same point differ by `number`.
pub(crate) async fn end_at(env: &Env, point: Point, number: usize, spec: &SubscribeSpec) -> Proof<u32> {
    end_after(env, point, number, spec, async |_| Ok(())).await
}

/// The same of a process that stops at that point; it goes on after what is done meanwhile, which is told which client it is.
pub(crate) async fn end_after(
    env: &Env,
    point: Point,
    number: usize,
    spec: &SubscribeSpec,
    meanwhile: impl AsyncFnOnce(u32) -> Proof,
) -> Proof<u32> {
    let command = env.harness.child().map_err(Breach::NotRun)?;
    let client = env.next_client();
    let job = Job {
        point,
        destination: spec.destinations[0].clone(),
        group: spec.group.clone(),
        scope: env.scope().to_owned(),
        seed: env.rng().random::<u64>() ^ point as u64 ^ (number as u64) << 32,
        client,
        first_number: env.history.numbers(NUMBERS),
        began: micros(env.history.began().duration_since(UNIX_EPOCH).unwrap_or_default()),
        lease: spec.lease,
        quiet: env.quiet(),
        patience: env.patience(),
    };
    let text = serde_json::to_string(&job).map_err(|error| Breach::Failed(error.to_string()))?;
    let mut command = Command::from(command);
    command.env(CHILD_JOB, text).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    let not_started = |error| Breach::NotRun(format!("no process could be started: {error}"));
    let mut process = command.spawn().map_err(not_started)?;
    let (output, errors) = (process.stdout.take().expect("piped"), process.stderr.take().expect("piped"));
    let (stopped, is_stopped) = oneshot::channel();
    let (id, input) = (process.id(), process.stdin.take());
    let working = async {
        let (fault, told) = join(listen(env, output, stopped), beginning_of(errors)).await;
        Ok::<_, Breach>((fault?, told, process.wait().await))
    };
    let between = async {
        // Nothing comes from one that does not stop.
        let (Ok(()), Some(id)) = (is_stopped.await, id) else { return Ok(()) };
        let done = meanwhile(client).await;
        // Before it goes on, so that nothing keeps it from settling at once.
        drop(input);
        // Also when something went wrong: it would be there for ever.
        let goes_on = signal("-CONT", id).await;
        done.and(goes_on)
    };
    let whole = env.patience() * 2 + if point == Point::Stopped { env.patience() * 2 + MISSED } else { Duration::ZERO };
    let both = join(working, between);
    let (ended, between) = env.within("a process that ends by itself", whole, both).await?;
    between?;
    let (fault, told, status) = ended?;
    let Some(fault) = fault else {
        fail!("a process ended before it was {}: {status:?}; it said: {}", point.label(), told.trim());
    };
    env.history.record(client, What::FaultEnd { fault, connections: 0, bytes: 0 });
    Ok(client)
}

/// Takes in the events of a process; the fault that it noted, which is its own end.
async fn listen(env: &Env, output: impl AsyncRead + Unpin, stopped: oneshot::Sender<()>) -> Proof<Option<u64>> {
    let mut lines = BufReader::new(output).lines();
    let (mut own_end, mut stopped) = (None, Some(stopped));
    loop {
        let line =
            lines.next_line().await.map_err(|error| Breach::Failed(format!("listening to a process: {error}")))?;
        let Some(line) = line else { return Ok(own_end) };
        let Some(event) = line.strip_prefix(MARK) else { continue };
        let event: Event =
            serde_json::from_str(event).map_err(|error| Breach::Failed(format!("`{event}` of a process: {error}")))?;
        let mut stops = false;
        if let What::FaultBegin { fault, kind, .. } = &event.what {
            stops = kind == STOPPED;
            own_end = (!stops).then_some(*fault);
        }
        env.history.take_in(event);
        if let Some(stopped) = stopped.take_if(|_| stops) {
            let _ = stopped.send(());
        }
    }
}

/// Sends a signal to a process.
async fn signal(signal: &str, process: u32) -> Proof {
    let not_sent = |why: String| Breach::NotRun(format!("`kill {signal}` of a process: {why}"));
    let status = Command::new("kill").args([signal, &process.to_string()]).status().await;
    let status = status.map_err(|error| not_sent(error.to_string()))?;
    ensure!(status.success(), "`kill {signal}` of a process, which should be there: {status}");
    Ok(())
}

async fn beginning_of(errors: impl AsyncRead + Unpin) -> String {
    let (mut told, mut rest) = (Vec::new(), tokio::io::sink());
    let mut errors = errors.take(TOLD);
    let _ = errors.read_to_end(&mut told).await;
    // A process that has more to say must not stand still for it.
    let _ = tokio::io::copy(&mut errors.into_inner(), &mut rest).await;
    String::from_utf8_lossy(&told).into_owned()
}

/// What a process of [`Harness::child`](crate::Harness::child) does: publishes or consumes as the suite says in [`CHILD_JOB`],
/// tells its events on standard output, and ends in the middle of it, by `abort`. `connect` gives a client of the broker that
/// the suite runs against. Standard input is the suite's as well.
///
/// ```no_run
/// # async fn example(connect: impl Fn() -> futures_util::future::BoxFuture<'static, anybroker_core::Result<anybroker_core::Bus>> + Send + Sync + 'static)
/// # -> anybroker_core::Result<()> {
/// if std::env::var_os(anybroker_conformance::CHILD_JOB).is_some() {
///     return anybroker_conformance::run_child(connect).await;
/// }
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// It returns only where it did not come to that point: `ConfigInvalid` without a job that it can read; what connecting says;
/// `Unexpected` with what went wrong.
pub async fn run_child(connect: impl Fn() -> BoxFuture<'static, Result<Bus>> + Send + Sync + 'static) -> Result<()> {
    let unusable = |text: String| Error::new(ErrorKind::ConfigInvalid, "conform", text);
    let text = std::env::var(CHILD_JOB).map_err(|error| unusable(format!("{CHILD_JOB}: {error}")))?;
    let job: Job = serde_json::from_str(&text).map_err(|error| unusable(format!("{CHILD_JOB}: {error}")))?;
    let bus = connect().await?;
    let record = Arc::new(bus.capabilities().clone());
    let harness =
        UrlHarness::new("a process", connect).with_lease(job.lease).with_quiet(job.quiet).with_patience(job.patience);
    let began = UNIX_EPOCH.checked_add(Duration::from_micros(job.began)).unwrap_or_else(SystemTime::now);
    let history = History::part(began, job.first_number, Box::new(tell));
    let env = Env::part(Arc::new(harness), record, job.scope.clone(), job.seed, history, job.client);
    let client = env.wrap(bus);
    let ended = match job.point {
        Point::Redriving => redrive(&env, &client, &job).await,
        point if point.is_of_publisher() => publish(&env, &client, &job).await,
        _ => consume(&env, &client, &job).await,
    };
    match ended {
        Ok(()) => Ok(()),
        Err(Breach::Failed(why) | Breach::Inconclusive(why) | Breach::NotRun(why)) => {
            Err(Error::new(ErrorKind::Unexpected, "conform", why))
        }
    }
}

/// Nothing goes on before the suite can read it.
fn tell(event: &Event) {
    let line = serde_json::to_string(event).unwrap_or_default();
    let mut output = std::io::stdout().lock();
    let _ = writeln!(output, "{MARK}{line}").and_then(|()| output.flush());
}

/// The end. Nothing after it runs, nowhere in this process.
fn end(env: &Env, client: &Client<'_>, subscription: Option<u64>) -> ! {
    let (fault, clients) = (env.history.number(), vec![client.number()]);
    client.record(What::FaultBegin { fault, kind: ENDED.into(), clients, connections: 0 });
    if let Some(subscription) = subscription {
        client.record(What::Vanished { subscription });
    }
    std::process::abort()
}

/// Stops here, until it is told to go on. A signal reaches a process of many threads when one of them is scheduled next, and the
/// others run until then: what keeps this one from going on meanwhile is that its input has no end yet.
async fn stop(env: &Env, client: &Client<'_>) -> Proof {
    let (fault, clients) = (env.history.number(), vec![client.number()]);
    client.record(What::FaultBegin { fault, kind: STOPPED.into(), clients, connections: 0 });
    let stopped = signal("-STOP", std::process::id()).await;
    let _ = tokio::io::stdin().read(&mut [0]).await;
    client.record(What::FaultEnd { fault, connections: 0, bytes: 0 });
    stopped
}

async fn publish(env: &Env, client: &Client<'_>, job: &Job) -> Proof {
    let mut random = env.rng();
    let batches = random.random_range(2..6);
    for left in (0..batches).rev() {
        let batch: Vec<_> = (0..BATCH)
            .map(|_| client.message(&job.destination, format!("key {}", random.random_range(0..KEYS)).as_str()))
            .collect();
        if left > 0 || job.point == Point::Confirmed {
            client.publish_ok(batch).await?;
            continue;
        }
        client.invoke(&batch);
        let confirms = async { client.bus.submit(batch, &PublishOptions::default()).await.await };
        for_a_moment(&mut random, confirms).await;
    }
    end(env, client, None)
}

/// Puts some letters back, and is ended while it does so with the rest.
async fn redrive(env: &Env, client: &Client<'_>, job: &Job) -> Proof {
    let mut random = env.rng();
    let (destination, group) = (&job.destination, &job.group);
    let mut some = RedriveOptions::default();
    // Read no further than that: where letters are leased, looking for the end of them takes a while.
    (some.limit, some.batch) = (Some(REDRIVEN as u64), REDRIVEN);
    client.redrive(destination, group, &some).await?;
    let letters = client.bus.dead_letters(destination, group)?;
    let left = client.letters(destination, group).await?;
    let ids: Vec<_> = left.iter().map(|letter| letter.message.id().clone()).collect();
    // Which of them come first is the broker's business: of each may be said that it is back.
    client.record(What::RedriveInfo { destination: destination.clone(), group: group.clone(), ids });
    let begin = Instant::now();
    env.bounded("redrive", letters.redrive(&some)).await??;
    let took = begin.elapsed();
    let mut rest = RedriveOptions::default();
    // Some batches with a pause behind each, so that some are left however slow this machine is; the end comes within one of the first.
    rest.batch = random.random_range(1..=4);
    rest.rate = Some(REDRIVE_RATE);
    let pause = Duration::from_secs_f64(f64::from(u32::try_from(rest.batch).unwrap_or(u32::MAX)) / REDRIVE_RATE);
    let end_after = pause * random.random_range(0..3) + took.mul_f64(random.random_range(0.0..1.0));
    // Beside this task: an adapter that awaits nothing is ended in the middle all the same.
    let redriving = tokio::spawn(async move { letters.redrive(&rest).await.map(drop) });
    tokio::time::sleep(end_after).await;
    drop(redriving);
    end(env, client, None)
}

async fn consume(env: &Env, client: &Client<'_>, job: &Job) -> Proof {
    let mut random = env.rng();
    let spec = env.spec(&job.destination, &job.group).with_max_in_flight(BATCH).with_lease(job.lease);
    let mut consumer = client.subscribe(spec).await?;
    let subscription = consumer.subscription;
    let before = if job.point == Point::Hole { env.of_one_key(HELD) } else { env.at_once(HELD) };
    ack_all(consumer.take(before).await?).await?;
    let count = if job.point == Point::Hole { env.of_one_key(BESIDE_HOLE) } else { env.at_once(HELD) };
    let mut held = consumer.take(count).await?;
    let settled_with: fn() -> Settlement = match job.point {
        Point::Nacked | Point::Released | Point::Buried | Point::Hole => {
            let hole = (job.point == Point::Hole).then(|| held.remove(HOLE));
            let settlement = match job.point {
                Point::Nacked => Settlement::Nack(Nack { delay: LATER, error_type: None }),
                Point::Released => Settlement::Release,
                Point::Buried => Settlement::DeadLetter(Box::new(Verdict::new(Reason::Rejected))),
                _ => Settlement::Ack,
            };
            let entries = held.into_iter().map(|held| (held, settlement.clone())).collect();
            for outcome in settle(entries).await? {
                outcome.map_err(|(_, error)| Breach::from(error))?;
            }
            if env.record.ack_level != AckLevel::Confirmed {
                // As long as it takes the broker to be told.
                tokio::time::sleep(TAKEN_IN).await;
            }
            drop_never(hole.into_iter().collect());
            end(env, client, Some(subscription))
        }
        Point::Stopped => {
            stop(env, client).await?;
            for (number, held) in held.into_iter().enumerate() {
                let nacks = number % 2 == 1 && env.record.nack.is_given();
                let nack = Settlement::Nack(Nack { delay: Duration::ZERO, error_type: None });
                if let Err((held, _)) = held.settle(if nacks { nack } else { Settlement::Ack }).await? {
                    held.freeze();
                }
            }
            end(env, client, Some(subscription))
        }
        Point::Acked => {
            ack_all(held).await?;
            end(env, client, Some(subscription))
        }
        Point::Closing => {
            client.record(What::CloseInvoke { subscription });
            for_a_moment(&mut random, consumer.subscriber.close(env.patience())).await;
            // Held until the end.
            drop_never(held);
            end(env, client, Some(subscription))
        }
        Point::Acking => || Settlement::Ack,
        Point::Nacking => || Settlement::Nack(Nack { delay: Duration::ZERO, error_type: None }),
        Point::Burying => || Settlement::DeadLetter(Box::new(Verdict::new(Reason::Rejected))),
        Point::Holding | Point::Publishing | Point::Confirmed | Point::Redriving => {
            // As long as it takes a client to do what it does by the clock: commit, renew, note its progress. No ack of the
            // first ones may be forgotten any more then, whatever its level says.
            tokio::time::sleep(may_be_under_way(env.record.ack_level) + env.quiet()).await;
            drop_never(held);
            end(env, client, Some(subscription))
        }
    };
    let entries = held.into_iter().map(|held| {
        let (_, delivery_number, delivery) = held.take();
        let settlement = settled_with();
        client.record(What::settle_invoke(delivery_number, &settlement));
        (delivery, settlement)
    });
    for_a_moment(&mut random, anybroker_core::settle(entries.collect())).await;
    end(env, client, Some(subscription))
}

/// Lets something go on for as long as the seed says, so that it is ended at another place each time.
async fn for_a_moment(random: &mut StdRng, work: impl Future) {
    let most = u64::try_from(ON_ITS_WAY.as_micros()).unwrap_or(0);
    let work = std::pin::pin!(work);
    let _ = tokio::time::timeout(Duration::from_micros(random.random_range(0..=most)), work).await;
}

/// A drop would give them back.
fn drop_never(held: Vec<Held<'_>>) {
    held.into_iter().for_each(Held::freeze);
}

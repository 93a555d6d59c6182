//! Clusters whose nodes are killed, restarted and frozen one by one, and clusters without a majority.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::sync::Arc;
use std::time::Duration;

use anybroker_core::{Message, MessageId, Settlement, SubscribeSpec};
use futures_util::future::{BoxFuture, try_join_all};
use rand::seq::SliceRandom;
use tokio::sync::Mutex;
use tokio::time::Instant;

use super::faults::acked;
use super::server::short_lease;
use crate::case::{Breach, Proof, ensure};
use crate::client::Client;
use crate::consumer::{Consumer, settle};
use crate::env::Env;
use crate::faults::{Disturbance, NODES, Trial, is_publishing_in_a_fault, is_settling_in_a_fault, of_server};
use crate::history::{Event, What, micros};
use crate::{Case, ServerControl, need};

/// A case of the third level about nodes.
macro_rules! cluster {
    ($name:literal, [$($need:expr),* $(,)?], $proves:literal, $run:path) => {
        $crate::Case {
            name: $name,
            level: $crate::Level::Long,
            proves: $proves,
            needs: &[$($need),*],
            alone: true,
            run: |env| Box::pin($run(env)),
        }
    };
}

pub(super) const CASES: &[Case] = &[
    cluster!(
        "cluster/a-node-that-is-killed-and-stays-away-takes-nothing-with-it-and-everybody-goes-on",
        [need::SURVIVES_KILL],
        "What is confirmed survives the loss of a node, whichever it is, and others do its work while it is away.",
        killed
    ),
    cluster!(
        "cluster/nodes-that-are-restarted-in-turn-lose-nothing-and-everybody-goes-on",
        [],
        "An upgrade of a cluster, node by node, loses nothing and ends nobody's work.",
        restarted
    ),
    cluster!(
        "cluster/a-node-that-is-frozen-for-longer-than-its-peers-wait-for-it-does-no-harm-when-it-goes-on",
        [],
        "What a frozen node led others lead; when it goes on nothing is lost that was confirmed, and nothing settled that was not.",
        frozen
    ),
    cluster!(
        "cluster/with-a-majority-killed-nothing-is-told-as-stored-and-everybody-goes-on-when-it-is-back",
        [need::SURVIVES_KILL],
        "Ok means stored as the cluster stores: without a majority every publish ends in time with an error that may pass.",
        majority_killed
    ),
    cluster!(
        "cluster/with-a-majority-frozen-nothing-is-told-as-stored-and-everybody-goes-on-when-it-is-back",
        [],
        "Ok means stored as the cluster stores: without a majority every publish ends in time with an error that may pass.",
        majority_frozen
    ),
];

async fn killed(env: &Env) -> Proof {
    disturbed(env, How::Killed).await
}

async fn restarted(env: &Env) -> Proof {
    disturbed(env, How::Restarted).await
}

async fn frozen(env: &Env) -> Proof {
    disturbed(env, How::Frozen).await
}

async fn majority_killed(env: &Env) -> Proof {
    disturbed(env, How::MajorityKilled).await
}

async fn majority_frozen(env: &Env) -> Proof {
    disturbed(env, How::MajorityFrozen).await
}

/// What becomes of nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum How {
    Killed,
    Restarted,
    Frozen,
    MajorityKilled,
    MajorityFrozen,
}

/// How long a node is away: longer than elections, and than what brokers wait for one before others lead in its place (JetStream 9 s,
/// Kafka's controller 9 s). Nobody has to wait for longer than the harness has patience.
const AWAY: Duration = Duration::from_secs(20);
/// How long it is frozen.
const FROZEN: Duration = Duration::from_secs(15);
/// How long a majority is away.
const NO_MAJORITY: Duration = Duration::from_secs(15);
/// What is published later than that finds out that there is none.
const NOTICED: Duration = Duration::from_secs(5);

impl How {
    fn takes_a_majority(self) -> bool {
        matches!(self, Self::MajorityKilled | Self::MajorityFrozen)
    }

    /// What the nodes are called meanwhile.
    fn participle(self) -> &'static str {
        match self {
            Self::Killed | Self::MajorityKilled => "killed",
            Self::Restarted => "restarted",
            Self::Frozen | Self::MajorityFrozen => "frozen",
        }
    }

    /// For how long.
    fn lasts(self, env: &Env) -> Duration {
        match self {
            Self::Killed => AWAY.min(env.patience()),
            Self::Restarted => Duration::ZERO,
            Self::Frozen => FROZEN.min(env.patience()),
            Self::MajorityKilled | Self::MajorityFrozen => NO_MAJORITY.min(noticed(env) * 3),
        }
    }
}

fn noticed(env: &Env) -> Duration {
    NOTICED.min(env.patience())
}

/// A trial while every node has its turn, so that whatever leads is among them; or while all but one are gone. In which order, and
/// which one is left, the seed says.
async fn disturbed(env: &Env, how: How) -> Proof {
    let server = env.server()?;
    let count = server.nodes().map_err(Breach::NotRun)?;
    if count < 2 {
        return Err(Breach::NotRun(format!("a server of {count} node is no cluster")));
    }
    if count == 2 && matches!(how, How::Killed | How::Frozen) {
        return Err(Breach::NotRun("of two nodes no majority is left without one".into()));
    }
    let mut nodes: Vec<u32> = (1..=count).collect();
    nodes.shuffle(&mut env.rng());
    let turns: Vec<Vec<u32>> = match how.takes_a_majority() {
        true => vec![nodes.split_off(1)],
        false => nodes.into_iter().map(|node| vec![node]).collect(),
    };
    // Starting nodes again takes its time too.
    let lasts = (how.lasts(env) + env.patience()) * u32::try_from(turns.len()).unwrap_or(u32::MAX);
    let trial = Trial::new(env, |spec: SubscribeSpec| spec).enduring(lasts);
    let (publishers, members) = Trial::CLIENTS;
    let mut clients = Vec::new();
    for _ in 0..publishers + members {
        clients.push(env.client().await?);
    }
    let members = clients.split_off(publishers);
    let mut beside = Beside::open(env).await?;
    beside.go_on(env, "before any fault").await?;
    let beside = Mutex::new(beside);
    let hits: Vec<Box<dyn Disturbance + '_>> = turns
        .into_iter()
        .enumerate()
        .map(|(turn, nodes)| {
            let server = Arc::clone(&server);
            Box::new(OfNodes { server, nodes, how, is_first: turn == 0, beside: &beside }) as Box<dyn Disturbance + '_>
        })
        .collect();
    trial.run(clients, members, &hits).await?;
    drop(hits);
    beside.into_inner().close(env).await
}

/// A fault of some nodes.
struct OfNodes<'c, 'e> {
    server: Arc<dyn ServerControl>,
    nodes: Vec<u32>,
    how: How,
    is_first: bool,
    beside: &'c Mutex<Beside<'e>>,
}

impl OfNodes<'_, '_> {
    /// Such as `node 2 killed`, or `nodes 3 and 1 frozen`.
    fn kind(&self) -> String {
        let mut kind = NODES.to_owned();
        for (number, node) in self.nodes.iter().enumerate() {
            let before = match number {
                0 if self.nodes.len() == 1 => " ",
                0 => "s ",
                _ if number + 1 == self.nodes.len() => " and ",
                _ => ", ",
            };
            let _ = write!(kind, "{before}{node}");
        }
        format!("{kind} {}", self.how.participle())
    }

    async fn begin(&self) -> Result<(), String> {
        for node in &self.nodes {
            match self.how {
                How::Killed | How::MajorityKilled => self.server.kill_node(*node).await?,
                How::Frozen | How::MajorityFrozen => self.server.pause_node(*node).await?,
                How::Restarted => {}
            }
        }
        Ok(())
    }

    /// All at once: one may serve only when there is a majority.
    async fn over(&self) -> Result<(), String> {
        let back = self.nodes.iter().map(|node| async move {
            match self.how {
                How::Killed | How::MajorityKilled => self.server.restart_node(*node).await,
                How::Frozen | How::MajorityFrozen => self.server.resume_node(*node).await,
                How::Restarted => Ok(()),
            }
        });
        try_join_all(back).await.map(drop)
    }

    /// A restart is begun and over by one command. One that was never made shows at the first node.
    async fn restart(&self) -> Proof {
        for node in &self.nodes {
            let refused = if self.is_first { Breach::NotRun } else { Breach::Failed };
            self.server.restart_node(*node).await.map_err(refused)?;
        }
        Ok(())
    }

    async fn happens(&self, env: &Env) -> Proof {
        let mut beside = self.beside.lock().await;
        let (kind, lasts) = (self.kind(), self.how.lasts(env));
        let [while_away, still_away, back] = ["while away", "still away", "back"].map(|when| format!("{kind}, {when}"));
        let meanwhile = async {
            match self.how {
                How::Restarted => futures_util::try_join!(self.restart(), beside.go_on(env, &while_away)).map(drop),
                How::Killed | How::Frozen => {
                    let begin = Instant::now();
                    beside.go_on(env, &while_away).await?;
                    tokio::time::sleep_until(begin + lasts).await;
                    beside.go_on(env, &still_away).await
                }
                How::MajorityKilled | How::MajorityFrozen => beside.without_majority(env, &kind, lasts).await,
            }
        };
        of_server(env, &kind, self.begin(), meanwhile, self.over()).await?;
        beside.go_on(env, &back).await
    }
}

impl Disturbance for OfNodes<'_, '_> {
    fn describe(&self) -> String {
        self.kind()
    }

    fn wants(&self) -> (bool, usize) {
        (true, 0)
    }

    fn is_awaited(&self) -> bool {
        true
    }

    fn forgets(&self) -> bool {
        true
    }

    fn happen<'a>(&'a self, env: &'a Env, _: usize) -> BoxFuture<'a, Proof> {
        Box::pin(self.happens(env))
    }
}

/// A publisher and a member beside those of the trial. What they do is looked at while nodes are away.
struct Beside<'e> {
    publisher: Client<'e>,
    member: Client<'e>,
    spec: SubscribeSpec,
    consumer: Consumer<'e>,
}

/// How many messages go from one to the other, each with a key of its own: others lead every part of a destination.
const EACH: usize = 6;
/// What a publish may take.
const PUBLISH_TIMEOUT: Duration = Duration::from_secs(2);
/// How long a member waits for something to come before it looks round.
const LOOK: Duration = Duration::from_millis(200);

impl<'e> Beside<'e> {
    async fn open(env: &'e Env) -> Proof<Self> {
        let (publisher, member) = (env.client().await?, env.client().await?);
        let spec = env.spec(&env.destination("beside"), &env.group("g")).with_lease(short_lease(env));
        let consumer = member.subscribe(spec.clone()).await?;
        Ok(Self { publisher, member, spec, consumer })
    }

    async fn close(self, env: &'e Env) -> Proof {
        self.consumer.close().await?;
        env.client().await?.drain(self.spec).await?;
        for client in [self.publisher, self.member] {
            client.close().await?;
        }
        Ok(())
    }

    /// Messages are published until they are told as stored, and received until they are told as settled, within the harness's patience.
    async fn go_on(&mut self, env: &Env, when: &str) -> Proof {
        let (begin, limit) = (Instant::now(), env.patience());
        let message = |key: usize| self.publisher.message(&self.spec.destinations[0], format!("key {key}").as_str());
        let mut unstored: HashMap<MessageId, Message> = HashMap::new();
        let mut unsettled: HashMap<MessageId, usize> = HashMap::new();
        for key in 0..EACH {
            let message = message(key);
            unsettled.insert(message.id().clone(), key);
            unstored.insert(message.id().clone(), message);
        }
        let mut last = None;
        loop {
            let batch: Vec<Message> = unstored.values().cloned().collect();
            if !batch.is_empty() {
                let ids: Vec<MessageId> = batch.iter().map(|message| message.id().clone()).collect();
                let outcomes = self.publisher.publish_within(batch, PUBLISH_TIMEOUT).await?;
                for (id, outcome) in ids.iter().zip(outcomes) {
                    match outcome {
                        Ok(_) => drop(unstored.remove(id)),
                        Err(error) => {
                            is_publishing_in_a_fault(&error)?;
                            last = Some(error);
                        }
                    }
                }
            }
            let came = self.consumer.receive(EACH, LOOK).await?;
            let ids: Vec<MessageId> = came.iter().map(|held| held.message().id().clone()).collect();
            let settled = settle(came.into_iter().map(|held| (held, Settlement::Ack)).collect()).await?;
            for (id, outcome) in ids.into_iter().zip(settled) {
                let key = unsettled.remove(&id);
                let Err((_, error)) = outcome else { continue };
                is_settling_in_a_fault(&error)?;
                last = Some(error);
                // It may be settled, or come again: another one takes its place.
                if let Some(key) = key {
                    let message = message(key);
                    unsettled.insert(message.id().clone(), key);
                    unstored.insert(message.id().clone(), message);
                }
            }
            if unstored.is_empty() && unsettled.is_empty() {
                return Ok(());
            }
            let (took, stored) = (begin.elapsed(), EACH.saturating_sub(unstored.len()));
            ensure!(
                took < limit,
                "{when}: {took:?} later {stored} of {EACH} messages are told as stored, and {} as settled; the last error was {last:?}",
                EACH.saturating_sub(unsettled.len())
            );
        }
    }

    /// What is published meanwhile is told as stored by nobody, once the cluster has had the time to notice.
    async fn without_majority(&mut self, env: &Env, kind: &str, lasts: Duration) -> Proof {
        let (begin, gone) = (Instant::now(), env.now());
        let destination = &self.spec.destinations[0];
        let publishing = async {
            while begin.elapsed() < lasts {
                let batch = self.publisher.messages(destination, "k", EACH);
                let outcomes = self.publisher.publish_within(batch, PUBLISH_TIMEOUT).await?;
                outcomes.iter().filter_map(|outcome| outcome.as_ref().err()).try_for_each(is_publishing_in_a_fault)?;
                // A cluster that refuses at once is asked now and then.
                tokio::time::sleep(LOOK).await;
            }
            Proof::Ok(())
        };
        let consumer = &mut self.consumer;
        let consuming = async {
            while begin.elapsed() < lasts {
                let came = consumer.receive(EACH, LOOK).await?;
                acked(came).await?;
            }
            Proof::Ok(())
        };
        futures_util::try_join!(publishing, consuming)?;
        let late = gone.saturating_add(micros(noticed(env)));
        let events = env.history.events();
        let (told, refused) = answers(&events, late);
        ensure!(
            told.is_empty(),
            "{kind}: {} messages published more than {:?} later are told as stored, such as {}",
            told.len(),
            noticed(env),
            told[0]
        );
        match refused {
            0 => Err(Breach::Inconclusive(format!(
                "{kind}: no publish that began later than {:?} has ended",
                noticed(env)
            ))),
            _ => Ok(()),
        }
    }
}

/// Which publishes that began after that moment were told as stored, whoever made them, and how many failed. What is known to be stored
/// already was so before.
pub(super) fn answers(events: &[Event], after: u64) -> (Vec<String>, usize) {
    let mut begun: HashMap<u64, &MessageId> = HashMap::new();
    let (mut told, mut refused) = (Vec::new(), 0);
    for event in events {
        match &event.what {
            What::PublishInvoke { call, id, .. } if event.at >= after => {
                begun.insert(*call, id);
            }
            What::PublishOk { call, duplicate: false, .. } => {
                told.extend(begun.get(call).map(ToString::to_string));
            }
            What::PublishFail { call, .. } | What::PublishInfo { call, .. } => {
                refused += usize::from(begun.contains_key(call));
            }
            _ => {}
        }
    }
    (told, refused)
}

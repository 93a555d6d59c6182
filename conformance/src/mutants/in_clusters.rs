//! Mutants that only cases about clusters can tell from the real one: as they should be for as long as every node is there.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anybroker_core::{
    Broker, Capabilities, Confirms, Effect, Error, ErrorKind, Message, PublishTerms, Receipt, Received, Result,
    SettleError, Settling, Support,
};
use async_trait::async_trait;
use parking_lot::Mutex;

use super::Mutant;
use super::tampered::{Entries, Fault, Inner, Tap};
use crate::ServerControl;

pub(super) const UNMUTATED: Mutant =
    Mutant { name: "unmutated-cluster", fault: "none", killed_by: "", make: || Arc::new(Cluster::new(Flaw::None)) };

pub(super) const MUTANTS: &[Mutant] = &[
    Mutant {
        name: "a-node-killed-stops-all",
        fault: "nobody is served while a node is killed",
        killed_by: "cluster/a-node-that-is-killed-and-stays-away-takes-nothing-with-it-and-everybody-goes-on",
        make: || Arc::new(Cluster::new(Flaw::NeedsAll)),
    },
    Mutant {
        name: "a-node-killed-takes-messages-along",
        fault: "what is confirmed while a node is killed is not stored",
        killed_by: "cluster/a-node-that-is-killed-and-stays-away-takes-nothing-with-it-and-everybody-goes-on",
        make: || Arc::new(Cluster::new(Flaw::Loses)),
    },
    Mutant {
        name: "a-restart-ends-publishing",
        fault: "a publisher that has met the restart of a node publishes nothing any more",
        killed_by: "cluster/nodes-that-are-restarted-in-turn-lose-nothing-and-everybody-goes-on",
        make: || Arc::new(Cluster::new(Flaw::GivesUp)),
    },
    Mutant {
        name: "a-restart-takes-messages-along",
        fault: "what is confirmed while a node is restarted is not stored",
        killed_by: "cluster/nodes-that-are-restarted-in-turn-lose-nothing-and-everybody-goes-on",
        make: || Arc::new(Cluster::new(Flaw::Loses)),
    },
    Mutant {
        name: "a-node-frozen-stops-all",
        fault: "nobody is served while a node is frozen",
        killed_by: "cluster/a-node-that-is-frozen-for-longer-than-its-peers-wait-for-it-does-no-harm-when-it-goes-on",
        make: || Arc::new(Cluster::new(Flaw::NeedsAll)),
    },
    Mutant {
        name: "a-node-frozen-takes-messages-along",
        fault: "what is confirmed while a node is frozen is not stored",
        killed_by: "cluster/a-node-that-is-frozen-for-longer-than-its-peers-wait-for-it-does-no-harm-when-it-goes-on",
        make: || Arc::new(Cluster::new(Flaw::Loses)),
    },
    Mutant {
        name: "stored-by-one-of-three",
        fault: "a publish is told as stored while a majority is killed",
        killed_by: "cluster/with-a-majority-killed-nothing-is-told-as-stored-and-everybody-goes-on-when-it-is-back",
        make: || Arc::new(Cluster::new(Flaw::NeedsOne)),
    },
    Mutant {
        name: "stored-by-one-of-three-while-two-are-frozen",
        fault: "a publish is told as stored while a majority is frozen",
        killed_by: "cluster/with-a-majority-frozen-nothing-is-told-as-stored-and-everybody-goes-on-when-it-is-back",
        make: || Arc::new(Cluster::new(Flaw::NeedsOne)),
    },
    Mutant {
        name: "no-majority-for-ever",
        fault: "a publish that finds no majority fails with an error that says that it will not pass",
        killed_by: "cluster/with-a-majority-killed-nothing-is-told-as-stored-and-everybody-goes-on-when-it-is-back",
        make: || Arc::new(Cluster::new(Flaw::SaysNever)),
    },
];

/// What is wrong with a cluster.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Flaw {
    None,
    /// It serves only when all nodes are there.
    NeedsAll,
    /// It serves as long as one is.
    NeedsOne,
    /// What is published while one is away is told as stored, and gone.
    Loses,
    /// Nothing is published any more once one was away.
    GivesUp,
    /// It says of what it cannot do for now that it never can.
    SaysNever,
}

const NODES: u32 = 3;
/// How long a publish is on its way, and how long a node is away that is restarted.
const ON_ITS_WAY: Duration = Duration::from_millis(1);
const RESTARTED: Duration = Duration::from_millis(300);

/// Three nodes in name only, in front of any broker.
struct Cluster {
    flaw: Flaw,
    nodes: Arc<Nodes>,
}

#[derive(Default)]
struct Nodes {
    away: Mutex<BTreeSet<u32>>,
    was_away: AtomicBool,
}

impl Nodes {
    fn goes(&self, node: u32) -> std::result::Result<(), String> {
        self.away.lock().insert(node);
        self.was_away.store(true, Ordering::Relaxed);
        Ok(())
    }

    fn comes(&self, node: u32) -> std::result::Result<(), String> {
        self.away.lock().remove(&node);
        Ok(())
    }
}

impl Cluster {
    fn new(flaw: Flaw) -> Self {
        Self { flaw, nodes: Arc::default() }
    }

    fn away(&self) -> usize {
        self.nodes.away.lock().len()
    }

    /// What whoever asks for something is told, where it is not done.
    fn refuses(&self) -> Option<ErrorKind> {
        let away = self.away();
        match self.flaw {
            Flaw::NeedsAll if away > 0 => Some(ErrorKind::Unavailable),
            Flaw::NeedsOne => None,
            Flaw::SaysNever if away > 1 => Some(ErrorKind::NotFound),
            _ if away > 1 => Some(ErrorKind::Unavailable),
            _ => None,
        }
    }
}

fn refused(kind: ErrorKind) -> Error {
    Error::new(kind, "cluster", "too few nodes are there").with_effect(Effect::NotDone)
}

#[async_trait]
impl Fault for Cluster {
    /// Nodes in name only lose nothing when they are killed.
    fn record(&self, record: Capabilities) -> Capabilities {
        Capabilities { survives_process_kill: Support::Native, ..record }
    }

    async fn publish(&self, broker: &Arc<dyn Broker>, batch: Vec<Message>, terms: PublishTerms) -> Confirms {
        tokio::time::sleep(ON_ITS_WAY).await;
        let failed = match self.flaw {
            Flaw::GivesUp if self.nodes.was_away.load(Ordering::Relaxed) => Some(ErrorKind::Unavailable),
            _ => self.refuses(),
        };
        match failed {
            Some(kind) => Confirms::ready(batch.iter().map(|_| Err(refused(kind))).collect()),
            None if self.flaw == Flaw::Loses && self.away() > 0 => {
                Confirms::ready(batch.iter().map(|_| Ok(Receipt { position: None, duplicate: false })).collect())
            }
            None => broker.publish(batch, terms).await,
        }
    }

    async fn receive(&self, tap: &mut Tap, max: usize, wait: Duration) -> Result<Received> {
        if self.refuses().is_some() {
            tokio::time::sleep(wait).await;
            return Ok(Received { deliveries: Vec::new(), events: Vec::new() });
        }
        tap.inner.receive(max, wait).await
    }

    fn settle(&self, inner: &Inner, batch: Entries) -> Settling {
        match self.refuses() {
            None => inner.settler.settle(batch),
            Some(_) => {
                let error = || refused(ErrorKind::Unavailable);
                let failed = batch.into_iter().map(|(delivery, _)| Err(SettleError::new(delivery, error())));
                Settling::ready(failed.collect())
            }
        }
    }

    fn server(&self) -> Option<Arc<dyn ServerControl>> {
        Some(Arc::<Nodes>::clone(&self.nodes))
    }
}

const ONLY_NODES: &str = "only its nodes can be told something";

#[async_trait]
impl ServerControl for Nodes {
    async fn kill(&self) -> std::result::Result<(), String> {
        Err(ONLY_NODES.into())
    }

    async fn restart(&self) -> std::result::Result<(), String> {
        Err(ONLY_NODES.into())
    }

    async fn pause(&self) -> std::result::Result<(), String> {
        Err(ONLY_NODES.into())
    }

    async fn resume(&self) -> std::result::Result<(), String> {
        Err(ONLY_NODES.into())
    }

    fn nodes(&self) -> std::result::Result<u32, String> {
        Ok(NODES)
    }

    async fn kill_node(&self, node: u32) -> std::result::Result<(), String> {
        self.goes(node)
    }

    async fn restart_node(&self, node: u32) -> std::result::Result<(), String> {
        self.goes(node)?;
        tokio::time::sleep(RESTARTED).await;
        self.comes(node)
    }

    async fn pause_node(&self, node: u32) -> std::result::Result<(), String> {
        self.goes(node)
    }

    async fn resume_node(&self, node: u32) -> std::result::Result<(), String> {
        self.comes(node)
    }
}

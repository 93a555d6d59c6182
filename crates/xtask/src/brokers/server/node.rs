//! What can be done to one node of a cluster.

use std::fs::File;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;

use super::{
    Condition, KILLED_WITHIN, Process, READY_WITHIN, Record, STOPPED_WITHIN, Server, ask_to_end, wait_gone_by,
};

/// How long a node that was frozen may take to come back by itself.
const BACK_WITHIN: Duration = Duration::from_secs(30);

impl Server {
    /// How many nodes it has.
    pub(crate) fn nodes(&self) -> u32 {
        self.recipe.nodes()
    }

    /// SIGKILL: a crash of one node. Its data and ports stay.
    pub(crate) fn kill_node(&self, node: u32) -> Result<()> {
        let (_, process) = self.node(node)?;
        ensure!(process.condition() != Condition::Gone, "node {node} of {} does not run", self.name());
        process.signal(Signal::KILL)?;
        ensure!(gone(&process, KILLED_WITHIN)?, "node {node} of {} (pid {}) does not die", self.name(), process.pid);
        Ok(())
    }

    /// SIGSTOP.
    pub(crate) fn pause_node(&self, node: u32) -> Result<()> {
        let (_, process) = self.node(node)?;
        ensure!(process.condition() != Condition::Gone, "node {node} of {} does not run", self.name());
        process.signal(Signal::STOP)
    }

    /// After [`Server::pause_node`]; waits as [`Server::restart_node`] does. A node that was missed may not come back by itself: to a
    /// node of RabbitMQ 4.0 the others are a partition then, which no setting ends reliably. It is started anew, as its operator would.
    pub(crate) fn resume_node(&self, node: u32) -> Result<()> {
        let (record, process) = self.node(node)?;
        process.signal(Signal::CONT)?;
        self.wait_for_node(&record, node, BACK_WITHIN).or_else(|error| {
            crate::interrupt::check()?;
            eprintln!("{}: node {node} does not come back by itself, starting it again: {error:#}", self.name());
            self.restart_node(node)
        })
    }

    /// Ends a node in an orderly way if it runs, starts it on the same ports with the same data, and waits until it serves clients,
    /// and, where all nodes run, until the cluster is whole.
    pub(crate) fn restart_node(&self, node: u32) -> Result<()> {
        let process = self.node(node)?.1;
        ask_to_end(&process)?;
        if !gone(&process, STOPPED_WITHIN)? {
            eprintln!("{}: node {node} does not end by itself, killing it", self.name());
            self.kill_node(node)?;
        }
        let home = self.recipe.install(&self.cache)?;
        let record = {
            // Several nodes may be started at once, each by a command of its own.
            let lock = File::create(self.folder.join("nodes.lock"))?;
            lock.lock()?;
            let mut record = self.node(node)?.0;
            self.launch_node(&home, node, &mut record)?;
            record
        };
        self.wait_for_node(&record, node, READY_WITHIN)
    }

    /// Until it serves clients, and, where all nodes run, until the cluster is whole.
    fn wait_for_node(&self, record: &Record, node: u32, limit: Duration) -> Result<()> {
        let names = self.recipe.port_names().len();
        let own = record.ports.chunks(names).nth(node as usize - 1).context("every node has its ports")?;
        let all_run = || record.processes().iter().all(|process| process.condition() == Condition::Running);
        let probe = || {
            self.recipe.probe(own)?;
            if all_run() { self.recipe.is_whole(&record.ports) } else { Ok(()) }
        };
        self.wait(probe, || Ok(self.node(node)?.1.condition()), node, limit)
    }

    fn node(&self, node: u32) -> Result<(Record, Process)> {
        ensure!((1..=self.nodes()).contains(&node), "{} has nodes 1 to {}, and no {node}", self.name(), self.nodes());
        let record = self.record()?.with_context(|| format!("{} was never started", self.name()))?;
        let process = record.processes().get(node as usize - 1).cloned();
        let process = process.with_context(|| format!("{} has no process of node {node}", self.name()))?;
        Ok((record, process))
    }
}

fn gone(process: &Process, limit: Duration) -> Result<bool> {
    wait_gone_by(|| Ok(process.condition()), Instant::now() + limit)
}

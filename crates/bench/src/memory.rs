//! The memory broker beside a bare channel, and the two scenarios that it must stand.

use std::time::Duration;

use anybroker_core::{Destination, Message};
use anybroker_memory::Memory;
use rustix::thread::{CpuSet, sched_setaffinity};
use tokio::sync::mpsc;

use crate::report::{Report, Row};
use crate::rows::{self, Bare, Source, receive_and_ack};
use crate::{allocations, headline};

/// Measures everything about the memory broker, on one thread that stays on one core.
pub fn run(report: &mut Report) {
    pin();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        rows::run(report, "memory", 1, async || Memory::new().bus(), async || Channel::new()).await;
        headline::run(report).await;
        if report.wants("memory backlog") {
            backlog(report).await;
        }
    });
}

/// One core means one: the scheduler shall not move the thread. Where that is not allowed, the figures are noisier.
fn pin() {
    let mut cores = CpuSet::new();
    cores.set(0);
    if let Err(error) = sched_setaffinity(None, &cores) {
        eprintln!("not pinned to one core: {error}");
    }
}

/// A channel of the runtime. It keeps nothing, leases nothing, counts nothing.
struct Channel {
    sender: mpsc::UnboundedSender<Message>,
    receiver: mpsc::UnboundedReceiver<Message>,
}

impl Channel {
    fn new() -> Self {
        let (sender, receiver) = mpsc::unbounded_channel();
        Self { sender, receiver }
    }
}

impl Bare for Channel {
    async fn publish(&mut self, batch: Vec<Message>) {
        for message in batch {
            self.sender.send(message).expect("the receiver is there");
        }
    }

    async fn receive_and_settle(&mut self, max: usize) -> usize {
        let mut batch = Vec::with_capacity(max);
        self.receiver.recv_many(&mut batch, max).await
    }
}

/// A backlog of 1,000,000 whose first message is not acked while everything behind it is.
#[allow(clippy::cast_precision_loss, reason = "counts are far below 2^52")]
async fn backlog(report: &mut Report) {
    const MESSAGES: usize = 1_000_000;
    let memory = Memory::new();
    let bus = memory.bus();
    let destination = Destination::from("orders");
    let mut source = Source::new(256);
    let empty = allocations::bytes();
    for _ in 0..MESSAGES / 1_000 {
        let outcomes = bus.publish(source.batch(&destination, 1_000)).await;
        assert!(outcomes.iter().all(Result::is_ok), "publishing failed");
    }
    let stored = allocations::bytes();
    let spec = bus.subscription(&destination, "bench").with_lease(Duration::from_secs(3600));
    let mut subscriber = bus.subscribe(spec).await.expect("the destination is there");
    let head = subscriber.receive(1, Duration::ZERO).await.expect("an open broker");
    let mut peak = allocations::bytes();
    let mut left = MESSAGES - 1;
    while left > 0 {
        left -= receive_and_ack(&mut subscriber, 1_000).await;
        peak = peak.max(allocations::bytes());
    }
    let end = allocations::bytes();
    drop(head);
    let above = |bytes: usize, base: usize| bytes as f64 - base as f64;
    let row = Row::default()
        .mebibytes("backlog MiB", above(stored, empty))
        .mebibytes("peak above it", above(peak, stored))
        .mebibytes("above empty, head unacked", above(end, empty));
    report.row("a backlog of 1,000,000 with one unacked message at its head", "memory backlog", &row);
}

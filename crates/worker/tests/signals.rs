//! SIGTERM and Ctrl-C. In a process of its own, since they are sent to it.
#![cfg(unix)]
#![allow(clippy::unwrap_used, reason = "test code")]

mod support;

use std::process::Command;

use anybroker_worker::Worker;
use support::{Gated, QUIET, bus, message, options, publish, spec, until, within};

fn signal(name: &str) {
    let sent = Command::new("kill").args(["-s", name, &std::process::id().to_string()]).status().unwrap();
    assert!(sent.success());
}

#[tokio::test]
async fn the_first_signal_drains_and_the_second_ends_the_grace() {
    for (first, second) in [("TERM", "INT"), ("INT", "TERM")] {
        let bus = bus();
        publish(&bus, (0..3).map(|n| message(&n.to_string()))).await;
        let handler = Gated::new();
        let worker = Worker::new(bus).handle(options(spec()).with_concurrency(2), handler.clone());
        let shutdown = worker.shutdown_handle();
        let running = tokio::spawn(worker.run());
        until("two run", || handler.begun().len() == 2).await;
        signal(first);
        until("it drains", || shutdown.is_draining()).await;
        handler.open(1);
        until("one ends", || handler.ended().len() == 1).await;
        tokio::time::sleep(QUIET).await;
        assert!(!running.is_finished(), "it waits for the other one");
        assert_eq!(handler.begun().len(), 2);
        signal(second);
        let total = within("the worker ends", running).await.unwrap().unwrap().total();
        assert_eq!((total.processed, total.cancelled, total.released), (1, 1, 2));
    }
}

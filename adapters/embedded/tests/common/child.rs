//! Other processes: the test binary runs itself, as one test of itself with a role in its environment.
#![allow(dead_code, clippy::print_stdout, reason = "test code; each test file uses some of it")]

use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anybroker_core::{Bus, BusOptions, Message};
use anybroker_embedded::{Durability, EmbeddedBroker, Settings};

const ROLE: &str = "ANYBROKER_EMBEDDED_TEST_ROLE";

/// What a child does.
pub(crate) struct Role {
    pub(crate) name: String,
    pub(crate) path: PathBuf,
    /// Anything else, separated by blanks.
    pub(crate) words: Vec<String>,
}

/// The role of this process, when it is a child.
pub(crate) fn role() -> Option<Role> {
    let text = std::env::var(ROLE).ok()?;
    let mut words = text.split('\t').map(ToOwned::to_owned);
    // The test runner has begun a line.
    println!();
    Some(Role { name: words.next()?, path: words.next()?.into(), words: words.collect() })
}

/// The command that runs this binary as a child whose entry is the test `entry`.
pub(crate) fn command(binary: &Path, entry: &str, role: &str, path: &Path, words: &[&str]) -> Command {
    let mut command = Command::new(binary);
    arguments(&mut command, entry, role, path, words);
    command
}

pub(crate) fn arguments(command: &mut Command, entry: &str, role: &str, path: &Path, words: &[&str]) {
    let text = [&[role, path.to_str().unwrap()], words].concat().join("\t");
    command.args([entry, "--exact", "--nocapture", "--test-threads=1"]).env(ROLE, text).stdin(Stdio::null());
}

/// A child that is killed when it is dropped, and whose lines go to a file.
pub(crate) struct Process {
    child: Child,
    pub(crate) log: PathBuf,
}

impl Process {
    pub(crate) fn start(entry: &str, role: &str, path: &Path, words: &[&str], log: PathBuf) -> Self {
        let mut command = command(&std::env::current_exe().unwrap(), entry, role, path, words);
        command.stdout(File::create(&log).unwrap()).stderr(Stdio::inherit());
        Self { child: command.spawn().unwrap(), log }
    }

    /// `kill -9`.
    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// The lines that it has written completely.
    pub(crate) fn lines(&self) -> Vec<String> {
        lines(&self.log)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The complete lines of a child that begin with one of our marks.
pub(crate) fn lines(log: &Path) -> Vec<String> {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    let complete = text.rfind('\n').map_or("", |end| &text[..end]);
    complete.lines().filter(|line| line.starts_with('@')).map(ToOwned::to_owned).collect()
}

/// Says something to the parent, in one write: a killed process has said it or has not.
pub(crate) fn say(text: &str) {
    let line = format!("@{text}\n");
    std::io::stdout().lock().write_all(line.as_bytes()).unwrap();
    std::io::stdout().lock().flush().unwrap();
}

pub(crate) fn micros() -> u128 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_micros()
}

pub(crate) fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

pub(crate) async fn open(path: &Path, durability: Durability) -> Bus {
    let mut settings = Settings::new(path);
    settings.durability = durability;
    let broker = EmbeddedBroker::open(settings).await.unwrap();
    Bus::new(std::sync::Arc::new(broker), BusOptions::default())
}

/// Publishes batches until it is killed (or `batches` are out); says each id before (`P`) and after its `Ok` (`A`).
pub(crate) async fn publish_until_killed(bus: &Bus, name: &str, batches: usize, size: usize) {
    let mut number = 0;
    for batch in 0..batches {
        let count = batch % 7 + 1;
        let ids: Vec<String> = (number..number + count).map(|number| format!("{name}-{number}")).collect();
        number += count;
        say(&format!("P {}", ids.join(" ")));
        let message = |id: &String| {
            Message::new("orders", vec![b'x'; size]).with_id(id.as_str()).with_key(format!("{}", id.len() % 3))
        };
        for (id, outcome) in ids.iter().zip(bus.publish(ids.iter().map(message).collect()).await) {
            if outcome.is_ok() {
                say(&format!("A {id} {}", micros()));
            } else {
                say(&format!("E {id} {outcome:?}"));
            }
        }
    }
}

/// Receives and acks until it is killed; says each hand-over (`R`) and each ack that returned `Ok` (`K`).
pub(crate) async fn consume_until_killed(bus: &Bus, group: &str, lease: Duration) {
    let spec = bus.subscription("orders", group).with_lease(lease).with_crash_limit(None);
    let mut subscriber = bus.subscribe(spec).await.unwrap();
    loop {
        let deliveries = subscriber.receive(20, Duration::from_secs(3600)).await.unwrap();
        for delivery in &deliveries {
            let id = delivery.message().id();
            say(&format!("R {id} {} {} {:?}", micros(), delivery.attempt(), delivery.facts().deliveries));
        }
        let ids: Vec<_> = deliveries.iter().map(|delivery| delivery.message().id().clone()).collect();
        for (id, outcome) in ids.iter().zip(anybroker_core::ack(deliveries).await) {
            match outcome {
                Ok(_) => say(&format!("K {id} {}", micros())),
                Err(error) => say(&format!("S {id} {}", error.error().kind())),
            }
        }
    }
}

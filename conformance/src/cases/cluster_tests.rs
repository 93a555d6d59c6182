//! What a case about a cluster is told of its nodes, and what it leaves of them.

use std::sync::Arc;
use std::time::Duration;

use anybroker_core::{Capabilities, ErrorKind, Support};
use anybroker_memory::Memory;
use async_trait::async_trait;
use parking_lot::Mutex;

use super::cluster::answers;
use crate::history::{Event, What};
use crate::mutants::{claiming, slow};
use crate::report::CaseReport;
use crate::{Level, Options, Outcome, ServerControl, UrlHarness, run};

/// The nodes of a broker that lives in this process: it notes what they are told, and nothing comes of it.
struct Noted {
    nodes: u32,
    told: Mutex<Vec<(&'static str, u32)>>,
    /// Told that it panics, or fails.
    panics: Option<&'static str>,
    fails: Option<&'static str>,
}

impl Noted {
    fn of(nodes: u32) -> Self {
        Self { nodes, told: Mutex::default(), panics: None, fails: None }
    }

    fn note(&self, told: &'static str, node: u32) -> Result<(), String> {
        self.told.lock().push((told, node));
        assert!(self.panics != Some(told), "told to {told}");
        if self.fails == Some(told) { Err(format!("it does not {told}")) } else { Ok(()) }
    }

    fn verbs(&self) -> Vec<&'static str> {
        self.told.lock().iter().map(|(verb, _)| *verb).collect()
    }
}

#[async_trait]
impl ServerControl for Noted {
    async fn kill(&self) -> Result<(), String> {
        self.note("kill", 0)
    }
    async fn restart(&self) -> Result<(), String> {
        self.note("restart", 0)
    }
    async fn pause(&self) -> Result<(), String> {
        self.note("pause", 0)
    }
    async fn resume(&self) -> Result<(), String> {
        self.note("resume", 0)
    }
    fn nodes(&self) -> Result<u32, String> {
        Ok(self.nodes)
    }
    async fn kill_node(&self, node: u32) -> Result<(), String> {
        self.note("kill", node)
    }
    async fn restart_node(&self, node: u32) -> Result<(), String> {
        self.note("restart", node)
    }
    async fn pause_node(&self, node: u32) -> Result<(), String> {
        self.note("pause", node)
    }
    async fn resume_node(&self, node: u32) -> Result<(), String> {
        self.note("resume", node)
    }
}

const KILLED: &str = "cluster/a-node-that-is-killed-*";
const FROZEN: &str = "cluster/a-node-that-is-frozen-*";
const RESTARTED: &str = "cluster/nodes-that-are-restarted-*";
const MAJORITY_KILLED: &str = "cluster/with-a-majority-killed-*";

/// A node is away for longer than that.
const TOO_SHORT: Duration = Duration::from_secs(4);

async fn on(nodes: &Arc<Noted>, case: &str, timeout: Duration) -> CaseReport {
    let memory = Memory::builder().build();
    let harness = UrlHarness::new("memory", move || {
        let memory = memory.clone();
        Box::pin(async move { Ok(memory.bus()) })
    });
    let nodes: Arc<dyn ServerControl> = Arc::<Noted>::clone(nodes);
    let harness = harness.with_server(nodes).with_quiet(Duration::from_millis(100));
    let survives = |record: &mut Capabilities| record.survives_process_kill = Support::Native;
    let harness = slow(Arc::new(claiming(Arc::new(harness), survives)), Duration::from_millis(1));
    let options = Options::default().with_level(Level::Long).with_seed(1).with_filter(case);
    // One of this level has five times as long.
    let report = run(Arc::new(harness), options.with_case_timeout(timeout / 5)).await.unwrap();
    report.cases.into_iter().next().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_case_that_is_given_up_leaves_no_node_away() {
    for (case, told) in [
        (KILLED, &["kill", "restart"][..]),
        (FROZEN, &["pause", "resume"]),
        (MAJORITY_KILLED, &["kill", "kill", "restart", "restart"]),
    ] {
        let nodes = Arc::new(Noted::of(3));
        let case = on(&nodes, case, TOO_SHORT).await;
        assert!(case.outcome == Outcome::Fail && case.detail.starts_with("hang"), "{}: {}", case.name, case.detail);
        assert_eq!(nodes.verbs(), told, "{}", case.name);
        let told = nodes.told.lock().clone();
        assert!(told.len() > 2 || told[0].1 == told[1].1, "{}: {told:?}", case.name);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_case_that_panics_leaves_no_node_away() {
    let nodes = Arc::new(Noted { panics: Some("kill"), ..Noted::of(3) });
    let case = on(&nodes, KILLED, Duration::from_secs(60)).await;
    assert!(case.outcome == Outcome::Fail && case.detail.starts_with("panic: told to kill"), "{}", case.detail);
    assert_eq!(nodes.verbs(), ["kill", "restart"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_node_has_its_turn() {
    let nodes = Arc::new(Noted::of(4));
    let case = on(&nodes, RESTARTED, Duration::from_secs(300)).await;
    assert_eq!(case.outcome, Outcome::Pass, "{}", case.detail);
    let mut told = nodes.told.lock().clone();
    told.sort_unstable();
    assert_eq!(told, [1, 2, 3, 4].map(|node| ("restart", node)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_nodes_cannot_be_told_is_not_run() {
    for (nodes, case, why) in [
        (Noted::of(1), RESTARTED, "a server of 1 node is no cluster"),
        (Noted::of(2), KILLED, "of two nodes no majority is left without one"),
        (Noted { fails: Some("kill"), ..Noted::of(3) }, KILLED, "it does not kill"),
        (Noted { fails: Some("pause"), ..Noted::of(3) }, FROZEN, "it does not pause"),
        (Noted { fails: Some("restart"), ..Noted::of(3) }, RESTARTED, "it does not restart"),
    ] {
        let case = on(&Arc::new(nodes), case, Duration::from_secs(60)).await;
        assert_eq!((case.outcome, case.detail.as_str()), (Outcome::NotRun, why), "{}", case.name);
    }
}

#[test]
fn only_a_publish_that_began_without_a_majority_and_is_no_duplicate_is_told_without_one() {
    let event = |at, what| Event { at, client: 0, what };
    let begun = |at, call: u64| {
        let (id, destination) = (call.to_string().as_str().into(), "d".into());
        let (sequence, digest) = (call, call);
        event(
            at,
            What::PublishInvoke {
                call,
                id,
                destination,
                key: None,
                sequence,
                digest,
                instructed: false,
                expires: false,
            },
        )
    };
    let stored = |call, duplicate| event(30, What::PublishOk { call, duplicate, position: None });
    let failed = |call| event(30, What::PublishInfo { call, kind: ErrorKind::Timeout });
    let events =
        [begun(9, 1), begun(10, 2), begun(11, 3), begun(12, 4), begun(13, 5), stored(1, false), stored(2, false)];
    let events = [&events[..], &[stored(3, true), failed(4)]].concat();
    assert_eq!(answers(&events, 10), (vec!["2".to_owned()], 1));
}

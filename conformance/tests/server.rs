//! What a case that does not come to its end has done to the server is undone.
#![allow(clippy::unwrap_used, reason = "test code")]

use std::sync::Arc;
use std::time::Duration;

use anybroker_conformance::{Level, Options, Outcome, Report, ServerControl, UrlHarness, run};
use anybroker_memory::Memory;
use async_trait::async_trait;
use parking_lot::Mutex;

/// The server of a broker that lives in this process: it notes what it is told, and nothing comes of it.
#[derive(Default)]
struct Noted {
    told: Mutex<Vec<&'static str>>,
    /// Told that for the time with that number, it panics.
    panics: Option<(&'static str, usize)>,
}

impl Noted {
    fn note(&self, told: &'static str) -> Result<(), String> {
        let mut all = self.told.lock();
        all.push(told);
        let times = all.iter().filter(|one| **one == told).count();
        drop(all);
        assert!(self.panics != Some((told, times)), "told to {told} once too often");
        Ok(())
    }
}

#[async_trait]
impl ServerControl for Noted {
    async fn kill(&self) -> Result<(), String> {
        self.note("kill")
    }
    async fn restart(&self) -> Result<(), String> {
        self.note("restart")
    }
    async fn pause(&self) -> Result<(), String> {
        self.note("pause")
    }
    async fn resume(&self) -> Result<(), String> {
        self.note("resume")
    }
    async fn fill(&self) -> Result<(), String> {
        self.note("fill")
    }
    async fn relieve(&self) -> Result<(), String> {
        self.note("relieve")
    }
    async fn lock_out(&self) -> Result<(), String> {
        self.note("lock out")
    }
    async fn let_in(&self) -> Result<(), String> {
        self.note("let in")
    }
}

/// Nobody is told here that it is locked out: the case waits for that longer than it may take.
const LOCKED: &str = "faults/clients-that-are-locked-out-are-told-so-and-go-on-when-they-are-let-in-again";
const TOO_SHORT: Duration = Duration::from_secs(2);

async fn on(server: &Arc<Noted>) -> Report {
    let memory = Memory::builder().build();
    let server: Arc<dyn ServerControl> = Arc::<Noted>::clone(server);
    let harness = UrlHarness::new("memory", move || {
        let memory = memory.clone();
        Box::pin(async move { Ok(memory.bus()) })
    });
    let harness = harness.with_server(server).with_quiet(Duration::from_millis(100));
    let options = Options::default().with_level(Level::Reliability).with_seed(1).with_case_timeout(TOO_SHORT);
    let report = run(Arc::new(harness), options.with_filter(LOCKED)).await.unwrap();
    assert_eq!(report.cases[0].outcome, Outcome::Fail, "{}", report.text());
    report
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_case_that_is_given_up_leaves_no_server_locked() {
    let server = Arc::default();
    let report = on(&server).await;
    assert!(report.cases[0].detail.starts_with("hang"), "{}", report.cases[0].detail);
    assert_eq!(*server.told.lock(), ["let in", "lock out", "let in"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_case_that_panics_leaves_no_server_locked() {
    let server = Arc::new(Noted { panics: Some(("lock out", 1)), ..Noted::default() });
    let report = on(&server).await;
    assert!(report.cases[0].detail.starts_with("panic: told to lock out"), "{}", report.cases[0].detail);
    assert_eq!(*server.told.lock(), ["let in", "lock out", "let in"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_stays_as_a_case_has_left_it_is_told_of() {
    let server = Arc::new(Noted { panics: Some(("let in", 2)), ..Noted::default() });
    let report = on(&server).await;
    assert!(report.cases[0].detail.contains("the server is left closed"), "{}", report.cases[0].detail);
}

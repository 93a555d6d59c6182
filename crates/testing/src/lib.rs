//! What the tests of several adapters share.
#![allow(clippy::print_stdout, reason = "tests show reports, and say why they do not run")]

mod credentials;
mod suite;

use std::fmt::Write as _;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use anybroker_conformance::ServerControl;
use async_trait::async_trait;

pub use credentials::{Told, Vault, refused, send};
pub use suite::{judge, judge_faults, judge_server};

/// The path of the project's `xtask` binary; `cargo xtask test` sets it.
const XTASK: &str = "ANYBROKER_XTASK";

/// How many lines of its logs are shown when a test fails.
const SHOWN: usize = 120;

/// Tests of one program run side by side, and must not end each other's servers.
static STARTED: AtomicU32 = AtomicU32::new(0);

/// A server of one test's own, by the project's own commands: the test may kill, freeze and restart it. It ends with the value.
pub struct OwnServer {
    running: Arc<Running>,
    /// Where its clients connect to.
    pub url: String,
}

struct Running {
    broker: &'static str,
    instance: String,
}

impl OwnServer {
    /// Starts `broker`, as `cargo xtask brokers` calls it; `None` after saying why there is no server.
    ///
    /// # Panics
    /// When it does not start, and when the environment demands brokers and does not say how to start one.
    #[must_use]
    pub fn start(broker: &'static str, name: &str) -> Option<Self> {
        if std::env::var_os(XTASK).is_none() {
            println!("not run: {XTASK} is not set (the path of the project's xtask binary)");
            let is_required = std::env::var("ANYBROKER_TEST_REQUIRE_BROKERS").is_ok_and(|value| value == "1");
            assert!(!is_required, "{XTASK} is not set, and ANYBROKER_TEST_REQUIRE_BROKERS demands it");
            return None;
        }
        let number = STARTED.fetch_add(1, Ordering::Relaxed);
        let instance = format!("{broker}-{name}-{}-{number}", std::process::id());
        let running = Running { broker, instance };
        let said = running.run("up", &["--how", "native"]);
        let url = said.split('\'').nth(1).expect("`brokers up` prints the URL in quotes").to_owned();
        Some(Self { running: Arc::new(running), url })
    }

    /// `kill`, `restart`, `pause`, `resume`, `fill`, `relieve`, `lock-out` or `let-in`.
    ///
    /// # Panics
    /// When that fails.
    pub async fn does(&self, verb: &'static str) {
        self.tries(verb).await.unwrap_or_else(|why| panic!("{verb}: {why}"));
    }

    async fn tries(&self, verb: &'static str) -> Result<(), String> {
        let running = Arc::clone(&self.running);
        let ran = tokio::task::spawn_blocking(move || running.tries(verb, &[])).await;
        ran.expect("the command does not panic").map(drop)
    }
}

impl Running {
    fn run(&self, verb: &str, options: &[&str]) -> String {
        self.tries(verb, options).unwrap_or_else(|why| panic!("{verb}: {why}"))
    }

    /// What the command prints, or what it complains about.
    fn tries(&self, verb: &str, options: &[&str]) -> Result<String, String> {
        let xtask = std::env::var_os(XTASK).expect("set when the server was started");
        let mut command = Command::new(xtask);
        command.args(["brokers", "--instance", &self.instance, verb, self.broker]).args(options);
        let done = command.output().expect("the xtask binary starts");
        match done.status.success() {
            true => Ok(String::from_utf8(done.stdout).expect("it prints UTF-8")),
            false => Err(String::from_utf8_lossy(&done.stderr).trim().to_owned()),
        }
    }

    /// The end of what the server wrote to its logs, which go with it.
    fn logs(&self) -> String {
        let state = std::env::var_os("ANYBROKER_STATE").map(PathBuf::from);
        let state = state.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".local/state/anybroker")));
        let folder = state.unwrap_or_default().join("brokers").join(&self.instance).join(self.broker);
        let mut text = String::new();
        for folder in [folder.join("log"), folder] {
            for file in std::fs::read_dir(folder).into_iter().flatten().flatten() {
                let path = file.path();
                if path.extension().is_none_or(|extension| extension != "log") {
                    continue;
                }
                let log = std::fs::read(&path).unwrap_or_default();
                let log = String::from_utf8_lossy(&log);
                let lines: Vec<&str> = log.lines().collect();
                let _ = writeln!(text, "the end of {}:", path.file_name().unwrap_or_default().display());
                let last = &lines[lines.len().saturating_sub(SHOWN)..];
                for line in last {
                    let _ = writeln!(text, "    | {line}");
                }
            }
        }
        text
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if std::thread::panicking() {
            println!("{}", self.logs());
        }
        self.run("down", &[]);
    }
}

#[async_trait]
impl ServerControl for OwnServer {
    async fn kill(&self) -> Result<(), String> {
        self.does("kill").await;
        Ok(())
    }

    async fn restart(&self) -> Result<(), String> {
        self.does("restart").await;
        Ok(())
    }

    async fn pause(&self) -> Result<(), String> {
        self.does("pause").await;
        Ok(())
    }

    async fn resume(&self) -> Result<(), String> {
        self.does("resume").await;
        Ok(())
    }

    async fn fill(&self) -> Result<(), String> {
        self.tries("fill").await
    }

    async fn relieve(&self) -> Result<(), String> {
        self.tries("relieve").await
    }

    async fn lock_out(&self) -> Result<(), String> {
        self.tries("lock-out").await
    }

    async fn let_in(&self) -> Result<(), String> {
        self.tries("let-in").await
    }
}

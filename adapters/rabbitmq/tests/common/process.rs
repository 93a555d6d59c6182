//! A server that a test may kill, freeze and start again.

use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use anybroker_conformance::ServerControl;
use async_trait::async_trait;

/// Tests of one program run side by side, and must not end each other's servers.
static STARTED: AtomicU32 = AtomicU32::new(0);

/// A server of this test's own, by the project's own commands; `None` after saying why there is none.
pub(crate) struct Server {
    instance: String,
    pub(crate) url: String,
}

impl Server {
    pub(crate) fn start(name: &str) -> Option<Self> {
        super::url()?;
        let Ok(xtask) = std::env::var("ANYBROKER_XTASK") else {
            println!("not run: ANYBROKER_XTASK is not set (the path of the project's xtask binary)");
            let is_required = std::env::var("ANYBROKER_TEST_REQUIRE_BROKERS").is_ok_and(|value| value == "1");
            assert!(!is_required, "ANYBROKER_XTASK is not set, and ANYBROKER_TEST_REQUIRE_BROKERS demands it");
            return None;
        };
        let number = STARTED.fetch_add(1, Ordering::Relaxed);
        let instance = format!("rabbitmq-{name}-{}-{number}", std::process::id());
        let up = Command::new(xtask)
            .args(["brokers", "--instance", &instance, "up", "rabbitmq", "--how", "native"])
            .output()
            .unwrap();
        assert!(up.status.success(), "{}", String::from_utf8_lossy(&up.stderr));
        let output = String::from_utf8(up.stdout).unwrap();
        let url = output.split('\'').nth(1).unwrap().to_owned();
        Some(Self { instance, url })
    }

    fn run(&self, verb: &str) {
        let xtask = std::env::var("ANYBROKER_XTASK").unwrap();
        let done =
            Command::new(xtask).args(["brokers", "--instance", &self.instance, verb, "rabbitmq"]).output().unwrap();
        assert!(done.status.success(), "{verb}: {}", String::from_utf8_lossy(&done.stderr));
    }

    pub(crate) async fn does(&self, verb: &'static str) {
        let server = Self { instance: self.instance.clone(), url: self.url.clone() };
        tokio::task::spawn_blocking(move || {
            server.run(verb);
            std::mem::forget(server);
        })
        .await
        .unwrap();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.run("down");
    }
}

#[async_trait]
impl ServerControl for Server {
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
}

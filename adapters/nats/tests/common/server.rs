//! Servers with a configuration of their own, from the binary that `cargo xtask brokers up nats` has built.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// A server that ends with the value.
pub(crate) struct OwnServer {
    binary: PathBuf,
    child: Child,
    pub(crate) port: u16,
    pub(crate) folder: tempfile::TempDir,
    settings: String,
}

fn configure(at: &Path, port: i32, settings: &str) {
    // A second `jetstream` block replaces the first: what it sets is put into this one.
    let (inside, rest) = match settings.strip_prefix("jetstream {") {
        Some(inside) => (inside.trim_end_matches('}'), ""),
        None => ("", settings),
    };
    let configuration = format!(
        "listen: \"127.0.0.1:{port}\"\nports_file_dir: {at:?}\n\
         jetstream {{ store_dir: {:?}, max_file_store: 1GB\n{inside} }}\n{rest}\n",
        at.join("data")
    );
    std::fs::write(at.join("nats.conf"), configuration).unwrap();
}

fn run(binary: &Path, at: &Path, port: i32, settings: &str) -> Child {
    configure(at, port, settings);
    let log = std::fs::File::options().create(true).append(true).open(at.join("log")).unwrap();
    Command::new(binary)
        .arg("-c")
        .arg(at.join("nats.conf"))
        .stdin(Stdio::null())
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        .spawn()
        .unwrap()
}

/// The binary, or `None` after saying why the test does not run.
fn binary() -> Option<PathBuf> {
    let cache = std::env::var_os("ANYBROKER_CACHE").map(PathBuf::from).or_else(|| {
        let of_user = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
        Some(of_user.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache")))?.join("anybroker"))
    })?;
    let mut found: Vec<PathBuf> = std::fs::read_dir(&cache)
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().starts_with("nats-server-"))
        .map(|entry| entry.path().join("nats-server"))
        .filter(|path| path.is_file())
        .collect();
    found.sort();
    if found.is_empty() {
        println!("not run: there is no nats-server below {} (cargo xtask brokers up nats)", cache.display());
        let is_required = std::env::var("ANYBROKER_TEST_REQUIRE_BROKERS").is_ok_and(|value| value == "1");
        assert!(!is_required, "there is no nats-server, and ANYBROKER_TEST_REQUIRE_BROKERS demands it");
    }
    found.pop()
}

impl OwnServer {
    /// Starts one. `settings` writes what it needs into the folder, and answers the rest of the configuration.
    pub(crate) fn start(settings: impl FnOnce(&Path) -> String) -> Option<Self> {
        super::url()?;
        let binary = binary()?;
        let folder = tempfile::tempdir().unwrap();
        let settings = settings(folder.path());
        let child = run(&binary, folder.path(), -1, &settings);
        let mut server = Self { binary, child, port: 0, folder, settings };
        server.wait();
        Some(server)
    }

    /// SIGKILL, and again on the same port with the same data.
    pub(crate) fn kill_and_restart(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        self.child = run(&self.binary, self.folder.path(), self.port.into(), &self.settings);
        self.wait();
    }

    /// Other settings, without an end of the process: it reads them on SIGHUP, and has read them when this returns.
    pub(crate) fn reload(&self, settings: &str) {
        let log = || std::fs::read_to_string(self.folder.path().join("log")).unwrap();
        let count = |log: &str| log.matches("Reloaded server configuration").count();
        let before = count(&log());
        configure(self.folder.path(), self.port.into(), settings);
        let told = Command::new("kill").args(["-HUP", &self.child.id().to_string()]).status().unwrap();
        assert!(told.success());
        let deadline = Instant::now() + Duration::from_secs(30);
        while count(&log()) == before {
            assert!(Instant::now() < deadline, "{}", log());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Until it listens.
    fn wait(&mut self) {
        let ports = self.folder.path().join(format!("nats-server_{}.ports", self.child.id()));
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            // `{"nats": ["nats://127.0.0.1:40123"]}`
            let text = std::fs::read_to_string(&ports).unwrap_or_default();
            if let Some(port) = text.split("127.0.0.1:").nth(1).and_then(|rest| rest.split('"').next()?.parse().ok()) {
                self.port = port;
                return;
            }
            if self.child.try_wait().unwrap().is_some() || Instant::now() > deadline {
                panic!("{}", std::fs::read_to_string(self.folder.path().join("log")).unwrap());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    pub(crate) fn url(&self, user: &str) -> String {
        let at = if user.is_empty() { "" } else { "@" };
        format!("nats://{user}{at}127.0.0.1:{}", self.port)
    }
}

impl Drop for OwnServer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

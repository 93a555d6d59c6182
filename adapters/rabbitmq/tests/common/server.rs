//! A server with a configuration of its own, in the root folder that `cargo xtask brokers up rabbitmq` has built.

use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process_group};

/// Where the server's own folder is inside of the root folder.
const INSIDE: &str = "/srv";

/// A server that ends with the value.
pub(crate) struct OwnServer {
    child: Child,
    pub(crate) folder: tempfile::TempDir,
}

/// The root folder, or `None` after saying why the test does not run.
fn root() -> Option<PathBuf> {
    let cache = std::env::var_os("ANYBROKER_CACHE").map(PathBuf::from).or_else(|| {
        let of_user = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
        Some(of_user.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache")))?.join("anybroker"))
    })?;
    let root = cache.join("rabbitmq-trixie");
    if root.join("usr/lib/rabbitmq/bin/rabbitmq-server").is_file() && rustix::process::geteuid().is_root() {
        return Some(root);
    }
    println!("not run: no RabbitMQ in {}, or not root (cargo xtask brokers up rabbitmq)", root.display());
    let is_required = std::env::var("ANYBROKER_TEST_REQUIRE_BROKERS").is_ok_and(|value| value == "1");
    assert!(!is_required, "there is no RabbitMQ of this test's own, and ANYBROKER_TEST_REQUIRE_BROKERS demands it");
    None
}

/// Ports that nobody listens on at the moment.
pub(crate) fn free_ports<const COUNT: usize>() -> [u16; COUNT] {
    let listeners = [(); COUNT].map(|()| std::net::TcpListener::bind("127.0.0.1:0").unwrap());
    listeners.map(|listener| listener.local_addr().unwrap().port())
}

impl OwnServer {
    /// Starts one, and waits until all of `ports` are served. `configure` writes what the server needs into its folder,
    /// which is `/srv` to it, and answers its configuration.
    pub(crate) fn start(ports: &[u16], plugins: &str, configure: impl FnOnce(&Path) -> String) -> Option<Self> {
        super::url()?;
        let root = root()?;
        let folder = tempfile::tempdir().unwrap();
        let at = folder.path();
        std::fs::create_dir_all(at.join("home")).unwrap();
        let configuration = configure(at);
        std::fs::write(at.join("rabbitmq.conf"), configuration).unwrap();
        std::fs::write(at.join("plugins"), plugins).unwrap();
        // The server runs as root, so it reads what this test may read.
        let [distribution, mapper] = free_ports();
        let script = "mount --bind \"$1\" \"$0$2\" && mount -t proc proc \"$0/proc\" && \
            exec chroot \"$0\" sh -c 'epmd -port \"$ERL_EPMD_PORT\" & exec /usr/lib/rabbitmq/bin/rabbitmq-server'";
        let log = std::fs::File::create(at.join("output")).unwrap();
        let own = |name: &str| format!("{INSIDE}/{name}");
        let child = Command::new("unshare")
            .args(["--mount", "sh", "-c", script])
            .arg(&root)
            .arg(at)
            .arg(INSIDE)
            .env_clear()
            .envs([
                ("PATH", "/usr/sbin:/usr/bin:/sbin:/bin".to_owned()),
                ("LANG", "C.UTF-8".to_owned()),
                ("HOME", own("home")),
                ("RABBITMQ_NODENAME", format!("anybroker{distribution}@localhost")),
                ("RABBITMQ_DIST_PORT", distribution.to_string()),
                ("ERL_EPMD_PORT", mapper.to_string()),
                ("ERL_EPMD_ADDRESS", "127.0.0.1".to_owned()),
                ("RABBITMQ_CONFIG_FILE", own("rabbitmq.conf")),
                ("RABBITMQ_ENABLED_PLUGINS_FILE", own("plugins")),
                ("RABBITMQ_MNESIA_BASE", own("data")),
                ("RABBITMQ_LOG_BASE", own("log")),
                ("RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS", "+S 2:2".to_owned()),
            ])
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        let mut server = Self { child, folder };
        server.wait(ports);
        Some(server)
    }

    fn wait(&mut self, ports: &[u16]) {
        let deadline = Instant::now() + Duration::from_secs(120);
        while !ports.iter().all(|port| std::net::TcpStream::connect(("127.0.0.1", *port)).is_ok()) {
            if self.child.try_wait().unwrap().is_some() || Instant::now() > deadline {
                panic!("{}", std::fs::read_to_string(self.folder.path().join("output")).unwrap());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

impl Drop for OwnServer {
    fn drop(&mut self) {
        let id = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw);
        let _ = id.map(|id| kill_process_group(id, Signal::KILL));
        let _ = self.child.wait();
    }
}

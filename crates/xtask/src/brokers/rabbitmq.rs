//! RabbitMQ 4: Debian trixie's package in a root folder of its own, an ordinary loopback process without a container engine.
//!
//! Debian 12's own RabbitMQ is 3.10, whose quorum queues lack what the adapter needs; so `mmdebstrap` builds a small root
//! folder once, and the server runs in it by `chroot`. Every server has its mounts to itself (`unshare`): its folder is
//! bound into the root folder, and nothing stays mounted when it ends.

pub(crate) mod cluster;

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use super::stand_ins::Contents;
use super::{Change, Contained, Process, Recipe, Site, StandIn};

const SUITE: &str = "trixie";
/// Where the server's own folder is inside of the root folder.
const INSIDE: &str = "/srv";
/// Less than this is free where the disk counts as full.
const DISK_LIMIT: &str = "200MB";
const TOOLS: &[&str] = &["mmdebstrap", "unshare", "chroot", "mount"];

/// The broker of the `amqp://` scheme.
pub(crate) struct RabbitMq;

impl Recipe for RabbitMq {
    fn name(&self) -> &'static str {
        "rabbitmq"
    }

    fn version(&self) -> &'static str {
        "RabbitMQ 4.0.5 (Debian trixie)"
    }

    fn port_names(&self) -> &'static [&'static str] {
        &["clients", "admin", "distribution", "port mapper"]
    }

    fn url(&self, ports: &[u16]) -> String {
        format!("amqp://127.0.0.1:{}/%2f?admin=http://127.0.0.1:{}", ports[0], ports[1])
    }

    fn obstacle(&self, cache: &Path) -> Option<String> {
        if !cfg!(target_os = "linux") {
            return Some("it runs in a Debian root folder, which takes Linux".to_owned());
        }
        if !rustix::process::geteuid().is_root() {
            return Some("it runs in a Debian root folder, which takes root".to_owned());
        }
        let is_built = is_complete(&home(cache));
        let missing = TOOLS.iter().filter(|tool| !(is_installed(tool) || is_built && **tool == "mmdebstrap"));
        let missing: Vec<&str> = missing.copied().collect();
        (!missing.is_empty()).then(|| format!("{} not installed (Debian's package names)", missing.join(", ")))
    }

    fn install(&self, cache: &Path) -> Result<PathBuf> {
        let home = home(cache);
        if let Some(obstacle) = self.obstacle(cache) {
            bail!("{obstacle}; or name a server in ANYBROKER_TEST_RABBITMQ_URL and use --how urls");
        }
        if is_complete(&home) {
            return Ok(home);
        }
        eprintln!("RabbitMQ 4: building a root folder of Debian {SUITE} in {}", home.display());
        fs::create_dir_all(cache)?;
        // Built beside the final place and renamed: an interrupted build leaves nothing that looks complete.
        let staging = tempfile::Builder::new().prefix("building-").tempdir_in(cache)?;
        let root = staging.path().join("root");
        let status = Command::new("mmdebstrap")
            .args(["--quiet", "--variant=minbase", "--components=main", "--include=rabbitmq-server", SUITE])
            .arg(&root)
            .stdin(Stdio::null())
            // Standard output belongs to the `export` lines.
            .stdout(std::io::stderr())
            .status()
            .context("could not start mmdebstrap")?;
        ensure!(status.success(), "mmdebstrap could not build the root folder ({status}); see its output above");
        fs::create_dir_all(root.join(&INSIDE[1..]))?;
        fs::rename(&root, &home).context("could not move the root folder to its place")?;
        ensure!(is_complete(&home), "the root folder has no RabbitMQ");
        Ok(home)
    }

    fn prepare(&self, site: &Site<'_>) -> Result<()> {
        fs::create_dir_all(site.folder.join("home"))?;
        fs::write(site.folder.join("rabbitmq.conf"), configuration(site))?;
        fs::write(site.folder.join("plugins"), "[rabbitmq_management].\n")?;
        Ok(())
    }

    /// The port mapper stays in the foreground and in the server's process group: it ends with it, whatever ends it.
    fn command(&self, site: &Site<'_>) -> Command {
        in_root(site, &format!("epmd -port \"$ERL_EPMD_PORT\" & {SERVER}"))
    }

    fn changes(&self) -> &'static [Change] {
        &[Change::Fill, Change::Relieve, Change::LockOut, Change::LetIn]
    }

    /// By its own command. A disk on which less is free than the limit raises the alarm (its documentation, "Free Disk Space Alarms"),
    /// at once when the limit is set. A password that is changed keeps nobody out who is in: connections are closed too.
    fn change(&self, site: &Site<'_>, _: &Process, change: Change) -> Result<()> {
        match change {
            Change::Fill => control(site, &["set_disk_free_limit", "1000000GB"]),
            Change::Relieve => control(site, &["set_disk_free_limit", DISK_LIMIT]),
            Change::LockOut => {
                control(site, &["change_password", "guest", "changed"])?;
                control(site, &["close_all_connections", "the password was changed"])
            }
            Change::LetIn => control(site, &["change_password", "guest", "guest"]),
        }
    }

    fn image(&self) -> &'static str {
        "rabbitmq:4.0.5-management"
    }

    /// Not by the image's own entry: it would change the user to one who may not write here. The node starts its port mapper.
    fn contained(&self, site: &Site<'_>) -> Contained {
        Contained {
            entrypoint: Some("rabbitmq-server".to_owned()),
            environment: environment(&site.folder.display().to_string(), site.ports),
            ..Contained::default()
        }
    }

    /// Debian's own `rabbitmq-server` changes the user too; this one goes round it.
    fn stand_in(&self) -> Option<StandIn> {
        let program = "#!/bin/sh\nexec /usr/lib/rabbitmq/bin/rabbitmq-server \"$@\"\n";
        let scripts = vec![("/usr/local/bin/rabbitmq-server", program.to_owned())];
        Some(StandIn { contents: Contents::Root, scripts, entrypoint: &["rabbitmq-server"] })
    }

    /// The management plugin comes last; clients are greeted before.
    fn probe(&self, ports: &[u16]) -> Result<()> {
        let limit = Duration::from_secs(1);
        let connect = |port: u16| -> Result<TcpStream> {
            let stream = TcpStream::connect_timeout(&SocketAddr::from((Ipv4Addr::LOCALHOST, port)), limit)?;
            stream.set_read_timeout(Some(limit))?;
            stream.set_write_timeout(Some(limit))?;
            Ok(stream)
        };
        let mut stream = connect(ports[0])?;
        stream.write_all(b"AMQP\x00\x00\x09\x01")?;
        let mut lead = [0; 1];
        stream.read_exact(&mut lead).context("it does not answer like a RabbitMQ server")?;
        ensure!(lead[0] == 1, "it does not answer like a RabbitMQ server");
        let answer = answer_of_management(ports[1], "/api/health/checks/local-alarms")?;
        let line = answer.lines().next().unwrap_or_default();
        ensure!(line.contains(" 200 "), "its management plugin answers {line}");
        Ok(())
    }
}

/// What its management plugin answers to who is asked for by `guest`.
fn answer_of_management(port: u16, path: &str) -> Result<String> {
    let limit = Duration::from_secs(1);
    let mut stream = TcpStream::connect_timeout(&SocketAddr::from((Ipv4Addr::LOCALHOST, port)), limit)?;
    stream.set_read_timeout(Some(limit))?;
    stream.set_write_timeout(Some(limit))?;
    let head = "Host: localhost\r\nConnection: close\r\nAuthorization: Basic Z3Vlc3Q6Z3Vlc3Q=\r\n\r\n";
    stream.write_all(format!("GET {path} HTTP/1.1\r\n{head}").as_bytes())?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

/// The server in the foreground, inside of the root folder.
const SERVER: &str = "exec /usr/lib/rabbitmq/bin/rabbitmq-server";

/// Runs a script in the root folder, with the server's folder at [`INSIDE`].
fn in_root(site: &Site<'_>, inner: &str) -> Command {
    let script = "mount --bind \"$1\" \"$0$2\" && mount -t proc proc \"$0/proc\" && exec chroot \"$0\" sh -c \"$3\"";
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", script]).arg(site.home).arg(site.folder).arg(INSIDE).arg(inner);
    command.env_clear();
    command.env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
    command.envs(environment(INSIDE, site.ports));
    command
}

/// Runs `rabbitmqctl` beside the server, in the root folder and with the server's folder in the same place.
fn control(site: &Site<'_>, arguments: &[&str]) -> Result<()> {
    let script = "root=\"$0\" && mount --bind \"$1\" \"$root$2\" && mount -t proc proc \"$root/proc\" && shift 2 && \
        exec chroot \"$root\" /usr/lib/rabbitmq/bin/rabbitmqctl --quiet \"$@\"";
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", script]).arg(site.home).arg(site.folder).arg(INSIDE).args(arguments);
    command.env_clear();
    command.env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
    command.envs(environment(INSIDE, site.ports));
    let output = command.stdin(Stdio::null()).output().context("could not start unshare")?;
    let said = [output.stdout, output.stderr].concat();
    ensure!(output.status.success(), "rabbitmqctl {}: {}", arguments[0], String::from_utf8_lossy(&said).trim());
    Ok(())
}

/// What a test machine has cores for.
const SCHEDULERS: &str = "+S 2:2";

/// What falls due while a server that was killed has not all its streams yet finds no route, and is tried again after this: three
/// minutes by default, which is longer than a test waits (`rabbit.app`; the adapter's README tells it).
const LETTERS_TRIED_AGAIN: &str = "-rabbit dead_letter_worker_publisher_confirm_timeout 10000";

/// What the server reads, with its own folder at `own`.
fn environment(own: &str, ports: &[u16]) -> Vec<(&'static str, String)> {
    let own = |name: &str| format!("{own}/{name}");
    vec![
        ("LANG", "C.UTF-8".to_owned()),
        ("HOME", own("home")),
        ("RABBITMQ_NODENAME", format!("anybroker{}@localhost", ports[0])),
        ("RABBITMQ_DIST_PORT", ports[2].to_string()),
        ("ERL_EPMD_PORT", ports[3].to_string()),
        ("ERL_EPMD_ADDRESS", "127.0.0.1".to_owned()),
        ("RABBITMQ_CONFIG_FILE", own("rabbitmq.conf")),
        ("RABBITMQ_ENABLED_PLUGINS_FILE", own("plugins")),
        ("RABBITMQ_MNESIA_BASE", own("data")),
        ("RABBITMQ_LOG_BASE", own("log")),
        ("RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS", format!("{SCHEDULERS} {LETTERS_TRIED_AGAIN}")),
    ]
}

fn home(cache: &Path) -> PathBuf {
    cache.join(format!("rabbitmq-{SUITE}"))
}

fn is_complete(home: &Path) -> bool {
    home.join("usr/lib/rabbitmq/bin/rabbitmq-server").is_file() && home.join(&INSIDE[1..]).is_dir()
}

fn is_installed(tool: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| folder.join(tool).is_file())
}

/// Everything on the loopback interface. The guest user may connect from there by default.
fn configuration(site: &Site<'_>) -> String {
    format!(
        "listeners.tcp.1 = 127.0.0.1:{clients}\n\
         management.tcp.ip = 127.0.0.1\n\
         management.tcp.port = {admin}\n\
         collect_statistics_interval = 1000\n\
         disk_free_limit.absolute = {DISK_LIMIT}\n\
         log.file.level = warning\n",
        clients = site.ports[0],
        admin = site.ports[1],
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_url_names_the_admin_endpoint_too() {
        let url = RabbitMq.url(&[20_001, 20_002, 20_003, 20_004]);
        assert_eq!(url, "amqp://127.0.0.1:20001/%2f?admin=http://127.0.0.1:20002");
    }

    #[test]
    fn a_folder_without_a_server_is_not_complete() {
        let folder = tempfile::tempdir().unwrap();
        assert!(!is_complete(folder.path()));
    }
}

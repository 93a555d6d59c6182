//! NATS with JetStream: one server, built from the Go module proxy.

pub(crate) mod cluster;

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rustix::process::Signal;

use super::stand_ins::Contents;
use super::{Change, Contained, Process, Recipe, Site, StandIn};
use crate::interrupt;

const MODULE: &str = "github.com/nats-io/nats-server/v2";
const VERSION: &str = "2.15.2";
/// Minor version of the first Go that fetches a newer toolchain by itself. Debian 12 has 1.19.
const OLDEST_GO: u32 = 21;

/// The broker of the `nats://` scheme.
pub(crate) struct Nats;

impl Recipe for Nats {
    fn name(&self) -> &'static str {
        "nats"
    }

    fn version(&self) -> &'static str {
        "NATS 2.15.2"
    }

    fn port_names(&self) -> &'static [&'static str] {
        &["clients"]
    }

    fn url(&self, ports: &[u16]) -> String {
        format!("nats://127.0.0.1:{}", ports[0])
    }

    fn obstacle(&self, cache: &Path) -> Option<String> {
        if home(cache).join("nats-server").is_file() {
            return None;
        }
        let told = Command::new("go").arg("version").stdin(Stdio::null()).output();
        let told = told.ok().filter(|output| output.status.success());
        let Some(told) = told else {
            return Some(format!("Go is not installed, and nats-server {VERSION} is built with it"));
        };
        let told = String::from_utf8_lossy(&told.stdout).into_owned();
        // What cannot be read is tried.
        let minor = minor_version(&told).unwrap_or(OLDEST_GO);
        (minor < OLDEST_GO).then(|| format!("Go 1.{minor} is too old to build nats-server; 1.{OLDEST_GO} is needed"))
    }

    fn install(&self, cache: &Path) -> Result<PathBuf> {
        let home = home(cache);
        if home.join("nats-server").is_file() {
            return Ok(home);
        }
        if let Some(obstacle) = self.obstacle(cache) {
            bail!(
                "{obstacle}: install Go 1.{OLDEST_GO} or later (https://go.dev/dl), or name a server in \
                 ANYBROKER_TEST_NATS_URL and use --how urls"
            );
        }
        eprintln!("nats-server {VERSION}: building it into {}", home.display());
        fs::create_dir_all(cache)?;
        // Built beside the final place and renamed: an interrupted build leaves nothing that looks complete.
        let staging = tempfile::Builder::new().prefix("building-").tempdir_in(cache)?;
        let status = Command::new("go")
            .args(["install", &format!("{MODULE}@v{VERSION}")])
            .env("GOBIN", staging.path())
            // An older Go fetches the newer toolchain that the module asks for.
            .env("GOTOOLCHAIN", "auto")
            .current_dir(staging.path())
            .stdin(Stdio::null())
            // Standard output belongs to the `export` lines.
            .stdout(std::io::stderr())
            .status()
            .context("could not start go")?;
        ensure!(status.success(), "go could not build nats-server ({status}); see its output above");
        fs::create_dir_all(&home)?;
        let built = staging.path().join("nats-server");
        fs::rename(&built, home.join("nats-server")).context("could not move nats-server to its place")?;
        Ok(home)
    }

    fn prepare(&self, site: &Site<'_>) -> Result<()> {
        fs::write(configuration_file(site), configuration(site, State::Open))?;
        Ok(())
    }

    fn command(&self, site: &Site<'_>) -> Command {
        let mut command = Command::new(site.home.join("nats-server"));
        command.arg("-c").arg(configuration_file(site));
        command
    }

    fn image(&self) -> &'static str {
        // The variant with a shell, for the health check of docker-compose.yml.
        "nats:2.15.2-alpine"
    }

    fn contained(&self, site: &Site<'_>) -> Contained {
        let arguments = vec!["-c".to_owned(), configuration_file(site).display().to_string()];
        Contained { arguments, ..Contained::default() }
    }

    fn stand_in(&self) -> Option<StandIn> {
        let contents = Contents::Folder("/usr/local/bin");
        Some(StandIn { contents, scripts: Vec::new(), entrypoint: &["nats-server"] })
    }

    fn changes(&self) -> &'static [Change] {
        &[Change::Fill, Change::Relieve, Change::LockOut, Change::LetIn]
    }

    /// By its configuration, which it reads again on SIGHUP. What its file store may hold altogether cannot become less while it runs
    /// ("config reload not supported for decreasing jetstream max memory and store", 2.15.2); what an account may hold can.
    fn change(&self, site: &Site<'_>, process: &Process, change: Change) -> Result<()> {
        let state = match change {
            Change::Fill => State::Full,
            Change::LockOut => State::Locked,
            Change::Relieve | Change::LetIn => State::Open,
        };
        let log = site.folder.join("server.log");
        let told =
            || fs::read_to_string(&log).map(|text| (text.matches(RELOADED).count(), text.matches(REFUSED).count()));
        let before = told()?;
        fs::write(configuration_file(site), configuration(site, state))?;
        process.signal(Signal::HUP)?;
        let after = interrupt::poll(RELOADED_WITHIN, || Ok(Some(told()?).filter(|after| *after != before)))?;
        let after = after.context("it does not say that it has read its configuration again")?;
        ensure!(after.1 == before.1, "it refuses its configuration: see {}", log.display());
        Ok(())
    }

    /// The server greets a client before JetStream has recovered its streams: asked is JetStream itself.
    fn probe(&self, ports: &[u16]) -> Result<()> {
        let limit = Duration::from_secs(1);
        let mut stream = TcpStream::connect_timeout(&SocketAddr::from((Ipv4Addr::LOCALHOST, ports[0])), limit)?;
        stream.set_read_timeout(Some(limit))?;
        stream.set_write_timeout(Some(limit))?;
        stream.write_all(
            b"CONNECT {\"verbose\":false,\"pedantic\":false,\"headers\":true,\"no_responders\":true}\r\n\
              SUB anybroker.probe 1\r\nPUB $JS.API.INFO anybroker.probe 0\r\n\r\n",
        )?;
        let mut lines = BufReader::new(stream);
        let mut line = String::new();
        for _ in 0..20 {
            line.clear();
            ensure!(lines.read_line(&mut line)? > 0, "it closed the connection");
            if line.starts_with("MSG anybroker.probe") {
                return Ok(());
            }
            ensure!(!line.starts_with("HMSG"), "JetStream does not answer yet");
            ensure!(!line.starts_with("-ERR"), "it answers {}", line.trim());
        }
        bail!("it does not answer like a NATS server")
    }
}

fn home(cache: &Path) -> PathBuf {
    cache.join(format!("nats-server-{VERSION}"))
}

/// 26 of `go version go1.26.8 linux/amd64`.
fn minor_version(told: &str) -> Option<u32> {
    told.split_whitespace().find_map(|word| word.strip_prefix("go1."))?.split('.').next()?.parse().ok()
}

fn configuration_file(site: &Site<'_>) -> PathBuf {
    site.folder.join("nats.conf")
}

/// What its configuration lets clients do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Open,
    /// Their account may store nothing more.
    Full,
    /// They may enter, and do nothing: who enters without a password cannot be changed while it runs ("config reload not supported for
    /// NoAuthUser", 2.15.2).
    Locked,
}

/// What it logs after it was told to read its configuration again.
const RELOADED: &str = "Reloaded server configuration";
const REFUSED: &str = "Failed to reload server configuration";
const RELOADED_WITHIN: Duration = Duration::from_secs(20);

/// File storage below the server's own folder. `sync_interval` is left at its default: a killed process loses nothing that
/// was acknowledged, a power loss may (its documentation, "sync_interval"). Clients without a password belong to an account of
/// their own, because the one of a server without accounts can be given no limits.
fn configuration(site: &Site<'_>, state: State) -> String {
    let most = if state == State::Full { "1KB" } else { "8GB" };
    let nothing = ", permissions: { publish: { deny: \">\" }, subscribe: { deny: \">\" } }";
    let allowed = if state == State::Locked { nothing } else { "" };
    format!(
        "listen: \"127.0.0.1:{port}\"\n\
         server_name: anybroker\n\
         jetstream {{ store_dir: {store:?}, max_file_store: 8GB }}\n\
         accounts {{ CLIENTS {{\n\
         \u{20}   jetstream: {{ max_file: {most} }}\n\
         \u{20}   users: [ {{ user: anybody, password: anything{allowed} }} ]\n\
         }} }}\n\
         no_auth_user: anybody\n",
        port = site.ports[0],
        store = site.folder.join("data").display().to_string(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_account_may_store_next_to_nothing_and_a_locked_one_may_do_nothing() {
        let site = Site { home: Path::new("/home"), folder: Path::new("/folder"), ports: &[4222], node: 1 };
        let [open, full, locked] = [State::Open, State::Full, State::Locked].map(|state| configuration(&site, state));
        assert!(open.contains("max_file: 8GB }") && !open.contains("deny"), "{open}");
        assert!(full.contains("max_file: 1KB }") && !full.contains("deny"), "{full}");
        assert!(locked.contains("max_file: 8GB }") && locked.contains("publish: { deny: \">\" }"), "{locked}");
    }

    #[test]
    fn the_version_of_go_is_read() {
        assert_eq!(minor_version("go version go1.26.8 linux/amd64"), Some(26));
        assert_eq!(minor_version("go version go1.19 linux/amd64"), Some(19));
        assert_eq!(minor_version("go version devel"), None);
    }
}

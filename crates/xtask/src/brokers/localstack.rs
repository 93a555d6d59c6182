//! LocalStack: an emulator of Amazon SNS and SQS behind one endpoint. What is shown with it is shown of the emulator, and
//! reports have to say so. It keeps everything in memory: what it held is gone when it ends.
//!
//! Only its gateway with these two services runs, by `localstack_server.py` beside this file. Its own start-up needs a folder of
//! the system, downloads a certificate, and listens on every interface of the machine.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use super::{Change, Contained, Recipe, Site, StandIn};

/// The last version that runs on Python 3.11 (Debian 12), under the Apache licence.
const VERSION: &str = "4.13.1";
/// LocalStack reads `cbor2._decoder`, which cbor2 6 does not have; Twisted needs the last one and does not ask for it.
const PACKAGES: &[&str] = &["localstack-core[base-runtime]==4.13.1", "cbor2==5.8.0", "service-identity==24.2.0"];
const LAUNCHER: &str = include_str!("localstack_server.py");

/// The fan-out mode of the `sqs://` scheme.
pub(crate) struct LocalStack;

impl Recipe for LocalStack {
    fn name(&self) -> &'static str {
        "localstack"
    }

    fn version(&self) -> &'static str {
        "LocalStack 4.13.1 (emulates SNS and SQS)"
    }

    fn port_names(&self) -> &'static [&'static str] {
        &["clients"]
    }

    fn keeps_data(&self) -> bool {
        // It keeps everything in memory.
        false
    }

    fn url(&self, ports: &[u16]) -> String {
        format!("sqs://127.0.0.1:{}?region=eu-west-1&fanout=sns", ports[0])
    }

    fn obstacle(&self, cache: &Path) -> Option<String> {
        if is_installed(&home(cache)) {
            return None;
        }
        let can_make = Command::new("python3").args(["-c", "import venv, ensurepip"]).stdin(Stdio::null()).output();
        match can_make {
            Ok(output) if output.status.success() => None,
            _ => Some("Python 3 with venv is not installed, and LocalStack is a Python program".to_owned()),
        }
    }

    fn install(&self, cache: &Path) -> Result<PathBuf> {
        let home = home(cache);
        if is_installed(&home) {
            return Ok(home);
        }
        eprintln!("LocalStack {VERSION}: installing it into {}", home.display());
        fs::create_dir_all(cache)?;
        // In place, because an environment's scripts hold its path; what an interrupted installation left is cleared.
        run(Command::new("python3").args(["-m", "venv", "--clear"]).arg(&home))?;
        run(Command::new(python(&home)).args(["-m", "pip", "install", "--quiet"]).args(PACKAGES))?;
        fs::write(finished(&home), PACKAGES.concat())?;
        Ok(home)
    }

    fn prepare(&self, site: &Site<'_>) -> Result<()> {
        fs::write(launcher(site), LAUNCHER)?;
        Ok(())
    }

    fn command(&self, site: &Site<'_>) -> Command {
        let mut command = Command::new(python(site.home));
        command.arg(launcher(site)).arg(site.ports[0].to_string());
        // Its caches of what is installed belong into this server's folder.
        command.env("PYTHONUNBUFFERED", "1").env("HOME", site.folder).env("XDG_CACHE_HOME", site.folder);
        command
    }

    fn image(&self) -> &'static str {
        "localstack/localstack:4.13.1"
    }

    /// The image's own start-up, told what `localstack_server.py` tells it; and no server for names (DNS).
    fn contained(&self, site: &Site<'_>) -> Contained {
        let address = format!("127.0.0.1:{}", site.ports[0]);
        Contained {
            environment: vec![
                ("GATEWAY_LISTEN", address.clone()),
                ("LOCALSTACK_HOST", address),
                ("SERVICES", "sqs,sns".to_owned()),
                ("PROVIDER_OVERRIDE_SNS", "v2".to_owned()),
                ("SQS_DISABLE_CLOUDWATCH_METRICS", "1".to_owned()),
                ("DISABLE_EVENTS", "1".to_owned()),
                ("SKIP_SSL_CERT_DOWNLOAD", "1".to_owned()),
                ("DNS_ADDRESS", "0".to_owned()),
            ],
            mounts: vec![(site.folder.join("data"), "/var/lib/localstack")],
            ..Contained::default()
        }
    }

    fn prepare_contained(&self, site: &Site<'_>) -> Result<()> {
        Ok(fs::create_dir_all(site.folder.join("data"))?)
    }

    /// Its Python environment cannot be moved.
    fn stand_in(&self) -> Option<StandIn> {
        None
    }

    fn cannot(&self, change: Change) -> Option<&'static str> {
        Some(match change {
            Change::Fill | Change::Relieve => "LocalStack, an emulator, has no limit on what it holds",
            // Its documentation, "IAM Policy Enforcement": off by default, and with a licence only.
            Change::LockOut | Change::LetIn => "LocalStack, an emulator, enforces no permissions here",
        })
    }

    fn probe(&self, ports: &[u16]) -> Result<()> {
        // Which service is meant is told by the signature, which nobody checks.
        let request = "GET /?Action=ListQueues&Version=2012-11-05 HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\
             Authorization: AWS4-HMAC-SHA256 Credential=test/20250101/eu-west-1/sqs/aws4_request, \
             SignedHeaders=host, Signature=none\r\n\r\n";
        let limit = Duration::from_secs(1);
        let mut stream = TcpStream::connect_timeout(&SocketAddr::from((Ipv4Addr::LOCALHOST, ports[0])), limit)?;
        stream.set_read_timeout(Some(limit))?;
        stream.write_all(request.as_bytes())?;
        let mut status = [0_u8; 12];
        stream.read_exact(&mut status)?;
        ensure!(status.ends_with(b" 200"), "it answers {}", String::from_utf8_lossy(&status));
        Ok(())
    }
}

fn home(cache: &Path) -> PathBuf {
    cache.join(format!("localstack-{VERSION}"))
}

/// Written last, after everything that is needed.
fn finished(home: &Path) -> PathBuf {
    home.join("installed.txt")
}

fn is_installed(home: &Path) -> bool {
    fs::read_to_string(finished(home)).is_ok_and(|packages| packages == PACKAGES.concat())
}

fn python(home: &Path) -> PathBuf {
    home.join("bin/python")
}

fn launcher(site: &Site<'_>) -> PathBuf {
    site.folder.join("localstack_server.py")
}

fn run(command: &mut Command) -> Result<()> {
    let program = command.get_program().display().to_string();
    // Standard output belongs to the `export` lines.
    let status = command.stdin(Stdio::null()).stdout(std::io::stderr()).status();
    let status = status.with_context(|| format!("could not start {program}"))?;
    ensure!(status.success(), "{program} failed ({status}); see its output above");
    Ok(())
}

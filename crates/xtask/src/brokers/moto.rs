//! moto: an emulator of Amazon SNS and SQS behind one endpoint. What is shown with it is shown of the emulator, and
//! reports have to say so. It keeps everything in memory: what it held is gone when it ends.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use super::{Recipe, Site};

const VERSION: &str = "5.2.5";

/// The fan-out mode of the `sqs://` scheme.
pub(crate) struct Moto;

impl Recipe for Moto {
    fn name(&self) -> &'static str {
        "moto"
    }

    fn version(&self) -> &'static str {
        "moto 5.2.5 (emulates SNS and SQS)"
    }

    fn port_names(&self) -> &'static [&'static str] {
        &["clients"]
    }

    fn url(&self, ports: &[u16]) -> String {
        format!("sqs://127.0.0.1:{}?region=eu-west-1&fanout=sns", ports[0])
    }

    fn obstacle(&self, cache: &Path) -> Option<String> {
        if server(&home(cache)).is_file() {
            return None;
        }
        let can_make = Command::new("python3").args(["-c", "import venv, ensurepip"]).stdin(Stdio::null()).output();
        match can_make {
            Ok(output) if output.status.success() => None,
            _ => Some("Python 3 with venv is not installed, and moto is a Python program".to_owned()),
        }
    }

    fn install(&self, cache: &Path) -> Result<PathBuf> {
        let home = home(cache);
        if server(&home).is_file() {
            return Ok(home);
        }
        eprintln!("moto {VERSION}: installing it into {}", home.display());
        fs::create_dir_all(cache)?;
        // In place, because an environment's scripts hold its path; what an interrupted installation left is cleared, and
        // the server's own script is written last, after everything that it needs.
        run(Command::new("python3").args(["-m", "venv", "--clear"]).arg(&home))?;
        let wanted = format!("moto[server]=={VERSION}");
        run(Command::new(home.join("bin/python")).args(["-m", "pip", "install", "--quiet", &wanted]))?;
        ensure!(server(&home).is_file(), "pip has installed moto without its server in {}", home.display());
        Ok(home)
    }

    fn prepare(&self, _: &Site<'_>) -> Result<()> {
        Ok(())
    }

    fn command(&self, site: &Site<'_>) -> Command {
        let mut command = Command::new(server(site.home));
        command.args(["-H", "127.0.0.1", "-p", &site.ports[0].to_string()]);
        // A line of log for every request would be most of its work.
        command.env("PYTHONUNBUFFERED", "1").env("MOTO_SERVER_LOG_LEVEL", "error");
        command
    }

    fn probe(&self, ports: &[u16]) -> Result<()> {
        let limit = Duration::from_secs(1);
        let mut stream = TcpStream::connect_timeout(&SocketAddr::from((Ipv4Addr::LOCALHOST, ports[0])), limit)?;
        stream.set_read_timeout(Some(limit))?;
        stream.write_all(b"GET /moto-api/ HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")?;
        let mut status = [0_u8; 12];
        stream.read_exact(&mut status)?;
        ensure!(status.ends_with(b" 200"), "it answers {}", String::from_utf8_lossy(&status));
        Ok(())
    }
}

fn home(cache: &Path) -> PathBuf {
    cache.join(format!("moto-{VERSION}"))
}

fn server(home: &Path) -> PathBuf {
    home.join("bin/moto_server")
}

fn run(command: &mut Command) -> Result<()> {
    let program = command.get_program().display().to_string();
    // Standard output belongs to the `export` lines.
    let status = command.stdin(Stdio::null()).stdout(std::io::stderr()).status();
    let status = status.with_context(|| format!("could not start {program}"))?;
    ensure!(status.success(), "{program} failed ({status}); see its output above");
    Ok(())
}

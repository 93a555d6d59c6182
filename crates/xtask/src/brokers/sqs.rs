//! ElasticMQ: an emulator of Amazon SQS. What is shown with it is shown of the emulator, and reports have to say so.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, ensure};

use super::java::{self, Artefact};
use super::stand_ins::Contents;
use super::{Change, Contained, Recipe, Site, StandIn};

const VERSION: &str = "1.6.16";
const ARTEFACTS: &[Artefact] = &[("org.elasticmq", "elasticmq-server_2.13", VERSION)];

/// Where the image reads its configuration (its README, "ElasticMQ via Docker").
const INSIDE: &str = "/opt/elasticmq.conf";
const ENTRYPOINT: &[&str] = &[
    "java",
    "-Xmx256m",
    "-XX:+UseSerialGC",
    "-XX:TieredStopAtLevel=1",
    "-Dconfig.file=/opt/elasticmq.conf",
    "-cp",
    "/opt/elasticmq/lib/*",
    "org.elasticmq.server.Main",
];

/// The broker of the `sqs://` scheme.
pub(crate) struct ElasticMq;

impl Recipe for ElasticMq {
    fn name(&self) -> &'static str {
        "sqs"
    }

    fn version(&self) -> &'static str {
        "ElasticMQ 1.6.16 (emulates SQS)"
    }

    fn port_names(&self) -> &'static [&'static str] {
        &["clients"]
    }

    fn keeps_data(&self) -> bool {
        // It keeps everything in memory.
        false
    }

    fn url(&self, ports: &[u16]) -> String {
        format!("sqs://127.0.0.1:{}?region=elasticmq", ports[0])
    }

    fn install(&self, cache: &Path) -> Result<PathBuf> {
        java::fetch_jars(cache, &format!("elasticmq-{VERSION}"), ARTEFACTS)
    }

    fn prepare(&self, site: &Site<'_>) -> Result<()> {
        fs::write(configuration_file(site), configuration(site.ports[0]))?;
        Ok(())
    }

    fn command(&self, site: &Site<'_>) -> Command {
        let mut command = java::java(site.home, 256);
        command.arg(java::prefixed("-Dconfig.file=", &configuration_file(site))).arg("org.elasticmq.server.Main");
        command
    }

    fn image(&self) -> &'static str {
        "softwaremill/elasticmq-native:1.6.16"
    }

    fn contained(&self, site: &Site<'_>) -> Contained {
        Contained { mounts: vec![(configuration_file(site), INSIDE)], ..Contained::default() }
    }

    /// On a Java virtual machine, which the official image is not.
    fn stand_in(&self) -> Option<StandIn> {
        Some(StandIn { contents: Contents::Folder("/opt/elasticmq/lib"), scripts: Vec::new(), entrypoint: ENTRYPOINT })
    }

    fn cannot(&self, change: Change) -> Option<&'static str> {
        Some(match change {
            Change::Fill | Change::Relieve => "ElasticMQ, an emulator, has no limit on what it holds",
            Change::LockOut | Change::LetIn => "ElasticMQ, an emulator, asks nobody for credentials",
        })
    }

    fn probe(&self, ports: &[u16]) -> Result<()> {
        let limit = Duration::from_secs(1);
        let mut stream = TcpStream::connect_timeout(&SocketAddr::from((Ipv4Addr::LOCALHOST, ports[0])), limit)?;
        stream.set_read_timeout(Some(limit))?;
        stream.write_all(b"GET /?Action=ListQueues HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")?;
        let mut status = [0_u8; 12];
        stream.read_exact(&mut status)?;
        ensure!(status.ends_with(b" 200"), "it answers {}", String::from_utf8_lossy(&status));
        Ok(())
    }
}

fn configuration_file(site: &Site<'_>) -> PathBuf {
    site.folder.join("elasticmq.conf")
}

/// `node-address` is what ElasticMQ puts into the queue URLs that it answers. Everything is in memory: with its storage in a
/// file each request waits for the disk, and under load a long poll outlasts ElasticMQ's own bound of 21 s, which leases
/// its messages to nobody.
fn configuration(port: u16) -> String {
    format!(
        r#"include classpath("application.conf")
node-address {{ protocol = http, host = "127.0.0.1", port = {port}, context-path = "" }}
rest-sqs {{ enabled = true, bind-port = {port}, bind-hostname = "127.0.0.1", sqs-limits = strict }}
rest-stats {{ enabled = false }}
"#
    )
}

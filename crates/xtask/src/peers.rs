//! `cargo xtask peers`: other projects' crates under our suite. They build in a workspace of their own, which this one never sees.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use clap::Args;

use crate::brokers::{self, How, PrivateInstance};
use crate::child::{self, cargo};
use crate::conform::disturb;
use crate::workspace;

const BUILD_LIMIT: Duration = Duration::from_secs(40 * 60);
const RUN_LIMIT: Duration = Duration::from_secs(60 * 60);

/// A program of the workspace in `peers`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Peer {
    name: &'static str,
    broker: &'static str,
}

const PEERS: &[Peer] = &[
    peer("ruststream-nats", "nats"),
    peer("mq-bridge-nats", "nats"),
    peer("ruststream-rabbitmq", "rabbitmq"),
    peer("omniqueue-rabbitmq", "rabbitmq"),
    peer("mq-bridge-rabbitmq", "rabbitmq"),
    peer("ruststream-sqs", "sqs"),
    peer("omniqueue-sqs", "sqs"),
    peer("ruststream-kafka", "kafka"),
    peer("mq-bridge-kafka", "kafka"),
];

const fn peer(name: &'static str, broker: &'static str) -> Peer {
    Peer { name, broker }
}

/// Run the conformance suite on published crates of other projects
///
/// Builds the workspace in `peers`, brings the server up, and runs the suite. What was found is in peers/README.md. Fails when a
/// case fails.
#[derive(Debug, Args)]
pub(crate) struct Peers {
    /// Which peer; all of them when not given
    peer: Option<String>,
    /// Only cases whose name matches; may be repeated
    #[arg(long = "case", value_name = "GLOB")]
    cases: Vec<String>,
    /// Up to this level: conformance or reliability. From reliability on, connections are disturbed by proxies
    #[arg(long, default_value = "conformance")]
    level: String,
    /// What everything random starts from
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Where the reports go; a folder of each peer in target/peers when not given
    #[arg(long, value_name = "DIR")]
    report: Option<PathBuf>,
    /// Where the brokers come from
    #[arg(long, value_enum, default_value = "auto")]
    how: How,
}

impl Peers {
    pub(crate) fn run(&self) -> Result<()> {
        workspace::enter()?;
        let chosen = self.chosen()?;
        let folder = match &self.report {
            Some(folder) => std::path::absolute(folder)?,
            None => workspace::target()?.join("peers"),
        };
        // A folder of its own: the two workspaces resolve the same crates to other versions.
        let target = workspace::target()?.join("peers-build");
        // All of them: chosen alone, each would have shared crates built anew with its own features.
        let mut build = cargo(["build", "--locked", "--manifest-path", "peers/Cargo.toml", "--workspace", "--bins"]);
        child::run(build.env("CARGO_TARGET_DIR", &target), BUILD_LIMIT)?;
        let mut failed = Vec::new();
        for share in chosen.chunk_by(|one, other| one.broker == other.broker) {
            let mut instance = PrivateInstance::new()?;
            let broker = share[0].broker;
            let url = instance.up_one(broker, self.how)?.url;
            let proxy = match self.level.as_str() {
                "conformance" => Vec::new(),
                _ => proxy(disturb::advertised(&instance, broker)?),
            };
            let version = brokers::recipes(&[broker.to_owned()])?[0].version();
            for peer in share {
                if !self.one(peer, &target.join("debug"), &url, version, &proxy, &folder)? {
                    failed.push(peer.name);
                }
            }
        }
        println!("\nreports: {}", folder.display());
        ensure!(failed.is_empty(), "cases failed on: {}", failed.join(", "));
        Ok(())
    }

    fn chosen(&self) -> Result<Vec<Peer>> {
        let Some(name) = &self.peer else { return Ok(PEERS.to_vec()) };
        match PEERS.iter().find(|peer| peer.name == name) {
            Some(found) => Ok(vec![*found]),
            None => {
                let names: Vec<&str> = PEERS.iter().map(|peer| peer.name).collect();
                bail!("no peer is called `{name}`; there are: {}", names.join(", "))
            }
        }
    }

    /// Whether no case failed.
    fn one(
        &self,
        peer: &Peer,
        programs: &Path,
        url: &str,
        server: &str,
        proxy: &[String],
        report: &Path,
    ) -> Result<bool> {
        let mut run = std::process::Command::new(programs.join(peer.name));
        child::clean(&mut run);
        run.args(["--url", url, "--server", server, "--level", &self.level, "--seed", &self.seed.to_string()]);
        run.args(proxy);
        for case in &self.cases {
            run.args(["--case", case]);
        }
        run.arg("--report").arg(report.join(peer.name));
        Ok(child::watched(&mut run, RUN_LIMIT)?.success())
    }
}

/// A proxy in front of the broker: where its clients are told to come, if it tells them, and else anywhere.
fn proxy(advertised: Option<String>) -> Vec<String> {
    ["--proxy".to_owned()].into_iter().chain(advertised).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_proxy_listens_where_the_brokers_clients_are_told_to_come() {
        let route = "127.0.0.1:1=127.0.0.1:2".to_owned();
        assert_eq!(proxy(Some(route.clone())), ["--proxy".to_owned(), route]);
        assert_eq!(proxy(None), ["--proxy"]);
    }

    #[test]
    fn a_peer_is_found_by_its_name_and_another_name_is_refused() {
        let peers = |name: Option<&str>| Peers {
            peer: name.map(str::to_owned),
            cases: Vec::new(),
            level: "conformance".to_owned(),
            seed: 1,
            report: None,
            how: How::Auto,
        };
        assert_eq!(peers(None).chosen().unwrap().len(), PEERS.len());
        let found = peers(Some("ruststream-nats")).chosen().unwrap();
        assert_eq!(found, [peer("ruststream-nats", "nats")]);
        let told = peers(Some("ruststream")).chosen().unwrap_err().to_string();
        assert!(told.contains("`ruststream`") && told.contains("omniqueue-rabbitmq"), "{told}");
    }
}

//! Three Kafka nodes that are brokers and controllers, with three replicas of everything.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::super::{Contained, Recipe, Site, StandIn, java};
use super::wire::Wire;
use super::{Kafka, cluster_id};

/// `kafka://` with three addresses.
pub(crate) struct KafkaCluster;

/// Clients and the other brokers, and the controllers.
const PORTS: usize = 2;

impl Recipe for KafkaCluster {
    fn name(&self) -> &'static str {
        "kafka-cluster"
    }

    fn version(&self) -> &'static str {
        Kafka.version()
    }

    fn nodes(&self) -> u32 {
        3
    }

    fn port_names(&self) -> &'static [&'static str] {
        &["clients", "controller"]
    }

    fn url(&self, ports: &[u16]) -> String {
        let addresses: Vec<String> = ports.chunks(PORTS).map(|node| format!("127.0.0.1:{}", node[0])).collect();
        format!("kafka://{}", addresses.join(","))
    }

    fn install(&self, cache: &Path) -> Result<PathBuf> {
        Kafka.install(cache)
    }

    fn prepare(&self, site: &Site<'_>) -> Result<()> {
        fs::write(properties_file(site), properties(site))?;
        let data = data(site);
        if data.join("meta.properties").exists() {
            return Ok(());
        }
        fs::create_dir_all(&data)?;
        let log = site.folder.join(format!("format-{}.log", site.node));
        let output = File::create(&log)?;
        let mut command = java::java(site.home, 128);
        command.args(["kafka.tools.StorageTool", "format", "--cluster-id", &id(site)?, "--config"]);
        let status = command
            .arg(properties_file(site))
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output)
            .status()
            .context("could not start java")?;
        ensure!(status.success(), "kafka's storage could not be formatted ({status}): see {}", log.display());
        Ok(())
    }

    fn command(&self, site: &Site<'_>) -> Command {
        let mut command = java::java(site.home, 512);
        command.args(["-Dlog4j2.level=INFO", "kafka.Kafka"]).arg(properties_file(site));
        command
    }

    fn image(&self) -> &'static str {
        Kafka.image()
    }

    fn contained(&self, _: &Site<'_>) -> Contained {
        Contained::default()
    }

    fn stand_in(&self) -> Option<StandIn> {
        None
    }

    fn probe(&self, ports: &[u16]) -> Result<()> {
        Kafka.probe(ports)
    }

    /// All brokers are there, and every partition has all its replicas in sync.
    fn is_whole(&self, ports: &[u16]) -> Result<()> {
        for node in ports.chunks(PORTS) {
            let (brokers, lagging) = Wire::connect(node[0], Duration::from_secs(2))?.cluster()?;
            ensure!(brokers == 3, "{brokers} brokers of 3 have registered");
            ensure!(lagging == 0, "{lagging} partitions have replicas that are not in sync");
        }
        Ok(())
    }
}

/// Of one cluster all nodes have the same.
fn id(site: &Site<'_>) -> Result<String> {
    let file = site.folder.join("cluster-id");
    if !file.exists() {
        fs::write(&file, cluster_id()?)?;
    }
    Ok(fs::read_to_string(file)?)
}

fn data(site: &Site<'_>) -> PathBuf {
    site.folder.join(format!("data-{}", site.node))
}

fn properties_file(site: &Site<'_>) -> PathBuf {
    site.folder.join(format!("server-{}.properties", site.node))
}

fn properties(site: &Site<'_>) -> String {
    let nodes: Vec<&[u16]> = site.ports.chunks(PORTS).collect();
    let own = nodes[site.node as usize - 1];
    let voters: Vec<String> =
        nodes.iter().enumerate().map(|(at, node)| format!("{}@127.0.0.1:{}", at + 1, node[1])).collect();
    format!(
        "process.roles=broker,controller
node.id={node}
controller.quorum.voters={voters}
listeners=PLAINTEXT://127.0.0.1:{clients},CONTROLLER://127.0.0.1:{controller}
advertised.listeners=PLAINTEXT://127.0.0.1:{clients}
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT
controller.listener.names=CONTROLLER
inter.broker.listener.name=PLAINTEXT
log.dirs={data}
num.partitions=1
# What two nodes have is stored: one may be lost.
default.replication.factor=3
min.insync.replicas=2
unclean.leader.election.enable=false
offsets.topic.replication.factor=3
offsets.topic.num.partitions=4
transaction.state.log.replication.factor=3
transaction.state.log.min.isr=2
transaction.state.log.num.partitions=4
transaction.abort.timed.out.transaction.cleanup.interval.ms=1000
share.coordinator.state.topic.replication.factor=3
share.coordinator.state.topic.min.isr=2
share.coordinator.state.topic.num.partitions=4
# How soon a node that is away is missed: 9 s by default.
broker.session.timeout.ms=4000
broker.heartbeat.interval.ms=500
group.initial.rebalance.delay.ms=0
",
        node = site.node,
        voters = voters.join(","),
        clients = own[0],
        controller = own[1],
        data = data(site).display(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_listens_on_its_own_ports_and_votes_with_the_others() {
        let ports = [11, 12, 21, 22, 31, 32];
        let site = Site { home: Path::new("/home"), folder: Path::new("/folder"), ports: &ports, node: 2 };
        let text = properties(&site);
        assert!(text.contains("listeners=PLAINTEXT://127.0.0.1:21,CONTROLLER://127.0.0.1:22\n"), "{text}");
        assert!(text.contains("controller.quorum.voters=1@127.0.0.1:12,2@127.0.0.1:22,3@127.0.0.1:32\n"), "{text}");
        assert_eq!(KafkaCluster.url(&ports), "kafka://127.0.0.1:11,127.0.0.1:21,127.0.0.1:31");
    }
}

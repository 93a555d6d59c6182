//! Three RabbitMQ nodes that are one cluster.
//!
//! Nodes find each other by one port mapper. It is started with the first node, in a session of its own, so that no fault of a
//! node takes it along, and ends when the cluster's data are deleted.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Result, ensure};

use super::super::{Contained, Recipe, Site, StandIn};
use super::{INSIDE, RabbitMq, SERVER, answer_of_management, in_root};

/// `amqp://` with three addresses.
pub(crate) struct RabbitMqCluster;

/// Clients, management, the other nodes, and the port mapper, of which the first node's is the one.
const PORTS: usize = 4;

impl Recipe for RabbitMqCluster {
    fn name(&self) -> &'static str {
        "rabbitmq-cluster"
    }

    fn version(&self) -> &'static str {
        RabbitMq.version()
    }

    fn nodes(&self) -> u32 {
        3
    }

    fn port_names(&self) -> &'static [&'static str] {
        &["clients", "admin", "distribution", "port mapper"]
    }

    fn is_port_of_tests(&self, name: &str) -> bool {
        name.starts_with("port mapper")
    }

    fn url(&self, ports: &[u16]) -> String {
        let addresses: Vec<String> = ports.chunks(PORTS).map(|node| format!("127.0.0.1:{}", node[0])).collect();
        format!("amqp://{}/%2f?admin=http://127.0.0.1:{}", addresses.join(","), ports[1])
    }

    fn obstacle(&self, cache: &Path) -> Option<String> {
        RabbitMq.obstacle(cache)
    }

    fn install(&self, cache: &Path) -> Result<PathBuf> {
        RabbitMq.install(cache)
    }

    fn prepare(&self, site: &Site<'_>) -> Result<()> {
        let (folder, ports) = own(site);
        let node = Site { home: site.home, folder: &folder, ports: &ports, node: 1 };
        fs::create_dir_all(&folder)?;
        RabbitMq.prepare(&node)?;
        let file = folder.join("rabbitmq.conf");
        let text = fs::read_to_string(&file)? + &formation(site);
        fs::write(file, text)?;
        // Who has the same one may come in.
        let cookie = folder.join("home").join(".erlang.cookie");
        if !cookie.exists() {
            fs::write(&cookie, "loopback")?;
            fs::set_permissions(&cookie, fs::Permissions::from_mode(0o400))?;
        }
        Ok(fs::write(folder.join(MAPPER), "")?)
    }

    /// The port mapper watches over the file that says that it is wanted, and over itself: a second one finds the port taken.
    fn command(&self, site: &Site<'_>) -> Command {
        let (folder, ports) = own(site);
        let mapper = format!(
            "epmd -port \"$ERL_EPMD_PORT\" & while [ -e {INSIDE}/{MAPPER} ] && kill -0 $! 2>/dev/null; do sleep 1; done; kill $!"
        );
        let script = match site.node {
            1 => format!("setsid sh -c '{mapper}' & {SERVER}"),
            _ => SERVER.to_owned(),
        };
        let node = Site { home: site.home, folder: &folder, ports: &ports, node: 1 };
        in_root(&node, &script)
    }

    fn image(&self) -> &'static str {
        RabbitMq.image()
    }

    fn contained(&self, _: &Site<'_>) -> Contained {
        Contained::default()
    }

    fn stand_in(&self) -> Option<StandIn> {
        None
    }

    fn probe(&self, ports: &[u16]) -> Result<()> {
        RabbitMq.probe(ports)
    }

    /// Each node sees three, and no quorum queue needs it to have a majority (its documentation, "Health Checks").
    fn is_whole(&self, ports: &[u16]) -> Result<()> {
        for node in ports.chunks(PORTS) {
            let nodes = answer_of_management(node[1], "/api/nodes?columns=running")?;
            let running = nodes.matches("\"running\":true").count();
            ensure!(running == 3, "a node sees {running} of 3");
            let critical = answer_of_management(node[1], "/api/health/checks/node-is-quorum-critical")?;
            ensure!(critical.contains(" 200 "), "a queue would have no majority without that node");
        }
        Ok(())
    }
}

/// In the folder of the first node: as long as it is there, the port mapper is wanted.
const MAPPER: &str = "port-mapper";

/// Folder and ports of its node; the port mapper is the first node's.
fn own(site: &Site<'_>) -> (PathBuf, Vec<u16>) {
    let node = site.ports.chunks(PORTS).nth(site.node as usize - 1).unwrap_or_default();
    let ports = [&node[..PORTS - 1], &site.ports[PORTS - 1..PORTS]].concat();
    (site.folder.join(format!("node-{}", site.node)), ports)
}

/// A node that is without a majority stops serving, as its documentation advises for three nodes ("Clustering and Network
/// Partitions"). One that is frozen is missed after 6 to 10 s instead of 45 to 75 ("Net Tick Time"): until then whatever is declared
/// or bound waits for it, also what is there already.
fn formation(site: &Site<'_>) -> String {
    let nodes = site.ports.chunks(PORTS).enumerate();
    let nodes: String = nodes
        .map(|(at, node)| {
            format!("cluster_formation.classic_config.nodes.{} = anybroker{}@localhost\n", at + 1, node[0])
        })
        .collect();
    format!(
        "cluster_formation.peer_discovery_backend = classic_config\n{nodes}cluster_partition_handling = pause_minority\nnet_ticktime = 8\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_have_their_own_ports_and_one_port_mapper() {
        let ports = [11, 12, 13, 14, 21, 22, 23, 24, 31, 32, 33, 34];
        let site = Site { home: Path::new("/home"), folder: Path::new("/folder"), ports: &ports, node: 3 };
        assert_eq!(own(&site), (PathBuf::from("/folder/node-3"), vec![31, 32, 33, 14]));
        assert!(formation(&site).contains("nodes.2 = anybroker21@localhost\n"));
        let url = RabbitMqCluster.url(&ports);
        assert_eq!(url, "amqp://127.0.0.1:11,127.0.0.1:21,127.0.0.1:31/%2f?admin=http://127.0.0.1:12");
    }
}

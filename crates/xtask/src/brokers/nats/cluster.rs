//! Three NATS servers with JetStream that are one cluster.

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, ensure};

use super::super::{Contained, Recipe, Site, StandIn};
use super::Nats;

/// `nats://` with three addresses, streams with three replicas.
pub(crate) struct NatsCluster;

/// Clients, the other nodes, and HTTP for its state.
const PORTS: usize = 3;

impl Recipe for NatsCluster {
    fn name(&self) -> &'static str {
        "nats-cluster"
    }

    fn version(&self) -> &'static str {
        Nats.version()
    }

    fn nodes(&self) -> u32 {
        3
    }

    fn port_names(&self) -> &'static [&'static str] {
        &["clients", "routes", "monitor"]
    }

    fn url(&self, ports: &[u16]) -> String {
        let addresses: Vec<String> = ports.chunks(PORTS).map(|node| format!("127.0.0.1:{}", node[0])).collect();
        format!("nats://{}?replicas=3", addresses.join(","))
    }

    fn obstacle(&self, cache: &Path) -> Option<String> {
        Nats.obstacle(cache)
    }

    fn install(&self, cache: &Path) -> Result<PathBuf> {
        Nats.install(cache)
    }

    fn prepare(&self, site: &Site<'_>) -> Result<()> {
        Ok(fs::write(configuration_file(site), configuration(site))?)
    }

    fn command(&self, site: &Site<'_>) -> Command {
        let mut command = Command::new(site.home.join("nats-server"));
        command.arg("-c").arg(configuration_file(site));
        command
    }

    fn image(&self) -> &'static str {
        Nats.image()
    }

    fn contained(&self, _: &Site<'_>) -> Contained {
        Contained::default()
    }

    fn stand_in(&self) -> Option<StandIn> {
        None
    }

    fn probe(&self, ports: &[u16]) -> Result<()> {
        Nats.probe(ports)
    }

    /// `/healthz` of each node: it has caught up with all its streams and consumers (its documentation, "Monitoring").
    fn is_whole(&self, ports: &[u16]) -> Result<()> {
        let limit = Duration::from_secs(1);
        for node in ports.chunks(PORTS) {
            let mut stream = TcpStream::connect_timeout(&SocketAddr::from((Ipv4Addr::LOCALHOST, node[2])), limit)?;
            stream.set_read_timeout(Some(limit))?;
            stream.set_write_timeout(Some(limit))?;
            stream.write_all(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
            let mut line = String::new();
            BufReader::new(stream).read_line(&mut line)?;
            ensure!(line.contains(" 200 "), "a node has not caught up: {}", line.trim());
        }
        Ok(())
    }
}

fn configuration_file(site: &Site<'_>) -> PathBuf {
    site.folder.join(format!("nats-{}.conf", site.node))
}

fn configuration(site: &Site<'_>) -> String {
    let nodes: Vec<&[u16]> = site.ports.chunks(PORTS).collect();
    let own = nodes[site.node as usize - 1];
    let routes: Vec<String> = nodes.iter().map(|node| format!("\"nats-route://127.0.0.1:{}\"", node[1])).collect();
    format!(
        "listen: \"127.0.0.1:{clients}\"\n\
         http: \"127.0.0.1:{monitor}\"\n\
         server_name: anybroker-{node}\n\
         jetstream {{ store_dir: {store:?}, max_file_store: 8GB }}\n\
         cluster {{ name: anybroker, listen: \"127.0.0.1:{own_route}\", routes: [ {routes} ] }}\n",
        clients = own[0],
        monitor = own[2],
        node = site.node,
        store = site.folder.join(format!("data-{}", site.node)).display().to_string(),
        own_route = own[1],
        routes = routes.join(", "),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_listens_on_its_own_ports_and_knows_those_of_the_others() {
        let ports = [11, 12, 13, 21, 22, 23, 31, 32, 33];
        let site = Site { home: Path::new("/home"), folder: Path::new("/folder"), ports: &ports, node: 2 };
        let text = configuration(&site);
        assert!(text.contains("listen: \"127.0.0.1:21\"") && text.contains("listen: \"127.0.0.1:22\""), "{text}");
        assert!(
            text.contains("127.0.0.1:12\", \"nats-route://127.0.0.1:22\", \"nats-route://127.0.0.1:32\""),
            "{text}"
        );
        assert_eq!(NatsCluster.url(&ports), "nats://127.0.0.1:11,127.0.0.1:21,127.0.0.1:31?replicas=3");
    }
}

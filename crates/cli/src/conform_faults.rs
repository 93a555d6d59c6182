//! What `anybroker conform` may do to the endpoint's connections and to its server.

use std::collections::BTreeMap;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use anybroker::config::EndpointUrl;
use anybroker::{Config, Error, ErrorKind};
use anybroker_conformance::{Level, Route, ServerControl, routes_of};
use async_trait::async_trait;
use clap::ValueEnum as _;
use tokio::process::Command;
use tokio::time::Instant;

use crate::args::{FaultArgs, FaultsArg, ServerFault};
use crate::exit::Failure;

/// How long a server that was started again may take until it serves clients.
const SERVES: Duration = Duration::from_secs(120);

const NO_CONNECTION: &str = "the URL names no host and port that a proxy could stand in front of: a broker in this process or \
                             in a file has no connection, and an address that the client finds by itself cannot be replaced";

const NO_COMMANDS: &str = "no command on the line disturbs the server: --restart-command, --pause-command, --fill-command, \
                           --lock-out-command, or --nodes with those of nodes";

const NO_NODES: &str = "no --nodes on the line: the server is not known to be a cluster";

const CONNECTIONS_ALONE: &str = "--faults asks for others, which leave connections alone";
pub(crate) const CLIENTS_ALONE: &str = "--faults asks for others, which leave clients alone";

const NO_SERVER: &str = "the URL names no server: a broker in this process or in a file has none that could be killed, frozen, \
                         filled or locked";

pub(crate) struct Faults {
    /// Where proxies can stand, or why none does.
    pub(crate) routes: Result<Vec<Route>, String>,
    /// Whether they were asked for. Otherwise they are put where they can be.
    pub(crate) wants_proxies: bool,
    /// Whether processes of the command's own are killed.
    pub(crate) kills_clients: bool,
    /// The server, or why it is left alone.
    pub(crate) server: Result<Arc<Commands>, String>,
    pub(crate) level: Level,
    /// Why cases are not run that the line excludes by asking for other faults.
    pub(crate) excluded: Vec<String>,
}

impl Faults {
    /// What the command line asks for; a fault that cannot be brought about is refused before anything is run.
    pub(crate) fn of(args: &FaultArgs, level: Option<Level>, config: &Config) -> Result<Self, Failure> {
        let asks = |kind| args.faults.contains(&kind);
        let pair = |begin: &Option<String>, over: &Option<String>| begin.clone().zip(over.clone());
        let commands = Commands {
            kill: args.kill_command.clone(),
            restart: args.restart_command.clone(),
            frozen: pair(&args.pause_command, &args.resume_command),
            full: pair(&args.fill_command, &args.relieve_command),
            locked: pair(&args.lock_out_command, &args.let_in_command),
            nodes: args.nodes,
            kill_node: args.kill_node_command.clone(),
            restart_node: args.restart_node_command.clone(),
            frozen_node: pair(&args.pause_node_command, &args.resume_node_command),
            cannot: args.cannot.iter().cloned().collect(),
            config: config.clone(),
        };
        let has_nodes = commands.restart_node.is_some() || commands.frozen_node.is_some();
        if commands.nodes.is_some() && !has_nodes {
            let text = "--nodes needs --restart-node-command CMD, or --pause-node-command with --resume-node-command: the command \
                        knows no way to the nodes' processes";
            return Err(Failure::Usage(text.into()));
        }
        let has_commands = commands.are_any() || has_nodes;
        let wants_proxies = asks(FaultsArg::Proxy) || !args.proxies.is_empty();
        let wants_process = asks(FaultsArg::Process) || has_commands;
        let wants_clients = asks(FaultsArg::Clients);
        if asks(FaultsArg::None) && (wants_proxies || wants_process || wants_clients) {
            return Err(Failure::Usage(
                "--faults none asks for no faults, and something else on the line for some".into(),
            ));
        }
        if wants_process && !has_commands {
            let text = "--faults process needs --restart-command CMD, which kills the server and starts it again, or \
                        --pause-command with --resume-command (or --fill-command, or --lock-out-command, or --nodes with \
                        commands for nodes): the command knows no way to the server's process";
            return Err(Failure::Usage(text.into()));
        }
        let is_disturbed = wants_proxies || wants_process || wants_clients;
        let least = match is_disturbed || !args.schedule.is_empty() {
            _ if has_nodes => Level::Long,
            true => Level::Reliability,
            false => Level::Conformance,
        };
        let level = level.unwrap_or(least);
        if is_disturbed && level < Level::Reliability {
            return Err(Failure::Usage("faults belong to --level reliability".into()));
        }
        if has_nodes && level < Level::Long {
            return Err(Failure::Usage("faults of nodes belong to --level long".into()));
        }
        let url = config.endpoint_url();
        if wants_process && url.is_none_or(|url| !has_server(url)) {
            return Err(unsupported("the URL names no server that could be restarted".into()));
        }
        let routes = if asks(FaultsArg::None) {
            Err("--faults none".into())
        } else if (wants_process || wants_clients) && !wants_proxies {
            Err(CONNECTIONS_ALONE.into())
        } else if !args.proxies.is_empty() {
            Ok(args.proxies.clone())
        } else {
            url.map(routes_of).and_then(Result::ok).ok_or_else(|| NO_CONNECTION.to_owned())
        };
        if let (true, Err(why)) = (wants_proxies, &routes) {
            return Err(unsupported(why.clone()));
        }
        let mut excluded = Vec::new();
        if is_disturbed {
            excluded.extend([CONNECTIONS_ALONE, CLIENTS_ALONE].map(str::to_owned));
            match has_commands {
                true => excluded.extend(ServerFault::value_variants().iter().map(|fault| commands.missing(*fault))),
                false => excluded.extend([NO_COMMANDS, NO_SERVER].map(str::to_owned)),
            }
        }
        let server = match url {
            _ if has_commands => Ok(Arc::new(commands)),
            _ if asks(FaultsArg::None) => Err("--faults none".to_owned()),
            Some(url) if has_server(url) => Err(NO_COMMANDS.to_owned()),
            _ => Err(NO_SERVER.to_owned()),
        };
        let kills_clients = wants_clients || args.faults.is_empty() && !has_commands;
        Ok(Self { routes, wants_proxies, kills_clients, server, level, excluded })
    }
}

fn unsupported(why: String) -> Failure {
    Failure::Broker(Error::new(ErrorKind::Unsupported, "conform", why))
}

/// The host of a broker in this process is but its name.
fn has_server(url: &str) -> bool {
    EndpointUrl::parse(url).is_ok_and(|url| !url.hosts().is_empty() && url.scheme() != "memory")
}

/// The server's process, in the hands of the user's own commands.
pub(crate) struct Commands {
    kill: Option<String>,
    restart: Option<String>,
    frozen: Option<(String, String)>,
    full: Option<(String, String)>,
    locked: Option<(String, String)>,
    nodes: Option<u32>,
    kill_node: Option<String>,
    restart_node: Option<String>,
    frozen_node: Option<(String, String)>,
    /// Why the others are not there, where the line says so.
    cannot: BTreeMap<ServerFault, String>,
    config: Config,
}

impl Commands {
    fn are_any(&self) -> bool {
        self.restart.is_some() || [&self.frozen, &self.full, &self.locked].into_iter().any(Option::is_some)
    }

    /// Both commands of a fault, or why there are none.
    fn pair<'a>(&self, fault: ServerFault, pair: &'a Option<(String, String)>) -> Result<&'a (String, String), String> {
        pair.as_ref().ok_or_else(|| self.missing(fault))
    }

    fn missing(&self, fault: ServerFault) -> String {
        let cannot = self.cannot.get(&fault).cloned();
        let (option, done) = match fault {
            ServerFault::Restart => ("--restart-command", "be killed and come back"),
            ServerFault::Pause => ("--pause-command", "be frozen"),
            ServerFault::Fill => ("--fill-command", "have no room for new messages"),
            ServerFault::LockOut => ("--lock-out-command", "lock its clients out"),
            ServerFault::Nodes => return cannot.unwrap_or_else(|| NO_NODES.to_owned()),
            ServerFault::KillNode => ("--kill-node-command", "kill one of its nodes"),
            ServerFault::RestartNode => ("--restart-node-command", "restart one of its nodes"),
            ServerFault::PauseNode => ("--pause-node-command", "freeze one of its nodes"),
        };
        let unknown = || format!("no {option} on the line, by which the server could be told to {done}");
        cannot.unwrap_or_else(unknown)
    }
}

#[async_trait]
impl ServerControl for Commands {
    async fn kill(&self) -> Result<(), String> {
        match (&self.kill, &self.restart) {
            (Some(kill), _) => run("--kill-command", kill).await,
            // One command does both; the other half of it begins the server again.
            (None, Some(_)) => Ok(()),
            (None, None) => Err(self.missing(ServerFault::Restart)),
        }
    }

    async fn restart(&self) -> Result<(), String> {
        let line = self.restart.as_ref().ok_or_else(|| self.missing(ServerFault::Restart))?;
        run("--restart-command", line).await?;
        let deadline = Instant::now() + SERVES;
        loop {
            match anybroker::connect_with(self.config.clone()).await {
                Ok(bus) => return bus.close(SERVES).await.map_err(|error| error.to_string()),
                Err(error) if Instant::now() >= deadline => {
                    return Err(format!("{SERVES:?} after --restart-command clients are not served: {error}"));
                }
                Err(_) => tokio::time::sleep(Duration::from_millis(200)).await,
            }
        }
    }

    async fn pause(&self) -> Result<(), String> {
        run("--pause-command", &self.pair(ServerFault::Pause, &self.frozen)?.0).await
    }

    async fn resume(&self) -> Result<(), String> {
        run("--resume-command", &self.pair(ServerFault::Pause, &self.frozen)?.1).await
    }

    async fn fill(&self) -> Result<(), String> {
        run("--fill-command", &self.pair(ServerFault::Fill, &self.full)?.0).await
    }

    async fn relieve(&self) -> Result<(), String> {
        run("--relieve-command", &self.pair(ServerFault::Fill, &self.full)?.1).await
    }

    async fn lock_out(&self) -> Result<(), String> {
        run("--lock-out-command", &self.pair(ServerFault::LockOut, &self.locked)?.0).await
    }

    async fn let_in(&self) -> Result<(), String> {
        run("--let-in-command", &self.pair(ServerFault::LockOut, &self.locked)?.1).await
    }

    fn nodes(&self) -> Result<u32, String> {
        self.nodes.ok_or_else(|| self.missing(ServerFault::Nodes))
    }

    async fn kill_node(&self, node: u32) -> Result<(), String> {
        let line = self.kill_node.as_ref().ok_or_else(|| self.missing(ServerFault::KillNode))?;
        run_on(node, "--kill-node-command", line).await
    }

    async fn restart_node(&self, node: u32) -> Result<(), String> {
        let line = self.restart_node.as_ref().ok_or_else(|| self.missing(ServerFault::RestartNode))?;
        run_on(node, "--restart-node-command", line).await
    }

    async fn pause_node(&self, node: u32) -> Result<(), String> {
        run_on(node, "--pause-node-command", &self.pair(ServerFault::PauseNode, &self.frozen_node)?.0).await
    }

    async fn resume_node(&self, node: u32) -> Result<(), String> {
        run_on(node, "--resume-node-command", &self.pair(ServerFault::PauseNode, &self.frozen_node)?.1).await
    }
}

/// Its standard error is the command's own. Its standard output is nobody's: a server that it leaves running may keep it open.
async fn run(what: &str, line: &str) -> Result<(), String> {
    ended(what, Command::new("sh").args(["-c", line])).await
}

/// The same for that node.
async fn run_on(node: u32, what: &str, line: &str) -> Result<(), String> {
    let told = format!("{what} of node {node}");
    ended(&told, Command::new("sh").args(["-c", line]).env("NODE", node.to_string())).await
}

async fn ended(what: &str, command: &mut Command) -> Result<(), String> {
    command.stdin(Stdio::null()).stdout(Stdio::null()).kill_on_drop(true);
    match command.status().await {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(format!("{what}: {status}")),
        Err(error) => Err(format!("{what}: {error}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn commands(folder: &std::path::Path) -> Commands {
        let noted = |what: &str| format!("echo {what} $NODE >> {}", folder.join("told").display());
        Commands {
            kill: None,
            restart: None,
            frozen: None,
            full: None,
            locked: None,
            nodes: Some(3),
            kill_node: Some(noted("kill")),
            restart_node: Some(noted("restart")),
            frozen_node: Some((noted("pause"), "exit 7".into())),
            cannot: BTreeMap::from([(ServerFault::RestartNode, "why".to_owned())]),
            config: Config::default(),
        }
    }

    #[tokio::test]
    async fn a_command_of_a_node_has_its_number_and_what_fails_names_both() {
        let folder = tempfile::tempdir().expect("a folder");
        let commands = commands(folder.path());
        commands.kill_node(2).await.expect("killed");
        commands.restart_node(2).await.expect("restarted");
        commands.pause_node(3).await.expect("paused");
        let failed = commands.resume_node(3).await.expect_err("it ends with 7");
        assert!(failed.contains("--resume-node-command of node 3"), "{failed}");
        let told = std::fs::read_to_string(folder.path().join("told")).expect("read");
        assert_eq!(told, "kill 2\nrestart 2\npause 3\n");
    }

    #[tokio::test]
    async fn a_command_of_nodes_that_is_missing_is_told_of_and_so_is_why() {
        let folder = tempfile::tempdir().expect("a folder");
        let none = Commands { nodes: None, kill_node: None, restart_node: None, ..commands(folder.path()) };
        assert!(none.nodes().expect_err("none").contains("--nodes"));
        assert!(none.kill_node(1).await.expect_err("none").contains("--kill-node-command"));
        assert_eq!(none.restart_node(1).await.expect_err("none"), "why");
    }
}

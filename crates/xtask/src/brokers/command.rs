//! `cargo xtask brokers …`

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};

use super::instance::{self, How, Instance};
use super::{Change, Condition, Recipe, Server, every_recipe, recipes, stand_ins};
use crate::folders;

/// Start, end and disturb real brokers on this machine
///
/// Downloads go to $ANYBROKER_CACHE (default ~/.cache/anybroker), data, logs and pid files to $ANYBROKER_STATE (default
/// ~/.local/state/anybroker). Everything listens on the loopback interface only.
#[derive(Debug, Args)]
pub(crate) struct Brokers {
    #[command(subcommand)]
    action: Action,
    /// The set of brokers to act on; sets do not touch each other
    #[arg(long, global = true, env = "ANYBROKER_INSTANCE", default_value = instance::DEFAULT)]
    instance: String,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Start brokers, wait until they serve clients, and print their addresses: eval "$(cargo xtask brokers up)"
    Up {
        /// Which ones; all single servers when none is given. Clusters of three nodes: kafka-cluster, nats-cluster, rabbitmq-cluster
        names: Vec<String>,
        /// Where they come from
        #[arg(long, value_enum, default_value = "auto")]
        how: How,
        /// The port for clients, as `kafka=9092`; also $ANYBROKER_KAFKA_PORT and so on. A free one when not given
        #[arg(long = "port", value_name = "NAME=PORT", value_parser = parse_port)]
        ports: Vec<(String, u16)>,
    },
    /// End brokers that `up` started, and delete their data
    Down {
        /// Which ones; all when none is given
        names: Vec<String>,
        /// Keep ports, data and logs for the next `up`
        #[arg(long)]
        keep_data: bool,
        /// In every instance, not only in this one
        #[arg(long)]
        all: bool,
    },
    /// Build images that take the place of the official ones where no image registry can be reached
    StandIns {
        /// Of which ones; all when none is given
        names: Vec<String>,
    },
    /// What runs, in every instance
    Status {
        /// Which ones; all when none is given
        names: Vec<String>,
    },
    /// Crash brokers (SIGKILL); `restart` or `up` brings them back with their data
    Kill {
        /// Which ones
        #[arg(required = true)]
        names: Vec<String>,
        /// Only this node of a cluster, from 1
        #[arg(long, value_name = "N")]
        node: Option<u32>,
    },
    /// Freeze brokers (SIGSTOP): connections stay open and nothing is answered
    Pause {
        /// Which ones
        #[arg(required = true)]
        names: Vec<String>,
        /// Only this node of a cluster, from 1
        #[arg(long, value_name = "N")]
        node: Option<u32>,
    },
    /// Let paused brokers go on
    Resume {
        /// Which ones
        #[arg(required = true)]
        names: Vec<String>,
        /// Only this node of a cluster, from 1
        #[arg(long, value_name = "N")]
        node: Option<u32>,
    },
    /// Take from brokers the room for new messages, as a full disk or a quota does; native ones only
    Fill {
        /// Which ones: those that can be told to
        #[arg(required = true)]
        names: Vec<String>,
    },
    /// Give brokers that room back
    Relieve {
        /// Which ones
        #[arg(required = true)]
        names: Vec<String>,
    },
    /// Take from the clients of brokers what lets them in, also from those that are connected; native ones only
    LockOut {
        /// Which ones: those that can be told to
        #[arg(required = true)]
        names: Vec<String>,
    },
    /// Let the clients of brokers in again
    LetIn {
        /// Which ones
        #[arg(required = true)]
        names: Vec<String>,
    },
    /// End brokers if they run, start them on the same ports with the same data, wait until they are ready
    Restart {
        /// Which ones
        #[arg(required = true)]
        names: Vec<String>,
        /// Only this node of a cluster, from 1
        #[arg(long, value_name = "N")]
        node: Option<u32>,
    },
}

impl Brokers {
    /// Does what was asked for.
    pub(crate) fn run(&self) -> Result<()> {
        let instance = Instance::named(&self.instance)?;
        match &self.action {
            Action::Up { names, how, ports } => up(&instance, names, *how, ports),
            Action::Down { names, keep_data, all } => {
                let instances = if *all { Instance::all()? } else { vec![instance] };
                instances.iter().try_for_each(|instance| down(instance, names, *keep_data))
            }
            Action::StandIns { names } => stand_ins::build(&recipes(names)?, &folders::cache()?),
            Action::Status { names } => status(names),
            Action::Kill { names, node: None } => each(&instance, names, "killed", Server::kill),
            Action::Kill { names, node: Some(node) } => {
                each(&instance, names, &format!("node {node} killed"), |server| server.kill_node(*node))
            }
            Action::Pause { names, node: None } => each(&instance, names, "paused", Server::pause),
            Action::Pause { names, node: Some(node) } => {
                each(&instance, names, &format!("node {node} paused"), |server| server.pause_node(*node))
            }
            Action::Resume { names, node: None } => each(&instance, names, "resumed", Server::resume),
            Action::Resume { names, node: Some(node) } => {
                each(&instance, names, &format!("node {node} resumed"), |server| server.resume_node(*node))
            }
            Action::Fill { names } => each(&instance, names, "has no room", |server| server.change(Change::Fill)),
            Action::Relieve { names } => each(&instance, names, "has room", |server| server.change(Change::Relieve)),
            Action::LockOut { names } => each(&instance, names, "locked", |server| server.change(Change::LockOut)),
            Action::LetIn { names } => each(&instance, names, "open", |server| server.change(Change::LetIn)),
            Action::Restart { names, node: None } => each(&instance, names, "restarted", Server::restart),
            Action::Restart { names, node: Some(node) } => {
                each(&instance, names, &format!("node {node} restarted"), |server| server.restart_node(*node))
            }
        }
    }
}

fn up(instance: &Instance, names: &[String], how: How, ports: &[(String, u16)]) -> Result<()> {
    let recipes = recipes(names)?;
    if let Some((name, _)) = ports.iter().find(|(name, _)| recipes.iter().all(|recipe| recipe.name() != name)) {
        bail!("--port {name}=…: `{name}` is not among the brokers to start");
    }
    let port = |name: &str| match ports.iter().find(|(given, _)| given == name) {
        Some((_, port)) => Ok(Some(*port)),
        None => port_from_environment(name),
    };
    for endpoint in instance.up(&recipes, how, port)? {
        println!("export {}='{}'", endpoint.variable, endpoint.url);
    }
    Ok(())
}

fn down(instance: &Instance, names: &[String], keep_data: bool) -> Result<()> {
    let ended = instance.down(&named_or_every(names)?, keep_data)?;
    let ended = if ended.is_empty() { "nothing ran".to_owned() } else { format!("ended {}", ended.join(", ")) };
    eprintln!("{}: {ended}", instance.name());
    Ok(())
}

/// Those that are named; without a name also clusters.
fn named_or_every(names: &[String]) -> Result<Vec<&'static dyn Recipe>> {
    if names.is_empty() { Ok(every_recipe()) } else { recipes(names) }
}

fn status(names: &[String]) -> Result<()> {
    let recipes = named_or_every(names)?;
    println!("{:<12} {:<16} {:<16} {:>8}  {:<34} {:<34} URL", "INSTANCE", "BROKER", "STATE", "PID", "PORTS", "FROM");
    for instance in Instance::all()? {
        for &recipe in &recipes {
            let server = instance.server(recipe);
            if server.nodes() > 1 && names.is_empty() && server.url()?.is_none() {
                continue;
            }
            let condition = server.condition()?;
            let mut state = instance::describe(condition).to_owned();
            if condition == Condition::Running && !server.is_ready()? {
                state.push_str(", not ready");
            }
            let ports: Vec<_> = server.ports()?.iter().map(|(purpose, port)| format!("{purpose} {port}")).collect();
            println!(
                "{:<12} {:<16} {state:<16} {:>8}  {:<34} {:<34} {}",
                instance.name(),
                server.name(),
                server.pid()?.map_or_else(|| "-".to_owned(), |pid| pid.to_string()),
                if ports.is_empty() { "-".to_owned() } else { ports.join(", ") },
                if ports.is_empty() { "-".to_owned() } else { from(&server)? },
                server.url()?.unwrap_or_else(|| "-".to_owned()),
            );
        }
    }
    Ok(())
}

fn from(server: &Server) -> Result<String> {
    Ok(server.image()?.map_or_else(|| "native".to_owned(), |image| image.told()))
}

fn each(instance: &Instance, names: &[String], verb: &str, act: impl Fn(&Server) -> Result<()>) -> Result<()> {
    for recipe in recipes(names)? {
        act(&instance.server(recipe))?;
        eprintln!("{}: {verb}", recipe.name());
    }
    Ok(())
}

fn port_from_environment(name: &str) -> Result<Option<u16>> {
    let variable = format!("ANYBROKER_{}_PORT", name.to_uppercase());
    match std::env::var(&variable).ok().filter(|value| !value.is_empty()) {
        Some(value) => value.parse().map(Some).with_context(|| format!("{variable}={value} is not a port")),
        None => Ok(None),
    }
}

fn parse_port(text: &str) -> Result<(String, u16)> {
    let (name, port) = text.split_once('=').context("expected NAME=PORT, for example kafka=9092")?;
    Ok((name.to_owned(), port.parse().with_context(|| format!("{port} is not a port"))?))
}

//! Real brokers on this machine, for tests: one file per broker says how it is fetched, configured and asked whether it
//! is ready; everything else (ports, pid files, signals, waiting) is shared.

pub(crate) mod command;
mod container;
mod engine;
mod instance;
mod java;
mod kafka;
mod localstack;
mod nats;
mod ports;
mod process;
mod pulsar;
mod rabbitmq;
mod server;
mod sqs;
mod stand_ins;

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Result, bail};

use container::Contained;
pub(crate) use instance::{Endpoint, How, PrivateInstance, with_settings};
use process::Process;
pub(crate) use server::change::Change;
use server::{Condition, Server};
use stand_ins::StandIn;

/// Every broker that can be started. Adding one: its own file, and one line here.
static RECIPES: &[&dyn Recipe] =
    &[&kafka::Kafka, &localstack::LocalStack, &nats::Nats, &pulsar::Pulsar, &rabbitmq::RabbitMq, &sqs::ElasticMq];

/// Clusters of three nodes. They are started when they are named.
static CLUSTERS: &[&dyn Recipe] =
    &[&kafka::cluster::KafkaCluster, &nats::cluster::NatsCluster, &rabbitmq::cluster::RabbitMqCluster];

/// All of them.
pub(crate) fn every_recipe() -> Vec<&'static dyn Recipe> {
    [RECIPES, CLUSTERS].concat()
}

/// How one broker is fetched, configured, run and probed.
pub(crate) trait Recipe: Sync {
    /// The name in commands, and upper-cased in the names of environment variables.
    fn name(&self) -> &'static str;

    /// Product and version, for people.
    fn version(&self) -> &'static str;

    /// How many nodes it is made of: a cluster's share [`Site::folder`], and each has a process of its own.
    fn nodes(&self) -> u32 {
        1
    }

    /// What a node's ports are for; the first is the one that clients connect to.
    fn port_names(&self) -> &'static [&'static str];

    /// Whether the port of that name is kept for a test to listen on (a proxy to which the server sends its clients), or held by what
    /// goes on without the server, and not the server's own: taken or not, it stays the same.
    fn is_port_of_tests(&self, name: &str) -> bool {
        let _ = name;
        false
    }

    /// Whether what was stored is there when it is started again after a crash.
    fn keeps_data(&self) -> bool {
        true
    }

    /// The URL that a service puts into its configuration. Of a cluster `ports` are those of all nodes.
    fn url(&self, ports: &[u16]) -> String;

    /// Why it cannot be installed on this machine, where that is known beforehand. The tests then say that its share is not
    /// run, instead of failing.
    fn obstacle(&self, cache: &Path) -> Option<String> {
        let _ = cache;
        None
    }

    /// Fetches what is missing below `cache` and answers where it is. Cheap when nothing is missing.
    fn install(&self, cache: &Path) -> Result<PathBuf>;

    /// Writes the configuration for `site.ports`. Called before every start; formats storage when there is none.
    fn prepare(&self, site: &Site<'_>) -> Result<()>;

    /// The server in the foreground.
    fn command(&self, site: &Site<'_>) -> Command;

    /// The official image of the same version. `docker-compose.yml` has it too.
    fn image(&self) -> &'static str;

    /// As [`Recipe::prepare`], for [`Recipe::contained`]: what takes the server's own programs is left to the container.
    fn prepare_contained(&self, site: &Site<'_>) -> Result<()> {
        self.prepare(site)
    }

    /// How the server runs in its image, with the configuration of a native one.
    fn contained(&self, site: &Site<'_>) -> Contained;

    /// What an image consists of that takes the official one's place; none when there is no way to build one.
    fn stand_in(&self) -> Option<StandIn>;

    /// What a running server can be told. A server in a container is told nothing.
    fn changes(&self) -> &'static [Change] {
        &[]
    }

    /// Why that is not among them.
    fn cannot(&self, change: Change) -> Option<&'static str> {
        let _ = change;
        None
    }

    /// Tells it one of [`Recipe::changes`], and returns when it has taken effect. Undone by the opposite one; a restart undoes no more
    /// than the server forgets by itself.
    fn change(&self, site: &Site<'_>, process: &Process, change: Change) -> Result<()> {
        let _ = (site, process);
        bail!("{} cannot be told to {change}", self.name())
    }

    /// Gives clients what only a running server can give them, such as permissions. Called whenever it serves after a start.
    fn grant(&self, site: &Site<'_>) -> Result<()> {
        let _ = site;
        Ok(())
    }

    /// What the suite's clients add to the settings of [`Recipe::url`], so that what lets them in can be taken back.
    fn of_the_suite(&self) -> &'static str {
        ""
    }

    /// `Ok` once a node with these ports serves clients; an error says what is missing still. Returns within about a second.
    fn probe(&self, ports: &[u16]) -> Result<()>;

    /// `Ok` once all nodes of a cluster that serve clients can do without one of them. `ports` are those of all.
    fn is_whole(&self, ports: &[u16]) -> Result<()> {
        let _ = ports;
        Ok(())
    }
}

/// Where one server lives.
pub(crate) struct Site<'a> {
    /// What [`Recipe::install`] answered; the cache, which is not there, for a container.
    pub(crate) home: &'a Path,
    /// This server's own folder: configuration and data.
    pub(crate) folder: &'a Path,
    /// One port for each of [`Recipe::port_names`], node by node.
    pub(crate) ports: &'a [u16],
    /// Which node, from 1.
    pub(crate) node: u32,
}

/// The variable that tells tests where `name` is.
pub(crate) fn url_variable(name: &str) -> String {
    format!("ANYBROKER_TEST_{}_URL", name.to_uppercase().replace('-', "_"))
}

/// The recipes called `names`, or all of single servers when no name is given.
pub(crate) fn recipes(names: &[String]) -> Result<Vec<&'static dyn Recipe>> {
    if names.is_empty() {
        return Ok(RECIPES.to_vec());
    }
    let mut chosen: Vec<&'static dyn Recipe> = Vec::new();
    for name in names {
        match every_recipe().iter().find(|recipe| recipe.name() == name) {
            Some(_) if chosen.iter().any(|recipe| recipe.name() == name) => {}
            Some(recipe) => chosen.push(*recipe),
            None => {
                let known: Vec<_> = every_recipe().iter().map(|recipe| recipe.name()).collect();
                bail!("no broker is called `{name}`; there are: {}", known.join(", "));
            }
        }
    }
    Ok(chosen)
}

/// All recipes that can be started here, and of the others why not.
pub(crate) fn startable(how: How) -> Result<(Vec<&'static dyn Recipe>, Vec<String>)> {
    let cache = crate::folders::cache()?;
    let (mut chosen, mut left_out) = (Vec::new(), Vec::new());
    if how.is_contained() {
        engine::Engine::find()?;
        return Ok((RECIPES.to_vec(), left_out));
    }
    for &recipe in RECIPES {
        let is_given = how != How::Native && std::env::var_os(url_variable(recipe.name())).is_some();
        match recipe.obstacle(&cache).filter(|_| !is_given && how != How::Urls) {
            Some(obstacle) => left_out.push(format!("{}: {obstacle}", recipe.name())),
            None => chosen.push(recipe),
        }
    }
    Ok((chosen, left_out))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_choose_recipes_once_each_and_an_unknown_name_is_refused() {
        let names = |given: &[&str]| {
            let given: Vec<String> = given.iter().map(|&name| name.to_owned()).collect();
            recipes(&given).map(|chosen| chosen.iter().map(|recipe| recipe.name()).collect::<Vec<_>>())
        };
        assert_eq!(names(&[]).unwrap(), ["kafka", "localstack", "nats", "pulsar", "rabbitmq", "sqs"]);
        assert_eq!(names(&["sqs", "sqs"]).unwrap(), ["sqs"]);
        assert!(
            names(&["rabbits"]).unwrap_err().to_string().contains("kafka, localstack, nats, pulsar, rabbitmq, sqs")
        );
    }

    #[test]
    fn every_recipe_has_a_client_port_and_a_url_that_names_it() {
        for recipe in RECIPES {
            let ports: Vec<u16> = (0..recipe.port_names().len()).map(|i| 20_001 + u16::try_from(i).unwrap()).collect();
            let url = recipe.url(&ports);
            assert!(url.contains("://127.0.0.1:20001"), "{}: {url}", recipe.name());
        }
    }

    #[test]
    fn what_a_server_cannot_be_told_it_says_why() {
        for recipe in RECIPES {
            for change in [Change::Fill, Change::Relieve, Change::LockOut, Change::LetIn] {
                let can = recipe.changes().contains(&change);
                assert_eq!(recipe.cannot(change).is_none(), can, "{}: {change}", recipe.name());
            }
        }
    }

    #[test]
    fn the_images_are_of_the_versions_that_run_natively_and_the_compose_file_has_the_same() {
        let compose = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docker-compose.yml");
        let compose = std::fs::read_to_string(compose).unwrap();
        for recipe in RECIPES {
            let (_, tag) = recipe.image().rsplit_once(':').unwrap();
            let version = tag.split('-').next().unwrap();
            assert!(recipe.version().contains(version), "{}: {}", recipe.image(), recipe.version());
            let line = format!("image: ${{ANYBROKER_{}_IMAGE:-{}}}\n", recipe.name().to_uppercase(), recipe.image());
            assert!(compose.contains(&line), "docker-compose.yml does not have: {line}");
            assert!(compose.contains(&format!("profiles: [{}]\n", recipe.name())), "no profile {}", recipe.name());
        }
        assert_eq!(compose.matches("    image: ").count(), RECIPES.len());
    }
}

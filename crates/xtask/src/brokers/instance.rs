//! A named set of servers on this machine. Several live side by side: the developer's own, and one for each running
//! `cargo xtask test`.

use std::fs::{self, File, TryLockError};
use std::net::{TcpStream, ToSocketAddrs as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::ValueEnum;

use super::server::Way;
use super::{Condition, Recipe, Server, every_recipe, recipes, url_variable};
use crate::{folders, interrupt};

/// The instance of commands that name none.
pub(crate) const DEFAULT: &str = "dev";
const PRIVATE_PREFIX: &str = "test-";

/// Where a broker comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum How {
    /// The one that the environment names if it can be reached, otherwise natively
    Auto,
    /// A process on this machine, fetched if need be
    Native,
    /// A container of the official image, by docker or podman
    Containers,
    /// As containers; where the image cannot be pulled, one that `cargo xtask brokers stand-ins` has built
    StandIns,
    /// Only what `ANYBROKER_TEST_…_URL` names; nothing is started
    Urls,
}

impl How {
    /// Whether a container engine is needed.
    pub(crate) fn is_contained(self) -> bool {
        matches!(self, Self::Containers | Self::StandIns)
    }

    fn way(self) -> Way {
        match self {
            Self::Auto => Way::AsBefore,
            Self::Native | Self::Urls => Way::Native,
            Self::Containers => Way::Container { stand_ins: false },
            Self::StandIns => Way::Container { stand_ins: true },
        }
    }
}

/// A broker that tests can use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Endpoint {
    /// The environment variable.
    pub(crate) variable: String,
    /// Its value.
    pub(crate) url: String,
    /// Where the suite connects to: there, showing what lets it in.
    pub(crate) url_of_the_suite: String,
    /// The official image in whose place its image is, when that was built on this machine.
    pub(crate) stands_in_for: Option<String>,
}

/// A named set of servers. See the module's documentation.
pub(crate) struct Instance {
    name: String,
    folder: PathBuf,
    cache: PathBuf,
}

impl Instance {
    /// The instance called `name`; nothing is started or written.
    pub(crate) fn named(name: &str) -> Result<Self> {
        let plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        if name.is_empty() || !name.chars().all(plain) {
            bail!("an instance's name consists of letters, digits, `-` and `_`: not `{name}`");
        }
        let folder = folders::state()?.join("brokers").join(name);
        Ok(Self { name: name.to_owned(), folder, cache: folders::cache()? })
    }

    /// Every instance that has a folder, and the default one.
    pub(crate) fn all() -> Result<Vec<Self>> {
        let mut names = vec![DEFAULT.to_owned()];
        if let Ok(entries) = fs::read_dir(folders::state()?.join("brokers")) {
            for entry in entries {
                let entry = entry?;
                let name = entry.file_name().to_string_lossy().into_owned();
                if entry.file_type()?.is_dir() && name != DEFAULT {
                    names.push(name);
                }
            }
        }
        names.sort();
        names.iter().map(|name| Self::named(name)).collect()
    }

    /// Its name.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// The handle of one of its servers.
    pub(crate) fn server(&self, recipe: &'static dyn Recipe) -> Server {
        Server::new(recipe, &self.cache, self.folder.join(recipe.name()))
    }

    /// Brings `recipes` up and waits until all are ready. `port` answers the client port that is wanted for a broker.
    /// When one fails, those that this call started are ended again.
    pub(crate) fn up(
        &self,
        recipes: &[&'static dyn Recipe],
        how: How,
        port: impl Fn(&str) -> Result<Option<u16>>,
    ) -> Result<Vec<Endpoint>> {
        let _lock = lock()?;
        let mut started = Vec::new();
        let endpoints = self.up_locked(recipes, how, port, &mut started);
        if endpoints.is_err() {
            for server in &started {
                eprintln!("{}: ending it again", server.name());
                server.stop()?;
            }
        }
        endpoints
    }

    fn up_locked(
        &self,
        recipes: &[&'static dyn Recipe],
        how: How,
        port: impl Fn(&str) -> Result<Option<u16>>,
        started: &mut Vec<Server>,
    ) -> Result<Vec<Endpoint>> {
        let mut endpoints = Vec::new();
        let mut waiting = Vec::new();
        for &recipe in recipes {
            let variable = url_variable(recipe.name());
            if let Some(url) = given(&variable, how)? {
                eprintln!("{}: the one that {variable} names", recipe.name());
                let url_of_the_suite = url.clone();
                endpoints.push(Endpoint { variable, url, url_of_the_suite, stands_in_for: None });
                continue;
            }
            let server = self.server(recipe);
            let since = Instant::now();
            let is_new = server.start(port(recipe.name())?, how.way())?;
            if is_new {
                started.push(self.server(recipe));
            }
            let url = server.url()?.context("a started server has a URL")?;
            let stands_in_for = server.image()?.and_then(|image| image.stands_in_for);
            let url_of_the_suite = with_settings(&url, recipe.of_the_suite());
            endpoints.push(Endpoint { variable, url, url_of_the_suite, stands_in_for });
            waiting.push((recipe, server, since, is_new));
        }
        // All start at once and are waited for together.
        for (recipe, server, since, is_new) in waiting {
            server.wait_ready()?;
            let pid = server.pid()?.unwrap_or_default();
            let verb = if is_new { "ready" } else { "runs already" };
            let seconds = since.elapsed().as_secs_f64();
            let what = server.image()?.map_or_else(|| recipe.version().to_owned(), |image| image.told());
            eprintln!("{}: {verb} after {seconds:.1} s ({what}, pid {pid})", recipe.name());
        }
        Ok(endpoints)
    }

    /// Ends `recipes`, deletes their data unless `keep_data`, and answers the names of those that ran.
    pub(crate) fn down(&self, recipes: &[&'static dyn Recipe], keep_data: bool) -> Result<Vec<&'static str>> {
        let _lock = lock()?;
        self.down_unlocked(recipes, keep_data)
    }

    fn down_unlocked(&self, recipes: &[&'static dyn Recipe], keep_data: bool) -> Result<Vec<&'static str>> {
        let mut ended = Vec::new();
        let mut failures = Vec::new();
        for &recipe in recipes {
            let server = self.server(recipe);
            // One that cannot be ended does not keep the others up.
            match server.stop().and_then(|ran| if keep_data { Ok(ran) } else { server.remove().map(|()| ran) }) {
                Ok(true) => ended.push(recipe.name()),
                Ok(false) => {}
                Err(error) => failures.push(format!("{}: {error:#}", recipe.name())),
            }
        }
        // Only when nothing is left in it.
        let _ = fs::remove_dir(&self.folder);
        if failures.is_empty() { Ok(ended) } else { bail!("could not be ended: {}", failures.join("; ")) }
    }
}

/// An instance of its own for one process; ended when dropped. What a killed process left behind is ended by the next
/// one to be made.
pub(crate) struct PrivateInstance {
    instance: Instance,
    recipes: Vec<&'static dyn Recipe>,
    owner: PathBuf,
    /// Locked as long as this process lives.
    _alive: File,
}

impl PrivateInstance {
    /// Ends orphans, then makes an instance of which nothing runs yet.
    pub(crate) fn new() -> Result<Self> {
        let brokers = folders::state()?.join("brokers");
        fs::create_dir_all(&brokers)?;
        end_orphans(&brokers)?;
        let instance = Instance::named(&format!("{PRIVATE_PREFIX}{}", std::process::id()))?;
        let owner = brokers.join(format!("{}.owner", instance.name));
        let alive = File::create(&owner)?;
        alive.lock()?;
        Ok(Self { instance, recipes: Vec::new(), owner, _alive: alive })
    }

    /// Its name, for `--instance`.
    pub(crate) fn name(&self) -> &str {
        self.instance.name()
    }

    /// See [`Instance::up`].
    pub(crate) fn up(&mut self, recipes: &[&'static dyn Recipe], how: How) -> Result<Vec<Endpoint>> {
        self.recipes = recipes.to_vec();
        self.instance.up(recipes, how, |_| Ok(None))
    }

    /// As [`up`](Self::up), for one broker by its name.
    pub(crate) fn up_one(&mut self, broker: &str, how: How) -> Result<Endpoint> {
        let mut endpoints = self.up(&recipes(&[broker.to_owned()])?, how)?;
        endpoints.pop().context("a server that was started has an address")
    }

    /// The server of a broker, when it is this instance's own and runs.
    pub(crate) fn server(&self, name: &str) -> Result<Option<Server>> {
        let recipe = self.recipes.iter().find(|recipe| recipe.name() == name);
        let server = recipe.map(|recipe| self.instance.server(*recipe));
        match server {
            Some(server) if server.pid()?.is_some() => Ok(Some(server)),
            _ => Ok(None),
        }
    }

    /// Ends everything in it. Does not ask for the machine-wide lock: nobody else knows these servers.
    pub(crate) fn down(&mut self) -> Result<Vec<&'static str>> {
        let ended = self.instance.down_unlocked(&self.recipes, false)?;
        self.recipes.clear();
        Ok(ended)
    }
}

impl Drop for PrivateInstance {
    fn drop(&mut self) {
        if let Err(error) = self.down() {
            eprintln!("{error:#}");
        }
        let _ = fs::remove_file(&self.owner);
    }
}

fn end_orphans(brokers: &Path) -> Result<()> {
    for instance in Instance::all()?.iter().filter(|instance| instance.name.starts_with(PRIVATE_PREFIX)) {
        let owner = brokers.join(format!("{}.owner", instance.name));
        let is_orphan = match File::options().write(true).create(true).truncate(false).open(&owner)?.try_lock() {
            Ok(()) => true,
            Err(TryLockError::WouldBlock) => false,
            Err(TryLockError::Error(error)) => return Err(error.into()),
        };
        if is_orphan {
            let ended = instance.down(&every_recipe(), false)?;
            eprintln!("ended {} of an aborted test run ({})", ended.join(", "), instance.name);
            fs::remove_file(&owner)?;
        }
    }
    Ok(())
}

/// One process at a time chooses ports and starts servers.
fn lock() -> Result<File> {
    let folder = folders::state()?;
    fs::create_dir_all(&folder)?;
    let file = File::create(folder.join("lock"))?;
    let mut told = false;
    interrupt::poll(Duration::from_secs(15 * 60), || match file.try_lock() {
        Ok(()) => Ok(Some(())),
        Err(TryLockError::WouldBlock) => {
            if !told {
                eprintln!("waiting for another `cargo xtask` that starts or ends brokers");
                told = true;
            }
            Ok(None)
        }
        Err(TryLockError::Error(error)) => Err(error.into()),
    })?
    .context("another `cargo xtask` has been starting or ending brokers for 15 minutes")?;
    Ok(file)
}

/// A URL with settings more.
pub(crate) fn with_settings(url: &str, settings: &str) -> String {
    match settings {
        "" => url.to_owned(),
        _ => format!("{url}{}{settings}", if url.contains('?') { '&' } else { '?' }),
    }
}

/// The URL that the environment names for a broker, as far as `how` wants it.
fn given(variable: &str, how: How) -> Result<Option<String>> {
    let url = std::env::var(variable).ok().filter(|url| !url.is_empty());
    match how {
        How::Native | How::Containers | How::StandIns => Ok(None),
        How::Urls => url.map(Some).with_context(|| format!("{variable} is not set, and nothing may be started")),
        // Often left over in a shell from brokers that were ended since.
        How::Auto => Ok(url.filter(|url| may_be_reached(url))),
    }
}

/// False only when the URL names host and port and nothing listens there.
fn may_be_reached(url: &str) -> bool {
    let Some(address) = address(url) else {
        return true;
    };
    let Ok(mut addresses) = address.to_socket_addrs() else {
        return false;
    };
    addresses.any(|address| TcpStream::connect_timeout(&address, Duration::from_secs(2)).is_ok())
}

/// `host:port` of the first server that `url` names.
fn address(url: &str) -> Option<&str> {
    let rest = url.split_once("://")?.1;
    let authority = rest.split([',', '/', '?', '#']).next()?;
    let address = authority.rsplit('@').next()?;
    let (_, port) = address.rsplit_once(':')?;
    port.parse::<u16>().is_ok().then_some(address)
}

/// Whether a condition counts as up, for people.
pub(crate) fn describe(condition: Condition) -> &'static str {
    match condition {
        Condition::Running => "running",
        Condition::Paused => "paused",
        Condition::Gone => "stopped",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_address_of_a_url_is_found() {
        assert_eq!(address("kafka://127.0.0.1:9092"), Some("127.0.0.1:9092"));
        assert_eq!(address("kafka://a:1,b:2/topic?x=y"), Some("a:1"));
        assert_eq!(address("amqp://user:secret@host:5672/vhost"), Some("host:5672"));
        assert_eq!(address("sqs://?region=eu-west-1"), None);
        assert_eq!(address("sqs://host"), None);
    }

    #[test]
    fn a_url_where_nothing_listens_is_not_taken_for_a_broker() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("kafka://{}", listener.local_addr().unwrap());
        assert!(may_be_reached(&url));
        // Nothing listens at the near end of a connection, and nobody else gets its port while it is open. A port of which the
        // listener was closed would not do: a child that another test is just starting may hold it open still.
        let connection = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        assert!(!may_be_reached(&format!("kafka://{}", connection.local_addr().unwrap())));
        assert!(may_be_reached("sqs://?region=eu-west-1"));
    }

    #[test]
    fn an_instance_name_cannot_leave_its_folder() {
        assert!(Instance::named("../x").is_err());
        assert!(Instance::named("").is_err());
        assert!(Instance::named("test-1").is_ok());
    }
}

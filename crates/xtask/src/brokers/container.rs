//! A server that runs in a container: which engine it is with, what it is called, and what can be done to it.
//!
//! It shares the network of this machine, so that ports, addresses that servers advertise and the places for proxies are those
//! of a native process, and its folder has the same path inside as outside. Data live in that folder and not in the container,
//! which is made anew at each start.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use rustix::process::{getegid, geteuid};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::engine::{Engine, qualified};
use super::process::Condition;
use super::{Recipe, stand_ins};

/// The folder that a container works for: what tells ours from others, also from those of another user.
const FOLDER: &str = "anybroker.folder";
const INSTANCE: &str = "anybroker.instance";
const BROKER: &str = "anybroker.broker";

/// How a recipe's server runs in its image.
#[derive(Debug, Default)]
pub(crate) struct Contained {
    /// In the place of the image's own.
    pub(crate) entrypoint: Option<String>,
    pub(crate) arguments: Vec<String>,
    pub(crate) environment: Vec<(&'static str, String)>,
    /// Places outside that are seen at another place inside. The server's folder is there anyway.
    pub(crate) mounts: Vec<(PathBuf, &'static str)>,
}

/// What a container is made from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Image {
    pub(crate) name: String,
    /// The official image in whose place it is, when it was built on this machine.
    pub(crate) stands_in_for: Option<String>,
}

impl Image {
    /// The image of `recipe`: pulled when it is not there; a stand-in only where `stand_ins` allows it and nothing can be pulled.
    pub(crate) fn of(recipe: &dyn Recipe, engine: &Engine, stand_ins: bool) -> Result<Self> {
        let variable = format!("ANYBROKER_{}_IMAGE", recipe.name().to_uppercase());
        let given = std::env::var(&variable).ok().filter(|image| !image.is_empty());
        let name = qualified(given.as_deref().unwrap_or(recipe.image()));
        if let Some(labels) = engine.labels_of_image(&name)? {
            return Ok(Self::labelled(name, &labels));
        }
        eprintln!("{}: pulling {name}", recipe.name());
        let Err(refused) = engine.run(["pull", "--quiet", &name]) else {
            let labels =
                engine.labels_of_image(&name)?.with_context(|| format!("{name} was pulled and is not there"))?;
            return Ok(Self::labelled(name, &labels));
        };
        if !stand_ins {
            let hint = "where no registry can be reached: --how stand-ins";
            return Err(refused.context(format!("{name} could not be pulled; {variable} names another image; {hint}")));
        }
        let local = stand_ins::name_of(recipe);
        let labels = engine.labels_of_image(&local)?.with_context(|| {
            format!(
                "{name} could not be pulled, and there is no {local}: cargo xtask brokers stand-ins {}",
                recipe.name()
            )
        })?;
        eprintln!("{}: {name} could not be pulled, {local} stands in for it", recipe.name());
        Ok(Self::labelled(local, &labels))
    }

    fn labelled(name: String, labels: &Value) -> Self {
        let stands_in_for = labels.get(stand_ins::LABEL).and_then(Value::as_str).map(str::to_owned);
        Self { name, stands_in_for }
    }

    /// For people.
    pub(crate) fn told(&self) -> String {
        match &self.stands_in_for {
            Some(official) => format!("stand-in for {official}"),
            None => self.name.clone(),
        }
    }
}

/// A container, as it is written down before it is made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Container {
    pub(crate) engine: Engine,
    pub(crate) image: Image,
    pub(crate) name: String,
    pub(crate) folder: PathBuf,
}

impl Container {
    /// The one for the server of `broker` whose folder is that of an instance and a broker. Nothing is started.
    pub(crate) fn new(engine: Engine, image: Image, broker: &str, folder: &Path) -> Self {
        let name = format!("anybroker-{}-{broker}", instance_of(folder));
        Self { engine, image, name, folder: folder.to_owned() }
    }

    /// Makes and starts it. The last container of the same server is removed before; another one's is an error.
    pub(crate) fn start(&self, broker: &str, contained: &Contained) -> Result<()> {
        self.remove()?;
        let user = if self.engine.program().ends_with("podman") {
            // Podman without root maps this user to root inside.
            "0:0".to_owned()
        } else {
            format!("{}:{}", geteuid().as_raw(), getegid().as_raw())
        };
        self.engine.run(self.run_arguments(broker, &user, contained)).map(drop)
    }

    fn run_arguments(&self, broker: &str, user: &str, contained: &Contained) -> Vec<String> {
        let folder = self.folder.display();
        let mut arguments: Vec<String> =
            ["run", "--detach", "--network", "host", "--name", &self.name, "--user", user].map(str::to_owned).to_vec();
        let mut option = |name: &str, value: String| arguments.extend([name.to_owned(), value]);
        option("--label", format!("{INSTANCE}={}", instance_of(&self.folder)));
        option("--label", format!("{BROKER}={broker}"));
        option("--label", format!("{FOLDER}={folder}"));
        // Its folder is this user's own and gets no label of SELinux.
        option("--security-opt", "label=disable".to_owned());
        option("--volume", format!("{folder}:{folder}"));
        for (outside, inside) in &contained.mounts {
            option("--volume", format!("{}:{inside}", outside.display()));
        }
        for (name, value) in &contained.environment {
            option("--env", format!("{name}={value}"));
        }
        if let Some(entrypoint) = &contained.entrypoint {
            option("--entrypoint", entrypoint.clone());
        }
        arguments.push(self.image.name.clone());
        arguments.extend(contained.arguments.iter().cloned());
        arguments
    }

    /// What the engine says of it.
    pub(crate) fn condition(&self) -> Result<Condition> {
        Ok(self.seen()?.map_or(Condition::Gone, |(condition, _)| condition))
    }

    /// Its first process, as this machine sees it, when it is not gone.
    pub(crate) fn pid(&self) -> Result<Option<i32>> {
        Ok(self.seen()?.filter(|(condition, _)| *condition != Condition::Gone).map(|(_, pid)| pid))
    }

    fn seen(&self) -> Result<Option<(Condition, i32)>> {
        let Some(seen) = self.engine.state_of(&self.name)?.filter(|seen| self.is_ours(seen)) else { return Ok(None) };
        Ok(Some(condition_of(&seen["state"])))
    }

    fn is_ours(&self, seen: &Value) -> bool {
        seen["labels"][FOLDER].as_str() == self.folder.to_str()
    }

    /// SIGKILL to everything in it. It may be there a moment longer.
    pub(crate) fn kill(&self) -> Result<()> {
        self.tell(&["kill", "--signal", "KILL"])
    }

    /// SIGTERM, and SIGKILL when that has not ended it after `seconds`.
    pub(crate) fn stop(&self, seconds: u64) -> Result<()> {
        if self.condition()? == Condition::Paused {
            self.resume()?;
        }
        self.tell(&["stop", "--time", &seconds.to_string()])
    }

    /// Freezes everything in it: sockets stay open and nothing is answered.
    pub(crate) fn pause(&self) -> Result<()> {
        self.tell(&["pause"])
    }

    /// After [`Container::pause`].
    pub(crate) fn resume(&self) -> Result<()> {
        self.tell(&["unpause"])
    }

    /// Removes it, whatever it does, and keeps what it wrote in the server's log.
    pub(crate) fn remove(&self) -> Result<()> {
        let Some(seen) = self.engine.state_of(&self.name)? else { return Ok(()) };
        ensure!(self.is_ours(&seen), "the container {} belongs to somebody else: {}", self.name, seen["labels"]);
        if self.folder.is_dir() {
            let mut log = fs::File::options().create(true).append(true).open(self.folder.join("server.log"))?;
            log.write_all(&self.engine.log(&self.name, "all")?)?;
        }
        self.tell(&["rm", "--force", "--volumes"])
    }

    /// Its last lines.
    pub(crate) fn end_of_log(&self) -> Vec<u8> {
        self.engine.log(&self.name, "20").unwrap_or_default()
    }

    fn tell(&self, arguments: &[&str]) -> Result<()> {
        self.engine.run(arguments.iter().copied().chain([self.name.as_str()])).map(drop)
    }
}

/// The folder of a server is `…/<instance>/<broker>`.
fn instance_of(folder: &Path) -> String {
    folder.parent().and_then(Path::file_name).map_or_else(String::new, |name| name.to_string_lossy().into_owned())
}

/// Both engines say `running`, `paused`, `created` and `exited`, and some more for what is ending.
fn condition_of(state: &Value) -> (Condition, i32) {
    let condition = match state["Status"].as_str() {
        Some("paused") => Condition::Paused,
        Some("running" | "stopping" | "restarting") => Condition::Running,
        _ => Condition::Gone,
    };
    (condition, state["Pid"].as_i64().and_then(|pid| i32::try_from(pid).ok()).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn container() -> Container {
        let engine = serde_json::from_value(json!("podman")).unwrap();
        let image = Image { name: "docker.io/x/y:1".to_owned(), stands_in_for: None };
        Container::new(engine, image, "kafka", Path::new("/state/brokers/test-7/kafka"))
    }

    #[test]
    fn a_container_is_labelled_sees_its_folder_at_the_same_path_and_shares_the_network() {
        let contained = Contained {
            entrypoint: Some("bash".to_owned()),
            arguments: vec!["-c".to_owned(), "exec it".to_owned()],
            environment: vec![("HEAP", "1 2".to_owned())],
            mounts: vec![(PathBuf::from("/a/b"), "/etc/b")],
        };
        let arguments = container().run_arguments("kafka", "0:0", &contained);
        let line = arguments.join("|");
        for wanted in [
            "--name|anybroker-test-7-kafka|",
            "--network|host|",
            "--label|anybroker.instance=test-7|",
            "--label|anybroker.broker=kafka|",
            "--label|anybroker.folder=/state/brokers/test-7/kafka|",
            "--volume|/state/brokers/test-7/kafka:/state/brokers/test-7/kafka|",
            "--volume|/a/b:/etc/b|",
            "--env|HEAP=1 2|",
        ] {
            assert!(line.contains(wanted), "{wanted} in {line}");
        }
        assert!(line.ends_with("--entrypoint|bash|docker.io/x/y:1|-c|exec it"), "{line}");
    }

    #[test]
    fn what_an_engine_calls_running_and_frozen_counts_as_such_and_all_else_as_gone() {
        let seen = |status: &str, pid: i32| condition_of(&json!({"Status": status, "Pid": pid}));
        assert_eq!(seen("running", 7), (Condition::Running, 7));
        assert_eq!(seen("paused", 7), (Condition::Paused, 7));
        for status in ["created", "exited", "dead", "removing"] {
            assert_eq!(seen(status, 0), (Condition::Gone, 0));
        }
    }

    #[test]
    fn a_container_of_another_folder_is_not_ours() {
        assert!(container().is_ours(&json!({"labels": {"anybroker.folder": "/state/brokers/test-7/kafka"}})));
        assert!(!container().is_ours(&json!({"labels": {"anybroker.folder": "/elsewhere/test-7/kafka"}})));
        assert!(!container().is_ours(&json!({"labels": null})));
    }

    #[test]
    fn a_stand_in_is_known_by_its_label_and_told_apart() {
        let stand_in = Image::labelled("x".to_owned(), &json!({"anybroker.stand-in": "apache/kafka:4.3.1"}));
        assert_eq!(stand_in.told(), "stand-in for apache/kafka:4.3.1");
        assert_eq!(Image::labelled("x".to_owned(), &Value::Null).told(), "x");
    }
}

//! One server of one instance: its folder, its pid file, and what can be done to it.

pub(crate) mod change;
mod node;

use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::Signal;
use serde::{Deserialize, Serialize};

use super::container::{Container, Image};
use super::engine::Engine;
pub(crate) use super::process::Condition;
use super::process::Process;
use super::{Recipe, Site, ports};
use crate::{folders, interrupt};

/// A busy machine may need a multiple of the few seconds that a quiet one takes.
const READY_WITHIN: Duration = Duration::from_secs(120);
/// How long a server may take to end by itself before it is killed.
const STOPPED_WITHIN: Duration = Duration::from_secs(20);
const KILLED_WITHIN: Duration = Duration::from_secs(10);
/// How long the sockets of a killed server may stay.
const PORT_FREED_WITHIN: Duration = Duration::from_secs(if cfg!(test) { 1 } else { 30 });

/// Where a server is remembered, in its folder.
const RECORD: &str = "server.json";

/// A handle to a broker's server, whether it runs or not. Ports and data stay the same from start to start until
/// [`Server::remove`].
pub(crate) struct Server {
    recipe: &'static dyn Recipe,
    cache: PathBuf,
    folder: PathBuf,
}

/// What the folder's [`RECORD`] holds.
#[derive(Serialize, Deserialize)]
struct Record {
    ports: Vec<u16>,
    /// The first node's.
    process: Option<Process>,
    /// Those of a cluster's other nodes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    others: Vec<Process>,
    /// Written before it is made, so that none is ever lost. Stays when it is gone: the data are its.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    container: Option<Container>,
}

impl Record {
    fn processes(&self) -> Vec<Process> {
        self.process.iter().chain(&self.others).cloned().collect()
    }
}

/// In what a server is started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    /// As the last time; natively the first time.
    AsBefore,
    Native,
    Container {
        /// Whether an image may be taken that was built here, when the official one cannot be had.
        stand_ins: bool,
    },
}

/// What can be disturbed.
enum Body {
    /// One for each node.
    Processes(Vec<Process>),
    Container(Container),
}

/// The ports of all servers of this machine, those that are down for a moment too: whoever took one of theirs would keep them
/// from coming back, or would be taken for them.
fn others() -> Result<Vec<u16>> {
    let mut ports = Vec::new();
    for instance in entries(&folders::state()?.join("brokers"))? {
        for folder in entries(&instance)? {
            // It may be deleted meanwhile, and a record that cannot be read is not for us to mend.
            let record = fs::read(folder.join(RECORD)).ok();
            ports.extend(
                record.and_then(|text| serde_json::from_slice::<Record>(&text).ok()).map(|record| record.ports),
            );
        }
    }
    Ok(ports.concat())
}

/// What is in a folder; nothing where it is none.
fn entries(folder: &Path) -> Result<Vec<PathBuf>> {
    match fs::read_dir(folder) {
        Ok(entries) => entries.map(|entry| Ok(entry?.path())).collect(),
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => Ok(Vec::new()),
        Err(error) => Err(error.into()),
    }
}

impl Server {
    /// The server of `recipe` that lives in `folder`. Nothing is started or written.
    pub(crate) fn new(recipe: &'static dyn Recipe, cache: &Path, folder: PathBuf) -> Self {
        Self { recipe, cache: cache.to_owned(), folder }
    }

    /// The broker's name.
    pub(crate) fn name(&self) -> &'static str {
        self.recipe.name()
    }

    /// Whether what was stored is there after a crash.
    pub(crate) fn keeps_data(&self) -> bool {
        self.recipe.keeps_data()
    }

    /// What clients connect to, once the server was started for the first time.
    pub(crate) fn url(&self) -> Result<Option<String>> {
        Ok(self.record()?.map(|record| self.recipe.url(&record.ports)))
    }

    /// Its ports by purpose; empty before the first start.
    pub(crate) fn ports(&self) -> Result<BTreeMap<String, u16>> {
        let ports = self.record()?.map(|record| record.ports).unwrap_or_default();
        Ok(self.purposes().into_iter().zip(ports).collect())
    }

    /// Whether its process runs, is paused or is gone.
    pub(crate) fn condition(&self) -> Result<Condition> {
        self.body()?.map_or(Ok(Condition::Gone), |body| body.condition())
    }

    /// Its pid, when it is not gone.
    pub(crate) fn pid(&self) -> Result<Option<i32>> {
        self.body()?.map_or(Ok(None), |body| body.pid())
    }

    /// The image of its container; none for a process.
    pub(crate) fn image(&self) -> Result<Option<Image>> {
        Ok(self.record()?.and_then(|record| record.container).map(|container| container.image))
    }

    /// Starts the server unless it runs; a paused one is resumed. Does not wait: see [`Server::wait_ready`].
    ///
    /// `port` is the one for clients; without it the port of the last start is taken again, or a free one is chosen.
    /// Answers whether a process was started.
    pub(crate) fn start(&self, port: Option<u16>, way: Way) -> Result<bool> {
        match self.condition()? {
            // Of a cluster some nodes may be gone.
            Condition::Running if self.body()?.is_some_and(|body| !body.is_whole(self.recipe.nodes())) => {
                return self.launch_processes(None).map(|()| true);
            }
            Condition::Running => {}
            Condition::Paused => self.resume()?,
            Condition::Gone => return self.launch(port, way).map(|()| true),
        }
        let is_contained = self.image()?.is_some();
        match way {
            Way::Native if is_contained => bail!("{} runs in a container: `down` first", self.name()),
            Way::Container { .. } if !is_contained => bail!("{} runs natively: `down` first", self.name()),
            _ => {}
        }
        let runs_on = self.record()?.and_then(|record| record.ports.first().copied());
        if let (Some(wanted), Some(port)) = (port, runs_on) {
            ensure!(wanted == port, "{} runs on port {port} already, not on {wanted}: `down` first", self.name());
        }
        Ok(false)
    }

    fn launch(&self, port: Option<u16>, way: Way) -> Result<()> {
        let last = self.record()?.and_then(|record| record.container);
        match (way, last) {
            (Way::AsBefore, Some(last)) => self.launch_container(port, &last),
            (Way::Container { .. }, None) if self.recipe.nodes() > 1 => {
                bail!("{} is a cluster, and runs natively only", self.name())
            }
            (Way::Container { stand_ins }, None) => {
                ensure!(!self.folder.exists(), "{} has data of a native server: `down` first", self.name());
                let engine = Engine::find()?;
                let image = Image::of(self.recipe, &engine, stand_ins)?;
                self.launch_container(port, &Container::new(engine, image, self.name(), &self.folder))
            }
            (Way::Container { stand_ins }, Some(last)) => {
                let image = Image::of(self.recipe, &last.engine, stand_ins)?;
                self.launch_container(port, &Container { image, ..last })
            }
            (Way::Native, Some(_)) => bail!("{} has data of a container: `down` first", self.name()),
            (Way::AsBefore | Way::Native, None) => self.launch_processes(port),
        }
    }

    fn launch_container(&self, port: Option<u16>, container: &Container) -> Result<()> {
        interrupt::check()?;
        fs::create_dir_all(&self.folder)?;
        let last = self.record()?.map(|record| record.ports).unwrap_or_default();
        let ports = self.choose_ports(port, &last)?;
        let record = Record { ports, process: None, others: Vec::new(), container: Some(container.clone()) };
        self.write(&record)?;
        let site = Site { home: &self.cache, folder: &self.folder, ports: &record.ports, node: 1 };
        self.recipe.prepare_contained(&site).with_context(|| format!("{} could not be configured", self.name()))?;
        let contained = self.recipe.contained(&site);
        container.start(self.name(), &contained)
    }

    /// Starts the nodes that do not run.
    fn launch_processes(&self, port: Option<u16>) -> Result<()> {
        let home = self.recipe.install(&self.cache)?;
        interrupt::check()?;
        fs::create_dir_all(&self.folder)?;
        let mut record = match self.record()? {
            Some(record) if record.processes().iter().any(|process| process.condition() != Condition::Gone) => record,
            last => {
                let last = last.map(|record| record.ports).unwrap_or_default();
                Record { ports: self.choose_ports(port, &last)?, process: None, others: Vec::new(), container: None }
            }
        };
        self.write(&record)?;
        for node in 1..=self.recipe.nodes() {
            let known = record.processes().get(node as usize - 1).cloned();
            if known.is_none_or(|process| process.condition() == Condition::Gone) {
                self.launch_node(&home, node, &mut record)?;
            }
        }
        Ok(())
    }

    fn launch_node(&self, home: &Path, node: u32, record: &mut Record) -> Result<()> {
        let site = Site { home, folder: &self.folder, ports: &record.ports, node };
        self.recipe.prepare(&site).with_context(|| format!("{} could not be configured", self.name()))?;
        let process = Process::spawn(&mut self.recipe.command(&site), &self.log(node))?;
        match (node as usize).checked_sub(2) {
            None => record.process = Some(process.clone()),
            Some(at) if at < record.others.len() => record.others[at] = process.clone(),
            Some(_) => record.others.push(process.clone()),
        }
        let written = self.write(record);
        if written.is_err() {
            // Nobody would ever find it again.
            process.signal(Signal::KILL)?;
        }
        written
    }

    /// What each of its ports is for: of a cluster, with the number of the node.
    fn purposes(&self) -> Vec<String> {
        let names = self.recipe.port_names();
        match self.recipe.nodes() {
            1 => names.iter().map(|&name| name.to_owned()).collect(),
            nodes => {
                let of_node = |node: u32| names.iter().map(move |name| format!("{name} {node}"));
                (1..=nodes).flat_map(of_node).collect()
            }
        }
    }

    /// A server that was there before comes back on its ports or not at all: on others it is lost to its clients.
    fn choose_ports(&self, first: Option<u16>, last: &[u16]) -> Result<Vec<u16>> {
        let mut ports = Vec::new();
        let mut taken = others()?;
        for (index, purpose) in self.purposes().iter().enumerate() {
            let port = match (first, last.get(index)) {
                (Some(wanted), _) if index == 0 => {
                    ensure!(ports::is_free(wanted), "port {wanted} ({purpose}) is taken by another process");
                    wanted
                }
                (_, Some(&port)) => {
                    let is_ours = self.recipe.is_port_of_tests(purpose) || ports::is_free_soon(port, PORT_FREED_WITHIN);
                    ensure!(
                        is_ours,
                        "port {port} ({purpose}), where {} was, is taken by another process: end that one, or `down` and `up`",
                        self.name()
                    );
                    port
                }
                _ => ports::choose(&taken)?,
            };
            ports.push(port);
            taken.push(port);
        }
        Ok(ports)
    }

    /// Whether clients are served right now.
    pub(crate) fn is_ready(&self) -> Result<bool> {
        Ok(self.record()?.is_some_and(|record| self.probe(&record.ports).is_ok()))
    }

    /// `Ok` once every node serves clients, and a cluster is whole.
    fn probe(&self, ports: &[u16]) -> Result<()> {
        let names = self.recipe.port_names().len();
        ports.chunks(names).try_for_each(|ports| self.recipe.probe(ports))?;
        self.recipe.is_whole(ports)
    }

    /// Waits until clients are served. Fails at once when the process ends, and after two minutes otherwise.
    pub(crate) fn wait_ready(&self) -> Result<()> {
        let record = self.record()?.with_context(|| format!("{} was never started", self.name()))?;
        self.wait(|| self.probe(&record.ports), || self.condition(), 1, READY_WITHIN)?;
        let site = Site { home: &self.cache, folder: &self.folder, ports: &record.ports, node: 1 };
        self.recipe.grant(&site).with_context(|| format!("{} could not be opened to its clients", self.name()))
    }

    fn wait(
        &self,
        probe: impl Fn() -> Result<()>,
        condition: impl Fn() -> Result<Condition>,
        node: u32,
        limit: Duration,
    ) -> Result<()> {
        let mut last = String::new();
        let ready = interrupt::poll(limit, || {
            match probe() {
                // Asked after the probe: an answer on the port while our process is gone comes from a stranger.
                Ok(()) if condition()? == Condition::Running => return Ok(Some(())),
                Ok(()) => {}
                Err(error) => last = format!("{error:#}"),
            }
            if condition()? == Condition::Gone {
                bail!("{} ended while it was starting{}", self.name(), self.end_of_log(node));
            }
            Ok(None)
        })?;
        if ready.is_none() {
            bail!("{} was not ready within {limit:?}: {last}{}", self.name(), self.end_of_log(node));
        }
        Ok(())
    }

    /// Ends the server: politely, and with SIGKILL when it does not listen. Answers whether one was there.
    pub(crate) fn stop(&self) -> Result<bool> {
        let Some(body) = self.body()? else { return Ok(false) };
        if body.condition()? == Condition::Gone {
            return Ok(false);
        }
        body.ask_to_end()?;
        if !wait_gone(&body, STOPPED_WITHIN)? {
            eprintln!("{}: does not end by itself, killing it", self.name());
            self.kill()?;
        }
        Ok(true)
    }

    /// SIGKILL: a crash. Data and ports stay.
    pub(crate) fn kill(&self) -> Result<()> {
        let body = self.started()?;
        body.kill()?;
        ensure!(wait_gone(&body, KILLED_WITHIN)?, "{} (pid {:?}) does not die", self.name(), self.pid()?);
        Ok(())
    }

    /// SIGSTOP, or the engine's freezer: sockets stay open and nothing is answered.
    pub(crate) fn pause(&self) -> Result<()> {
        match self.started()? {
            Body::Processes(nodes) => nodes.iter().try_for_each(|node| node.signal(Signal::STOP)),
            Body::Container(container) => container.pause(),
        }
    }

    /// After [`Server::pause`]; does nothing to a server that is not paused.
    pub(crate) fn resume(&self) -> Result<()> {
        match self.started()? {
            Body::Processes(nodes) => nodes.iter().try_for_each(|node| node.signal(Signal::CONT)),
            Body::Container(container) if container.condition()? == Condition::Paused => container.resume(),
            Body::Container(_) => Ok(()),
        }
    }

    /// Stops the server if it runs, starts it on the same ports with the same data, and waits until it is ready.
    pub(crate) fn restart(&self) -> Result<()> {
        self.stop()?;
        self.start(None, Way::AsBefore)?;
        self.wait_ready()
    }

    /// Deletes configuration, data, log and the memory of its ports.
    pub(crate) fn remove(&self) -> Result<()> {
        ensure!(self.condition()? == Condition::Gone, "{} still runs", self.name());
        if let Some(Body::Container(container)) = self.body()? {
            container.remove()?;
        }
        match fs::remove_dir_all(&self.folder) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(error.into()),
            _ => Ok(()),
        }
    }

    /// Where a node's output goes.
    fn log(&self, node: u32) -> PathBuf {
        match self.recipe.nodes() {
            1 => self.folder.join("server.log"),
            _ => self.folder.join(format!("server-{node}.log")),
        }
    }

    fn end_of_log(&self, node: u32) -> String {
        let text = match self.body() {
            Ok(Some(Body::Container(container))) => container.end_of_log(),
            _ => fs::read(self.log(node)).unwrap_or_default(),
        };
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<&str> = text.lines().collect();
        let end = lines[lines.len().saturating_sub(20)..].join("\n  ");
        format!("\nlast lines of {}:\n  {end}", self.log(node).display())
    }

    fn started(&self) -> Result<Body> {
        match self.body()? {
            Some(body) if body.condition()? != Condition::Gone => Ok(body),
            _ => bail!("{} does not run", self.name()),
        }
    }

    fn body(&self) -> Result<Option<Body>> {
        let Some(record) = self.record()? else { return Ok(None) };
        let processes = record.processes();
        let native = (!processes.is_empty()).then_some(Body::Processes(processes));
        Ok(record.container.map(Body::Container).or(native))
    }

    fn record(&self) -> Result<Option<Record>> {
        let file = self.folder.join(RECORD);
        match fs::read(&file) {
            Ok(text) => {
                let record = serde_json::from_slice(&text);
                record.map(Some).with_context(|| format!("{} is damaged", file.display()))
            }
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).with_context(|| format!("could not read {}", file.display())),
        }
    }

    /// Replaces the record as a whole: a reader never sees half of it.
    fn write(&self, record: &Record) -> Result<()> {
        let mut file = tempfile::NamedTempFile::new_in(&self.folder)?;
        serde_json::to_writer(&mut file, record)?;
        file.persist(self.folder.join(RECORD))?;
        Ok(())
    }
}

impl Body {
    /// Of several nodes: gone when all are, paused when one is.
    fn condition(&self) -> Result<Condition> {
        match self {
            Self::Processes(nodes) => {
                let conditions: Vec<Condition> = nodes.iter().map(Process::condition).collect();
                let any = |condition: Condition| conditions.contains(&condition);
                Ok(match (any(Condition::Paused), any(Condition::Running)) {
                    (true, _) => Condition::Paused,
                    (_, true) => Condition::Running,
                    (false, false) => Condition::Gone,
                })
            }
            Self::Container(container) => container.condition(),
        }
    }

    /// Whether of so many nodes none is gone.
    fn is_whole(&self, count: u32) -> bool {
        match self {
            Self::Processes(nodes) => {
                nodes.len() == count as usize && nodes.iter().all(|node| node.condition() != Condition::Gone)
            }
            Self::Container(_) => true,
        }
    }

    /// Of several nodes the first one's that is not gone.
    fn pid(&self) -> Result<Option<i32>> {
        match self {
            Self::Processes(nodes) => {
                Ok(nodes.iter().find(|node| node.condition() != Condition::Gone).map(|node| node.pid))
            }
            Self::Container(container) => container.pid(),
        }
    }

    fn ask_to_end(&self) -> Result<()> {
        match self {
            Self::Processes(nodes) => nodes.iter().try_for_each(ask_to_end),
            Self::Container(container) => container.stop(STOPPED_WITHIN.as_secs()),
        }
    }

    fn kill(&self) -> Result<()> {
        match self {
            Self::Processes(nodes) => nodes.iter().try_for_each(|node| node.signal(Signal::KILL)),
            Self::Container(container) => container.kill(),
        }
    }
}

fn ask_to_end(process: &Process) -> Result<()> {
    process.signal(Signal::TERM)?;
    // A paused process receives it only now.
    process.signal(Signal::CONT)
}

fn wait_gone(body: &Body, limit: Duration) -> Result<bool> {
    wait_gone_by(|| body.condition(), Instant::now() + limit)
}

/// Not interruptible: it is part of cleaning up after an interrupt.
fn wait_gone_by(condition: impl Fn() -> Result<Condition>, deadline: Instant) -> Result<bool> {
    while condition()? != Condition::Gone {
        if Instant::now() >= deadline {
            return Ok(false);
        }
        thread::sleep(Duration::from_millis(20));
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::super::{Contained, StandIn};
    use super::*;

    /// A "broker" that runs a shell script; `ready` is what its probe answers.
    struct Script {
        script: &'static str,
        ready: bool,
    }

    static SLEEPER: Script = Script { script: "exec sleep 60", ready: true };
    static BROKEN: Script = Script { script: "echo cannot work; exit 1", ready: false };

    impl Recipe for Script {
        fn name(&self) -> &'static str {
            "script"
        }
        fn version(&self) -> &'static str {
            "script 1"
        }
        fn port_names(&self) -> &'static [&'static str] {
            &["clients"]
        }
        fn url(&self, ports: &[u16]) -> String {
            format!("script://127.0.0.1:{}", ports[0])
        }
        fn install(&self, cache: &Path) -> Result<PathBuf> {
            Ok(cache.to_owned())
        }
        fn prepare(&self, _: &Site<'_>) -> Result<()> {
            Ok(())
        }
        fn command(&self, _: &Site<'_>) -> Command {
            let mut command = Command::new("sh");
            command.args(["-c", self.script]);
            command
        }
        fn image(&self) -> &'static str {
            "script:1"
        }
        fn contained(&self, _: &Site<'_>) -> Contained {
            Contained::default()
        }
        fn stand_in(&self) -> Option<StandIn> {
            None
        }
        fn probe(&self, _: &[u16]) -> Result<()> {
            if self.ready { Ok(()) } else { bail!("not yet") }
        }
    }

    fn server(folder: &Path) -> Server {
        Server::new(&SLEEPER, folder, folder.join("script"))
    }

    #[test]
    fn a_second_start_starts_nothing_and_another_handle_sees_the_same_server() {
        let folder = tempfile::tempdir().unwrap();
        assert!(server(folder.path()).start(None, Way::Native).unwrap());
        server(folder.path()).wait_ready().unwrap();
        let pid = server(folder.path()).pid().unwrap();
        assert!(pid.is_some());
        assert!(!server(folder.path()).start(None, Way::Native).unwrap());
        assert_eq!(server(folder.path()).pid().unwrap(), pid);
        assert!(server(folder.path()).stop().unwrap());
        assert!(!server(folder.path()).stop().unwrap());
    }

    #[test]
    fn a_killed_server_comes_back_on_the_same_port_with_its_data() {
        let folder = tempfile::tempdir().unwrap();
        let server = server(folder.path());
        server.start(None, Way::Native).unwrap();
        let (pid, url) = (server.pid().unwrap(), server.url().unwrap());
        server.kill().unwrap();
        assert_eq!(server.condition().unwrap(), Condition::Gone);
        server.restart().unwrap();
        assert_eq!(server.url().unwrap(), url);
        assert_ne!(server.pid().unwrap(), pid);
        server.stop().unwrap();
    }

    #[test]
    fn a_paused_server_is_seen_resumes_on_start_and_can_be_stopped_while_paused() {
        let folder = tempfile::tempdir().unwrap();
        let server = server(folder.path());
        let paused = |server: &Server| {
            server.pause().unwrap();
            let seen = interrupt::poll(KILLED_WITHIN, || Ok((server.condition()? == Condition::Paused).then_some(())));
            seen.unwrap().expect("SIGSTOP stops it");
        };
        server.start(None, Way::Native).unwrap();
        paused(&server);
        assert!(!server.start(None, Way::Native).unwrap());
        server.wait_ready().unwrap();
        paused(&server);
        assert!(server.stop().unwrap());
        server.remove().unwrap();
        assert_eq!(server.url().unwrap(), None);
    }

    #[test]
    fn a_server_that_ends_while_starting_is_an_error_with_the_end_of_its_log() {
        let folder = tempfile::tempdir().unwrap();
        let server = Server::new(&BROKEN, folder.path(), folder.path().join("script"));
        server.start(None, Way::Native).unwrap();
        let error = server.wait_ready().unwrap_err().to_string();
        assert!(error.contains("ended while it was starting") && error.ends_with("cannot work"), "{error}");
    }

    #[test]
    fn a_server_whose_port_was_taken_while_it_was_down_says_so_instead_of_moving() {
        let folder = tempfile::tempdir().unwrap();
        let server = server(folder.path());
        server.start(None, Way::Native).unwrap();
        server.kill().unwrap();
        let url = server.url().unwrap().unwrap();
        let port: u16 = url.rsplit(':').next().unwrap().parse().unwrap();
        let held = std::net::TcpListener::bind(("127.0.0.1", port)).unwrap();
        let error = server.restart().unwrap_err().to_string();
        assert!(error.contains(&port.to_string()) && error.contains("taken"), "{error}");
        drop(held);
        server.restart().unwrap();
        assert_eq!(server.url().unwrap(), Some(url));
        server.stop().unwrap();
    }

    #[test]
    fn a_wanted_port_that_is_taken_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let port = ports::choose(&[]).unwrap();
        let _held = std::net::TcpListener::bind(("127.0.0.1", port)).unwrap();
        let error = server(folder.path()).start(Some(port), Way::Native).unwrap_err().to_string();
        assert!(error.contains("taken"), "{error}");
    }
}

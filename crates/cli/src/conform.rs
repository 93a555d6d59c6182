//! `anybroker conform`: the conformance suite against the endpoint.

use std::ffi::OsString;
use std::net::SocketAddr;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anybroker::config::EndpointUrl;
use anybroker::{Bus, Config, ErrorKind, TopologySpec};
use anybroker_conformance::{
    About, Case, CaseReport, Harness, HttpService, Level, NativeChannel, Options, Outcome, Report, Route,
    ServerControl, Stop, cases, check_proxies, fresh_name, url_through,
};
use async_trait::async_trait;
use futures_util::future::BoxFuture;
use serde_json::{Value, json};

use crate::args::{ConformArgs, ConformCommand, Global, LevelArg};
use crate::conform_faults::{CLIENTS_ALONE, Faults};
use crate::exit::{Exit, Failure};
use crate::interrupt::Interrupt;
use crate::output::Output;
use crate::progress::Progress;
use crate::{conform_report, conform_sweep, connect};

/// The setting that adapters have for it, by convention.
const CREATE_DESTINATIONS: &str = "create_destinations";

pub(crate) async fn run(global: &Global, args: ConformArgs, output: &mut Output) -> Result<Exit, Failure> {
    match &args.command {
        Some(ConformCommand::Report(command)) => return conform_report::run(command, output),
        Some(ConformCommand::Child) => return child(global).await,
        Some(ConformCommand::Sweep(args)) => return conform_sweep::run(global, args, output).await,
        None => {}
    }
    if args.list {
        return list(&args, output);
    }
    let level = args.level.map(level).or_else(|| level_of(&args.cases));
    let faults = Faults::of(&args.disturbing, level, &connect::settings(global)?)?;
    let (level, wants_proxies, mut excused) = (faults.level, faults.wants_proxies, faults.excluded.clone());
    let harness = Arc::new(CommandHarness::new(global, &args, faults).await?);
    if wants_proxies {
        check_proxies(harness.clone()).await?;
    }
    excused.extend(harness.http().err());
    let mut interrupt = Interrupt::listen()?;
    let done = Arc::new(AtomicU64::new(0));
    let progress = Progress::new("cases", false);
    let bar = progress.handle();
    let mut options = Options::default()
        .with_level(level)
        .with_parallelism(args.parallel.into())
        .with_progress(move |_| bar.set_position(done.fetch_add(1, Ordering::Relaxed) + 1));
    options.filter = args.cases.clone();
    if let Some(seed) = args.seed {
        options = options.with_seed(seed);
    }
    options = options.with_shrinking(args.disturbing.shrink.into());
    if !args.disturbing.schedule.is_empty() {
        options = options.with_schedule(args.disturbing.schedule.iter().map(|number| usize::from(*number)));
    }
    let stop = Stop::new();
    let run = anybroker_conformance::run(harness, options.with_stop(stop.clone()));
    tokio::pin!(run);
    let report = tokio::select! {
        biased;
        () = interrupt.requested() => {
            // What the cases created is deleted before the run ends.
            stop.request();
            run.await?
        }
        report = &mut run => report?,
    };
    drop(progress);
    if stop.is_requested() {
        // Half a report could be taken for a whole one, so none is written.
        print(&report, output)?;
        return Ok(Exit::Interrupted);
    }
    if report.cases.is_empty() {
        return Err(Failure::Usage("no case of this level matches; see conform --list".into()));
    }
    print(&report, output)?;
    if let Some(directory) = &args.report {
        report.write_dir(directory).map_err(|error| Failure::Io("write the report", error))?;
    }
    let missing = !args.cases.is_empty() && is_missing(&report, &args.cases, &excused);
    Ok(if report.is_green() && !missing { Exit::Done } else { Exit::Failed })
}

/// Whoever names a case wants it run. A pattern may take along what the endpoint's protocol has not, or the line leaves alone, beside
/// what was run.
fn is_missing(report: &Report, named: &[String], excused: &[String]) -> bool {
    let is_excused = |case: &CaseReport| excused.contains(&case.detail) && !named.iter().any(|name| name == case.name);
    let (not_run, ran): (Vec<_>, Vec<_>) = report.cases.iter().partition(|case| case.outcome == Outcome::NotRun);
    ran.is_empty() || !not_run.into_iter().all(is_excused)
}

/// One of the processes that [`CommandHarness::child`] starts. It does not come to its end this way, unless something went wrong.
async fn child(global: &Global) -> Result<Exit, Failure> {
    let config = connect::settings(global)?;
    let connect =
        move || -> BoxFuture<'static, anybroker::Result<Bus>> { Box::pin(anybroker::connect_with(config.clone())) };
    anybroker_conformance::run_child(connect).await.map_err(Failure::Broker)?;
    Ok(Exit::Failed)
}

fn list(args: &ConformArgs, output: &mut Output) -> Result<Exit, Failure> {
    let highest = args.level.map_or(Level::Long, level);
    let chosen: Vec<_> = cases().iter().filter(|case| case.level <= highest).collect();
    if output.is_json() {
        for case in chosen {
            let needs: Vec<&str> = case.needs.iter().map(|need| need.name).collect();
            let level = serde_json::to_value(case.level).unwrap_or(Value::Null);
            output.object(&json!({"name": case.name, "level": level, "proves": case.proves, "needs": needs}))?;
        }
    } else {
        let row = |case: &&Case| {
            vec![case.name.to_owned(), format!("{:?}", case.level).to_lowercase(), case.proves.to_owned()]
        };
        output.table(&["CASE", "LEVEL", "PROVES"], chosen.iter().map(row).collect())?;
    }
    output.flush()?;
    Ok(Exit::Done)
}

/// With `--json`: an object for each case, then one for the run.
fn print(report: &Report, output: &mut Output) -> Result<(), Failure> {
    if output.is_json() {
        let Value::Object(mut run) = report.json() else { return output.flush() };
        if let Some(Value::Array(cases)) = run.remove("cases") {
            cases.iter().try_for_each(|case| output.object(case))?;
        }
        run.insert("green".into(), report.is_green().into());
        output.object(&Value::Object(run))?;
    } else {
        output.raw(report.text().as_bytes())?;
        if report.cases.iter().all(|case| case.outcome == Outcome::NotRun) {
            output.line("nothing was run")?;
        }
    }
    output.flush()
}

fn level(level: LevelArg) -> Level {
    match level {
        LevelArg::Conformance => Level::Conformance,
        LevelArg::Reliability => Level::Reliability,
        LevelArg::Long => Level::Long,
    }
}

/// The level at which each pattern chooses something, where that is not the first.
fn level_of(patterns: &[String]) -> Option<Level> {
    let lowest =
        |pattern: &String| cases().iter().filter(|case| case.is_chosen_by(pattern)).map(|case| case.level).min();
    patterns.iter().filter_map(lowest).max().filter(|level| *level > Level::Conformance)
}

/// Fresh clients of the endpoint that the command line names.
struct CommandHarness {
    name: String,
    about: About,
    lease: Duration,
    quiet: Duration,
    patience: Duration,
    config: Config,
    /// The same with missing destinations not created, where the adapter has that setting.
    strict: Option<Config>,
    /// The command line of another process of the same endpoint, or why there can be none.
    child: Result<Vec<OsString>, String>,
    faults: Faults,
    native: Result<Arc<dyn NativeChannel>, String>,
    http: Result<Arc<dyn HttpService>, String>,
}

impl CommandHarness {
    async fn new(global: &Global, args: &ConformArgs, faults: Faults) -> Result<Self, Failure> {
        let mut config = connect::settings(global)?;
        let bus = connect::connect(global).await?;
        let name = args.name.clone().unwrap_or_else(|| bus.endpoint().url.clone());
        let mut apart = config.clone();
        if let Some((named, other)) = private(global)
            && !is_shared(&bus, &config).await?
        {
            config = config.with("url", named);
            // The setting belongs to the broker there, which has it the other way.
            apart = apart.with("url", other);
        }
        connect::close(&bus).await?;
        let strict = config.scheme().filter(|scheme| has_setting(scheme, CREATE_DESTINATIONS));
        let strict = strict.map(|scheme| apart.with(format!("{scheme}.{CREATE_DESTINATIONS}"), false));
        let child = match faults.kills_clients {
            true => process_of(global, &config),
            false => Err(CLIENTS_ALONE.to_owned()),
        };
        let url = config.endpoint_url().unwrap_or_default();
        let native = anybroker_conformance_native::channel(url, |setting| given(&config, setting));
        let http = anybroker_conformance_native::http(url, |setting| given(&config, setting));
        let about = About { client: args.client.clone(), emulated: args.emulated.clone() };
        let (lease, quiet, patience) = (args.lease, args.quiet, args.patience);
        Ok(Self { name, about, lease, quiet, patience, config, strict, child, faults, native, http })
    }
}

/// The command line of another process that has the same endpoint; its environment is this one's.
fn process_of(global: &Global, config: &Config) -> Result<Vec<OsString>, String> {
    // With a name, too: it is one within a process.
    if config.scheme().as_deref() == Some("memory") {
        return Err("messages lie in this process's memory: another process has its own".into());
    }
    let mut arguments: Vec<OsString> = Vec::new();
    let mut add = |flag: &str, value: OsString| arguments.extend([OsString::from(flag), value]);
    if let Some(url) = &global.url {
        add("--url", url.into());
    }
    if let Some(file) = &global.config {
        add("--config", file.into());
    }
    for (key, value) in &global.settings {
        add("--set", format!("{key}={value}").into());
    }
    arguments.extend(["conform", "child"].map(OsString::from));
    Ok(arguments)
}

/// A setting of the endpoint's section, which is called as its first scheme.
fn given(config: &Config, setting: &str) -> Option<String> {
    let scheme = config.scheme().unwrap_or_default();
    config.text(&format!("{}.{setting}", scheme.split('+').next().unwrap_or_default()))
}

/// Where the URL names neither host nor path: the same URL with a name, and with another one. Connections to an in-process
/// broker without a name may each have one of their own, and the suite needs several to the same.
fn private(global: &Global) -> Option<(String, String)> {
    let url = global.url.clone().or_else(|| std::env::var("ANYBROKER_URL").ok())?;
    if !is_without_a_place(&url) {
        return None;
    }
    let (scheme, rest) = url.split_once("://")?;
    let named = |what| format!("{scheme}://conform-{}{what}{rest}", std::process::id());
    Some((named(""), named("-strict")))
}

/// Whether a URL names neither host nor path, as that of a broker in this process does.
fn is_without_a_place(url: &str) -> bool {
    EndpointUrl::parse(url).is_ok_and(|url| url.hosts().is_empty() && url.path().is_empty())
}

/// Whether a second connection sees what the first one declared.
async fn is_shared(bus: &Bus, config: &Config) -> Result<bool, Failure> {
    let probe = fresh_name("probe");
    if bus.declare(&TopologySpec::destination(&probe)).await.is_err() {
        return Ok(true);
    }
    let other = anybroker::connect_with(config.clone()).await?;
    let shared = match other.describe(&probe).await {
        Err(error) => error.kind() != ErrorKind::NotFound,
        Ok(_) => true,
    };
    bus.delete(&probe, None).await?;
    connect::close(&other).await?;
    Ok(shared)
}

fn has_setting(scheme: &str, setting: &str) -> bool {
    anybroker::registry().json_schema()["properties"][scheme]["properties"].get(setting).is_some()
}

#[async_trait]
impl Harness for CommandHarness {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn about(&self) -> About {
        self.about.clone()
    }

    fn lease(&self) -> Duration {
        self.lease
    }

    fn quiet(&self) -> Duration {
        self.quiet
    }

    fn patience(&self) -> Duration {
        self.patience
    }

    async fn connect(&self) -> anybroker::Result<Bus> {
        anybroker::connect_with(self.config.clone()).await
    }

    async fn connect_strict(&self) -> Option<anybroker::Result<Bus>> {
        match anybroker::connect_with(self.strict.clone()?).await {
            // The setting belongs to the broker, which is there already without it.
            Err(error) if error.kind() == ErrorKind::AlreadyExists => None,
            connected => Some(connected),
        }
    }

    fn routes(&self) -> Result<Vec<Route>, String> {
        self.faults.routes.clone()
    }

    async fn connect_through(&self, addresses: &[SocketAddr]) -> anybroker::Result<Bus> {
        let url = url_through(self.config.endpoint_url().unwrap_or_default(), addresses);
        anybroker::connect_with(self.config.clone().with("url", url)).await
    }

    fn http(&self) -> Result<Arc<dyn HttpService>, String> {
        self.http.clone()
    }

    fn server(&self) -> Result<Arc<dyn ServerControl>, String> {
        self.faults.server.clone().map(|server| server as Arc<dyn ServerControl>)
    }

    fn child(&self) -> Result<Command, String> {
        let arguments = self.child.as_ref().map_err(Clone::clone)?;
        let program = std::env::current_exe().map_err(|error| format!("this program is not found: {error}"))?;
        let mut command = Command::new(program);
        command.args(arguments);
        Ok(command)
    }

    fn native(&self) -> Result<Arc<dyn NativeChannel>, String> {
        self.native.clone()
    }
}

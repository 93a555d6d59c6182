//! The command that each adapter is.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use anybroker_conformance::{About, Level, Options, Outcome, Route, UrlHarness, routes_of, run, url_through};
use anybroker_core::{Bus, Error, ErrorKind, Result};
use clap::Parser;
use futures_util::future::BoxFuture;

/// What differs between the commands.
pub struct Setup {
    /// The peer's name and version.
    pub peer: &'static str,
    /// What it stands on.
    pub client: &'static str,
    /// A fresh client; with `true` one that creates missing destinations when it publishes.
    pub connect: fn(String, bool) -> BoxFuture<'static, Result<Bus>>,
    /// The lease of cases about leases.
    pub lease: Duration,
    /// How long nothing must happen before an absence counts.
    pub quiet: Duration,
    /// How long something may take that must happen.
    pub patience: Duration,
    /// Whether the peer, on this server, has a setting with which a publish creates nothing.
    pub has_strict: bool,
}

/// Runs the suite of AnyBroker on a published crate that is not AnyBroker's
#[derive(Debug, Parser)]
struct Command {
    /// The broker's address
    #[arg(long)]
    url: String,
    /// Product and version of the broker, for the report where the client is not told
    #[arg(long, default_value = "")]
    server: String,
    /// Only cases whose name matches; may be repeated
    #[arg(long = "case", value_name = "GLOB")]
    cases: Vec<String>,
    /// The highest level: conformance or reliability
    #[arg(long, default_value = "conformance", value_parser = level)]
    level: Level,
    /// Put a proxy in front of the broker, for cases of the level reliability. With LISTEN=UPSTREAM it listens where the broker
    /// tells its clients to come (Kafka's advertised listeners)
    #[arg(long, value_name = "LISTEN=UPSTREAM", num_args = 0..)]
    proxy: Option<Vec<Route>>,
    /// What everything random starts from
    #[arg(long)]
    seed: Option<u64>,
    /// How many cases run at once
    #[arg(long, default_value_t = 4)]
    parallelism: usize,
    /// Where report.html, report.json and histories of failed cases go
    #[arg(long, value_name = "DIR")]
    report: Option<PathBuf>,
}

fn level(text: &str) -> std::result::Result<Level, String> {
    match text {
        "conformance" => Ok(Level::Conformance),
        "reliability" => Ok(Level::Reliability),
        other => Err(format!("no level is called `{other}`")),
    }
}

static SERVER: OnceLock<String> = OnceLock::new();

/// What the command was told that the broker is.
pub fn server() -> String {
    SERVER.get().cloned().unwrap_or_default()
}

/// Runs the command. Its exit status is 1 when a case has failed.
pub fn main(setup: Setup) -> ExitCode {
    let command = Command::parse();
    // More than the members of any case: ruststream-rdkafka closes a consumer where it is dropped, which blocks the thread until the
    // server has answered, and the end of a fault has to come all the same.
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(16).enable_all().build();
    match runtime.map(|runtime| runtime.block_on(drive(setup, command))) {
        Ok(Ok(code)) => code,
        Ok(Err(error)) => {
            eprintln!("error: {error:?}");
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn drive(setup: Setup, command: Command) -> Result<ExitCode> {
    let connect = setup.connect;
    let _ = SERVER.set(command.server);
    // Admin endpoints and the like are AnyBroker's own; the peers' URLs have none.
    let url = command.url.split('?').next().unwrap_or_default().to_owned();
    let strict = url.clone();
    let direct = url.clone();
    let harness = UrlHarness::new(setup.peer, move || connect(direct.clone(), true));
    let harness = match command.proxy {
        Some(named) => {
            let routes = if named.is_empty() { routes_of(&url) } else { Ok(named) };
            let routes = routes.map_err(|why| Error::new(ErrorKind::ConfigInvalid, "connect", why))?;
            harness.with_proxies(routes, move |addresses| connect(url_through(&url, &addresses), true))
        }
        None => harness,
    };
    #[cfg(feature = "sqs")]
    let harness = match anybroker_conformance_native::http(&command.url, |_| None) {
        Ok(service) => harness.with_http(service),
        // Another broker's program: the harness says so by itself.
        Err(_) => harness,
    };
    let harness = harness
        .with_about(About { client: Some(format!("{} on {}", setup.peer, setup.client)), emulated: None })
        .with_lease(setup.lease)
        .with_quiet(setup.quiet)
        .with_patience(setup.patience);
    let harness = match setup.has_strict {
        true => harness.with_strict(move || connect(strict.clone(), false)),
        false => harness,
    };
    let mut options = Options::default().with_level(command.level).with_parallelism(command.parallelism);
    for case in &command.cases {
        options = options.with_filter(case);
    }
    if let Some(seed) = command.seed {
        options = options.with_seed(seed);
    }
    let options = options.with_progress(|case| println!("{:?} {}", case.outcome, case.name));
    let report = run(Arc::new(harness), options).await?;
    println!("{}", report.text());
    if let Some(folder) = &command.report
        && let Err(error) = report.write_dir(folder)
    {
        eprintln!("the report was not written: {error}");
    }
    let has_failed = report.cases.iter().any(|case| case.outcome == Outcome::Fail);
    Ok(if has_failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

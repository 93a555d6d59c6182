//! The order service. See the library for what it does.

use std::error::Error;
use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anybroker::Config;
use clap::Parser;
use orders::report::Printed;
use orders::service::{self, Settings};
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;

/// Publishes the orders of a file and works them off, on any broker.
///
/// Without --config and --url it uses the embedded broker, in a folder of its own that it empties first.
#[derive(Debug, Parser)]
struct Args {
    /// The broker's configuration (.toml, .yaml, .json); there are some in examples/orders/config
    #[arg(long, value_name = "FILE", conflicts_with = "url")]
    config: Option<PathBuf>,
    /// The broker's URL, such as embedded:///tmp/orders.db
    #[arg(long)]
    url: Option<String>,
    /// The orders, one JSON object per line
    #[arg(long, value_name = "FILE", default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/data/orders.jsonl"))]
    orders: PathBuf,
    /// Where the totals are kept, and the embedded broker unless another is named [default: beside the program]
    #[arg(long, value_name = "FOLDER")]
    state: Option<PathBuf>,
    /// Publish nothing: go on with what the last run left and with what was redriven, now that all banks are back
    #[arg(long)]
    resume: bool,
}

#[tokio::main]
async fn main() -> ExitCode {
    // Workers log each dead letter as an error, which is right for a service and too much for an example that prints them
    // at its end. `RUST_LOG=anybroker_worker=debug` shows every step.
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("warn,anybroker_worker=off"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr).init();
    match run(Args::parse()).await {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn run(args: Args) -> Result<ExitCode, Box<dyn Error + Send + Sync>> {
    let place = Place::of(&args)?;
    println!("Broker: {}\nTotals: {}", place.broker, place.totals.display());
    let settings = Settings {
        config: place.config,
        orders: (!args.resume).then_some(args.orders),
        totals: place.totals,
        all_banks: args.resume,
    };
    let summary = service::run(settings, stop_on_signals()).await?;
    let anybroker = cargo_run("anybroker-cli");
    println!("{}", Printed { summary: &summary, anybroker: &anybroker, flags: &place.flags, resume: &place.resume });
    Ok(if summary.interrupted { ExitCode::from(130) } else { ExitCode::SUCCESS })
}

/// What the commands that are printed need beside, so that they reach the same broker.
const FEATURES: &[(&str, bool)] = &[
    ("kafka", cfg!(feature = "kafka")),
    ("nats", cfg!(feature = "nats")),
    ("pulsar", cfg!(feature = "pulsar")),
    ("rabbitmq", cfg!(feature = "rabbitmq")),
    ("sqs", cfg!(feature = "sqs")),
];

/// `cargo run` of a package, with the brokers that this program was built with.
fn cargo_run(package: &str) -> String {
    let features: Vec<&str> = FEATURES.iter().filter(|(_, on)| *on).map(|(name, _)| *name).collect();
    if features.is_empty() {
        format!("cargo run -q -p {package} --")
    } else {
        format!("cargo run -q -p {package} --features {} --", features.join(","))
    }
}

/// Where the broker is and where the totals are kept.
struct Place {
    config: Config,
    broker: String,
    totals: PathBuf,
    flags: String,
    resume: String,
    /// Held until the end: two runs with one broker are fine, but not one that empties the other's folder.
    _lock: File,
}

impl Place {
    fn of(args: &Args) -> Result<Self, Box<dyn Error + Send + Sync>> {
        let state = match &args.state {
            Some(folder) => folder.clone(),
            // Under cargo that is target/debug/orders-state.
            None => std::env::current_exe()?.with_file_name("orders-state"),
        };
        fs::create_dir_all(&state)?;
        let state = state.canonicalize()?;
        let lock = lock(&state)?;
        let mut resume = format!("{} --resume", cargo_run("orders"));
        if args.state.is_some() {
            resume += &format!(" --state {}", quoted(&state.display().to_string()));
        }
        let own = args.config.is_none() && args.url.is_none();
        let (config, broker, flags) = match (&args.config, &args.url) {
            (Some(file), _) => {
                let flags = format!("--config {}", quoted(&file.display().to_string()));
                (Config::from_file(file)?.with_env(), file.display().to_string(), flags)
            }
            (None, Some(url)) => {
                // User, password and query may hold secrets, which are not printed.
                let (scheme, rest) = url.split_once("://").unwrap_or_default();
                let flags = if rest.contains(['@', '?']) {
                    "--url '<the same>'".to_owned()
                } else {
                    format!("--url {}", quoted(url))
                };
                (Config::from_url(url.clone()).with_env(), format!("{scheme}://…"), flags)
            }
            (None, None) => {
                let url = format!("embedded://{}", escaped(&state.join("broker.db").display().to_string()));
                let config = Config::from_url(url.clone()).with("subscribe.order", "key");
                (config, url.clone(), format!("--url {}", quoted(&url)))
            }
        };
        if !own {
            resume += &format!(" {flags}");
        }
        // Totals belong to their broker: what it has delivered once it does not deliver again for a new database.
        let scheme = config.scheme().unwrap_or_else(|| "unknown".to_owned());
        let totals = state.join(if own { "totals.db".to_owned() } else { format!("totals-{scheme}.db") });
        if own && !args.resume {
            empty(&state.join("broker.db"))?;
        }
        if own && !args.resume || scheme == "memory" {
            empty(&totals)?;
        }
        Ok(Self { config, broker, totals, flags, resume, _lock: lock })
    }
}

fn lock(state: &Path) -> Result<File, Box<dyn Error + Send + Sync>> {
    let lock = File::create(state.join("lock"))?;
    match lock.try_lock() {
        Ok(()) => Ok(lock),
        Err(TryLockError::WouldBlock) => {
            Err(format!("another run works in {}; choose another folder with --state", state.display()).into())
        }
        Err(TryLockError::Error(error)) => Err(error.into()),
    }
}

/// Removes a database with the files beside it.
fn empty(database: &Path) -> io::Result<()> {
    let Some((folder, name)) = database.parent().zip(database.file_name()) else { return Ok(()) };
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_name().as_encoded_bytes().starts_with(name.as_encoded_bytes()) {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// A path as part of a URL.
fn escaped(path: &str) -> String {
    path.bytes().fold(String::with_capacity(path.len()), |mut url, byte| {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'/' | b'.' | b'-' | b'_' | b'~' => url.push(char::from(byte)),
            _ => url.push_str(&format!("%{byte:02X}")),
        }
        url
    })
}

/// As a shell takes it.
fn quoted(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/:._-=@%+,".contains(c);
    if text.chars().all(plain) { text.to_owned() } else { format!("'{}'", text.replace('\'', r"'\''")) }
}

/// Ctrl-C and SIGTERM end the run in good order; a second one ends it at once.
fn stop_on_signals() -> CancellationToken {
    let stop = CancellationToken::new();
    let told = stop.clone();
    tokio::spawn(async move {
        signal().await;
        eprintln!("stopping: running handlers may finish; once more to end at once");
        told.cancel();
        signal().await;
        std::process::exit(130);
    });
    stop
}

#[cfg(unix)]
async fn signal() {
    use tokio::signal::unix::{SignalKind, signal};
    let terminated = async {
        match signal(SignalKind::terminate()) {
            Ok(mut terminate) => drop(terminate.recv().await),
            Err(_) => std::future::pending().await,
        }
    };
    tokio::select! {
        () = terminated => {}
        _ = tokio::signal::ctrl_c() => {}
    }
}

#[cfg(not(unix))]
async fn signal() {
    let _ = tokio::signal::ctrl_c().await;
}

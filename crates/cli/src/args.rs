//! The command line.

use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use anybroker::{Start, Timestamp};
use anybroker_conformance::Route;
use clap::{Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;

const EXIT_CODES: &str = "\
Exit codes:
  0    everything that was asked for happened
  1    something failed, or happened only in part
  2    wrong usage or configuration; nothing was attempted
  3    the broker cannot be reached or did not answer in time
  4    the endpoint's capability record refuses the verb or option
  130  interrupted (Ctrl-C, SIGTERM)

Settings, later wins: the query of the URL, --config FILE, ANYBROKER_* variables, --set and --url.
Durations have a unit (250ms, 30s, 5m). A TIME is 2026-11-21T10:00:00Z (UTC), `now`, or a duration that means so long ago.";

/// One set of messaging verbs on every broker.
#[derive(Debug, Parser)]
#[command(name = "anybroker", version, after_help = EXIT_CODES, propagate_version = true, max_term_width = 110)]
pub(crate) struct Invocation {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Endpoint and output")]
pub(crate) struct Global {
    /// The endpoint, such as embedded:///absolute/path.db
    #[arg(long, global = true, value_name = "URL")]
    pub(crate) url: Option<String>,
    /// A configuration file (.toml, .yaml, .yml, .json)
    #[arg(long, global = true, value_name = "FILE", env = "ANYBROKER_CONFIG", hide_env_values = true)]
    pub(crate) config: Option<PathBuf>,
    /// Sets one key over all other sources, such as publish_timeout=5s or subscribe.order=key
    #[arg(long = "set", global = true, value_name = "KEY=VALUE", value_parser = setting)]
    pub(crate) settings: Vec<(String, String)>,
    /// One JSON object per line on standard output, and errors as one JSON object on standard error
    #[arg(long, global = true)]
    pub(crate) json: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Publish one message per line of input, and print a receipt for each
    Publish(PublishArgs),
    /// Receive messages, print them, then settle them
    Consume(ConsumeArgs),
    /// Look at dead letters, put them back, or delete them
    #[command(subcommand)]
    Dlq(DlqCommand),
    /// What a group has left to do
    Lag(LagArgs),
    /// What the endpoint gives natively, what it emulates, and what it refuses
    Capabilities,
    /// Create a destination, or a group of it, where it is missing
    Declare(DeclareArgs),
    /// Show a destination and its groups as the broker has them
    Describe(DescribeArgs),
    /// Delete a group with its dead letters, or a destination with all its groups
    Delete(DeleteArgs),
    /// Run the conformance suite against the endpoint
    Conform(Box<ConformArgs>),
    /// The settings: their JSON Schema, and whether yours are valid
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Print the completion script of a shell
    Completions {
        /// The shell
        shell: Shell,
    },
}

#[derive(Debug, Args)]
pub(crate) struct PublishArgs {
    /// The destination
    pub(crate) destination: String,
    /// Where the lines come from; - for standard input
    #[arg(long, value_name = "FILE", default_value = "-")]
    pub(crate) file: PathBuf,
    /// What a line is: the payload itself, or a JSON object with payload, key, id, headers, …
    #[arg(long, value_enum, default_value_t = LineFormat::Lines)]
    pub(crate) format: LineFormat,
    /// The key of every message
    #[arg(long)]
    pub(crate) key: Option<String>,
    /// The id; only with a single line of input
    #[arg(long)]
    pub(crate) id: Option<String>,
    /// A header of every message; may be repeated
    #[arg(long = "header", value_name = "NAME=VALUE", value_parser = header)]
    pub(crate) headers: Vec<(String, String)>,
    /// The media type of the payloads
    #[arg(long, value_name = "TYPE")]
    pub(crate) content_type: Option<String>,
    /// How long the broker holds the messages back
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    pub(crate) delay: Option<Duration>,
    /// How long the messages may stay unsettled before they become dead letters
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    pub(crate) ttl: Option<Duration>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum LineFormat {
    Lines,
    Json,
}

#[derive(Debug, Args)]
pub(crate) struct ConsumeArgs {
    /// The destination
    pub(crate) destination: String,
    /// The group
    #[arg(long)]
    pub(crate) group: String,
    /// End after that many deliveries
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) max: Option<u64>,
    /// End when no message came for that long
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    pub(crate) idle: Option<Duration>,
    /// What becomes of a delivery after it was printed; none gives it back at the end, uncounted
    #[arg(long, value_enum, default_value_t = Settle::Ack)]
    pub(crate) settle: Settle,
    /// With --settle nack: it does not come back before that
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    pub(crate) delay: Option<Duration>,
    /// With --settle dead-letter: why [default: rejected]
    #[arg(long)]
    pub(crate) reason: Option<String>,
    /// With --settle nack or dead-letter: the class of the failure, such as VALIDATION_ERROR
    #[arg(long, value_name = "CLASS")]
    pub(crate) error_type: Option<String>,
    /// With --settle dead-letter: what a person should read about it
    #[arg(long, value_name = "TEXT")]
    pub(crate) detail: Option<String>,
    /// Where a group that is new starts: earliest, latest, a TIME, or position:N
    #[arg(long, value_parser = start, default_value = "earliest")]
    pub(crate) start: Start,
    /// The order that deliveries keep [default: the configured one]
    #[arg(long, value_enum)]
    pub(crate) order: Option<OrderArg>,
    /// How long a delivery is leased [default: the configured one]
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    pub(crate) lease: Option<Duration>,
    /// Failed attempts before a message becomes a dead letter, 0 for never [default: the configured one]
    #[arg(long, value_name = "N")]
    pub(crate) max_attempts: Option<u32>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Settle {
    Ack,
    Nack,
    DeadLetter,
    None,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum OrderArg {
    None,
    Key,
    Total,
}

#[derive(Debug, Subcommand)]
pub(crate) enum DlqCommand {
    /// One row for each dead letter, oldest first
    List(ListArgs),
    /// The oldest dead letters in full
    Peek(ListArgs),
    /// Put dead letters back to the group that failed them; running it again goes on with the rest
    Redrive(RedriveArgs),
    /// Delete dead letters
    Purge(PurgeArgs),
}

#[derive(Debug, Args)]
pub(crate) struct Letters {
    /// The destination that the letters came from
    pub(crate) source: String,
    /// The group that failed them
    #[arg(long)]
    pub(crate) group: String,
    /// Only with this reason, such as attempts_exhausted
    #[arg(long)]
    pub(crate) reason: Option<String>,
    /// Only with this error type
    #[arg(long, value_name = "CLASS")]
    pub(crate) error_type: Option<String>,
    /// Only those that died at or after this TIME
    #[arg(long, value_name = "TIME", value_parser = time)]
    pub(crate) since: Option<Timestamp>,
    /// Only those that died before this TIME
    #[arg(long, value_name = "TIME", value_parser = time)]
    pub(crate) until: Option<Timestamp>,
    /// Only with this key
    #[arg(long)]
    pub(crate) key: Option<String>,
    /// Only with this header and value; may be repeated, all must hold
    #[arg(long = "header", value_name = "NAME=VALUE", value_parser = header)]
    pub(crate) headers: Vec<(String, String)>,
    /// Only this message
    #[arg(long)]
    pub(crate) id: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct ListArgs {
    #[command(flatten)]
    pub(crate) letters: Letters,
    /// At most that many [default: all for list, 10 for peek]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) limit: Option<u64>,
}

#[derive(Debug, Args)]
pub(crate) struct RedriveArgs {
    #[command(flatten)]
    pub(crate) letters: Letters,
    /// Only tell what would be redriven
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// At most that many
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) limit: Option<u64>,
    /// At most that many each second
    #[arg(long, value_name = "N", value_parser = rate)]
    pub(crate) rate: Option<f64>,
    /// Letters that were redriven this often already are refused
    #[arg(long, value_name = "N", default_value_t = 3)]
    pub(crate) max_redrives: u32,
}

#[derive(Debug, Args)]
pub(crate) struct PurgeArgs {
    #[command(flatten)]
    pub(crate) letters: Letters,
    /// Only tell how many would be deleted
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Really delete them
    #[arg(long)]
    pub(crate) yes: bool,
}

#[derive(Debug, Args)]
pub(crate) struct LagArgs {
    /// The destination
    pub(crate) destination: String,
    /// The group
    #[arg(long)]
    pub(crate) group: String,
}

#[derive(Debug, Args)]
pub(crate) struct DeclareArgs {
    /// The destination
    pub(crate) destination: String,
    /// Also this group; it keeps everything published from then on
    #[arg(long)]
    pub(crate) group: Option<String>,
    /// Where the group starts when it is new: earliest, latest, a TIME, or position:N
    #[arg(long, value_parser = start, default_value = "earliest", requires = "group")]
    pub(crate) start: Start,
}

#[derive(Debug, Args)]
pub(crate) struct DescribeArgs {
    /// The destination
    pub(crate) destination: String,
    /// Only this group of it
    #[arg(long)]
    pub(crate) group: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct DeleteArgs {
    /// The destination
    pub(crate) destination: String,
    /// Only this group of it
    #[arg(long)]
    pub(crate) group: Option<String>,
    /// Really delete it
    #[arg(long)]
    pub(crate) yes: bool,
}

#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(crate) struct ConformArgs {
    #[command(subcommand)]
    pub(crate) command: Option<ConformCommand>,
    /// Only cases whose name matches; may be repeated; * stands for anything
    #[arg(long = "case", value_name = "GLOB")]
    pub(crate) cases: Vec<String>,
    /// Up to this level; `conformance` when not given, `reliability` where faults are asked for
    #[arg(long, value_enum)]
    pub(crate) level: Option<LevelArg>,
    /// Repeats a run: the seed that its report names
    #[arg(long, value_name = "N")]
    pub(crate) seed: Option<u64>,
    #[command(flatten)]
    pub(crate) disturbing: FaultArgs,
    /// How many cases run at once
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..))]
    pub(crate) parallel: u16,
    /// Write the report there: report.html, report.json, report.txt, junit.xml, and history and timeline of each case that failed
    #[arg(long, value_name = "DIR")]
    pub(crate) report: Option<PathBuf>,
    /// What the report calls the endpoint; its URL without credentials when not given
    #[arg(long, value_name = "NAME")]
    pub(crate) name: Option<String>,
    /// Product and version of the client library, for the report
    #[arg(long, value_name = "TEXT")]
    pub(crate) client: Option<String>,
    /// What stands in for the product, for the report, where it is an emulator or stand-in
    #[arg(long, value_name = "TEXT")]
    pub(crate) emulated: Option<String>,
    /// The lease that cases about leases wait for
    #[arg(long, value_name = "DURATION", value_parser = duration, default_value = "1s")]
    pub(crate) lease: Duration,
    /// How long nothing must happen before an absence counts as one
    #[arg(long, value_name = "DURATION", value_parser = duration, default_value = "2s")]
    pub(crate) quiet: Duration,
    /// How long something may take that must happen
    #[arg(long, value_name = "DURATION", value_parser = duration, default_value = "30s")]
    pub(crate) patience: Duration,
    /// Only list the cases; needs no endpoint
    #[arg(long, conflicts_with_all = ["cases", "seed", "report"])]
    pub(crate) list: bool,
}

/// What the cases of the level `reliability` (faults/…), and those about clusters (cluster/…), may do.
#[derive(Debug, Args)]
#[command(next_help_heading = "Faults")]
pub(crate) struct FaultArgs {
    /// What is disturbed, separated by commas. When not given, level `reliability` disturbs connections and clients where it can
    #[arg(long, value_enum, value_name = "KINDS", value_delimiter = ',')]
    pub(crate) faults: Vec<FaultsArg>,
    /// Only these faults of a case's schedule, as a report numbers them: what it has shrunk a schedule to
    #[arg(long, value_name = "NUMBERS", value_delimiter = ',', requires_all = ["seed", "cases"],
          value_parser = clap::value_parser!(u16).range(1..))]
    pub(crate) schedule: Vec<u16>,
    /// In how many more runs, at most, the schedule of a case that failed is shrunk to the faults that matter
    #[arg(long, value_name = "RUNS", default_value_t = 12)]
    pub(crate) shrink: u16,
    /// Where the proxy listens, and the server's address behind it, such as 127.0.0.1:9192=127.0.0.1:9092; one for each host
    /// of the URL. For servers whose clients go to the address that they advertise (Kafka): give the server a listener at
    /// UPSTREAM that advertises LISTEN. Others need none
    #[arg(long = "proxy", value_name = "LISTEN=UPSTREAM", value_parser = advertised)]
    pub(crate) proxies: Vec<Route>,
    /// Kills the server and starts it again with the same data, such as 'docker kill nats && docker start nats'; a line for
    /// sh, which may return before clients are served. It hits everybody on that server
    #[arg(long, value_name = "CMD")]
    pub(crate) restart_command: Option<String>,
    /// Kills the server; --restart-command then only starts it again, and the cases decide how long it is away
    #[arg(long, value_name = "CMD", requires = "restart_command")]
    pub(crate) kill_command: Option<String>,
    /// Freezes the server (SIGSTOP, docker pause); a line for sh
    #[arg(long, value_name = "CMD", requires = "resume_command")]
    pub(crate) pause_command: Option<String>,
    /// Lets a frozen server go on
    #[arg(long, value_name = "CMD", requires = "pause_command")]
    pub(crate) resume_command: Option<String>,
    /// Takes from the server the room for new messages, such as 'rabbitmqctl set_disk_free_limit 1000000GB'; a line for sh, which
    /// returns when it has taken effect
    #[arg(long, value_name = "CMD", requires = "relieve_command")]
    pub(crate) fill_command: Option<String>,
    /// Gives that room back, and changes nothing where there is room
    #[arg(long, value_name = "CMD", requires = "fill_command")]
    pub(crate) relieve_command: Option<String>,
    /// Takes from the clients of this URL what lets them in, also from those that are connected; a line for sh
    #[arg(long, value_name = "CMD", requires = "let_in_command")]
    pub(crate) lock_out_command: Option<String>,
    /// Lets them in again, and changes nothing where they are let in
    #[arg(long, value_name = "CMD", requires = "lock_out_command")]
    pub(crate) let_in_command: Option<String>,
    /// How many nodes the server has, where it is a cluster; the cases cluster/… disturb them one by one, by the commands below. These
    /// are lines for sh with the number of the node, from 1, in the variable NODE. They imply --level long
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(2..))]
    pub(crate) nodes: Option<u32>,
    /// Kills the node $NODE, such as 'docker kill nats-$NODE'
    #[arg(long, value_name = "CMD", requires_all = ["nodes", "restart_node_command"])]
    pub(crate) kill_node_command: Option<String>,
    /// Starts the node $NODE again with its data where it was killed; where it runs, ends it in an orderly way and starts it again.
    /// Returns when that node serves clients; several may be run at once
    #[arg(long, value_name = "CMD", requires = "nodes")]
    pub(crate) restart_node_command: Option<String>,
    /// Freezes the node $NODE
    #[arg(long, value_name = "CMD", requires_all = ["nodes", "resume_node_command"])]
    pub(crate) pause_node_command: Option<String>,
    /// Lets the node $NODE go on
    #[arg(long, value_name = "CMD", requires_all = ["nodes", "pause_node_command"])]
    pub(crate) resume_node_command: Option<String>,
    /// A fault of the server for which there is no command, and why, such as 'fill=a quota of Kafka refuses nothing': the reason
    /// that the report gives for its cases. May be repeated
    #[arg(long, value_name = "FAULT=WHY", value_parser = cannot)]
    pub(crate) cannot: Vec<(ServerFault, String)>,
}

/// A fault of the server that takes a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(crate) enum ServerFault {
    Restart,
    Pause,
    Fill,
    LockOut,
    /// The server is no cluster.
    Nodes,
    KillNode,
    RestartNode,
    PauseNode,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum FaultsArg {
    /// Connections: the command's own clients go through proxies, which cut, hold, lose and slow down; safe on a shared server
    Proxy,
    /// The server, by --restart-command, --pause-command, --fill-command and --lock-out-command, and what undoes them; the nodes of a
    /// cluster by those with --nodes
    Process,
    /// Processes that the command starts to publish and to consume: they are killed; safe on a shared server
    Clients,
    /// Nothing: those cases are not run
    None,
}

#[derive(Debug, Args)]
pub(crate) struct SweepArgs {
    /// Only of runs that began at least that long ago; a younger one may be going on
    #[arg(long, value_name = "DURATION", value_parser = duration, default_value = "1d")]
    pub(crate) older_than: Duration,
    /// Only list what would be deleted
    #[arg(long)]
    pub(crate) dry_run: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ConformCommand {
    /// Delete what runs that were killed have left behind
    ///
    /// Lists the endpoint's destinations and deletes those whose names have the form that only the suite gives
    /// (conform-TIME-RANDOM.CASE.…). The time in the name, when the run began, says how old they are.
    Sweep(SweepArgs),
    /// What a process does that the suite kills: it is started by the suite, and by nobody else
    #[command(hide = true)]
    Child,
    /// Reports that runs have left behind: put them side by side, compare two, or print the form
    #[command(subcommand)]
    Report(ReportCommand),
}

#[derive(Debug, Subcommand)]
pub(crate) enum ReportCommand {
    /// Put the reports of several endpoints side by side, in one page and one file
    Merge {
        /// report.json of each run, or of earlier merges
        #[arg(required = true, value_name = "FILE")]
        files: Vec<PathBuf>,
        /// Where report.html, report.json, report.txt and junit.xml are written
        #[arg(long, value_name = "DIR")]
        to: PathBuf,
    },
    /// What changed from one run to another; the exit code is 1 where something that held does not any more
    Compare {
        /// report.json of the earlier run
        before: PathBuf,
        /// report.json of the later run
        after: PathBuf,
        /// Also write it as a page
        #[arg(long, value_name = "FILE")]
        html: Option<PathBuf>,
    },
    /// Print the JSON Schema of report.json
    Schema {
        /// That of the merged report
        #[arg(long)]
        merged: bool,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum LevelArg {
    /// A live endpoint, without faults
    #[value(alias = "L1", alias = "l1")]
    Conformance,
    /// Faults: killed processes, cut connections
    #[value(alias = "L2", alias = "l2")]
    Reliability,
    /// Minutes of time: windows, heartbeats and many leases outlived; clusters whose nodes go one by one
    #[value(alias = "L3", alias = "l3")]
    Long,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ConfigCommand {
    /// The JSON Schema of a configuration file for the brokers in this build
    Schema,
    /// Check the settings, without connecting unless asked to
    Check(CheckArgs),
}

#[derive(Debug, Args)]
pub(crate) struct CheckArgs {
    /// Also connect, and check `require` against the endpoint's capability record
    #[arg(long)]
    pub(crate) connect: bool,
}

fn advertised(text: &str) -> Result<Route, String> {
    let route: Route = text.parse()?;
    if route.listen.is_some() { Ok(route) } else { Err("expected LISTEN=UPSTREAM, two addresses with ports".into()) }
}

fn cannot(text: &str) -> Result<(ServerFault, String), String> {
    let expected = "expected restart=WHY, pause=WHY, fill=WHY, lock-out=WHY, nodes=WHY, kill-node=WHY, restart-node=WHY or \
                    pause-node=WHY";
    let (fault, why) = text.split_once('=').filter(|(_, why)| !why.trim().is_empty()).ok_or(expected)?;
    Ok((ServerFault::from_str(fault, false).map_err(|_| expected)?, why.trim().to_owned()))
}

fn duration(text: &str) -> Result<Duration, String> {
    humantime::parse_duration(text).map_err(|_| "expected a duration with a unit, such as 250ms, 30s or 5m".into())
}

fn time(text: &str) -> Result<Timestamp, String> {
    if text == "now" {
        return Ok(Timestamp::now());
    }
    if let Ok(ago) = humantime::parse_duration(text) {
        let ago = i64::try_from(ago.as_millis()).unwrap_or(i64::MAX);
        return Ok(Timestamp::from_millis(Timestamp::now().as_millis().saturating_sub(ago)));
    }
    text.parse().map_err(|_| {
        "expected a time such as 2026-11-21T10:00:00Z, `now`, or a duration such as 15m that means so long ago".into()
    })
}

fn start(text: &str) -> Result<Start, String> {
    Ok(match (text, text.strip_prefix("position:")) {
        ("earliest", _) => Start::Earliest,
        ("latest", _) => Start::Latest,
        (_, Some(position)) => {
            Start::Position(position.parse().map_err(|_| "expected position:N or position:N:M".to_owned())?)
        }
        _ => Start::Time(time(text).map_err(|problem| format!("earliest, latest, position:N, or: {problem}"))?),
    })
}

fn pair(text: &str, what: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        // The text is not repeated by us: the value may be a secret.
        _ => Err(format!("expected {what}")),
    }
}

fn header(text: &str) -> Result<(String, String), String> {
    pair(text, "NAME=VALUE")
}

fn setting(text: &str) -> Result<(String, String), String> {
    pair(text, "KEY=VALUE")
}

fn rate(text: &str) -> Result<f64, String> {
    f64::from_str(text)
        .ok()
        .filter(|rate| rate.is_finite() && *rate > 0.0)
        .ok_or_else(|| "expected a number above 0 (letters each second)".into())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Invocation::command().debug_assert();
    }

    #[test]
    fn a_time_is_a_moment_or_so_long_ago() {
        assert_eq!(time("2026-01-01T00:00:00Z"), Ok(Timestamp::from_millis(1_767_225_600_000)));
        let before = Timestamp::now();
        let an_hour_ago = time("1h").expect("a duration");
        let after = Timestamp::now();
        assert!(before.since(an_hour_ago) <= Duration::from_secs(3600), "{an_hour_ago:?} {before:?}");
        assert!(after.since(an_hour_ago) >= Duration::from_secs(3600), "{an_hour_ago:?} {after:?}");
        assert!(time("yesterday").is_err());
    }

    #[test]
    fn a_number_without_unit_is_no_duration() {
        assert!(duration("10").is_err());
        assert_eq!(duration("10s"), Ok(Duration::from_secs(10)));
    }

    #[test]
    fn a_start_is_a_word_a_time_or_a_position() {
        assert_eq!(start("latest"), Ok(Start::Latest));
        assert_eq!(start("position:7"), Ok(Start::Position(anybroker::Position::new(7))));
        assert!(matches!(start("5m"), Ok(Start::Time(_))));
        assert!(start("position:x").is_err() && start("first").is_err());
    }

    #[test]
    fn a_header_value_may_hold_an_equals_sign() {
        assert_eq!(header("a=b=c"), Ok(("a".to_owned(), "b=c".to_owned())));
        assert!(header("=b").is_err() && header("a").is_err());
    }

    #[test]
    fn a_rate_is_above_zero() {
        assert_eq!(rate("0.5"), Ok(0.5));
        assert!(["0", "-1", "NaN", "inf", "x"].iter().all(|text| rate(text).is_err()));
    }
}

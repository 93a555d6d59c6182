//! The `anybroker` command: the same verbs and flags on every broker.

mod args;
mod conform;
mod conform_faults;
mod conform_report;
mod conform_sweep;
mod connect;
mod consume;
mod dlq;
mod exit;
mod input;
mod interrupt;
mod json;
mod lag;
mod output;
mod progress;
mod publish;
mod topology;

use std::process::ExitCode;

use clap::{CommandFactory, Parser};

use crate::args::{Command, ConfigCommand, Invocation};
use crate::exit::{Exit, Failure};
use crate::output::Output;

fn main() -> ExitCode {
    let invocation = match Invocation::try_parse() {
        Ok(invocation) => invocation,
        Err(error) => return refuse_usage(&error),
    };
    let json = invocation.global.json;
    log_to_stderr(json);
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return Failure::Io("start the runtime", error).report(json),
    };
    let outcome = runtime.block_on(run(invocation));
    // A reader of standard input may still block in its thread; nothing waits for it.
    runtime.shutdown_background();
    match outcome {
        Ok(exit) => exit.into(),
        Err(failure) => failure.report(json),
    }
}

async fn run(invocation: Invocation) -> Result<Exit, Failure> {
    let Invocation { global, command } = invocation;
    let mut output = Output::new(global.json);
    match command {
        Command::Publish(args) => publish::run(&global, args, &mut output).await,
        Command::Consume(args) => consume::run(&global, args, &mut output).await,
        Command::Dlq(command) => dlq::run(&global, command, &mut output).await,
        Command::Lag(args) => lag::run(&global, args, &mut output).await,
        Command::Capabilities => topology::capabilities(&global, &mut output).await,
        Command::Declare(args) => topology::declare(&global, args, &mut output).await,
        Command::Describe(args) => topology::describe(&global, args, &mut output).await,
        Command::Delete(args) => topology::delete(&global, args, &mut output).await,
        Command::Conform(args) => conform::run(&global, *args, &mut output).await,
        Command::Config(ConfigCommand::Schema) => connect::schema(&mut output),
        Command::Config(ConfigCommand::Check(args)) => connect::check(&global, args, &mut output).await,
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Invocation::command(), "anybroker", &mut script);
            output.raw(&script)?;
            output.flush()?;
            Ok(Exit::Done)
        }
    }
}

/// Help and version are no failures; with `--json` a mistake is told as an object, like every other error.
fn refuse_usage(error: &clap::Error) -> ExitCode {
    let json = std::env::args_os().any(|argument| argument == "--json");
    if error.use_stderr() && json {
        let text = error.render().to_string();
        let first = text.split("\n\n").next().unwrap_or_default().trim().trim_start_matches("error: ");
        return Failure::Usage(first.split_whitespace().collect::<Vec<_>>().join(" ")).report(true);
    }
    // The exit code stays right where the text cannot be written.
    let _ = error.print();
    if error.use_stderr() { Exit::Usage.into() } else { Exit::Done.into() }
}

/// `ANYBROKER_LOG=debug` (or `anybroker_kafka=trace,…`) tells what happens inside; nothing otherwise.
fn log_to_stderr(json: bool) {
    let Ok(directives) = std::env::var("ANYBROKER_LOG") else { return };
    let subscriber = tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_env_filter(tracing_subscriber::EnvFilter::new(directives));
    if json {
        subscriber.json().init();
    } else {
        subscriber.init();
    }
}

//! Other programs, run in the foreground: ended with everything they started when an interrupt comes.

use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process_group};

use crate::interrupt;

/// What a `cargo` that runs this program sets for it alone. Handed on, some of it makes build scripts run again.
const SET_BY_CARGO_RUN: &[&str] =
    &["CARGO", "CARGO_MANIFEST_DIR", "CARGO_MANIFEST_PATH", "CARGO_BIN_NAME", "CARGO_CRATE_NAME"];

/// How long a program may take to end after it was asked to: a run of the suite deletes what it created.
const GRACE: Duration = Duration::from_secs(60);

/// `cargo` with `arguments`, to be run in the current folder.
pub(crate) fn cargo<S: AsRef<std::ffi::OsStr>>(arguments: impl IntoIterator<Item = S>) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(arguments);
    clean(&mut command);
    command
}

/// Takes away what the outer cargo has set; see [`SET_BY_CARGO_RUN`].
pub(crate) fn clean(command: &mut Command) {
    for name in SET_BY_CARGO_RUN {
        command.env_remove(name);
    }
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("CARGO_PKG_") {
            command.env_remove(name);
        }
    }
}

/// Runs `command` to its end; an error unless it succeeds within `limit`.
pub(crate) fn run(command: &mut Command, limit: Duration) -> Result<()> {
    let line = describe(command);
    println!("$ {line}");
    let status = wait(command, limit)?;
    ensure!(status.success(), "`{line}` failed ({status})");
    Ok(())
}

/// Standard output of `command`, as text; an error unless it succeeds.
pub(crate) fn output_of(command: &mut Command) -> Result<String> {
    let line = describe(command);
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("could not start `{line}`"))?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "`{line}` failed ({}): {}", output.status, errors.trim());
    String::from_utf8(output.stdout).with_context(|| format!("`{line}` printed something that is not UTF-8"))
}

/// Like [`run`], with the exit status for the caller to judge.
pub(crate) fn watched(command: &mut Command, limit: Duration) -> Result<ExitStatus> {
    println!("$ {}", describe(command));
    wait(command, limit)
}

/// Like [`run`], without output, and with the exit status for the caller to judge.
pub(crate) fn quietly(command: &mut Command, limit: Duration) -> Result<ExitStatus> {
    wait(command.stdout(Stdio::null()).stderr(Stdio::null()), limit)
}

/// Waits for `command`, and ends it with all that it started when `limit` is over or an interrupt comes.
pub(crate) fn wait(command: &mut Command, limit: Duration) -> Result<ExitStatus> {
    let line = describe(command);
    // Its own group, so that one signal reaches all that it started and Ctrl-C comes to it through us, once.
    let mut child =
        command.process_group(0).stdin(Stdio::null()).spawn().with_context(|| format!("could not start `{line}`"))?;
    let status = interrupt::poll(limit, || Ok(child.try_wait()?));
    if let Ok(Some(status)) = status {
        return Ok(status);
    }
    let group = i32::try_from(child.id()).ok().and_then(Pid::from_raw).context("a child without a pid")?;
    let _ = kill_process_group(group, Signal::TERM);
    let until = Instant::now() + GRACE;
    while child.try_wait()?.is_none() && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(50));
    }
    let _ = kill_process_group(group, Signal::KILL);
    child.wait()?;
    status?;
    bail!("`{line}` did not end within {} minutes", limit.as_secs() / 60)
}

fn describe(command: &Command) -> String {
    let program = PathBuf::from(command.get_program());
    let program = program.file_name().unwrap_or_default().to_string_lossy().into_owned();
    std::iter::once(program)
        .chain(command.get_args().map(|argument| argument.to_string_lossy().into_owned()))
        .collect::<Vec<_>>()
        .join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failure_and_lateness_are_errors_that_name_the_command() {
        let limit = Duration::from_secs(10);
        run(&mut Command::new("true"), limit).unwrap();
        let failed = run(Command::new("sh").args(["-c", "exit 3"]), limit).unwrap_err().to_string();
        assert!(failed.contains("exit 3") && failed.contains("status: 3"), "{failed}");
        let late = run(Command::new("sleep").arg("60"), Duration::from_millis(100)).unwrap_err().to_string();
        assert!(late.contains("did not end"), "{late}");
    }
}

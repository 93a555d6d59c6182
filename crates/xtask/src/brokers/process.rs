//! A server process that outlives the command which started it: started in its own process group, known again by pid
//! *and* start time, so that a recycled pid is never signalled.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process_group};
use serde::{Deserialize, Serialize};

/// What the operating system says about a recorded process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Condition {
    /// It runs.
    Running,
    /// It was stopped by a signal and holds its sockets open.
    Paused,
    /// It has ended, or its pid belongs to another process by now.
    Gone,
}

/// A process that was started here, as it is written to the pid file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Process {
    /// Its pid, which is its process group as well.
    pub(crate) pid: i32,
    /// Boot and start time: no two processes of one machine share pid and birth.
    birth: String,
}

impl Process {
    /// Starts `command` detached: its own process group, no stdin, all output appended to `log`.
    pub(crate) fn spawn(command: &mut Command, log: &Path) -> Result<Self> {
        use std::os::unix::process::CommandExt as _;

        let output = fs::File::options().create(true).append(true).open(log)?;
        let child = command
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output)
            .spawn()
            .with_context(|| format!("could not start {}", command.get_program().display()))?;
        let pid = i32::try_from(child.id()).context("a pid that does not fit into an i32")?;
        match observe(pid) {
            Some(seen) => Ok(Self { pid, birth: seen.birth }),
            None => bail!("process {pid} ended at once"),
        }
    }

    /// Whether it still is the process that was started.
    pub(crate) fn condition(&self) -> Condition {
        match observe(self.pid) {
            Some(seen) if seen.birth == self.birth => seen.condition,
            _ => Condition::Gone,
        }
    }

    /// Sends `signal` to its whole process group; does nothing when the process is gone.
    pub(crate) fn signal(&self, signal: Signal) -> Result<()> {
        if self.condition() == Condition::Gone {
            return Ok(());
        }
        let group = Pid::from_raw(self.pid).context("pid 0 in a pid file")?;
        match kill_process_group(group, signal) {
            // It ended between the look and the signal.
            Err(rustix::io::Errno::SRCH) => Ok(()),
            other => other.with_context(|| format!("signal {} to process group {}", signal.as_raw(), self.pid)),
        }
    }
}

struct Seen {
    birth: String,
    condition: Condition,
}

/// Linux: `/proc/<pid>/stat`, whose fields 3 and 22 are state and start time in ticks since boot (proc_pid_stat(5)).
#[cfg(target_os = "linux")]
fn observe(pid: i32) -> Option<Seen> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is the command in brackets and may itself hold blanks and brackets.
    let mut fields = stat.get(stat.rfind(')')? + 1..)?.split_whitespace();
    let state = fields.next()?;
    let start = fields.nth(18)?;
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    Some(Seen { birth: format!("{}:{start}", boot.trim()), condition: condition_of(state) })
}

/// Elsewhere: what `ps` knows, to the second.
#[cfg(not(target_os = "linux"))]
fn observe(pid: i32) -> Option<Seen> {
    let output = Command::new("ps").args(["-o", "state=,lstart=", "-p", &pid.to_string()]).output().ok()?;
    let line = String::from_utf8(output.stdout).ok()?;
    let (state, start) = line.trim().split_once(char::is_whitespace)?;
    Some(Seen { birth: start.trim().to_owned(), condition: condition_of(state) })
}

/// A zombie has ended: only its parent's `wait` is missing.
fn condition_of(state: &str) -> Condition {
    match state.as_bytes().first() {
        Some(b'Z' | b'X') => Condition::Gone,
        Some(b'T' | b't') => Condition::Paused,
        _ => Condition::Running,
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    fn wait_for(process: &Process, wanted: Condition) {
        let deadline = Instant::now() + Duration::from_secs(10);
        while process.condition() != wanted {
            assert!(Instant::now() < deadline, "never became {wanted:?}: {:?}", process.condition());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    #[test]
    fn a_process_is_seen_running_paused_running_and_gone() {
        let folder = tempfile::tempdir().unwrap();
        let process = Process::spawn(Command::new("sleep").arg("60"), &folder.path().join("log")).unwrap();
        wait_for(&process, Condition::Running);
        process.signal(Signal::STOP).unwrap();
        wait_for(&process, Condition::Paused);
        process.signal(Signal::CONT).unwrap();
        wait_for(&process, Condition::Running);
        process.signal(Signal::KILL).unwrap();
        wait_for(&process, Condition::Gone);
        process.signal(Signal::KILL).unwrap();
    }

    #[test]
    fn a_recycled_pid_is_not_ours_and_is_not_signalled() {
        let folder = tempfile::tempdir().unwrap();
        let stranger = Process::spawn(Command::new("sleep").arg("60"), &folder.path().join("log")).unwrap();
        let ours = Process { pid: stranger.pid, birth: "another boot:1".to_owned() };
        assert_eq!(ours.condition(), Condition::Gone);
        ours.signal(Signal::KILL).unwrap();
        assert_eq!(stranger.condition(), Condition::Running);
        stranger.signal(Signal::KILL).unwrap();
        wait_for(&stranger, Condition::Gone);
    }
}

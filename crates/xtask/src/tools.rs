//! Programs and headers that the workspace and its brokers need beside Rust.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, bail};

use crate::child;
use crate::report::Verdict;

/// Installing all of them, over a slow line.
const LIMIT: Duration = Duration::from_secs(20 * 60);

/// Something that has to be on this machine.
struct Tool {
    /// The name of Debian's package.
    package: &'static str,
    is_there: fn() -> bool,
    /// Nothing is built with it: what it is for says that it was not run without it. Most of these are for real brokers.
    for_brokers: bool,
}

const fn built_with(package: &'static str, is_there: fn() -> bool) -> Tool {
    Tool { package, is_there, for_brokers: false }
}

const fn run_with(package: &'static str, is_there: fn() -> bool) -> Tool {
    Tool { package, is_there, for_brokers: true }
}

/// librdkafka's configure and make and the libraries that it links, the Pulsar client's protocol compiler; Java, Maven, Go
/// and Python for the brokers.
const TOOLS: &[Tool] = &[
    built_with("build-essential", || ["cc", "c++", "make"].iter().all(|name| on_path(name))),
    built_with("cmake", || on_path("cmake")),
    built_with("git", || on_path("git")),
    built_with("python3-minimal", || on_path("python3")),
    built_with("pkg-config", || on_path("pkg-config")),
    built_with("libssl-dev", || has_library("libssl", "/usr/include/openssl/ssl.h")),
    built_with("zlib1g-dev", || has_library("zlib", "/usr/include/zlib.h")),
    built_with("protobuf-compiler", || on_path("protoc")),
    // The embedded broker's power losses.
    run_with("strace", || on_path("strace")),
    run_with("openssl", || on_path("openssl")),
    run_with("default-jre-headless", || on_path("java")),
    run_with("maven", || on_path("mvn")),
    run_with("mmdebstrap", || on_path("mmdebstrap")),
    run_with("python3-venv", || succeeds("python3", &["-c", "import venv, ensurepip"])),
    // The first Go that fetches the toolchain that NATS asks for; older ones are of no use.
    run_with("golang-go", || on_path("go") || !debian_has("golang-go", "2:1.21")),
];

/// Sees to what is missing: installs it where that is possible without asking (as root, with apt-get), and says how
/// otherwise.
pub(crate) fn provide(with_brokers: bool) -> Result<Verdict> {
    let missing: Vec<&Tool> =
        TOOLS.iter().filter(|tool| (with_brokers || !tool.for_brokers) && !(tool.is_there)()).collect();
    if missing.is_empty() {
        return Ok(Verdict::Passed);
    }
    let names = |tools: &[&Tool]| tools.iter().map(|tool| tool.package).collect::<Vec<_>>().join(" ");
    if !rustix::process::geteuid().is_root() || !on_path("apt-get") {
        let needed: Vec<&Tool> = missing.iter().filter(|tool| !tool.for_brokers).copied().collect();
        if needed.is_empty() {
            // What a broker misses is told by its own line.
            return Ok(Verdict::NotRun(format!("for brokers: sudo apt-get install {}", names(&missing))));
        }
        bail!("something is missing that needs root: sudo apt-get install {}", names(&missing));
    }
    println!("installing {}", names(&missing));
    let apt = |arguments: &[&str]| {
        let mut command = Command::new("apt-get");
        command.args(arguments).env("DEBIAN_FRONTEND", "noninteractive");
        command
    };
    child::run(&mut apt(&["update", "-q"]), LIMIT)?;
    let mut install = apt(&["install", "-q", "-y", "--no-install-recommends"]);
    child::run(install.args(missing.iter().map(|tool| tool.package)), LIMIT)?;
    Ok(Verdict::Passed)
}

fn on_path(name: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| folder.join(name).is_file())
}

fn has_library(name: &str, header: &str) -> bool {
    succeeds("pkg-config", &["--exists", name]) || Path::new(header).exists()
}

/// Whether the package that apt would install is at least of that version.
fn debian_has(package: &str, least: &str) -> bool {
    let Ok(policy) = child::output_of(Command::new("apt-cache").args(["policy", package]).env("LC_ALL", "C")) else {
        return false;
    };
    let candidate = policy.lines().find_map(|line| line.trim().strip_prefix("Candidate: "));
    candidate.is_some_and(|version| {
        version.starts_with(|first: char| first.is_ascii_digit())
            && succeeds("dpkg", &["--compare-versions", version, "ge", least])
    })
}

fn succeeds(program: &str, arguments: &[&str]) -> bool {
    child::quietly(Command::new(program).args(arguments), Duration::from_secs(30)).is_ok_and(|status| status.success())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_on_the_path_is_found_and_what_is_not_is_missed() {
        assert!(on_path("sh") && succeeds("sh", &["-c", "true"]));
        assert!(!on_path("no-such-program") && !succeeds("no-such-program", &[]) && !succeeds("sh", &["-c", "false"]));
    }
}

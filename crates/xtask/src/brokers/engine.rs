//! The container engine, by its command line: `docker` or `podman`, whose arguments are the same for all that is needed here.
//! Why not a library: docs/decisions/0005.

use std::process::{Command, Output, Stdio};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Which one, when several are there; either would do.
const VARIABLE: &str = "CONTAINER_ENGINE";
const KNOWN: &[&str] = &["docker", "podman"];

/// A program that starts containers on this machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub(crate) struct Engine {
    program: String,
}

impl Engine {
    /// The one that `CONTAINER_ENGINE` names, otherwise the first that answers.
    pub(crate) fn find() -> Result<Self> {
        let given = std::env::var(VARIABLE).ok().filter(|program| !program.is_empty());
        let candidates = given.map_or_else(|| KNOWN.iter().map(|&name| name.to_owned()).collect(), |name| vec![name]);
        let mut why = Vec::new();
        for program in candidates {
            let engine = Self { program };
            // Docker's command is there without the daemon: this asks the engine itself.
            match engine.run(["ps", "--quiet"]) {
                Ok(_) => return Ok(engine),
                Err(error) => why.push(format!("{error:#}")),
            }
        }
        bail!("no container engine answers ({VARIABLE} names one): {}", why.join("; "))
    }

    /// `docker` or `podman`, or what the user has named.
    pub(crate) fn program(&self) -> &str {
        &self.program
    }

    /// An image's labels; none when it is not on this machine.
    pub(crate) fn labels_of_image(&self, image: &str) -> Result<Option<Value>> {
        self.inspect("image", image, "{{json .Config.Labels}}")
    }

    /// A container's state and labels; none when there is no container of that name.
    pub(crate) fn state_of(&self, container: &str) -> Result<Option<Value>> {
        self.inspect("container", container, "{\"state\":{{json .State}},\"labels\":{{json .Config.Labels}}}")
    }

    /// Standard output of the engine's command with `arguments`; an error unless it succeeds.
    pub(crate) fn run<S: AsRef<str>>(&self, arguments: impl IntoIterator<Item = S>) -> Result<String> {
        let arguments: Vec<String> = arguments.into_iter().map(|argument| argument.as_ref().to_owned()).collect();
        let output = self.output(&arguments)?;
        let what = arguments.first().map_or("", String::as_str);
        ensure!(output.status.success(), "{} {what}: {}", self.program, said(&output.stderr));
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// What the container wrote, both streams, at most its last `lines`.
    pub(crate) fn log(&self, container: &str, lines: &str) -> Result<Vec<u8>> {
        let output = self.output(&["logs".to_owned(), format!("--tail={lines}"), container.to_owned()])?;
        Ok([output.stdout, output.stderr].concat())
    }

    /// The engine's command with `arguments`, for a caller that feeds it.
    pub(crate) fn command(&self) -> Command {
        Command::new(&self.program)
    }

    fn output(&self, arguments: &[String]) -> Result<Output> {
        let output = self.command().args(arguments).stdin(Stdio::null()).output();
        output.with_context(|| format!("could not start {}", self.program))
    }

    fn inspect(&self, what: &str, name: &str, format: &str) -> Result<Option<Value>> {
        match self.run([what, "inspect", "--format", format, name]) {
            Ok(text) => {
                let value = serde_json::from_str(text.trim());
                value.map(Some).with_context(|| format!("{} describes {name} as: {text}", self.program))
            }
            // It says so in words only. An engine that answers knows no such thing; one that does not is an error.
            Err(error) => self.run(["ps", "--quiet"]).map(|_| None).context(error),
        }
    }
}

fn said(stderr: &[u8]) -> String {
    let text = String::from_utf8_lossy(stderr);
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    lines.join("; ")
}

/// With the registry that Docker takes for granted and Podman does not: `nats:2` is `docker.io/library/nats:2`.
pub(crate) fn qualified(image: &str) -> String {
    match image.split_once('/') {
        None => format!("docker.io/library/{image}"),
        Some((first, _)) if first == "localhost" || first.contains(['.', ':']) => image.to_owned(),
        Some(_) => format!("docker.io/{image}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_is_named_with_its_registry_so_that_both_engines_mean_the_same() {
        assert_eq!(qualified("nats:2.15.2"), "docker.io/library/nats:2.15.2");
        assert_eq!(qualified("apache/kafka:4.3.1"), "docker.io/apache/kafka:4.3.1");
        assert_eq!(qualified("quay.io/x/y:1"), "quay.io/x/y:1");
        assert_eq!(qualified("mirror:5000/x:1"), "mirror:5000/x:1");
        assert_eq!(qualified("localhost/x:1"), "localhost/x:1");
    }

    #[test]
    fn an_engine_that_cannot_be_started_is_an_error_and_not_an_absent_container() {
        let engine = Engine { program: "/nonexistent/engine".to_owned() };
        assert!(engine.state_of("anybroker-dev-kafka").is_err());
        assert!(engine.labels_of_image("nats:2").is_err());
    }
}

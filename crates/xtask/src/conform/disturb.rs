//! What the suite's command is told of a server, so that it can disturb it.

use std::path::Path;

use anyhow::{Context, Result};

use crate::brokers::{Change, PrivateInstance};

/// The arguments by which `anybroker conform` disturbs the connections to a server, its own clients, and the server itself where
/// that is this command's own; with `nodes` also the nodes of a cluster, which takes the level `long`. Empty for what has no server.
pub(crate) fn arguments(instance: &PrivateInstance, broker: Option<&str>, nodes: bool) -> Result<Vec<String>> {
    let Some(broker) = broker else { return Ok(Vec::new()) };
    let of_nodes = if nodes { of_nodes(instance, broker)? } else { Vec::new() };
    Ok([of_connections(instance, broker)?, of_server(instance, broker)?, of_nodes].concat())
}

/// Those that disturb connections and clients only. No proxy stands in front of a cluster: its nodes tell clients of each other.
pub(crate) fn of_connections(instance: &PrivateInstance, broker: &str) -> Result<Vec<String>> {
    if instance.server(broker)?.is_some_and(|server| server.nodes() > 1) {
        return Ok(vec!["--faults".to_owned(), "clients".to_owned()]);
    }
    let mut arguments = vec!["--faults".to_owned(), "proxy,clients".to_owned()];
    arguments.extend(advertised(instance, broker)?.into_iter().flat_map(|route| ["--proxy".to_owned(), route]));
    Ok(arguments)
}

/// Those that disturb the server only; empty where it is not this command's own.
pub(crate) fn of_server(instance: &PrivateInstance, broker: &str) -> Result<Vec<String>> {
    let Some(server) = instance.server(broker)? else { return Ok(Vec::new()) };
    let mut arguments = Vec::new();
    let own = std::env::current_exe().context("this command has a path")?;
    let does = |verb: &str| line(&own, instance, verb, broker);
    arguments.extend(["--faults".to_owned(), "process".to_owned()]);
    arguments.extend(["--pause-command".to_owned(), does("pause")]);
    arguments.extend(["--resume-command".to_owned(), does("resume")]);
    let cannot = |fault: &str, why: &str| ["--cannot".to_owned(), format!("{fault}={why}")];
    match server.keeps_data() {
        true => {
            arguments.extend(["--kill-command".to_owned(), does("kill")]);
            arguments.extend(["--restart-command".to_owned(), does("restart")]);
        }
        false => arguments.extend(cannot("restart", "the server forgets everything when it is killed")),
    }
    match server.obstacle(Change::Fill)? {
        None => arguments.extend([
            "--fill-command".to_owned(),
            does("fill"),
            "--relieve-command".to_owned(),
            does("relieve"),
        ]),
        Some(why) => arguments.extend(cannot("fill", &why)),
    }
    match server.obstacle(Change::LockOut)? {
        None => {
            arguments.extend(["--lock-out-command".to_owned(), does("lock-out")]);
            arguments.extend(["--let-in-command".to_owned(), does("let-in")]);
        }
        Some(why) => arguments.extend(cannot("lock-out", &why)),
    }
    Ok(arguments)
}

/// Those that disturb the nodes of a cluster one by one; empty for a single server.
fn of_nodes(instance: &PrivateInstance, broker: &str) -> Result<Vec<String>> {
    let Some(server) = instance.server(broker)?.filter(|server| server.nodes() > 1) else { return Ok(Vec::new()) };
    let own = std::env::current_exe().context("this command has a path")?;
    let mut arguments = vec!["--nodes".to_owned(), server.nodes().to_string()];
    for verb in ["kill", "restart", "pause", "resume"] {
        let line = format!("{} --node \"$NODE\"", line(&own, instance, verb, broker));
        arguments.extend([format!("--{verb}-node-command"), line]);
    }
    Ok(arguments)
}

fn line(own: &Path, instance: &PrivateInstance, verb: &str, broker: &str) -> String {
    format!("{} brokers --instance {} {verb} {broker}", quoted(own), instance.name())
}

/// `LISTEN=UPSTREAM` of a server of this instance that tells its clients to come to `LISTEN`, where a proxy may stand.
pub(crate) fn advertised(instance: &PrivateInstance, broker: &str) -> Result<Option<String>> {
    let Some(server) = instance.server(broker)? else { return Ok(None) };
    let ports = server.ports()?;
    let pair = ports.get("proxy").zip(ports.get("proxied"));
    Ok(pair.map(|(listen, upstream)| format!("127.0.0.1:{listen}=127.0.0.1:{upstream}")))
}

/// As one word for sh.
fn quoted(path: &Path) -> String {
    format!("'{}'", path.display().to_string().replace('\'', "'\\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_one_word_for_sh() {
        for path in ["/a b/c", "/it's", "/$x"] {
            let line = format!("printf %s {}", quoted(path.as_ref()));
            let output = std::process::Command::new("sh").arg("-c").arg(line).output().unwrap();
            assert_eq!(String::from_utf8(output.stdout).unwrap(), path);
        }
    }
}

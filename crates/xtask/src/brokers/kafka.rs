//! Apache Kafka: one KRaft node that is broker and controller, replication factors of one.
//!
//! Beside the plain listener there are one with passwords and one with passwords and TLS. Tests read their addresses in
//! `server.properties` and the certificate to trust in `ca.pem`, both in the server's folder. `alice` may do everything, `limited`
//! nothing; a test makes `rotated`, who may do everything. Who comes by the plain listener may do everything too, until it is locked out.
//!
//! A last listener, PROXIED, sends its clients to another port, where a test may put a proxy: Kafka's clients follow the
//! advertised address, and would go round a proxy that is not behind it.

pub(crate) mod cluster;
mod wire;

use std::fs::{self, File};
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use super::java::{self, Artefact};
use super::stand_ins::Contents;
use super::{Change, Contained, Process, Recipe, Site, StandIn};
use wire::{Permission, Wire};

const VERSION: &str = "4.3.1";
const ARTEFACTS: &[Artefact] =
    &[("org.apache.kafka", "kafka_2.13", VERSION), ("org.apache.logging.log4j", "log4j-slf4j-impl", "2.24.3")];

/// Who may log in: name and password. They guard nothing: the broker listens on the loopback interface only.
const USERS: &[(&str, &str)] = &[("alice", "alice-secret"), ("limited", "limited-secret")];
/// Who shows no password: the suite's clients, and the broker itself towards its controller.
const ANYBODY: &str = "User:ANONYMOUS";
/// What clients work with.
const CLIENTS: [(u8, &str); 3] = [(wire::TOPIC, "*"), (wire::GROUP, "*"), (wire::TRANSACTIONAL_ID, "*")];
/// How long the controller of a busy machine may take for a permission.
const CHANGED_WITHIN: Duration = Duration::from_secs(20);
const STORE: &str = "server.p12";
const STORE_PASSWORD: &str = "loopback";
/// Where the official image has Kafka's programs.
const PROGRAMS: &str = "/opt/kafka/bin";

/// The broker of the `kafka://` scheme.
pub(crate) struct Kafka;

impl Recipe for Kafka {
    fn name(&self) -> &'static str {
        "kafka"
    }

    fn version(&self) -> &'static str {
        "Kafka 4.3.1"
    }

    fn port_names(&self) -> &'static [&'static str] {
        &["clients", "controller", "sasl", "sasl-tls", "proxied", "proxy"]
    }

    fn is_port_of_tests(&self, name: &str) -> bool {
        name == "proxy"
    }

    fn url(&self, ports: &[u16]) -> String {
        format!("kafka://127.0.0.1:{}", ports[0])
    }

    fn install(&self, cache: &Path) -> Result<PathBuf> {
        java::fetch_jars(cache, &format!("kafka-{VERSION}"), ARTEFACTS)
    }

    fn prepare(&self, site: &Site<'_>) -> Result<()> {
        let data = site.folder.join("data");
        fs::write(properties_file(site), properties(site, &data))?;
        if data.join("meta.properties").exists() {
            return Ok(());
        }
        fs::create_dir_all(&data)?;
        make_certificate(site)?;
        let log = site.folder.join("format.log");
        let output = File::create(&log)?;
        let mut command = java::java(site.home, 128);
        command
            .args(["kafka.tools.StorageTool", "format", "--cluster-id", &cluster_id()?, "--config"])
            .arg(properties_file(site));
        command.args(scram());
        let status = command
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output)
            .status()
            .context("could not start java")?;
        ensure!(status.success(), "kafka's storage could not be formatted ({status}): see {}", log.display());
        Ok(())
    }

    fn command(&self, site: &Site<'_>) -> Command {
        let mut command = java::java(site.home, 512);
        // log4j's built-in configuration writes to standard output; only its level is changed.
        command.args(["-Dlog4j2.level=INFO", "kafka.Kafka"]).arg(properties_file(site));
        command
    }

    fn image(&self) -> &'static str {
        "apache/kafka:4.3.1"
    }

    fn prepare_contained(&self, site: &Site<'_>) -> Result<()> {
        let data = site.folder.join("data");
        fs::create_dir_all(&data)?;
        fs::write(properties_file(site), properties(site, &data))?;
        Ok(fs::write(script_file(site), script(site)?)?)
    }

    fn contained(&self, site: &Site<'_>) -> Contained {
        Contained {
            entrypoint: Some("bash".to_owned()),
            arguments: vec![script_file(site).display().to_string()],
            environment: vec![
                ("KAFKA_HEAP_OPTS", "-Xmx512m".to_owned()),
                ("KAFKA_JVM_PERFORMANCE_OPTS", "-XX:+UseSerialGC -XX:TieredStopAtLevel=1".to_owned()),
                ("LOG_DIR", site.folder.join("log").display().to_string()),
            ],
            ..Contained::default()
        }
    }

    fn stand_in(&self) -> Option<StandIn> {
        let program = |class: &str| {
            let java =
                "exec java $KAFKA_HEAP_OPTS $KAFKA_JVM_PERFORMANCE_OPTS -Dlog4j2.level=INFO -cp '/opt/kafka/libs/*'";
            format!("#!/bin/sh\n{java} {class} \"$@\"\n")
        };
        let scripts = vec![
            ("/opt/kafka/bin/kafka-server-start.sh", program("kafka.Kafka")),
            ("/opt/kafka/bin/kafka-storage.sh", program("kafka.tools.StorageTool")),
        ];
        Some(StandIn { contents: Contents::Folder("/opt/kafka/libs"), scripts, entrypoint: &["bash"] })
    }

    fn changes(&self) -> &'static [Change] {
        &[Change::LockOut, Change::LetIn]
    }

    fn cannot(&self, change: Change) -> Option<&'static str> {
        // A quota delays answers and sends no error (its documentation, "Quotas"). A log folder that cannot be written any more is
        // given up, and with the last one the broker ends (4.3.1, LogManager.scala, `handleLogDirFailure`: "Shutdown broker because
        // all log dirs in … have failed"), which is the fault of a server that is killed.
        let is_of_room = matches!(change, Change::Fill | Change::Relieve);
        is_of_room
            .then_some("a quota of Kafka slows its clients down and refuses nothing, and a full disk ends the broker")
    }

    /// By permissions: one that denies is stronger than one that allows (its documentation, "Authorization and ACLs"), and is looked
    /// for with every request, so that it meets those who are connected too. The cluster stays open: the broker itself registers
    /// there, and by it clients without a password may take the denial back.
    fn change(&self, site: &Site<'_>, _: &Process, change: Change) -> Result<()> {
        let mut wire = Wire::connect(site.ports[0], CHANGED_WITHIN)?;
        match change {
            Change::LockOut => wire.add(ANYBODY, &CLIENTS, Permission::Deny),
            Change::LetIn => wire.remove(ANYBODY, &CLIENTS, Permission::Deny),
            Change::Fill | Change::Relieve => bail!("Kafka has nothing that refuses what is published"),
        }
    }

    /// Whatever has a permission is closed to those who have none: from now on `limited` may do nothing.
    fn grant(&self, site: &Site<'_>) -> Result<()> {
        let mut wire = Wire::connect(site.ports[0], CHANGED_WITHIN)?;
        wire.add(ANYBODY, &CLIENTS, Permission::Allow)?;
        wire.add(ANYBODY, &[(wire::CLUSTER, "kafka-cluster")], Permission::Allow)
    }

    /// An open port alone proves little: the listener opens before the broker has registered.
    fn probe(&self, ports: &[u16]) -> Result<()> {
        let brokers = Wire::connect(ports[0], Duration::from_secs(1))?.registered_brokers()?;
        ensure!(brokers > 0, "it answers, but has not registered itself with its controller yet");
        Ok(())
    }
}

fn properties_file(site: &Site<'_>) -> PathBuf {
    site.folder.join("server.properties")
}

fn script_file(site: &Site<'_>) -> PathBuf {
    site.folder.join("start.sh")
}

/// A certificate for `localhost` that is its own authority. Not for 127.0.0.1: that is the wrong host of the tests.
fn make_certificate(site: &Site<'_>) -> Result<()> {
    let _ = fs::remove_file(site.folder.join(STORE));
    for arguments in certificate(site.folder) {
        let output = Command::new("keytool")
            .args(arguments)
            .stdin(Stdio::null())
            .output()
            .context("could not start keytool, which belongs to the JDK")?;
        ensure!(output.status.success(), "keytool failed: {}", String::from_utf8_lossy(&output.stdout));
    }
    Ok(())
}

/// Twice the arguments of `keytool`.
fn certificate(folder: &Path) -> [Vec<String>; 2] {
    let own = |name: &str| folder.join(name).display().to_string();
    let in_store = |arguments: &str| -> Vec<String> {
        let store = format!("{arguments} -alias kafka -storetype PKCS12 -storepass {STORE_PASSWORD} -keystore");
        store.split(' ').map(str::to_owned).chain([own(STORE)]).collect()
    };
    let names = "-ext san=dns:localhost -ext bc:c=ca:true";
    let make = in_store(&format!("-genkeypair -keyalg EC -dname CN=localhost -validity 3650 {names}"));
    let mut export = in_store("-exportcert -rfc");
    export.extend(["-file".to_owned(), own("ca.pem")]);
    [make, export]
}

/// Arguments of Kafka's storage tool: one for each user and mechanism.
fn scram() -> Vec<String> {
    let of = |(user, password): &(&str, &str)| {
        ["SCRAM-SHA-256", "SCRAM-SHA-512"].map(|mechanism| format!("{mechanism}=[name={user},password={password}]"))
    };
    USERS.iter().flat_map(of).flat_map(|user| ["--add-scram".to_owned(), user]).collect()
}

/// What natively is done before the start, done in the container: the official image has Java and Kafka's programs.
fn script(site: &Site<'_>) -> Result<String> {
    let quoted = |words: &[String]| words.iter().map(|word| format!("'{word}'")).collect::<Vec<_>>().join(" ");
    let [make, export] = certificate(site.folder).map(|arguments| quoted(&arguments));
    let folder = site.folder.display();
    let properties = properties_file(site);
    let properties = properties.display();
    Ok(format!(
        "set -e
if [ ! -f '{folder}/data/meta.properties' ]; then
  rm -f '{folder}/{STORE}'
  keytool {make}
  keytool {export}
  {PROGRAMS}/kafka-storage.sh format --cluster-id {id} --config '{properties}' {scram}
fi
exec {PROGRAMS}/kafka-server-start.sh '{properties}'
",
        id = cluster_id()?,
        scram = quoted(&scram()),
    ))
}

fn properties(site: &Site<'_>, data: &Path) -> String {
    let [port, controller, sasl, tls, proxied, proxy] = site.ports else { unreachable!("one port for each purpose") };
    let users: String = USERS.iter().map(|(user, password)| format!(" user_{user}=\"{password}\"")).collect();
    let modules: String = ["sasl_plaintext", "sasl_ssl"]
        .map(|listener| {
            format!(
                "listener.name.{listener}.plain.sasl.jaas.config=org.apache.kafka.common.security.plain.PlainLoginModule required{users};
listener.name.{listener}.scram-sha-256.sasl.jaas.config=org.apache.kafka.common.security.scram.ScramLoginModule required;
listener.name.{listener}.scram-sha-512.sasl.jaas.config=org.apache.kafka.common.security.scram.ScramLoginModule required;
"
            )
        })
        .concat();
    format!(
        "process.roles=broker,controller
# How soon who is connected so has to show the password again: never by default.
listener.name.sasl_plaintext.scram-sha-256.connections.max.reauth.ms=3000
node.id=1
controller.quorum.voters=1@127.0.0.1:{controller}
listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller},SASL_PLAINTEXT://127.0.0.1:{sasl},SASL_SSL://127.0.0.1:{tls},PROXIED://127.0.0.1:{proxied}
advertised.listeners=PLAINTEXT://127.0.0.1:{port},SASL_PLAINTEXT://127.0.0.1:{sasl},SASL_SSL://localhost:{tls},PROXIED://127.0.0.1:{proxy}
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT,SASL_PLAINTEXT:SASL_PLAINTEXT,SASL_SSL:SASL_SSL,PROXIED:PLAINTEXT
sasl.enabled.mechanisms=PLAIN,SCRAM-SHA-256,SCRAM-SHA-512
{modules}ssl.keystore.type=PKCS12
ssl.keystore.location={store}
ssl.keystore.password={STORE_PASSWORD}
authorizer.class.name=org.apache.kafka.metadata.authorizer.StandardAuthorizer
super.users=User:alice;User:rotated
# Until the first permissions are there the broker itself needs none. See `grant`.
allow.everyone.if.no.acl.found=true
controller.listener.names=CONTROLLER
inter.broker.listener.name=PLAINTEXT
log.dirs={data}
num.partitions=1
# One node: every internal topic has one replica, and few partitions, so that the first consumer group waits less.
offsets.topic.replication.factor=1
offsets.topic.num.partitions=4
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
transaction.state.log.num.partitions=4
# What a dead process left open is taken back soon behind its time: within 10 s by default.
transaction.abort.timed.out.transaction.cleanup.interval.ms=1000
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
share.coordinator.state.topic.num.partitions=4
# After a crash the node may register again only when its last session is over: 9 s by default.
broker.session.timeout.ms=4000
broker.heartbeat.interval.ms=500
# A group is not held back for members that may still come.
group.initial.rebalance.delay.ms=0
",
        data = data.display(),
        store = site.folder.join(STORE).display(),
    )
}

/// A random UUID as Kafka writes it: 16 bytes, unpadded URL-safe base64. The version bits make it a valid one.
fn cluster_id() -> Result<String> {
    let mut bytes = [0_u8; 16];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    // Kafka refuses ids that begin with a dash, which a command line would take for an option.
    bytes[0] &= 0x7f;
    Ok(base64_url(&bytes))
}

fn base64_url(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let mut text = String::new();
    for group in bytes.chunks(3) {
        let bits = group.iter().fold(0_usize, |bits, &byte| bits << 8 | usize::from(byte)) << (8 * (3 - group.len()));
        for digit in 0..=group.len() {
            text.push(char::from(DIGITS[bits >> (18 - 6 * digit) & 63]));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_follows_rfc_4648_without_padding() {
        assert_eq!(base64_url(b"foobar"), "Zm9vYmFy");
        assert_eq!(base64_url(b"foob"), "Zm9vYg");
        assert_eq!(base64_url(&[0xfb, 0xff]), "-_8");
    }

    #[test]
    fn cluster_ids_are_22_characters_differ_and_never_begin_with_a_dash() {
        let ids: Vec<String> = (0..200).map(|_| cluster_id().unwrap()).collect();
        assert!(ids.iter().all(|id| id.len() == 22 && !id.starts_with('-')));
        assert_ne!(ids[0], ids[1]);
    }
}

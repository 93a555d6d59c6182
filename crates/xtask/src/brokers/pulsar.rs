//! Apache Pulsar standalone: broker, one bookie and their metadata in one process.
//!
//! Beside the plain ports there are encrypted ones. Who shows no token may do everything; who shows one is the role that it
//! names: `admin` may do everything, others what they are granted. The suite's clients are `suite`, which administers the tenant
//! `public` until it is locked out. Tests read the ports and the key that tokens are signed with
//! in `standalone.conf`, and the certificate to trust in `ca.pem`, both in the server's folder.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::java;
use super::stand_ins::Contents;
use super::{Change, Contained, Process, Recipe, Site, StandIn};

/// 4.0.7 can loop for ever over its bookie's registration after a kill (apache/pulsar#25001, apache/bookkeeper#4686).
const VERSION: &str = "4.2.4";

/// The imported version set matters: without it Maven mixes releases of log4j, Netty and Jackson. What is excluded is
/// needed for Kubernetes, etcd and the functions worker only.
const POM: &str = r#"<?xml version="1.0" encoding="UTF-8"?>
<project>
  <modelVersion>4.0.0</modelVersion>
  <groupId>anybroker</groupId><artifactId>server</artifactId><version>1</version><packaging>pom</packaging>
  <dependencyManagement><dependencies><dependency>
    <groupId>org.apache.pulsar</groupId><artifactId>pulsar</artifactId><version>VERSION</version>
    <type>pom</type><scope>import</scope>
  </dependency></dependencies></dependencyManagement>
  <dependencies><dependency>
    <groupId>org.apache.pulsar</groupId><artifactId>pulsar-broker</artifactId><version>VERSION</version>
    <exclusions>
      <exclusion><groupId>io.kubernetes</groupId><artifactId>*</artifactId></exclusion>
      <exclusion><groupId>org.apache.pulsar</groupId><artifactId>jetcd-core-shaded</artifactId></exclusion>
      <exclusion><groupId>org.apache.pulsar</groupId><artifactId>pulsar-docs-tools</artifactId></exclusion>
      <exclusion><groupId>io.grpc</groupId><artifactId>*</artifactId></exclusion>
      <exclusion><groupId>io.vertx</groupId><artifactId>*</artifactId></exclusion>
      <exclusion><groupId>net.bytebuddy</groupId><artifactId>*</artifactId></exclusion>
      <exclusion><groupId>org.conscrypt</groupId><artifactId>*</artifactId></exclusion>
    </exclusions>
  </dependency></dependencies>
</project>
"#;

const LOGGING: &str = r#"<?xml version="1.0" encoding="UTF-8"?>
<Configuration status="WARN">
  <Appenders><Console name="Console" target="SYSTEM_OUT">
    <PatternLayout pattern="%d{ISO8601} [%t] %-5level %logger{36} - %msg%n%throwable"/>
  </Console></Appenders>
  <Loggers><Root level="info"><AppenderRef ref="Console"/></Root></Loggers>
</Configuration>
"#;

/// What Netty, BookKeeper and Jetty reach into by reflection.
const OPENED: &[&str] = &[
    "java.base/java.io",
    "java.base/java.util.zip",
    "java.base/java.nio",
    "java.base/jdk.internal.misc",
    "java.base/jdk.internal.platform",
    "java.base/sun.net",
    "java.management/sun.management",
];

/// Signs tokens (HS256). It guards nothing: the broker listens on the loopback interface only.
const TOKEN_KEY: &str = "data:;base64,YW55YnJva2VyIHRlc3RzIG9uIHRoZSBsb29wYmFjayBpbnRlcmZhY2U=";

/// What the suite's clients show: the token of the role `suite` (RFC 7519), signed with that key.
const OF_THE_SUITE: &str =
    "token=eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJzdWl0ZSJ9.TaFAJX6hEdCgSEvkT-DSpuv7C0bXkz9CmKbV37t_oys";

/// How long the admin endpoint of a busy broker may take.
const CHANGED_WITHIN: Duration = Duration::from_secs(20);

const STARTER: &str = "org.apache.pulsar.PulsarStandaloneStarter";

/// The official image's command.
const PROGRAM: &str = "/pulsar/bin/pulsar";

/// The broker of the `pulsar://` scheme.
pub(crate) struct Pulsar;

impl Recipe for Pulsar {
    fn name(&self) -> &'static str {
        "pulsar"
    }

    fn version(&self) -> &'static str {
        "Pulsar 4.2.4 (standalone)"
    }

    fn port_names(&self) -> &'static [&'static str] {
        &["clients", "admin", "bookie", "clients-tls", "admin-tls"]
    }

    fn url(&self, ports: &[u16]) -> String {
        format!("pulsar://127.0.0.1:{}?admin=http://127.0.0.1:{}", ports[0], ports[1])
    }

    fn install(&self, cache: &Path) -> Result<PathBuf> {
        java::fetch_jars_by(cache, &format!("pulsar-{VERSION}"), &POM.replace("VERSION", VERSION))
    }

    fn prepare(&self, site: &Site<'_>) -> Result<()> {
        fs::create_dir_all(site.folder.join("data"))?;
        if !site.folder.join("server.pem").exists() {
            make_certificates(site.folder)?;
        }
        fs::write(site.folder.join("standalone.conf"), configuration(site))?;
        fs::write(site.folder.join("log4j2.xml"), LOGGING)?;
        Ok(())
    }

    fn command(&self, site: &Site<'_>) -> Command {
        let mut command = java::java(site.home, 512);
        command
            .args(["-Xms256m", "-XX:MaxDirectMemorySize=512m"])
            .arg(java::prefixed("-Dlog4j.configurationFile=", &site.folder.join("log4j2.xml")))
            .args(properties())
            .args([STARTER, "--config"])
            .arg(site.folder.join("standalone.conf"))
            .args(arguments(site));
        command
    }

    fn image(&self) -> &'static str {
        "apachepulsar/pulsar:4.2.4"
    }

    /// `bin/pulsar` hands these variables on to the starter that runs natively too.
    fn contained(&self, site: &Site<'_>) -> Contained {
        let own = |name: &str| site.folder.join(name).display().to_string();
        Contained {
            entrypoint: Some(PROGRAM.to_owned()),
            arguments: std::iter::once("standalone".to_owned()).chain(arguments(site)).collect(),
            environment: vec![
                ("PULSAR_STANDALONE_CONF", own("standalone.conf")),
                ("PULSAR_LOG_CONF", own("log4j2.xml")),
                ("PULSAR_LOG_DIR", own("log")),
                ("PULSAR_MEM", "-Xms256m -Xmx512m -XX:MaxDirectMemorySize=512m".to_owned()),
                ("PULSAR_GC", "-XX:+UseSerialGC -XX:TieredStopAtLevel=1".to_owned()),
            ],
            ..Contained::default()
        }
    }

    fn stand_in(&self) -> Option<StandIn> {
        let properties = properties().join(" ");
        let program = format!(
            "#!/bin/bash\nshift\nexec java -cp \"$(dirname \"$PULSAR_LOG_CONF\"):/pulsar/lib/*\" $PULSAR_MEM $PULSAR_GC \\\n \
             -Dlog4j.configurationFile=\"$(basename \"$PULSAR_LOG_CONF\")\" {properties} \\\n \
             {STARTER} --config \"$PULSAR_STANDALONE_CONF\" \"$@\"\n"
        );
        Some(StandIn {
            contents: Contents::Folder("/pulsar/lib"),
            scripts: vec![(PROGRAM, program)],
            entrypoint: &[PROGRAM],
        })
    }

    fn changes(&self) -> &'static [Change] {
        &[Change::Fill, Change::Relieve, Change::LockOut, Change::LetIn]
    }

    /// A quota of the namespace for what its groups have not settled (its documentation, "Backlog quotas"). The broker looks for topics
    /// beyond it once in `backlogQuotaCheckIntervalInSeconds`, ends their producers and lets in no other.
    ///
    /// Whom a topic serves it looks at again when a policy of its namespace changes (4.2.4, `PersistentTopic.onPoliciesUpdate`), and
    /// then at permissions only, not at who administers the tenant: both are taken back, the tenant first.
    fn change(&self, site: &Site<'_>, _: &Process, change: Change) -> Result<()> {
        const QUOTA: &str = "namespaces/public/default/backlogQuota?backlogQuotaType=destination_storage";
        let admin = |what: &str, body: &str| administer(site.ports[1], what, body);
        match change {
            Change::Fill => {
                let quota = r#"{"limitSize":1,"limitTime":-1,"policy":"producer_exception"}"#;
                admin(&format!("POST {QUOTA}"), quota)
            }
            Change::Relieve => admin(&format!("DELETE {QUOTA}"), ""),
            Change::LockOut => {
                admin("POST tenants/public", &tenant(&["anonymous", "admin"]))?;
                admin(&format!("DELETE {GRANTED}"), "")
            }
            Change::LetIn => self.grant(site),
        }
    }

    fn grant(&self, site: &Site<'_>) -> Result<()> {
        administer(site.ports[1], "POST tenants/public", &tenant(&["anonymous", "admin", "suite"]))?;
        administer(site.ports[1], &format!("POST {GRANTED}"), r#"["produce","consume"]"#)
    }

    fn of_the_suite(&self) -> &'static str {
        OF_THE_SUITE
    }

    /// The ports open seconds before the namespace exists that clients use.
    fn probe(&self, ports: &[u16]) -> Result<()> {
        let limit = Duration::from_secs(1);
        TcpStream::connect_timeout(&SocketAddr::from((Ipv4Addr::LOCALHOST, ports[0])), limit)?;
        let answer = ask(ports[1], limit, "GET /admin/v2/namespaces/public", "", "")?;
        ensure!(answer.contains("\"public/default\""), "it answers, but the namespace public/default is not there yet");
        Ok(())
    }
}

/// Where the role of the suite is given permissions, and loses them.
const GRANTED: &str = "namespaces/public/default/permissions/suite";

/// The tenant, with the roles that administer it.
fn tenant(roles: &[&str]) -> String {
    format!(r#"{{"adminRoles":{roles:?},"allowedClusters":["standalone"]}}"#)
}

/// Asks the admin endpoint for a change, such as `DELETE tenants/x`.
fn administer(port: u16, what: &str, body: &str) -> Result<()> {
    let (method, path) = what.split_once(' ').context("a method and a path")?;
    let headers = format!("Content-Type: application/json\r\nContent-Length: {}\r\n", body.len());
    let answer = ask(port, CHANGED_WITHIN, &format!("{method} /admin/v2/{path}"), &headers, body)?;
    ensure!(answer.lines().next().is_some_and(|line| line.contains(" 204 ")), "{what}: the broker answers {answer}");
    Ok(())
}

/// What the admin endpoint answers within the limit, as it is on the line.
fn ask(port: u16, limit: Duration, what: &str, headers: &str, body: &str) -> Result<String> {
    let mut stream = TcpStream::connect_timeout(&SocketAddr::from((Ipv4Addr::LOCALHOST, port)), limit)?;
    stream.set_read_timeout(Some(limit))?;
    let request = format!("{what} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n{headers}\r\n{body}");
    stream.write_all(request.as_bytes())?;
    let mut answer = Vec::new();
    stream.take(65_536).read_to_end(&mut answer)?;
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

/// What the virtual machine is told, but for memory and the log.
fn properties() -> Vec<String> {
    let fixed = [
        "-Dlog4j2.is.webapp=false",
        "-Dlog4j.shutdownHookEnabled=false",
        "-Djava.net.preferIPv4Stack=true",
        "-Djute.maxbuffer=10485760",
        "-Dio.netty.tryReflectionSetAccessible=true",
    ];
    let opened = OPENED.iter().flat_map(|package| ["--add-opens".to_owned(), format!("{package}=ALL-UNNAMED")]);
    let drivers = [("bookie", "Bookie"), ("client", "Client")].map(|(of, name)| {
        format!("-Dbookkeeper.metadata.{of}.drivers=org.apache.pulsar.metadata.bookkeeper.PulsarMetadata{name}Driver")
    });
    fixed.map(str::to_owned).into_iter().chain(opened).chain(drivers).collect()
}

/// What the starter takes beside its configuration.
fn arguments(site: &Site<'_>) -> Vec<String> {
    let own = |name: &str| site.folder.join(name).display().to_string();
    let mut arguments: Vec<String> =
        ["--no-functions-worker", "--no-stream-storage", "--advertised-address", "127.0.0.1"]
            .map(str::to_owned)
            .to_vec();
    arguments.extend(["--metadata-dir".to_owned(), own("data/metadata")]);
    arguments.extend(["--bookkeeper-dir".to_owned(), own("data/bookkeeper")]);
    arguments.extend(["--bookkeeper-port".to_owned(), site.ports[2].to_string()]);
    arguments
}

/// An authority, and a certificate of it for 127.0.0.1. Not for `localhost`: that is the wrong host of the tests.
fn make_certificates(folder: &Path) -> Result<()> {
    let openssl = |arguments: &str| -> Result<()> {
        let output = Command::new("openssl")
            .args(arguments.split(' '))
            .current_dir(folder)
            .stdin(Stdio::null())
            .output()
            .context("could not start openssl")?;
        ensure!(output.status.success(), "openssl failed: {}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    };
    let key = "-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes";
    fs::write(folder.join("extensions"), "subjectAltName=IP:127.0.0.1\n")?;
    openssl(&format!("req -x509 {key} -keyout ca.key -out ca.pem -subj /CN=anybroker-tests -days 3650"))?;
    openssl(&format!("req -new {key} -keyout server.key -out server.csr -subj /CN=pulsar"))?;
    let sign = "x509 -req -in server.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 3650 -extfile extensions";
    openssl(&format!("{sign} -out server.pem"))
}

/// Read twice: by the broker, and by the bookie. Keys that they do not know are ignored without a word.
fn configuration(site: &Site<'_>) -> String {
    let [port, admin, _, port_tls, admin_tls] = site.ports else { unreachable!("one port for each purpose") };
    format!(
        "clusterName=standalone
brokerServicePort={port}
webServicePort={admin}
brokerServicePortTls={port_tls}
webServicePortTls={admin_tls}
bindAddress=127.0.0.1
advertisedAddress=127.0.0.1
tlsCertificateFilePath={certificate}
tlsKeyFilePath={key}
tlsTrustCertsFilePath={authority}
authenticationEnabled=true
authenticationProviders=org.apache.pulsar.broker.authentication.AuthenticationProviderToken
tokenSecretKey={TOKEN_KEY}
# How often it looks for tokens that have expired: 60 s by default.
authenticationRefreshCheckSeconds=1
authorizationEnabled=true
anonymousUserRole=anonymous
superUserRoles=anonymous,admin
metadataStoreUrl=
configurationMetadataStoreUrl=
# One bookie: with the default of two copies no topic could be created.
managedLedgerDefaultEnsembleSize=1
managedLedgerDefaultWriteQuorum=1
managedLedgerDefaultAckQuorum=1
# Transactions stay off, as they are by default: with them a topic that was just loaded may stand still for up to 30 s, until
# the broker has read the snapshots of its transaction buffer.
# Idle topics are kept.
brokerDeleteInactiveTopicsEnabled=false
systemTopicEnabled=true
topicLevelPoliciesEnabled=true
acknowledgmentAtBatchIndexLevelEnabled=true
delayedDeliveryEnabled=true
delayedDeliveryTickTimeMillis=100
forceDeleteNamespaceAllowed=true
forceDeleteTenantAllowed=true
# Acks are written as they come. By default a cursor is written once a second, and the rest every 60 s.
managedLedgerDefaultMarkDeleteRateLimit=0
# A message that is given back is dispatched to one member. By default two reads of a subscription may wait to be dispatched in its
# thread, and after the first one the broker reads again what the second one brings (4.2.4, `sendInProgress` is one flag for
# both, PersistentDispatcherMultipleConsumers.java).
dispatcherDispatchMessagesInSubscriptionThread=false
# What is beyond a quota is noticed once a minute by default.
backlogQuotaCheckIntervalInSeconds=1
# A small machine.
numIOThreads=2
numHttpServerThreads=8
managedLedgerCacheSizeMB=64
# The bookie.
allowLoopback=true
listeningInterface=lo
allowEphemeralPorts=true
journalSyncData=true
journalPreAllocSizeMB=4
journalMaxGroupWaitMSec=1
gcWaitTime=300000
diskUsageThreshold=0.99
diskUsageWarnThreshold=0.98
diskUsageLwmThreshold=0.97
",
        certificate = site.folder.join("server.pem").display(),
        key = site.folder.join("server.key").display(),
        authority = site.folder.join("ca.pem").display(),
    )
}

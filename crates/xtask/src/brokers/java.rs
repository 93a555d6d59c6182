//! Servers that run on a Java virtual machine: fetched from Maven Central as a folder of jars, started without their
//! vendors' shell scripts.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::geteuid;

/// Kafka 4 needs Java 17 (its documentation, "Compatibility"); ElasticMQ is content with 11.
const OLDEST_JAVA: u32 = 17;

/// Pinned: without a version Maven takes whatever its own release was shipped with.
const COPY_GOAL: &str = "org.apache.maven.plugins:maven-dependency-plugin:3.8.1:copy-dependencies";

/// One Maven artefact: group, artefact, version.
pub(crate) type Artefact = (&'static str, &'static str, &'static str);

/// Makes `cache/<name>` hold `artefacts` and all that they need as a folder of jars, and answers its path.
pub(crate) fn fetch_jars(cache: &Path, name: &str, artefacts: &[Artefact]) -> Result<PathBuf> {
    fetch_jars_by(cache, name, &pom_of(artefacts))
}

/// As [`fetch_jars`], for what only a whole pom can say: version sets, exclusions.
pub(crate) fn fetch_jars_by(cache: &Path, name: &str, text: &str) -> Result<PathBuf> {
    let home = cache.join(name);
    if home.is_dir() {
        ensure_tools(&["java"])?;
        return Ok(home);
    }
    ensure_tools(&["java", "mvn"])?;
    eprintln!("{name}: fetching jars into {}", home.display());
    fs::create_dir_all(cache)?;
    // Fetched beside the final place and renamed: an interrupted fetch leaves nothing that looks complete.
    let staging = tempfile::Builder::new().prefix("fetching-").tempdir_in(cache)?;
    let pom = staging.path().join("pom.xml");
    let jars = staging.path().join("jars");
    fs::write(&pom, text)?;
    let status = Command::new("mvn")
        // -C: a download whose checksum is wrong fails the build.
        .args(["-q", "-B", "-C", "-Dstyle.color=never", "-f"])
        .arg(&pom)
        .arg(COPY_GOAL)
        .args(["-DincludeScope=runtime"])
        .arg(prefixed("-DoutputDirectory=", &jars))
        .stdin(Stdio::null())
        // Standard output belongs to the `export` lines.
        .stdout(std::io::stderr())
        .status()
        .context("could not start mvn")?;
    ensure!(status.success(), "{name}: mvn could not fetch the jars ({status}); see its output above");
    fs::rename(&jars, &home).with_context(|| format!("could not move {} to {}", jars.display(), home.display()))?;
    Ok(home)
}

/// `java` with all jars of `home` on its class path and a heap of at most `heap_mib`.
///
/// The serial collector and the first compiler tier only: on a small machine that is shared with the tests, a short
/// start matters more than peak speed.
pub(crate) fn java(home: &Path, heap_mib: u32) -> Command {
    let mut command = Command::new("java");
    command
        .arg(format!("-Xmx{heap_mib}m"))
        .args(["-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1"])
        .arg("-cp")
        .arg(home.join("*"));
    command
}

/// `prefix` directly followed by `path`, which need not be UTF-8.
pub(crate) fn prefixed(prefix: &str, path: &Path) -> OsString {
    let mut argument = OsString::from(prefix);
    argument.push(path);
    argument
}

fn pom_of(artefacts: &[Artefact]) -> String {
    let dependencies: String = artefacts
        .iter()
        .map(|(group, artefact, version)| {
            format!(
                "<dependency><groupId>{group}</groupId><artifactId>{artefact}</artifactId><version>{version}</version></dependency>\n"
            )
        })
        .collect();
    format!(
        "<project xmlns=\"http://maven.apache.org/POM/4.0.0\"><modelVersion>4.0.0</modelVersion>\n\
         <groupId>anybroker</groupId><artifactId>server</artifactId><version>1</version>\n\
         <dependencies>\n{dependencies}</dependencies></project>\n"
    )
}

/// Installs `tools` where that is possible (root on a system with apt-get), and says what to install where not.
fn ensure_tools(tools: &[&str]) -> Result<()> {
    let missing: Vec<&str> = tools.iter().copied().filter(|tool| !is_on_path(tool)).collect();
    if !missing.is_empty() {
        let names = missing.join(" and ");
        let hint = "install a Java runtime (17 or newer) and Maven, for example \
                    `apt-get install default-jre-headless maven`";
        ensure!(is_on_path("apt-get") && geteuid().is_root(), "{names} not found: {hint}");
        eprintln!("{names} not found: installing with apt-get");
        apt_get_install(&["default-jre-headless", "maven"]).context(hint)?;
    }
    let version = java_version()?;
    ensure!(version >= OLDEST_JAVA, "java is version {version}; the servers need {OLDEST_JAVA} or newer");
    Ok(())
}

fn apt_get_install(packages: &[&str]) -> Result<()> {
    for arguments in [vec!["update", "-q"], [&["install", "-q", "-y", "--no-install-recommends"], packages].concat()] {
        let status = Command::new("apt-get")
            .args(&arguments)
            .env("DEBIAN_FRONTEND", "noninteractive")
            .stdin(Stdio::null())
            .stdout(std::io::stderr())
            .status()
            .context("could not start apt-get")?;
        ensure!(status.success(), "apt-get {} failed ({status})", arguments.join(" "));
    }
    Ok(())
}

fn is_on_path(tool: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| folder.join(tool).is_file())
}

fn java_version() -> Result<u32> {
    let output = Command::new("java").arg("-version").stdin(Stdio::null()).output().context("could not start java")?;
    // `java -version` writes to standard error.
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    match major_version(&text) {
        Some(version) => Ok(version),
        None => bail!("`java -version` answered something unknown: {text}"),
    }
}

/// The number after the first quotation mark: `openjdk version "17.0.15" 2025-04-15` is 17, the old `"1.8.0_412"` is 8.
fn major_version(text: &str) -> Option<u32> {
    let mut numbers = text.split('"').nth(1)?.split(|c: char| !c.is_ascii_digit()).filter_map(|n| n.parse().ok());
    match numbers.next()? {
        1 => numbers.next(),
        major => Some(major),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn java_versions_old_and_new_are_read() {
        assert_eq!(major_version("openjdk version \"17.0.15\" 2025-04-15\nOpenJDK Runtime"), Some(17));
        assert_eq!(major_version("java version \"1.8.0_412\""), Some(8));
        assert_eq!(major_version("openjdk version \"21\" 2023-09-19"), Some(21));
        assert_eq!(major_version("command not found"), None);
    }

    #[test]
    fn a_pom_lists_each_artefact() {
        let pom = pom_of(&[("a.b", "c", "1"), ("d", "e", "2")]);
        assert!(pom.contains("<groupId>a.b</groupId><artifactId>c</artifactId><version>1</version>"));
        assert_eq!(pom.matches("<dependency>").count(), 2);
    }
}

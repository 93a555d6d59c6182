//! Where settings come from, and how they are laid over one another.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Map, Value};

use super::section::Setting;
use super::{COMMON, EndpointUrl, Field, Problem, SUBSCRIBE, Secret, Section};
use crate::bus::SubscribeDefaults;
use crate::credentials::{Credentials, CredentialsFile, CredentialsProvider, Login};
use crate::{Error, ErrorKind, Requirement, Result};

/// The notation of a configuration text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// JSON.
    Json,
    /// TOML.
    Toml,
    /// YAML.
    Yaml,
}

/// Settings that were gathered and are not checked yet; [`Registry::connect`](crate::Registry::connect) checks them.
#[derive(Clone, Default)]
pub struct Config {
    /// Key (`publish_timeout`, `embedded.durability`) to value and origin.
    entries: BTreeMap<String, (Value, String)>,
    problems: Vec<Problem>,
    credentials: Option<Arc<dyn CredentialsProvider>>,
}

/// Variables that belong to the tools around (the command, xtask, Docker Compose), not to the configuration.
fn is_foreign(name: &str) -> bool {
    let tools = ["CACHE", "CONFIG", "INSTANCE", "LOG", "STATE", "XTASK"];
    let setting = name.contains("__");
    tools.contains(&name)
        || !setting && (name.starts_with("TEST_") || name.ends_with("_IMAGE") || name.ends_with("_PORT"))
}

impl Config {
    /// No settings.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The settings in a URL.
    pub fn from_url(url: impl Into<String>) -> Self {
        Self::new().with("url", url.into())
    }

    /// The settings in a file; its ending (`.toml`, `.yaml`, `.yml`, `.json`) tells the notation.
    ///
    /// # Errors
    /// [`NotFound`](ErrorKind::NotFound) or [`PermissionDenied`](ErrorKind::PermissionDenied) when it cannot be
    /// read, [`ConfigInvalid`](ErrorKind::ConfigInvalid) when the notation is unknown or broken.
    pub fn from_file(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        Ok(Self::new().with_table(Self::table_of_file(path)?, &format!("file {}", path.display())))
    }

    pub(crate) fn table_of_file(path: &Path) -> Result<Map<String, Value>> {
        let format = match path.extension().and_then(|ending| ending.to_str()) {
            Some("toml") => Format::Toml,
            Some("yaml" | "yml") => Format::Yaml,
            Some("json") => Format::Json,
            _ => {
                let message = "expected a file that ends in .toml, .yaml, .yml or .json";
                return Err(
                    Error::new(ErrorKind::ConfigInvalid, "read configuration", message).with("file", path.display())
                );
            }
        };
        let text = std::fs::read_to_string(path).map_err(|error| {
            let kind = match error.kind() {
                std::io::ErrorKind::NotFound => ErrorKind::NotFound,
                std::io::ErrorKind::PermissionDenied => ErrorKind::PermissionDenied,
                _ => ErrorKind::ConfigInvalid,
            };
            Error::new(kind, "read configuration", error.to_string()).with("file", path.display()).with_source(error)
        })?;
        table(&text, format, &format!("file {}", path.display()))
    }

    /// The settings in a text; `origin` names it in messages.
    ///
    /// # Errors
    /// [`ConfigInvalid`](ErrorKind::ConfigInvalid) when the notation is broken.
    pub fn from_text(text: &str, format: Format, origin: &str) -> Result<Self> {
        Ok(Self::new().with_table(table(text, format, origin)?, origin))
    }

    fn with_table(mut self, table: Map<String, Value>, origin: &str) -> Self {
        for (key, value) in table {
            match value {
                Value::Object(section) => {
                    for (name, value) in section {
                        self.entries.insert(format!("{key}.{name}"), (value, origin.to_owned()));
                    }
                }
                value => {
                    self.entries.insert(key, (value, origin.to_owned()));
                }
            }
        }
        self
    }

    /// Lays the process's environment over the settings: `ANYBROKER_URL`, `ANYBROKER_PUBLISH_TIMEOUT`, and with two
    /// underscores between section and key `ANYBROKER_EMBEDDED__DURABILITY`. Lists are separated by commas.
    #[must_use]
    pub fn with_env(self) -> Self {
        // Variables that are not UTF-8 cannot be ours.
        let variables =
            std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
        self.with_variables(variables)
    }

    /// As [`with_env`](Self::with_env), from the given variables.
    #[must_use]
    pub fn with_variables(mut self, variables: impl IntoIterator<Item = (String, String)>) -> Self {
        for (name, value) in variables {
            let Some(rest) = name.strip_prefix("ANYBROKER_") else { continue };
            if is_foreign(rest) {
                continue;
            }
            let key = rest.to_ascii_lowercase().replacen("__", ".", 1);
            self.entries.insert(key, (Value::String(value), format!("environment {name}")));
        }
        self
    }

    /// Sets one key (`publish_timeout`, `embedded.durability`) over all other sources.
    #[must_use]
    pub fn with(mut self, key: impl Into<String>, value: impl Into<Value>) -> Self {
        self.entries.insert(key.into(), (value.into(), "program".to_owned()));
        self
    }

    /// Lays the settings of `other` over these.
    #[must_use]
    pub fn overlaid_by(mut self, other: Self) -> Self {
        self.entries.extend(other.entries);
        self.problems.extend(other.problems);
        self.credentials = other.credentials.or(self.credentials);
        self
    }

    /// Where the credentials come from, in the place of those in the URL and of `credentials_file`.
    #[must_use]
    pub fn with_credentials(mut self, provider: impl CredentialsProvider) -> Self {
        self.credentials = Some(Arc::new(provider));
        self
    }

    /// The URL as it was given, credentials included, where there is one.
    #[must_use]
    pub fn endpoint_url(&self) -> Option<&str> {
        self.entries.get("url")?.0.as_str()
    }

    /// What was given for a key (`kafka.tls`) by a file, the environment or the program, as text. What stands in the URL is in
    /// [`endpoint_url`](Self::endpoint_url).
    #[must_use]
    pub fn text(&self, key: &str) -> Option<String> {
        let value = &self.entries.get(key)?.0;
        Some(value.as_str().map_or_else(|| value.to_string(), str::to_owned))
    }

    /// The URL's scheme, where there is a URL that can be parsed.
    #[must_use]
    pub fn scheme(&self) -> Option<String> {
        let url = self.entries.get("url")?.0.as_str()?;
        EndpointUrl::parse(url).ok().map(|url| url.scheme().to_owned())
    }
}

impl std::fmt::Debug for Config {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Values may be secrets: only keys and origins are shown.
        f.debug_map().entries(self.entries.iter().map(|(key, (_, origin))| (key, origin))).finish()
    }
}

/// Field to value; `None` where it is not set and has no default.
type Settings = BTreeMap<&'static str, Option<Setting>>;

/// The settings after all checks.
pub(crate) struct Checked {
    pub(crate) section: Section,
    pub(crate) common: Settings,
    pub(crate) subscribe: Settings,
    pub(crate) requirements: Vec<Requirement>,
}

impl Checked {
    pub(crate) fn duration(&self, field: &str) -> Duration {
        match self.common.get(field) {
            Some(Some(Setting::Duration(duration))) => *duration,
            _ => Duration::from_secs(30),
        }
    }

    pub(crate) fn text(&self, field: &str) -> &str {
        match self.common.get(field) {
            Some(Some(Setting::Text(text))) => text,
            _ => "",
        }
    }
}

/// The driver of a scheme, as far as checking needs it.
pub(crate) struct Known<'a> {
    pub(crate) section: &'static str,
    pub(crate) fields: &'static [Field],
    pub(crate) takes_credentials: bool,
    pub(crate) check: &'a dyn Fn(&Section) -> Vec<Problem>,
}

impl Config {
    /// Checks everything and reports every problem at once. `known` finds the driver of a scheme; `schemes` lists
    /// all, and `sections` their sections.
    pub(crate) fn check<'a>(
        mut self,
        known: impl Fn(&str) -> Option<Known<'a>>,
        schemes: &[&str],
        sections: &[&str],
    ) -> Result<Checked> {
        let mut problems = std::mem::take(&mut self.problems);
        let url = self.url(&mut problems);
        let driver = url.as_ref().and_then(|(url, origin)| {
            let driver = known(url.scheme());
            if driver.is_none() {
                let message = format!("unknown scheme `{}`; expected one of {}", url.scheme(), schemes.join(", "));
                problems.push(Problem { key: "url".into(), origin: origin.clone(), message });
            }
            driver
        });
        if let (Some((url, origin)), Some(driver)) = (&url, &driver) {
            self.take_query(url, origin, driver, &mut problems);
        }
        self.report_unknown(driver.as_ref(), sections, &mut problems);
        let common = self.read("", COMMON, &mut problems);
        let subscribe = self.read("subscribe", SUBSCRIBE, &mut problems);
        let values =
            driver.as_ref().map(|driver| self.read(driver.section, driver.fields, &mut problems)).unwrap_or_default();
        let requirements = self.requirements(&common, &mut problems);
        self.contradictions(&common, &subscribe, &mut problems);
        let Some((url, _)) = url else { return Err(invalid(&problems)) };
        let section = Section { url, connect_timeout: Duration::ZERO, values, login: None };
        let mut checked = Checked { section, common, subscribe, requirements };
        checked.section.connect_timeout = checked.duration("connect_timeout");
        checked.section.login = self.login(&checked, driver.as_ref(), &mut problems);
        // Fields that are wrong hold their defaults here; one that is missing would make the accessors panic.
        if let Some(driver) = driver
            && !driver.fields.iter().any(|field| field.required && checked.section.values[field.name].is_none())
        {
            problems.extend((driver.check)(&checked.section));
        }
        if problems.is_empty() { Ok(checked) } else { Err(invalid(&problems)) }
    }

    /// What the program sets goes before the file; neither stands beside what the URL says.
    fn login(&self, checked: &Checked, driver: Option<&Known<'_>>, problems: &mut Vec<Problem>) -> Option<Login> {
        let section = &checked.section;
        let file = Some(checked.text("credentials_file")).filter(|path| !path.is_empty());
        let (key, origin) = match &self.credentials {
            Some(_) => ("credentials", "program".to_owned()),
            None => ("credentials_file", self.origin("credentials_file")),
        };
        let provider = self.credentials.clone();
        let provider =
            provider.or_else(|| file.map(|path| Arc::new(CredentialsFile::new(path)) as Arc<dyn CredentialsProvider>));
        let Some(provider) = provider else {
            let password = section.url.password().cloned().unwrap_or_else(|| Secret::new(""));
            let of_url = |user: &str| Login::fixed(Credentials::Password { user: user.to_owned(), password });
            return section.url.username().map(of_url);
        };
        let mut wrong = |message: String| {
            problems.push(Problem { key: key.into(), origin: origin.clone(), message });
        };
        if driver.is_some_and(|driver| !driver.takes_credentials) {
            wrong(format!("the broker of {}:// takes no credentials", section.url.scheme()));
        } else if section.url.username().is_some() || section.url.password().is_some() {
            wrong("the URL has credentials too; expected them in one place".into());
        }
        Some(Login::asked(provider, section.connect_timeout))
    }

    fn url(&self, problems: &mut Vec<Problem>) -> Option<(EndpointUrl, String)> {
        let (value, origin) = self.entries.get("url")?;
        // What is no text is reported with the other fields.
        match EndpointUrl::parse(value.as_str().filter(|url| !url.is_empty())?) {
            Ok(url) => Some((url, origin.clone())),
            Err(message) => {
                problems.push(Problem { key: "url".into(), origin: origin.clone(), message });
                None
            }
        }
    }

    /// The URL's query lies below everything else. A key of the adapter goes to its section, a common one to the top.
    fn take_query(&mut self, url: &EndpointUrl, origin: &str, driver: &Known<'_>, problems: &mut Vec<Problem>) {
        let mut taken = BTreeSet::new();
        let origin = format!("url, {origin}");
        for (name, value) in url.query() {
            let common = COMMON.iter().any(|field| field.name == name && name != "url");
            let key = if common || name.contains('.') { name.clone() } else { format!("{}.{name}", driver.section) };
            if !taken.insert(key.clone()) {
                let message = "stands twice in the URL; which one holds?".into();
                problems.push(Problem { key, origin: origin.clone(), message });
                continue;
            }
            self.entries.entry(key).or_insert_with(|| (Value::String(value.clone()), origin.clone()));
        }
    }

    fn report_unknown(&self, driver: Option<&Known<'_>>, sections: &[&str], problems: &mut Vec<Problem>) {
        let is_section = |name: &str| name == "subscribe" || sections.contains(&name);
        for (key, (_, origin)) in &self.entries {
            let unknown = |name: &str, fields: &[Field]| {
                if fields.iter().any(|field| field.name == name) {
                    return None;
                }
                let names: Vec<&str> = fields.iter().map(|field| field.name).collect();
                Some(match names.is_empty() {
                    true => "unknown key; this broker has no settings".to_owned(),
                    false => format!("unknown key; expected one of {}", names.join(", ")),
                })
            };
            let message = match key.split_once('.') {
                None if is_section(key) => Some("expected a table of settings".to_owned()),
                None => unknown(key, COMMON),
                Some(("subscribe", name)) => unknown(name, SUBSCRIBE),
                Some((section, name)) => match driver {
                    Some(driver) if driver.section == section => unknown(name, driver.fields),
                    // Sections of other brokers may stand in the same file: swapping is then a change of the URL.
                    _ if is_section(section) => None,
                    _ => Some(match COMMON.iter().find(|field| field.name == section) {
                        Some(field) => format!("expected {}, found a table", field.expected()),
                        None => {
                            let sections = sections.iter().copied().chain(["subscribe"]).collect::<Vec<_>>().join(", ");
                            format!("unknown section; expected one of {sections}")
                        }
                    }),
                },
            };
            problems.extend(message.map(|message| Problem { key: key.clone(), origin: origin.clone(), message }));
        }
    }

    /// Where a setting comes from.
    fn origin(&self, key: &str) -> String {
        self.entries.get(key).map_or_else(|| "default".to_owned(), |(_, origin)| origin.clone())
    }

    /// Settings that are valid by themselves and make no sense.
    fn contradictions(&self, common: &Settings, subscribe: &Settings, problems: &mut Vec<Problem>) {
        for key in ["connect_timeout", "publish_timeout"] {
            if let Some(Some(Setting::Duration(Duration::ZERO))) = common.get(key) {
                let message = "expected more than 0 s".into();
                problems.push(Problem { key: key.into(), origin: self.origin(key), message });
            }
        }
        if problems.iter().any(|problem| problem.key.starts_with("subscribe.")) {
            return;
        }
        if let Err(error) = SubscribeDefaults::from_settings(subscribe).validate() {
            problems.extend(error.context().map(|(name, message)| {
                let key = format!("subscribe.{name}");
                Problem { origin: self.origin(&key), key, message: message.to_owned() }
            }));
        }
    }

    fn read(&self, section: &str, fields: &'static [Field], problems: &mut Vec<Problem>) -> Settings {
        let mut values = BTreeMap::new();
        for field in fields {
            let key = if section.is_empty() { field.name.to_owned() } else { format!("{section}.{}", field.name) };
            let setting = match self.entries.get(&key) {
                Some((value, origin)) => match field.read(value) {
                    Ok(setting) => Some(setting),
                    Err(message) => {
                        problems.push(Problem { key, origin: origin.clone(), message });
                        default(field)
                    }
                },
                None if field.required => {
                    let message = format!("missing; expected {}", field.expected());
                    problems.push(Problem { key, origin: "nowhere".into(), message });
                    None
                }
                None => default(field),
            };
            values.insert(field.name, setting);
        }
        values
    }

    fn requirements(&self, common: &Settings, problems: &mut Vec<Problem>) -> Vec<Requirement> {
        let Some(Some(Setting::List(texts))) = common.get("require") else { return Vec::new() };
        let mut requirements = Vec::new();
        for text in texts {
            match text.parse() {
                Ok(requirement) => requirements.push(requirement),
                Err(message) => {
                    let origin = self.entries.get("require").map(|(_, origin)| origin.clone()).unwrap_or_default();
                    problems.push(Problem { key: "require".into(), origin, message });
                }
            }
        }
        requirements
    }
}

/// The table that a text of that notation holds; `origin` names it in messages.
fn table(text: &str, format: Format, origin: &str) -> Result<Map<String, Value>> {
    let parsed: std::result::Result<Value, String> = match format {
        // The parsers' messages quote the offending line, which may hold a secret: only the place is kept.
        Format::Json => serde_json::from_str(text)
            .map_err(|error| format!("line {}, column {}: not valid JSON", error.line(), error.column())),
        Format::Toml => toml::from_str(text).map_err(|error| {
            let line = error.span().map_or(0, |span| text[..span.start].lines().count().max(1));
            format!("line {line}: {}", error.message())
        }),
        Format::Yaml => serde_norway::from_str(text).map_err(|error| {
            error.location().map_or_else(
                || "not valid YAML".to_owned(),
                |place| format!("line {}, column {}: not valid YAML", place.line(), place.column()),
            )
        }),
    };
    let invalid =
        |message: String| Error::new(ErrorKind::ConfigInvalid, "read configuration", message).with("origin", origin);
    match parsed.map_err(invalid)? {
        Value::Object(table) => Ok(table),
        Value::Null => Ok(Map::new()),
        _ => Err(invalid("expected a table of settings".into())),
    }
}

fn default(field: &Field) -> Option<Setting> {
    let text = field.default?;
    Some(field.read(&Value::String(text.to_owned())).expect("the default of a field is valid"))
}

fn invalid(problems: &[Problem]) -> Error {
    let list: Vec<String> = problems.iter().map(ToString::to_string).collect();
    let count = problems.len();
    let noun = if count == 1 { "problem" } else { "problems" };
    Error::new(ErrorKind::ConfigInvalid, "connect", format!("{count} {noun}: {}", list.join("; ")))
}

//! Adapters, registered explicitly by scheme.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use serde_json::{Map, Value, json};

use crate::bus::BusOptions;
use crate::config::{COMMON, Checked, Config, Field, Known, Problem, SUBSCRIBE, Section};
use crate::{Broker, Bus, Error, ErrorKind, PublishOrder, Result};

/// What an adapter gives the [`Registry`]: its schemes, its settings as data, and how to connect.
#[async_trait]
pub trait Driver: Send + Sync + 'static {
    /// The URL schemes; the first also names the adapter's section in a configuration file.
    fn schemes(&self) -> &'static [&'static str];

    /// The settings of its section, which may also stand in the query of the URL.
    fn fields(&self) -> &'static [Field];

    /// Whether it shows what a [provider of credentials](crate::CredentialsProvider) says, by [`Section::login`]. Where it does
    /// not, a configuration with a provider is refused.
    fn takes_credentials(&self) -> bool {
        false
    }

    /// Checks that single fields cannot make: hosts and path of the URL, settings that contradict one another.
    /// Fields that are wrong by themselves are reported already and hold their defaults here; it is not called while a
    /// required one is missing. Reports everything it finds.
    fn check(&self, section: &Section) -> Vec<Problem> {
        let _ = section;
        Vec::new()
    }

    /// Connects. Bounded by the `connect_timeout` from outside as well.
    ///
    /// # Errors
    /// `Unavailable`, `Unauthenticated`, `PermissionDenied`, `NotFound`.
    async fn connect(&self, section: Section) -> Result<Arc<dyn Broker>>;
}

/// The adapters that a program knows. Registered explicitly, never before `main`; a scheme of your own is one more
/// [`with`](Self::with).
#[derive(Clone, Default)]
pub struct Registry {
    drivers: Vec<Arc<dyn Driver>>,
}

impl Registry {
    /// No adapters.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds an adapter. Of two with one scheme the later one holds.
    #[must_use]
    pub fn with(mut self, driver: impl Driver) -> Self {
        self.drivers.insert(0, Arc::new(driver));
        self
    }

    /// The schemes that are known.
    #[must_use]
    pub fn schemes(&self) -> Vec<&'static str> {
        let mut schemes: Vec<_> = self.drivers.iter().flat_map(|driver| driver.schemes()).copied().collect();
        schemes.sort_unstable();
        schemes.dedup();
        schemes
    }

    /// Checks the settings, connects, and checks the requirements against the endpoint's record.
    ///
    /// # Errors
    /// `ConfigInvalid` with every bad field at once; `Unsupported` for unmet requirements, naming endpoint,
    /// requirement and remedy; `Timeout` after `connect_timeout`; what the adapter says.
    pub async fn connect(&self, config: Config) -> Result<Bus> {
        let checked = self.checked(config)?;
        let driver = self.driver(checked.section.url.scheme()).expect("checked");
        let timeout = checked.duration("connect_timeout");
        let options = BusOptions {
            publish_timeout: checked.duration("publish_timeout"),
            publish_order: if checked.text("publish_order") == "none" { PublishOrder::None } else { PublishOrder::Key },
            subscribe: crate::bus::SubscribeDefaults::from_settings(&checked.subscribe),
        };
        let (requirements, section) = (checked.requirements, checked.section);
        let url = section.url.to_string();
        // One second more than the adapter is told, so that its own, better explained error comes first.
        let connecting = tokio::time::timeout(timeout.saturating_add(Duration::from_secs(1)), driver.connect(section));
        let broker = connecting.await.map_err(|_| {
            Error::new(ErrorKind::Timeout, "connect", format!("no answer within {timeout:?}")).with("endpoint", &url)
        })??;
        if let Err(unmet) = broker.capabilities().require(&broker.endpoint().to_string(), &requirements) {
            // The refusal is the answer; a failure to close what is refused adds nothing to it.
            let _ = broker.close(Duration::from_secs(1)).await;
            return Err(unmet);
        }
        Ok(Bus::new(broker, options))
    }

    /// Checks the settings as [`connect`](Self::connect) does, without connecting. What only the endpoint can tell
    /// (credentials, requirements) stays open.
    ///
    /// # Errors
    /// `ConfigInvalid` with every bad field at once.
    pub fn check(&self, config: Config) -> Result<()> {
        self.checked(config).map(drop)
    }

    fn checked(&self, config: Config) -> Result<Checked> {
        let sections: Vec<&str> = self.drivers.iter().map(|driver| driver.schemes()[0]).collect();
        let checks: Vec<_> =
            self.drivers.iter().map(|driver| (driver, |section: &Section| driver.check(section))).collect();
        let known = |scheme: &str| {
            checks.iter().find(|(driver, _)| driver.schemes().contains(&scheme)).map(|(driver, check)| Known {
                section: driver.schemes()[0],
                fields: driver.fields(),
                takes_credentials: driver.takes_credentials(),
                check,
            })
        };
        config.check(known, &self.schemes(), &sections)
    }

    fn driver(&self, scheme: &str) -> Option<&Arc<dyn Driver>> {
        self.drivers.iter().find(|driver| driver.schemes().contains(&scheme))
    }

    /// The JSON Schema of a configuration file for these adapters.
    #[must_use]
    pub fn json_schema(&self) -> Value {
        let object = |fields: &[Field]| {
            let properties: Map<String, Value> =
                fields.iter().map(|field| (field.name.to_owned(), field.schema())).collect();
            let required: Vec<&str> = fields.iter().filter(|field| field.required).map(|field| field.name).collect();
            json!({"type": "object", "properties": properties, "required": required, "additionalProperties": false})
        };
        let mut schema = object(COMMON);
        schema["$schema"] = json!("https://json-schema.org/draft/2020-12/schema");
        schema["title"] = json!("AnyBroker configuration");
        schema["properties"]["subscribe"] = object(SUBSCRIBE);
        for driver in &self.drivers {
            schema["properties"][driver.schemes()[0]] = object(driver.fields());
        }
        schema
    }
}

impl std::fmt::Debug for Registry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Registry").field(&self.schemes()).finish()
    }
}

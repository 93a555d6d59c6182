//! How an endpoint is reached: its URL, and those of its settings that bare clients go by.

use std::collections::BTreeMap;

use anybroker_core::config::EndpointUrl;

/// The settings by which an adapter is told how to reach its server, and which kind of endpoint it is.
const SETTINGS: &[&str] = &[
    "auth",
    "credentials",
    "fanout",
    "mode",
    "nkey",
    "profile",
    "queue",
    "region",
    "sasl",
    "session_token",
    "sns_endpoint",
    "tls",
    "tls_ca",
    "tls_certificate",
    "token",
];

/// See the module's documentation.
#[allow(dead_code, reason = "each client uses its share")]
pub(crate) struct Access {
    /// As it was given, without its settings.
    pub(crate) base: String,
    url: EndpointUrl,
    settings: BTreeMap<&'static str, String>,
}

#[allow(dead_code, reason = "each client uses its share")]
impl Access {
    /// What `given` answers goes before a setting in the URL, as it does for adapters.
    pub(crate) fn of(url: &str, given: &dyn Fn(&str) -> Option<String>) -> Result<Self, String> {
        let base = url.split('?').next().unwrap_or_default().to_owned();
        let url = EndpointUrl::parse(url)?;
        let in_url = |name: &str| url.query().iter().find(|(key, _)| key == name).map(|(_, value)| value.clone());
        let settings =
            SETTINGS.iter().filter_map(|&name| Some((name, given(name).or_else(|| in_url(name))?))).collect();
        Ok(Self { base, url, settings })
    }

    pub(crate) fn scheme(&self) -> &str {
        self.url.scheme()
    }

    /// `host` or `host:port`.
    pub(crate) fn hosts(&self) -> &[String] {
        self.url.hosts()
    }

    pub(crate) fn path(&self) -> &str {
        self.url.path()
    }

    pub(crate) fn setting(&self, name: &str) -> Option<&str> {
        self.settings.get(name).map(String::as_str)
    }

    /// Name and password.
    pub(crate) fn user(&self) -> Option<(&str, &str)> {
        let password = self.url.password().map_or("", |password| password.reveal());
        self.url.username().map(|name| (name, password))
    }

    /// Refuses what a bare client is not made for.
    pub(crate) fn without(&self, names: &[&str]) -> Result<(), String> {
        let is_set = |name: &&&str| self.setting(name).is_some_and(|value| value != "false");
        match names.iter().find(is_set) {
            Some(name) => Err(format!("the bare client is not made for the setting `{name}`")),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_setting_of_the_file_goes_before_one_in_the_url_and_what_is_refused_is_named() {
        let given = |name: &str| (name == "token" || name == "mode").then(|| "of the file".to_owned());
        let access = Access::of("nats://me:p%40ss@a:1,b:2/?mode=of%20the%20url&region=x&tls=false", &given).unwrap();
        assert_eq!((access.setting("mode"), access.setting("region")), (Some("of the file"), Some("x")));
        assert_eq!((access.user(), access.hosts().len()), (Some(("me", "p@ss")), 2));
        assert_eq!(access.without(&["tls", "tls_ca"]), Ok(()));
        assert!(access.without(&["tls", "token"]).unwrap_err().contains("`token`"));
    }
}

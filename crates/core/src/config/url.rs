//! Endpoint URLs: self-contained, with several hosts where the broker has them.

use std::fmt;

use percent_encoding::percent_decode_str;

use super::Secret;

/// A parsed endpoint URL. `Display` and `Debug` show neither user, password nor query.
///
/// ```
/// use anybroker_core::config::EndpointUrl;
/// let url = EndpointUrl::parse("kafka://me:secret@a:9092,b:9093/?mode=x").unwrap();
/// assert_eq!(url.hosts(), ["a:9092", "b:9093"]);
/// assert_eq!(url.to_string(), "kafka://a:9092,b:9093/");
/// ```
#[derive(Clone)]
pub struct EndpointUrl {
    scheme: String,
    username: Option<String>,
    password: Option<Secret>,
    hosts: Vec<String>,
    path: String,
    query: Vec<(String, String)>,
}

impl EndpointUrl {
    /// Parses `scheme://[user[:password]@][host[:port][,host…]][/path][?key=value&…]`; parts are
    /// percent-decoded.
    ///
    /// # Errors
    /// What is wrong with it, without repeating the URL (it may hold a password).
    pub fn parse(text: &str) -> Result<Self, String> {
        let Some((scheme, rest)) = text.split_once("://") else {
            return Err("expected a URL such as embedded:///var/lib/events.db; there is no `://` in it".into());
        };
        let scheme_ok = scheme.starts_with(|c: char| c.is_ascii_lowercase())
            && scheme.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || "+-.".contains(c));
        if !scheme_ok {
            // Not repeated: it may be a password that stands in the wrong place.
            return Err("what stands before `://` is no URL scheme; expected lower-case letters and digits".into());
        }
        if rest.contains('#') {
            return Err("a fragment (#…) has no meaning here; write %23 for a # in a name".into());
        }
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (authority, path) = match rest.find('/') {
            Some(slash) => rest.split_at(slash),
            None => (rest, ""),
        };
        // A slash or a question mark in a password ends the authority, and the password would show as host or path.
        let cut_short = !authority.is_empty() && path.contains('@')
            || query.split('&').any(|pair| pair.split('=').next().is_some_and(|name| name.contains('@')));
        if cut_short {
            return Err(
                "an @ stands behind the first / or ?; write %2F, %3F or %40 for these in a password or name".into()
            );
        }
        let (user, hosts) = match authority.rsplit_once('@') {
            Some((user, hosts)) => (Some(user), hosts),
            None => (None, authority),
        };
        if !hosts.split(',').all(has_valid_port) {
            return Err(
                "a host's port is no number; expected host or host:port (write %3A, %2F, %3F for :, /, ? in a \
                        password)"
                    .into(),
            );
        }
        let (username, password) = match user.map(|user| user.split_once(':').unwrap_or((user, ""))) {
            None => (None, None),
            Some((name, "")) => (Some(decode(name)?), None),
            Some((name, password)) => (Some(decode(name)?), Some(Secret::new(decode(password)?))),
        };
        Ok(Self {
            scheme: scheme.to_owned(),
            username,
            password,
            hosts: hosts.split(',').filter(|host| !host.is_empty()).map(decode).collect::<Result<_, _>>()?,
            path: decode(path)?,
            query: form_urlencoded::parse(query.as_bytes()).into_owned().collect(),
        })
    }

    /// The scheme, which names the adapter.
    #[must_use]
    pub fn scheme(&self) -> &str {
        &self.scheme
    }

    /// The user name.
    #[must_use]
    pub fn username(&self) -> Option<&str> {
        self.username.as_deref().filter(|name| !name.is_empty())
    }

    /// The password.
    #[must_use]
    pub fn password(&self) -> Option<&Secret> {
        self.password.as_ref()
    }

    /// `host` or `host:port`, in the order given.
    #[must_use]
    pub fn hosts(&self) -> &[String] {
        &self.hosts
    }

    /// The path, with its leading slash; empty when there is none.
    #[must_use]
    pub fn path(&self) -> &str {
        &self.path
    }

    /// The settings in the query.
    #[must_use]
    pub fn query(&self) -> &[(String, String)] {
        &self.query
    }
}

fn has_valid_port(host: &str) -> bool {
    // The colons of an IPv6 address stand in brackets.
    let rest = host.rsplit_once(']').map_or(host, |(_, rest)| rest);
    rest.split_once(':').is_none_or(|(_, port)| port.parse::<u16>().is_ok())
}

fn decode(text: &str) -> Result<String, String> {
    percent_decode_str(text).decode_utf8().map(Into::into).map_err(|_| "a percent-encoded part is not UTF-8".into())
}

impl fmt::Display for EndpointUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}{}", self.scheme, self.hosts.join(","), self.path)
    }
}

impl fmt::Debug for EndpointUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_found_and_decoded() {
        let url = EndpointUrl::parse("embedded:///tmp/a%20b.db?durability=grouped&x=1%262").expect("valid");
        assert_eq!(url.scheme(), "embedded");
        assert_eq!(url.path(), "/tmp/a b.db");
        assert!(url.hosts().is_empty());
        assert_eq!(url.query()[1], ("x".to_owned(), "1&2".to_owned()));
    }

    #[test]
    fn no_form_of_it_prints_the_password() {
        let url = EndpointUrl::parse("sqs://key:MARKER@h/?token=MARKER").expect("valid");
        assert!(!format!("{url} {url:?}").contains("MARKER"));
        assert_eq!(url.password().map(Secret::reveal), Some("MARKER"));
    }

    #[test]
    fn nonsense_is_refused_without_repeating_it() {
        for text in ["", "orders.db", "KAFKA://a", "kafka://a#MARKER", "://x"] {
            let problem = EndpointUrl::parse(text).expect_err(text);
            assert!(!problem.contains("MARKER"));
        }
    }
}

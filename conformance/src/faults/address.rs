//! The addresses in a URL, and the same URL with others.

use std::net::SocketAddr;

use super::Route;

/// One for each `host:port` of a URL, in their order.
///
/// # Errors
/// The URL names no host, or one without its port.
pub fn routes_of(url: &str) -> Result<Vec<Route>, String> {
    let (_, hosts, _) = parts(url);
    let route = |host: &str| match host.rsplit_once(':') {
        Some((name, port)) if !name.is_empty() && port.parse::<u16>().is_ok() => Ok(Route::to(host)),
        _ => Err("the URL names no host and port that a proxy could stand in front of".to_owned()),
    };
    hosts.split(',').map(route).collect()
}

/// The URL with these addresses in place of its hosts: one for each of [`routes_of`].
#[must_use]
pub fn url_through(url: &str, addresses: &[SocketAddr]) -> String {
    let (before, _, behind) = parts(url);
    let hosts: Vec<String> = addresses.iter().map(SocketAddr::to_string).collect();
    format!("{before}{}{behind}", hosts.join(","))
}

/// What stands before the hosts, the hosts, and what stands behind them.
fn parts(url: &str) -> (&str, &str, &str) {
    let start = url.find("://").map_or(0, |at| at + 3);
    let end = url[start..].find(['/', '?']).map_or(url.len(), |at| start + at);
    let start = url[start..end].rfind('@').map_or(start, |at| start + at + 1);
    (&url[..start], &url[start..end], &url[end..])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_are_found_and_replaced_and_everything_else_stays() {
        let proxies: Vec<SocketAddr> = vec!["127.0.0.1:7001".parse().unwrap(), "127.0.0.1:7002".parse().unwrap()];
        for (url, upstreams, through) in [
            (
                "amqp://a:secret@b:1/%2f?admin=http://b:2",
                vec!["b:1"],
                "amqp://a:secret@127.0.0.1:7001/%2f?admin=http://b:2",
            ),
            ("nats://b:4222", vec!["b:4222"], "nats://127.0.0.1:7001"),
            ("kafka://b:1,[::1]:9?x=y", vec!["b:1", "[::1]:9"], "kafka://127.0.0.1:7001,127.0.0.1:7002?x=y"),
        ] {
            let found: Vec<_> = routes_of(url).unwrap().into_iter().map(|route| route.upstream).collect();
            assert_eq!(found, upstreams);
            assert_eq!(url_through(url, &proxies[..found.len()]), through);
        }
        for without in ["sqs://?region=x", "nats://b", "nats://b:1,[::1]", "embedded:///tmp/x:1"] {
            assert!(routes_of(without).is_err(), "{without}");
        }
    }
}

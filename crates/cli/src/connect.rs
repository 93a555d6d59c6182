//! From the command line to a connection, and the commands about the settings themselves.

use std::time::Duration;

use anybroker::{Bus, Config, ErrorKind};
use serde_json::json;

use crate::args::{CheckArgs, Global};
use crate::exit::{Exit, Failure};
use crate::json;
use crate::output::Output;

/// How long closing may take; what was printed as done is done before. Long, since a disk that is busy with other things
/// is no failure; a second signal does not wait for it.
pub(crate) const CLOSE_GRACE: Duration = Duration::from_secs(30);

/// The settings: the file, the environment over it, `--set` and `--url` over both.
pub(crate) fn settings(global: &Global) -> Result<Config, Failure> {
    let mut config = match &global.config {
        Some(file) => Config::from_file(file).map_err(Failure::Config)?,
        None => Config::new(),
    };
    config = config.with_env();
    for (key, value) in &global.settings {
        config = config.with(key.clone(), value.clone());
    }
    if let Some(url) = &global.url {
        config = config.with("url", url.clone());
    }
    Ok(config)
}

/// Connects to the endpoint that the command line names.
pub(crate) async fn connect(global: &Global) -> Result<Bus, Failure> {
    anybroker::connect_with(settings(global)?).await.map_err(|error| match error.kind() {
        ErrorKind::ConfigInvalid => Failure::Config(with_hint(global, error)),
        _ => Failure::Broker(error),
    })
}

/// Closes after everything went well; a close that fails is told, since the last words may not have arrived.
pub(crate) async fn close(bus: &Bus) -> Result<(), Failure> {
    bus.close(CLOSE_GRACE).await.map_err(Failure::Broker)
}

/// Closes after `exit` is clear already: a failed close makes nothing better, and hides no failure before it.
pub(crate) async fn close_after(bus: &Bus, exit: Exit, json: bool) -> Result<Exit, Failure> {
    match (close(bus).await, exit) {
        (Err(failure), Exit::Done) => Err(failure),
        (Err(failure), exit) => {
            failure.tell(json);
            Ok(exit)
        }
        (Ok(()), exit) => Ok(exit),
    }
}

/// `anybroker config schema`.
pub(crate) fn schema(output: &mut Output) -> Result<Exit, Failure> {
    let schema = anybroker::registry().json_schema();
    if output.is_json() {
        output.object(&schema)?;
    } else {
        output.line(&format!("{schema:#}"))?;
    }
    output.flush()?;
    Ok(Exit::Done)
}

/// `anybroker config check`.
pub(crate) async fn check(global: &Global, args: CheckArgs, output: &mut Output) -> Result<Exit, Failure> {
    let config = settings(global)?;
    let scheme = config.scheme();
    if args.connect {
        let bus = connect(global).await?;
        let endpoint = json::endpoint(bus.endpoint());
        if output.is_json() {
            output.object(&json!({"valid": true, "connected": true, "endpoint": endpoint}))?;
        } else {
            output.line(&format!("valid; connected to {} ({})", bus.endpoint(), bus.endpoint().server))?;
        }
        output.flush()?;
        close(&bus).await?;
        return Ok(Exit::Done);
    }
    anybroker::registry().check(config).map_err(|error| Failure::Config(with_hint(global, error)))?;
    if output.is_json() {
        output.object(&json!({"valid": true, "connected": false, "scheme": scheme}))?;
    } else {
        output.line(&format!("valid ({})", scheme.unwrap_or_default()))?;
    }
    output.flush()?;
    Ok(Exit::Done)
}

/// Where no endpoint was named at all, says how one is.
fn with_hint(global: &Global, error: anybroker::Error) -> anybroker::Error {
    let named = global.url.is_some()
        || global.config.is_some()
        || global.settings.iter().any(|(key, _)| key == "url")
        || std::env::var_os("ANYBROKER_URL").is_some();
    if named { error } else { error.with("hint", "name an endpoint with --url, --config or ANYBROKER_URL") }
}

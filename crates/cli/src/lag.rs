//! `anybroker lag`: what a group has left to do.

use anybroker::{Figure, Lag, Precision};

use crate::args::{Global, LagArgs};
use crate::exit::{Exit, Failure};
use crate::output::{Output, or_dash};
use crate::{connect, json};

pub(crate) async fn run(global: &Global, args: LagArgs, output: &mut Output) -> Result<Exit, Failure> {
    let bus = connect::connect(global).await?;
    let lag = bus.lag(args.destination.as_str(), args.group.as_str()).await?;
    if output.is_json() {
        let mut object = json::lag(&lag);
        object["destination"] = args.destination.into();
        object["group"] = args.group.into();
        output.object(&object)?;
    } else {
        let mut rows = vec![row("total", &lag)];
        rows.extend(lag.lanes.iter().map(|(name, lane)| row(name, lane)));
        output.table(&["LANE", "READY", "IN FLIGHT", "DELAYED", "OLDEST"], rows)?;
    }
    output.flush()?;
    connect::close(&bus).await?;
    Ok(Exit::Done)
}

fn row(name: &str, lag: &Lag) -> Vec<String> {
    let oldest = lag.oldest_age.map(|(age, precision)| (humantime::format_duration(age).to_string(), precision));
    vec![name.to_owned(), shown(lag.ready), shown(lag.in_flight), shown(lag.delayed), shown(oldest)]
}

/// `-` where the endpoint cannot tell, `~` before an estimate.
pub(crate) fn shown<T: ToString>(figure: Figure<T>) -> String {
    or_dash(figure.map(|(value, precision)| match precision {
        Precision::Exact => value.to_string(),
        Precision::Approximate => format!("~{}", value.to_string()),
    }))
}

//! `anybroker capabilities`, `declare`, `describe` and `delete`.

use anybroker::{Declared, ErrorKind, Group, GroupDescription, TopologySpec};
use serde_json::{Value, json};

use crate::args::{DeclareArgs, DeleteArgs, DescribeArgs, Global};
use crate::exit::{Exit, Failure};
use crate::lag::shown;
use crate::output::{Output, or_dash};
use crate::{connect, json};

pub(crate) async fn capabilities(global: &Global, output: &mut Output) -> Result<Exit, Failure> {
    let bus = connect::connect(global).await?;
    let (endpoint, record) = (bus.endpoint(), bus.capabilities());
    if output.is_json() {
        let record: serde_json::Map<String, Value> =
            record.fields().into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
        output.object(&json!({"endpoint": json::endpoint(endpoint), "capabilities": record}))?;
    } else {
        output.line(&format!("{endpoint} · mode {} · {}", endpoint.mode, endpoint.server))?;
        let mut rows = Vec::new();
        for (name, value) in record.fields() {
            match value {
                // `limits` and `lag`: one row for each figure.
                Value::Object(figures) if !figures.contains_key("emulated") && !figures.contains_key("refused") => {
                    for (figure, value) in figures.into_iter().filter(|(_, value)| !value.is_null()) {
                        rows.push(vec![format!("{name}.{figure}"), bare(&value), String::new()]);
                    }
                }
                Value::Object(support) => {
                    rows.extend(support.into_iter().map(|(level, note)| vec![name.to_owned(), level, bare(&note)]));
                }
                value => rows.push(vec![name.to_owned(), bare(&value), String::new()]),
            }
        }
        output.table(&["CAPABILITY", "VALUE", "PRICE OR REMEDY"], rows)?;
    }
    output.flush()?;
    connect::close(&bus).await?;
    Ok(Exit::Done)
}

pub(crate) async fn declare(global: &Global, args: DeclareArgs, output: &mut Output) -> Result<Exit, Failure> {
    let bus = connect::connect(global).await?;
    let spec = match &args.group {
        Some(group) => TopologySpec::group(args.destination.as_str(), group.as_str()).with_start(args.start),
        None => TopologySpec::destination(args.destination.as_str()),
    };
    let declared = match bus.declare(&spec).await? {
        Declared::Created => "created",
        Declared::Existed => "existed",
    };
    if output.is_json() {
        output.object(&json!({"destination": args.destination, "group": args.group, "declared": declared}))?;
    } else {
        output.line(&format!("{declared}: {}", named(&args.destination, args.group.as_deref())))?;
    }
    output.flush()?;
    connect::close(&bus).await?;
    Ok(Exit::Done)
}

pub(crate) async fn describe(global: &Global, args: DescribeArgs, output: &mut Output) -> Result<Exit, Failure> {
    let bus = connect::connect(global).await?;
    let description = bus.describe(args.destination.as_str()).await?;
    let wanted = |group: &&GroupDescription| args.group.as_deref().is_none_or(|name| group.group == *name);
    let groups: Vec<&GroupDescription> = description.groups.iter().filter(wanted).collect();
    if let (Some(group), true) = (&args.group, groups.is_empty()) {
        let error = anybroker::Error::new(ErrorKind::NotFound, "describe", "the destination has no such group")
            .with("destination", &args.destination)
            .with("group", group);
        return Err(error.into());
    }
    if output.is_json() {
        output.object(&json::description(&description, &groups))?;
    } else {
        output.line(&format!("destination  {}", description.destination))?;
        output.line(&format!("physical     {}", description.physical))?;
        output.line(&format!("messages     {}", or_dash(description.messages)))?;
        for (name, value) in &description.settings {
            output.line(&format!("{name:<12} {value}"))?;
        }
        if !groups.is_empty() {
            output.line("")?;
            let rows = groups.into_iter().map(row).collect();
            output.table(&["GROUP", "PHYSICAL", "READY", "IN FLIGHT", "DELAYED", "DEAD", "DEAD LETTERS IN"], rows)?;
        }
    }
    output.flush()?;
    connect::close(&bus).await?;
    Ok(Exit::Done)
}

pub(crate) async fn delete(global: &Global, args: DeleteArgs, output: &mut Output) -> Result<Exit, Failure> {
    let what = named(&args.destination, args.group.as_deref());
    if !args.yes {
        return Err(Failure::Usage(format!("deleting {what} cannot be undone; say --yes to do it")));
    }
    let bus = connect::connect(global).await?;
    let group = args.group.as_deref().map(Group::from);
    bus.delete(args.destination.as_str(), group.as_ref()).await?;
    if output.is_json() {
        output.object(&json!({"destination": args.destination, "group": args.group, "deleted": true}))?;
    } else {
        output.line(&format!("deleted: {what}"))?;
    }
    output.flush()?;
    connect::close(&bus).await?;
    Ok(Exit::Done)
}

fn row(group: &GroupDescription) -> Vec<String> {
    vec![
        group.group.to_string(),
        group.physical.clone(),
        shown(group.lag.ready),
        shown(group.lag.in_flight),
        shown(group.lag.delayed),
        or_dash(group.dead_letter_count),
        group.dead_letters.clone(),
    ]
}

fn named(destination: &str, group: Option<&str>) -> String {
    group.map_or_else(|| destination.to_owned(), |group| format!("group {group} of {destination}"))
}

fn bare(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), ToOwned::to_owned)
}

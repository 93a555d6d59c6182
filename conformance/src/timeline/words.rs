//! Events in words.

use serde_json::Value;

use super::model::{Line, plain};

/// Where names stand for long ones: the run's own prefix says nothing within one case.
fn short(name: &str) -> &str {
    match name.strip_prefix("conform-").and_then(|rest| rest.splitn(3, '.').nth(2)) {
        Some(label) => label,
        None => name,
    }
}

/// One event, without time and client.
pub(super) fn of(line: &Line) -> String {
    let field = |name: &str| line.text(name);
    let name = |field: &str| short(&line.text(field)).to_owned();
    match line.event.as_str() {
        "publish_invoke" => {
            let key = if line.fields["key"].is_null() { "no key".into() } else { format!("key `{}`", field("key")) };
            format!("publishes it to `{}` ({key}, number {} of that key)", name("destination"), field("sequence"))
        }
        "publish_ok" if line.fields["duplicate"] == Value::Bool(true) => {
            "publish is confirmed: the broker had it already".into()
        }
        "publish_ok" => "publish is confirmed".into(),
        "publish_fail" => format!("publish failed, certainly not stored ({})", field("kind")),
        "publish_info" => format!("publish has an unknown outcome ({})", field("kind")),
        "declared" => format!("declares group `{}` on `{}`", name("group"), name("destination")),
        "subscribe_invoke" => format!("asks for subscription {} in group `{}`", field("subscription"), name("group")),
        "subscribed" => {
            let attempts = match line.number("max_attempts") {
                Some(attempts) => format!("at most {attempts} attempts"),
                None => "attempts without limit".into(),
            };
            format!(
                "subscription {} in group `{}` is effective: order {}, lease {} ms, {attempts}",
                field("subscription"),
                name("group"),
                field("order"),
                line.number("lease_micros").unwrap_or_default() / 1_000
            )
        }
        "deliver" => {
            let mut words = format!(
                "gets it as delivery {} by subscription {}: attempt {}",
                field("delivery"),
                field("subscription"),
                field("attempt")
            );
            if let Some(deliveries) = line.number("deliveries") {
                words.push_str(&format!(", hand-over {deliveries}"));
            }
            words.push_str(&format!(", lane {}", field("lane")));
            if !line.fields["position"].is_null() {
                words.push_str(&format!(", position {}", field("position")));
            }
            words
        }
        "settle_invoke" => format!("settles delivery {}: {}", field("delivery"), field("verb").replace('_', " ")),
        "settle_ok" => format!("delivery {} is settled ({})", field("delivery"), field("level")),
        "settle_fail" => {
            format!("settling delivery {} failed: {}, effect {}", field("delivery"), field("kind"), field("effect"))
        }
        "dropped" => format!("drops delivery {} unsettled", field("delivery")),
        "extended" => format!("extends the lease of delivery {}", field("delivery")),
        "assigned" => format!("lane {} is assigned to subscription {}", field("lane"), field("subscription")),
        "lane_lost" => format!("subscription {} loses lane {}", field("subscription"), field("lane")),
        "degraded" => format!("subscription {} says that it is not served", field("subscription")),
        "recovered" => format!("subscription {} says that it is served again", field("subscription")),
        "close_invoke" => format!("asks subscription {} to close", field("subscription")),
        "closed" => format!("subscription {} is closed", field("subscription")),
        "vanished" => format!("subscription {} goes away without a close", field("subscription")),
        "letter" => format!(
            "reads it as a dead letter of group `{}`: {}, {} attempts (reading {})",
            name("group"),
            field("reason"),
            field("attempts"),
            field("scan")
        ),
        "redrive_invoke" => format!("redrives dead letters of group `{}`", name("group")),
        "redrive_info" => format!("asks to redrive dead letters of group `{}`, and is not told", name("group")),
        "purge_invoke" => format!("purges dead letters of group `{}`", name("group")),
        "drained" => format!("has read group `{}` on `{}` until nothing came", name("group"), name("destination")),
        "hang" => format!("`{}` did not end by its deadline", field("operation")),
        other => {
            let mut words = other.replace('_', " ");
            if let Value::Object(fields) = &line.fields {
                for (name, value) in
                    fields.iter().filter(|(name, _)| !["at", "client", "event"].contains(&name.as_str()))
                {
                    words.push_str(&format!(", {}: {}", name.replace('_', " "), plain(value)));
                }
            }
            words
        }
    }
}

/// Microseconds as milliseconds.
pub(super) fn time(micros: u64) -> String {
    format!("{}.{:03} ms", micros / 1_000, micros % 1_000)
}

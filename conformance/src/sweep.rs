//! What a run calls its destinations, and what runs that were killed have left behind.

use std::time::Duration;

use anybroker_core::{Bus, Destination, ErrorKind, Result, Timestamp};
use rand::RngExt;

/// Begins the name of everything that the suite creates.
const PREFIX: &str = "conform-";

/// A name that no other run and no other part of this one has; by its form it is known as the suite's, and by its time it is
/// known how old it is.
#[must_use]
pub fn fresh_name(label: &str) -> Destination {
    Destination::from(format!("{}.0.{label}", run_id()))
}

/// Begins every name of a run: the second in which it began, and something random.
pub(crate) fn run_id() -> String {
    let seconds = Timestamp::now().as_millis() / 1_000;
    format!("{PREFIX}{seconds:08x}-{:06x}", rand::rng().random::<u32>() >> 8)
}

/// When the run began that gave this name, or `None` where the suite gives no such name.
fn begun(name: &str) -> Option<Timestamp> {
    let is_hex = |text: &str, digits: usize| {
        text.len() == digits && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
    };
    let (run, rest) = name.strip_prefix(PREFIX)?.split_once('.')?;
    let (seconds, random) = run.split_once('-')?;
    let (case, label) = rest.split_once('.')?;
    let is_number = !case.is_empty() && case.bytes().all(|byte| byte.is_ascii_digit());
    if !is_hex(seconds, 8) || !is_hex(random, 6) || !is_number || label.is_empty() {
        return None;
    }
    Some(Timestamp::from_millis(i64::from_str_radix(seconds, 16).ok()? * 1_000))
}

/// A destination that a run of the suite created and did not delete.
#[derive(Debug)]
pub struct Leftover {
    /// Its name.
    pub destination: Destination,
    /// When the run began.
    pub begun: Timestamp,
    /// What deleting it said; `None` where it was not to be deleted.
    pub deleted: Option<Result<()>>,
}

/// Finds the destinations of runs that began at least `age` ago, and deletes them unless it is a `dry_run`. What does not have
/// the form of the suite's names is passed over, and so is a younger run, which may be going on.
///
/// # Errors
/// What listing says: `Unsupported` where the adapter does not list.
pub async fn sweep(bus: &Bus, age: Duration, dry_run: bool) -> Result<Vec<Leftover>> {
    let now = Timestamp::now();
    let mut found = Vec::new();
    for destination in bus.list(PREFIX).await? {
        let Some(begun) = begun(&destination).filter(|begun| now.since(*begun) >= age) else { continue };
        let deleted = match dry_run {
            true => None,
            false => Some(match bus.delete(&destination, None).await {
                // Somebody else was quicker.
                Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
                deleted => deleted,
            }),
        };
        found.push(Leftover { destination, begun, deleted });
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_suite_knows_its_own_names_and_their_age_and_takes_no_others_for_its_own() {
        let before = Timestamp::now().as_millis() / 1_000;
        let own = begun(&fresh_name("d.part")).expect("its own");
        assert!((before..=Timestamp::now().as_millis() / 1_000).contains(&(own.as_millis() / 1_000)));
        assert_eq!(begun("conform-692a0000-abcdef.12.d"), Some(Timestamp::from_millis(0x692a_0000 * 1_000)));
        for other in [
            "orders",
            "conform-orders",
            "conform-orders.1.d",
            "conform-692a0000.1.d",
            "conform-692a0000-abcdef",
            "conform-692a0000-abcdef.1",
            "conform-692a0000-abcdef.1.",
            "conform-692a0000-abcdef.x.d",
            "conform-692a0000-abcdef..d",
            "conform-692A0000-abcdef.1.d",
            "conform-692a0000-abcde.1.d",
            "my.conform-692a0000-abcdef.1.d",
        ] {
            assert_eq!(begun(other), None, "{other}");
        }
    }
}

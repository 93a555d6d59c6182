//! Texts of a report that is read back. In a run they are part of the program (names of cases, sentences of the contract), so
//! reports hold them as `&'static str`; those of a file are kept for the life of the process, each once.

use std::collections::HashSet;
use std::sync::LazyLock;

use parking_lot::Mutex;
use serde::{Deserialize, Deserializer};

/// Under a name of its own, because serde borrows whatever it sees to be a reference.
pub(crate) type Text = &'static str;

static KEPT: LazyLock<Mutex<HashSet<&'static str>>> = LazyLock::new(Mutex::default);

fn keep(text: String) -> Text {
    let mut kept = KEPT.lock();
    if let Some(known) = kept.get(text.as_str()) {
        return known;
    }
    let text: &'static str = text.leak();
    kept.insert(text);
    text
}

pub(crate) fn text<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Text, D::Error> {
    String::deserialize(deserializer).map(keep)
}

pub(crate) fn texts<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<Text>, D::Error> {
    Ok(Vec::<String>::deserialize(deserializer)?.into_iter().map(keep).collect())
}

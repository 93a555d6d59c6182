//! The folders outside the tree: a cache that may be deleted at any time, and the state of what runs.

use std::path::PathBuf;

use anyhow::{Context, Result};

/// Downloads: `ANYBROKER_CACHE`, or `anybroker` in the user's cache folder.
pub(crate) fn cache() -> Result<PathBuf> {
    folder("ANYBROKER_CACHE", "XDG_CACHE_HOME", ".cache")
}

/// Pid files, data and logs of running brokers: `ANYBROKER_STATE`, or `anybroker` in the user's state folder.
pub(crate) fn state() -> Result<PathBuf> {
    folder("ANYBROKER_STATE", "XDG_STATE_HOME", ".local/state")
}

fn folder(own: &str, xdg: &str, below_home: &str) -> Result<PathBuf> {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let folder = match set(own) {
        Some(folder) => folder,
        None => {
            let base = set(xdg).or_else(|| Some(set("HOME")?.join(below_home)));
            base.with_context(|| format!("none of {own}, {xdg} and HOME is set"))?.join("anybroker")
        }
    };
    Ok(std::path::absolute(folder)?)
}

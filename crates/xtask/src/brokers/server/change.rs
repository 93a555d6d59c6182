//! What a running server can be told by commands of its own.

use anyhow::{Context, Result, bail};

use super::super::Site;
use super::{Body, Server};

/// What a running server can be told, beside what signals do to its process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Change {
    /// To have no room for new messages.
    Fill,
    /// To have room again.
    Relieve,
    /// To serve none of its clients, whose password or permission is gone.
    LockOut,
    /// To serve them again.
    LetIn,
}

impl std::fmt::Display for Change {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Fill => "have no room",
            Self::Relieve => "have room again",
            Self::LockOut => "lock its clients out",
            Self::LetIn => "let its clients in again",
        })
    }
}

impl Server {
    /// Why it cannot be told to; none when it can.
    pub(crate) fn obstacle(&self, change: Change) -> Result<Option<String>> {
        if !self.recipe.changes().contains(&change) {
            let unknown = || format!("no way is known to tell {} to {change}", self.name());
            return Ok(Some(self.recipe.cannot(change).map_or_else(unknown, str::to_owned)));
        }
        let is_contained = self.image()?.is_some();
        let why = || format!("{} runs in a container, and only a native one can be told to {change}", self.name());
        Ok(is_contained.then(why))
    }

    /// Tells the running server something that is not done by a signal.
    pub(crate) fn change(&self, change: Change) -> Result<()> {
        let body = self.started()?;
        if let Some(why) = self.obstacle(change)? {
            bail!("{} cannot be told to {change}: {why}", self.name());
        }
        let Body::Processes(nodes) = body else { bail!("{} is no process of this machine", self.name()) };
        let process = nodes.first().context("a server that runs has a process")?;
        let (home, ports) = (self.recipe.install(&self.cache)?, self.record()?.map(|record| record.ports));
        let site = Site { home: &home, folder: &self.folder, ports: &ports.unwrap_or_default(), node: 1 };
        let changed = self.recipe.change(&site, process, change);
        changed.with_context(|| format!("{} could not be told to {change}", self.name()))
    }
}

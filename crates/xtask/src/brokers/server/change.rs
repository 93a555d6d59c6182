//! What a running server can be told by commands of its own.

use anyhow::{Context, Result, bail, ensure};

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
    /// Whether it can be told to.
    pub(crate) fn can(&self, change: Change) -> Result<bool> {
        Ok(self.recipe.changes().contains(&change) && self.image()?.is_none())
    }

    /// Tells the running server something that is not done by a signal.
    pub(crate) fn change(&self, change: Change) -> Result<()> {
        let Body::Process(process) = self.started()? else {
            bail!("{} runs in a container, and only a native one can be told to {change}", self.name())
        };
        ensure!(self.can(change)?, "{} cannot be told to {change}", self.name());
        let (home, ports) = (self.recipe.install(&self.cache)?, self.record()?.map(|record| record.ports));
        let site = Site { home: &home, folder: &self.folder, ports: &ports.unwrap_or_default() };
        let changed = self.recipe.change(&site, &process, change);
        changed.with_context(|| format!("{} could not be told to {change}", self.name()))
    }
}

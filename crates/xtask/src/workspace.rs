//! Where the checkout is.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::child::{cargo, output_of};

/// Makes the root of the workspace, in which this program was called, the current folder.
///
/// Asked at run time: a target folder that several checkouts share may hold a binary that another one compiled.
pub(crate) fn enter() -> Result<()> {
    let manifest = output_of(&mut cargo(["locate-project", "--workspace", "--message-format", "plain"]))?;
    let root = Path::new(manifest.trim()).parent().context("a manifest without a folder")?;
    std::env::set_current_dir(root).with_context(|| format!("could not enter {}", root.display()))
}

/// Cargo's target folder. The current folder has to be the root of the workspace.
pub(crate) fn target() -> Result<PathBuf> {
    let folder = std::env::var_os("CARGO_TARGET_DIR").filter(|folder| !folder.is_empty());
    Ok(std::path::absolute(folder.unwrap_or_else(|| "target".into()))?)
}

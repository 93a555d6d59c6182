//! A mutant: a patch of one adapter, with what it breaks and which case has to find it.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::child::output_of;

/// Where they are.
pub(super) const FOLDER: &str = "conformance/mutants";

/// One file of the folder.
#[derive(Debug)]
pub(super) struct Patch {
    pub(super) file: PathBuf,
    pub(super) adapter: String,
    /// The mode that it is run in, as `cargo xtask conform` calls it.
    pub(super) mode: String,
    /// The name of the file, without its end.
    pub(super) stem: String,
    pub(super) breaks: String,
    /// The case that has to fail.
    pub(super) killed_by: String,
    /// What must be in what the case says, so that it has failed for this fault.
    pub(super) says: String,
    /// What Git calls this content.
    pub(super) blob: String,
}

impl Patch {
    /// All there are, by adapter.
    pub(super) fn all() -> Result<Vec<Self>> {
        let mut files = Vec::new();
        for adapter in std::fs::read_dir(FOLDER).with_context(|| format!("there is no {FOLDER}"))? {
            let adapter = adapter?.path();
            if adapter.is_dir() {
                for file in std::fs::read_dir(&adapter)? {
                    files.push(file?.path());
                }
            }
        }
        files.retain(|file| file.extension().is_some_and(|end| end == "patch"));
        files.sort();
        files.into_iter().map(Self::read).collect()
    }

    fn read(file: PathBuf) -> Result<Self> {
        let text = std::fs::read_to_string(&file)?;
        let name = |path: Option<&Path>| {
            path.and_then(Path::file_stem).map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
        };
        let optional = |field: &str| {
            let value = text.lines().take_while(|line| !line.is_empty()).find_map(|line| line.strip_prefix(field));
            value.map(|value| value.trim().to_owned())
        };
        let field = |field: &str| optional(field).with_context(|| format!("{}: no `{field}`", file.display()));
        let (adapter, stem) = (name(file.parent()), name(Some(&file)));
        let within = format!("adapters/{adapter}/src/");
        for line in text.lines().filter(|line| line.starts_with("+++ ")) {
            ensure!(line[4..].starts_with(&format!("b/{within}")), "{}: changes more than {within}", file.display());
        }
        let blob = output_of(Command::new("git").arg("hash-object").arg(&file))?.trim().to_owned();
        let (breaks, killed_by, says) = (field("Breaks:")?, field("Killed-by:")?, field("Says:")?);
        let mode = optional("On:").unwrap_or_else(|| adapter.clone());
        Ok(Self { breaks, killed_by, says, blob, adapter, mode, stem, file })
    }

    pub(super) fn name(&self) -> String {
        format!("{}/{}", self.adapter, self.stem)
    }
}

//! A copy of the tree in which mutants are applied, so that nobody's work is touched.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::patch::Patch;
use crate::child::output_of;

/// The variable that names the mutant to be switched on. One that began with `ANYBROKER_` would be a setting.
pub(super) const SWITCH: &str = "MUTANT_OF_ANYBROKER";
/// Added to each adapter that is patched.
const SWITCHED: &str = r#"
/// Whether this mutant is switched on.
pub(crate) fn mutant(name: &str) -> bool {
    std::env::var_os("MUTANT_OF_ANYBROKER").is_some_and(|on| on == *name)
}
"#;

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct Tree {
    pub(super) root: PathBuf,
}

impl Tree {
    /// A copy of what the current folder holds, without what Git ignores, with all patches applied. A file that is as it was
    /// keeps its time, so that Cargo builds only what has changed.
    pub(super) fn new(folder: &Path, patches: &[Patch]) -> Result<Self> {
        let (root, fresh) = (folder.join("tree"), folder.join("fresh"));
        if fresh.is_dir() {
            std::fs::remove_dir_all(&fresh)?;
        }
        let list = ["ls-files", "-z", "--cached", "--others", "--exclude-standard"];
        let listed = output_of(Command::new("git").args(list))?;
        for file in listed.split('\0').map(Path::new).filter(|file| file.is_file()) {
            let to = fresh.join(file);
            std::fs::create_dir_all(to.parent().context("a file in a folder")?)?;
            std::fs::copy(file, to)?;
        }
        for patch in patches {
            apply(&fresh, &patch.file)?;
        }
        let adapters: BTreeSet<&str> = patches.iter().map(|patch| &*patch.adapter).collect();
        for adapter in adapters {
            let library = fresh.join("adapters").join(adapter).join("src/lib.rs");
            let text = std::fs::read_to_string(&library)?;
            std::fs::write(&library, text + SWITCHED)?;
        }
        update(&fresh, &root)?;
        std::fs::remove_dir_all(&fresh)?;
        Ok(Self { root })
    }
}

fn apply(tree: &Path, patch: &Path) -> Result<()> {
    let mut apply = Command::new("git");
    apply.arg("apply").arg(std::path::absolute(patch)?).current_dir(tree);
    // The copy may lie within a repository, which Git would take the paths for.
    apply.env("GIT_CEILING_DIRECTORIES", tree.parent().context("a folder above")?);
    output_of(&mut apply).map(drop)
}

/// Makes `to` what `from` is, and writes only what differs.
fn update(from: &Path, to: &Path) -> Result<()> {
    std::fs::create_dir_all(to)?;
    for entry in std::fs::read_dir(to)? {
        let old = entry?.path();
        let new = from.join(old.file_name().context("an entry of a folder")?);
        if old.is_dir() && !new.is_dir() {
            std::fs::remove_dir_all(&old)?;
        } else if !old.is_dir() && !new.is_file() {
            std::fs::remove_file(&old)?;
        }
    }
    for entry in std::fs::read_dir(from)? {
        let new = entry?.path();
        let old = to.join(new.file_name().context("an entry of a folder")?);
        if new.is_dir() {
            update(&new, &old)?;
            continue;
        }
        let content = std::fs::read(&new)?;
        if std::fs::read(&old).ok().as_ref() != Some(&content) {
            std::fs::write(&old, content)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_the_same_is_not_written_and_what_is_gone_is_deleted() {
        let folder = tempfile::tempdir().unwrap();
        let (from, to) = (folder.path().join("from"), folder.path().join("to"));
        let write = |file: &Path, text: &str| {
            std::fs::create_dir_all(file.parent().unwrap()).unwrap();
            std::fs::write(file, text).unwrap();
        };
        write(&from.join("a/same"), "1");
        write(&from.join("a/other"), "2");
        write(&to.join("a/same"), "1");
        write(&to.join("a/other"), "1");
        write(&to.join("gone"), "1");
        write(&to.join("b/gone"), "1");
        let written = |file: &str| std::fs::metadata(to.join(file)).unwrap().modified().unwrap();
        let before = written("a/same");
        update(&from, &to).unwrap();
        assert_eq!(written("a/same"), before);
        assert_eq!(std::fs::read_to_string(to.join("a/other")).unwrap(), "2");
        assert!(!to.join("gone").exists() && !to.join("b").exists());
    }
}

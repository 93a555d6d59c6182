//! Images that are built on this machine from what the native servers are fetched from, for where no image registry can be
//! reached. They have names and a label of their own: what passes on one says nothing of the official image.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

use super::Recipe;
use super::engine::Engine;

/// On every stand-in; its value is the official image in whose place it is.
pub(crate) const LABEL: &str = "anybroker.stand-in";
const SUITE: &str = "trixie";

/// What a recipe's stand-in consists of, beside what the recipe installs.
pub(crate) struct StandIn {
    pub(crate) contents: Contents,
    /// Programs that the official image has: absolute path and text.
    pub(crate) scripts: Vec<(&'static str, String)>,
    pub(crate) entrypoint: &'static [&'static str],
}

/// What [`Recipe::install`] fetched is, in the image …
pub(crate) enum Contents {
    /// … the root folder.
    Root,
    /// … this folder, beside a small Debian with Java.
    Folder(&'static str),
}

/// The name of the stand-in for the image of `recipe`.
pub(crate) fn name_of(recipe: &dyn Recipe) -> String {
    let tag = recipe.image().rsplit_once(':').map_or("latest", |(_, tag)| tag);
    format!("localhost/anybroker-stand-in-{}:{tag}", recipe.name())
}

/// Builds stand-ins of `recipes`; those that are there are built anew.
pub(crate) fn build(recipes: &[&'static dyn Recipe], cache: &Path) -> Result<()> {
    let engine = Engine::find()?;
    for recipe in recipes {
        let Some(stand_in) = recipe.stand_in() else {
            eprintln!("{}: there is no stand-in for {}", recipe.name(), recipe.image());
            continue;
        };
        let home = recipe.install(cache)?;
        crate::interrupt::check()?;
        // Beside what it links to: hard links do not cross file systems.
        let staging = tempfile::Builder::new().prefix("stand-in-").tempdir_in(cache)?;
        let root = staging.path().join("root");
        match stand_in.contents {
            Contents::Root => link_tree(&home, &root)?,
            Contents::Folder(place) => {
                link_tree(&base(cache)?, &root)?;
                link_files(&home, &below(&root, place))?;
            }
        }
        for (place, text) in &stand_in.scripts {
            write_program(&below(&root, place), text)?;
        }
        import(&engine, *recipe, &stand_in, &root)?;
        println!("{} stands in for {}", name_of(*recipe), recipe.image());
    }
    Ok(())
}

/// A root folder of Debian with Java, built once.
fn base(cache: &Path) -> Result<PathBuf> {
    let home = cache.join(format!("stand-in-base-{SUITE}"));
    if home.is_dir() {
        return Ok(home);
    }
    eprintln!("building a root folder of Debian {SUITE} with Java in {}", home.display());
    fs::create_dir_all(cache)?;
    let staging = tempfile::Builder::new().prefix("building-").tempdir_in(cache)?;
    let root = staging.path().join("root");
    let status = Command::new("mmdebstrap")
        .args(["--quiet", "--variant=minbase", "--components=main", "--include=openjdk-21-jre-headless", SUITE])
        .arg(&root)
        .stdin(Stdio::null())
        .status()
        .context("could not start mmdebstrap")?;
    ensure!(status.success(), "mmdebstrap could not build the root folder ({status}); see its output above");
    fs::rename(&root, &home).context("could not move the root folder to its place")?;
    Ok(home)
}

/// The root folder as one layer. `import` is what both engines do alike, without a builder.
fn import(engine: &Engine, recipe: &dyn Recipe, stand_in: &StandIn, root: &Path) -> Result<()> {
    let mut tar = Command::new("tar")
        .args(["--create", "--numeric-owner", "--file=-", "-C"])
        .arg(root)
        .arg(".")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("could not start tar")?;
    let archive = tar.stdout.take().context("a pipe was asked for")?;
    let mut import = engine.command();
    import.arg("import");
    for change in changes(recipe, stand_in) {
        import.args(["--change", &change]);
    }
    let output = import.args(["-", &name_of(recipe)]).stdin(archive).output().context("could not start the engine")?;
    // Its end of the pipe: tar would wait for a reader for ever when the engine has refused.
    drop(import);
    let packed = tar.wait()?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{}: {} import: {}", recipe.name(), engine.program(), said.trim());
    ensure!(packed.success(), "{}: tar failed ({packed})", recipe.name());
    Ok(())
}

fn changes(recipe: &dyn Recipe, stand_in: &StandIn) -> Vec<String> {
    let quoted: Vec<String> = stand_in.entrypoint.iter().map(|word| format!("\"{word}\"")).collect();
    vec![
        format!("LABEL {LABEL}={}", recipe.image()),
        "ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".to_owned(),
        format!("ENTRYPOINT [{}]", quoted.join(", ")),
    ]
}

/// A copy of `from` that takes no room: all its files are hard links, so that none of them may be written to.
fn link_tree(from: &Path, to: &Path) -> Result<()> {
    let output = Command::new("cp").args(["--archive", "--link"]).arg(from).arg(to).stdin(Stdio::null()).output();
    let output = output.context("could not start cp")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "could not copy {}: {}", from.display(), said.trim());
    Ok(())
}

fn below(root: &Path, place: &str) -> PathBuf {
    root.join(place.trim_start_matches('/'))
}

fn link_files(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        if !entry.file_type()?.is_file() {
            bail!("{} is not a file", entry.path().display());
        }
        fs::hard_link(entry.path(), to.join(entry.file_name()))?;
    }
    Ok(())
}

fn write_program(file: &Path, text: &str) -> Result<()> {
    use std::os::unix::fs::PermissionsExt as _;

    fs::create_dir_all(file.parent().context("a program's path is absolute")?)?;
    // Not through a hard link.
    let mut made = fs::File::create_new(file).with_context(|| format!("{} is there already", file.display()))?;
    std::io::Write::write_all(&mut made, text.as_bytes())?;
    Ok(fs::set_permissions(file, fs::Permissions::from_mode(0o755))?)
}

#[cfg(test)]
mod tests {
    use super::super::RECIPES;
    use super::*;

    #[test]
    fn a_stand_in_never_has_the_name_of_the_official_image_and_says_whose_place_it_takes() {
        for recipe in RECIPES {
            let name = name_of(*recipe);
            assert!(name.starts_with("localhost/anybroker-stand-in-"), "{name}");
            let Some(stand_in) = recipe.stand_in() else { continue };
            assert!(changes(*recipe, &stand_in).contains(&format!("LABEL {LABEL}={}", recipe.image())));
        }
    }
}

//! Reports as files, and several of them as one.

use std::path::{Component, Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Report, SCHEMA, html, schema};

/// The reports of several endpoints.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[non_exhaustive]
pub struct ReportSet {
    /// The version of this form, and of each report.
    pub schema: u32,
    /// One for each endpoint.
    pub reports: Vec<Report>,
}

/// Why a report cannot be read.
#[derive(Debug)]
#[non_exhaustive]
pub enum ReportError {
    /// The file system's answer.
    Io(PathBuf, std::io::Error),
    /// It is not a report.
    Malformed(PathBuf, serde_json::Error),
    /// It is one of another version of the form: the number it names.
    OtherSchema(PathBuf, Option<u64>),
}

impl std::fmt::Display for ReportError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Io(path, error) => write!(f, "{}: {error}", path.display()),
            Self::Malformed(path, error) => write!(f, "{} is not a conformance report: {error}", path.display()),
            Self::OtherSchema(path, found) => match found {
                Some(found) => {
                    write!(f, "{} has version {found} of the form; this suite reads {SCHEMA}", path.display())
                }
                None => write!(f, "{} is not a conformance report: it names no version of the form", path.display()),
            },
        }
    }
}

impl std::error::Error for ReportError {}

impl ReportSet {
    /// Those reports, in that order.
    #[must_use]
    pub fn new(reports: Vec<Report>) -> Self {
        Self { schema: SCHEMA, reports }
    }

    /// What a file holds: one report, or a set of them. Links to histories stay as they are in the file; see
    /// [`read_for`](Self::read_for).
    ///
    /// # Errors
    /// See [`ReportError`].
    pub fn read(path: &Path) -> Result<Self, ReportError> {
        let text = std::fs::read_to_string(path).map_err(|error| ReportError::Io(path.to_owned(), error))?;
        let malformed = |error| ReportError::Malformed(path.to_owned(), error);
        let value: Value = serde_json::from_str(&text).map_err(malformed)?;
        let schema = value.get("schema").and_then(Value::as_u64);
        if schema != Some(u64::from(SCHEMA)) {
            return Err(ReportError::OtherSchema(path.to_owned(), schema));
        }
        if value.get("reports").is_some() {
            return serde_json::from_value(value).map_err(malformed);
        }
        Ok(Self::new(vec![serde_json::from_value(value).map_err(malformed)?]))
    }

    /// All reports of several files, for a page in `directory`: links to histories lead from there.
    ///
    /// # Errors
    /// See [`ReportError`].
    pub fn read_for(directory: &Path, files: &[PathBuf]) -> Result<Self, ReportError> {
        let mut reports = Vec::new();
        let absolute = |path: &Path| std::path::absolute(path).map_err(|error| ReportError::Io(path.to_owned(), error));
        let to = absolute(directory)?;
        for file in files {
            let from = relative(&to, absolute(file)?.parent().unwrap_or(Path::new("/")));
            for mut report in Self::read(file)?.reports {
                for case in &mut report.cases {
                    if let Some(history) = &mut case.history_file {
                        *history = from.join(&*history).to_string_lossy().replace('\\', "/");
                    }
                }
                reports.push(report);
            }
        }
        Ok(Self::new(reports))
    }

    /// Whether there is a report, and each is green.
    #[must_use]
    pub fn is_green(&self) -> bool {
        !self.reports.is_empty() && self.reports.iter().all(Report::is_green)
    }

    /// One line for each endpoint.
    #[must_use]
    pub fn text(&self) -> String {
        self.reports.iter().map(|report| report.totals_line() + "\n").collect()
    }

    /// All reports side by side: one page that needs nothing else.
    #[must_use]
    pub fn html(&self) -> String {
        html::page(&self.reports)
    }

    /// The JSON Schema of the set's form.
    #[must_use]
    pub fn json_schema() -> Value {
        schema::set()
    }

    /// Writes `report.txt`, `report.html`, `junit.xml` and `report.json`.
    ///
    /// # Errors
    /// What the file system says.
    pub fn write_dir(&self, directory: &Path) -> std::io::Result<()> {
        std::fs::create_dir_all(directory)?;
        std::fs::write(directory.join("report.txt"), self.text())?;
        std::fs::write(directory.join("report.html"), self.html())?;
        std::fs::write(directory.join("junit.xml"), self.junit())?;
        write(&directory.join("report.json"), &serde_json::to_value(self).unwrap_or_default())
    }
}

/// Writes to a file of another name first: whoever finds the file finds all of it.
pub(super) fn write(path: &Path, value: &Value) -> std::io::Result<()> {
    let unfinished = path.with_extension("json.part");
    std::fs::write(&unfinished, format!("{value:#}\n"))?;
    std::fs::rename(unfinished, path)
}

/// The way from one absolute folder to another.
fn relative(from: &Path, to: &Path) -> PathBuf {
    let (from, to): (Vec<Component<'_>>, Vec<Component<'_>>) = (from.components().collect(), to.components().collect());
    let shared = from.iter().zip(&to).take_while(|(from, to)| from == to).count();
    let up = std::iter::repeat_n(Component::ParentDir, from.len() - shared);
    up.chain(to[shared..].iter().copied()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_way_from_one_folder_to_another_goes_up_and_down_no_further_than_it_must() {
        for (from, to, way) in
            [("/a/b", "/a/b/c", "c"), ("/a/b", "/a/c/d", "../c/d"), ("/a", "/a", ""), ("/a/b", "/", "../..")]
        {
            assert_eq!(relative(Path::new(from), Path::new(to)), Path::new(way), "{from} to {to}");
        }
    }
}

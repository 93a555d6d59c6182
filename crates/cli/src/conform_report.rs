//! `anybroker conform report`: what earlier runs have left behind.

use anybroker_conformance::{Comparison, Report, ReportError, ReportSet};

use crate::args::ReportCommand;
use crate::exit::{Exit, Failure};
use crate::output::Output;

pub(crate) fn run(command: &ReportCommand, output: &mut Output) -> Result<Exit, Failure> {
    let exit = match command {
        ReportCommand::Merge { files, to } => {
            let set = ReportSet::read_for(to, files).map_err(unreadable)?;
            set.write_dir(to).map_err(|error| Failure::Io("write the report", error))?;
            tell(output, &set.text(), &set)?;
            if set.is_green() { Exit::Done } else { Exit::Failed }
        }
        ReportCommand::Compare { before, after, html } => {
            let read = |file| ReportSet::read(file).map_err(unreadable);
            let comparison = Comparison::of(&read(before)?, &read(after)?);
            if let Some(file) = html {
                std::fs::write(file, comparison.html()).map_err(|error| Failure::Io("write the page", error))?;
            }
            tell(output, &comparison.text(), &comparison)?;
            if comparison.is_worse() { Exit::Failed } else { Exit::Done }
        }
        ReportCommand::Schema { merged } => {
            let schema = if *merged { ReportSet::json_schema() } else { Report::json_schema() };
            tell(output, &format!("{schema:#}\n"), &schema)?;
            Exit::Done
        }
    };
    output.flush()?;
    Ok(exit)
}

fn tell(output: &mut Output, text: &str, object: &impl serde::Serialize) -> Result<(), Failure> {
    if output.is_json() {
        return output.object(&serde_json::to_value(object).unwrap_or_default());
    }
    output.raw(text.as_bytes())
}

/// A file that is not there is a failure of this machine; one that is no report is wrong usage.
fn unreadable(error: ReportError) -> Failure {
    match error {
        ReportError::Io(_, error) => Failure::Io("read the report", error),
        other => Failure::Usage(other.to_string()),
    }
}

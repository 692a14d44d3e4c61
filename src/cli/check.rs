//! `sidereal catalog check`: is a catalog whole, and what can be saved of it?

use std::io::Write;
use std::path::PathBuf;

use clap::Args;
use sidereal::Result;
use sidereal::catalog::check::{self, Report};

use super::arguments::{Outcome, say, write_error};

#[derive(Args)]
#[command(after_help = "\
Reads the whole file and its log of changes and changes neither; a writer may
have the catalog open. Exit code 1 says that something is damaged. With
--salvage, everything that can be read is written to a new catalog, which may
then take the old one's place: move it there, and delete the old log.

Example:
  sidereal catalog check items.sidereal --salvage rescued.sidereal")]
pub struct Arguments {
    /// Compiled catalog
    catalog: PathBuf,
    /// Write what can be read to a new catalog
    #[arg(long, value_name = "NEW")]
    salvage: Option<PathBuf>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub fn run(arguments: &Arguments) -> Result<Outcome> {
    let report = match &arguments.salvage {
        Some(new) => check::salvage(&arguments.catalog, new)?,
        None => check::check(&arguments.catalog)?,
    };
    let text = match arguments.json {
        true => serde_json::to_string_pretty(&report).expect("a report has a JSON form"),
        false => to_text(arguments, &report),
    };
    writeln!(std::io::stdout(), "{text}").map_err(write_error(None))?;
    if let Some(new) = &arguments.salvage {
        say(&format!("{}: {} items written", new.display(), report.items));
    }
    Ok(if report.is_whole() { Outcome::Done } else { Outcome::SomeFailed })
}

fn to_text(arguments: &Arguments, report: &Report) -> String {
    let verdict = if report.is_whole() { "whole" } else { "damaged" };
    let mut text = format!(
        "{}: {verdict}\n  readable       {} items, snapshot {}, {} batches of changes, {} of them not \
         compiled in",
        arguments.catalog.display(),
        report.items,
        report.snapshot,
        report.batches,
        report.pending,
    );
    for finding in &report.findings {
        let (path, defect, lost) = (finding.path.display(), &finding.defect, &finding.lost);
        text += &format!("\n  damage         {path}: {defect}\n  lost           {lost}");
    }
    for note in &report.notes {
        text += &format!("\n  note           {note}");
    }
    text
}

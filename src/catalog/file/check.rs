//! Is a catalog whole? If not, what can be saved of it?
//!
//! [`check`] reads everything: the compiled file with all its checksums, the log of changes with
//! its own, and whether the one belongs to the other, nothing acknowledged is missing, and every
//! change applies. [`salvage`] writes what is readable to a new catalog.

use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::change_log::{check_lineage, loss, path_of, with_batches};
use super::lock::read_promise;
use super::log_format::{Batch, Contents, read, records_behind};
use super::{format, resolve};
use crate::catalog::{Catalog, CatalogBuilder, Change, Snapshot};
use crate::error::{Error, Result};
use crate::mapping::open_file;

/// How often file and log are read until they belong together: a compaction may end in between.
const ATTEMPTS: usize = 3;

/// What is wrong with one of a catalog's files.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Finding {
    /// The file.
    pub path: PathBuf,
    /// What is wrong with it.
    pub defect: String,
    /// What cannot be read any more.
    pub lost: String,
}

/// What a check of a catalog found.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Report {
    /// What is wrong; empty for a catalog that is whole.
    pub findings: Vec<Finding>,
    /// What is noteworthy and no damage.
    pub notes: Vec<String>,
    /// The number of items that can be read, with their changes.
    pub items: usize,
    /// The number of the last snapshot that can be read.
    pub snapshot: u64,
    /// The number of batches in the log that can be read.
    pub batches: usize,
    /// How many of them the compiled file lacks.
    pub pending: usize,
}

impl Report {
    /// Whether nothing is wrong.
    pub fn is_whole(&self) -> bool {
        self.findings.is_empty()
    }

    fn find(&mut self, path: &Path, defect: impl Into<String>, lost: impl Into<String>) {
        let (path, defect, lost) = (path.to_path_buf(), defect.into(), lost.into());
        self.findings.push(Finding { path, defect, lost });
    }
}

/// Verifies a compiled catalog and its log. Changes nothing and needs no lock: a writer may have the
/// catalog open.
///
/// # Errors
/// The operating system's, where a file cannot be read; damage is a finding and no error.
pub fn check(catalog: &Path) -> Result<Report> {
    Ok(examine(catalog)?.0)
}

/// Writes what is readable of a catalog, with its changes, to a new file. The old files stay as they
/// are.
///
/// # Errors
/// The operating system's; [`Error::InvalidOption`] where the new file is the old one;
/// [`Error::CatalogFile`] where nothing can be read.
pub fn salvage(catalog: &Path, new: &Path) -> Result<Report> {
    let (from, to) = (resolve(catalog), resolve(new));
    if from.is_ok_and(|from| to.is_ok_and(|to| from == to)) {
        let reason = format!("{} is the catalog itself; name another file", new.display());
        return Err(Error::InvalidOption { option: "--salvage", reason });
    }
    let (report, snapshot) = examine(catalog)?;
    let snapshot = snapshot.ok_or_else(|| {
        let reason = "nothing of it can be read, and its log has no items".into();
        Error::CatalogFile { path: catalog.to_path_buf(), reason }
    })?;
    Catalog::of_snapshot(snapshot).save(new)?;
    Ok(report)
}

/// The report and what is readable.
fn examine(catalog: &Path) -> Result<(Report, Option<Snapshot>)> {
    let path = resolve(catalog).map_err(|error| Error::io(catalog, error))?;
    for _ in 1..ATTEMPTS {
        let (report, snapshot) = examine_once(&path)?;
        if report.is_whole() {
            return Ok((report, snapshot));
        }
    }
    examine_once(&path)
}

fn examine_once(path: &Path) -> Result<(Report, Option<Snapshot>)> {
    let mut report = Report::default();
    let base = match Catalog::open_without_log(path) {
        Ok(catalog) => Some(Snapshot::clone(&catalog.snapshot())),
        Err(Error::CatalogFile { reason, .. }) => match format::salvage(path) {
            Ok((base, lost)) => {
                let lost = if lost.is_empty() { "nothing".into() } else { lost.join("; ") };
                report.find(path, reason, lost);
                Some(Snapshot::of(base))
            }
            Err(_) => {
                report.find(path, reason, "all items that the log does not put");
                None
            }
        },
        Err(error) => return Err(error),
    };
    let snapshot = examine_log(path, base, &mut report)?;
    if let Some(snapshot) = &snapshot {
        report.items = snapshot.num_items();
        report.snapshot = snapshot.number();
    }
    Ok((report, snapshot))
}

/// Looks at the log beside a catalog; returns `base` with all changes that can be read.
fn examine_log(
    path: &Path,
    base: Option<Snapshot>,
    report: &mut Report,
) -> Result<Option<Snapshot>> {
    let log = path_of(path);
    let promise = read_promise(path); // before the log, which may go on
    let io = |error| Error::io(&log, error);
    let read_log = || -> std::io::Result<_> {
        let mut file = open_file(&log)?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        Ok((bytes, file.metadata()?))
    };
    let (bytes, metadata) = match read_log() {
        Ok(found) => found,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(base),
        Err(error) => return Err(io(error)),
    };
    let mut contents = match read(&bytes) {
        Ok(contents) => contents,
        Err(reason) => {
            report.find(&log, reason, "all changes that are not compiled in");
            return Ok(base);
        }
    };
    if let Some(reason) = base.as_ref().and_then(|base| check_lineage(&contents, base)) {
        report.find(&log, reason, "all changes that are not compiled in");
        return Ok(base);
    }
    let compiled = base.as_ref().map_or(0, Snapshot::number);
    let loss = loss(&contents, compiled, promise, &metadata);
    let batches = std::mem::take(&mut contents.batches);
    let readable = readable(&contents, batches, &bytes);
    if let Some(reason) = loss {
        report.find(&log, reason, lost_batches(contents.after, &readable));
    } else if let Some(defect) = &contents.defect {
        report.notes.push(format!(
            "{}: {} at byte {}: it was being written when its process or machine ended, and was \
             never acknowledged",
            log.display(),
            defect.what,
            defect.at
        ));
    } else if readable.last().is_some_and(|last| last.snapshot < compiled) {
        report.notes.push(format!(
            "{}: the log ends before the catalog's snapshot {compiled}; the next writer begins it \
             again",
            log.display()
        ));
    }
    report.batches = readable.len();
    let pending: Vec<Batch> =
        readable.into_iter().filter(|batch| batch.snapshot > compiled).collect();
    report.pending = pending.len();
    let Some(base) = base.or_else(|| first_put(&pending)) else { return Ok(None) };
    Ok(Some(apply(&log, base, pending, report)))
}

/// The batches of a log, with those behind a defect.
fn readable(contents: &Contents, mut batches: Vec<Batch>, bytes: &[u8]) -> Vec<Batch> {
    if let Some(defect) = &contents.defect {
        let end = batches.last().map_or(contents.after, |batch| batch.snapshot);
        let mut behind = records_behind(contents.version, bytes, defect);
        behind.retain(|batch| batch.snapshot > end);
        behind.sort_by_key(|batch| batch.snapshot);
        behind.dedup_by_key(|batch| batch.snapshot);
        batches.append(&mut behind);
    }
    batches
}

/// The gaps between readable batches, the first of which follows snapshot `after`, in words.
fn lost_batches(after: u64, readable: &[Batch]) -> String {
    let mut lost = Vec::new();
    let mut end = after;
    for batch in readable {
        match batch.snapshot - end {
            1 => {}
            2 => lost.push(format!("the batch of snapshot {}", end + 1)),
            _ => {
                lost.push(format!("the batches of snapshots {} to {}", end + 1, batch.snapshot - 1))
            }
        }
        end = batch.snapshot;
    }
    lost.push(format!("any batch after snapshot {end}"));
    lost.join("; ")
}

/// A catalog of the first item that the batches put, for a log whose file is gone.
fn first_put(batches: &[Batch]) -> Option<Snapshot> {
    let mut changes = batches.iter().flat_map(|batch| &batch.changes);
    let item = changes.find_map(|change| match change {
        Change::Put(item) => Some(item.clone()),
        _ => None,
    })?;
    let mut builder = CatalogBuilder::default();
    builder.add(item).ok()?;
    Some(Snapshot::clone(&builder.build().ok()?.snapshot()))
}

/// Applies all batches that can be applied.
fn apply(log: &Path, base: Snapshot, batches: Vec<Batch>, report: &mut Report) -> Snapshot {
    let Some(number) = batches.last().map(|batch| batch.snapshot) else { return base };
    if let Ok(after) = with_batches(&base, batches.clone(), number) {
        return after;
    }
    let mut snapshot = base;
    for batch in batches {
        let number = batch.snapshot;
        match with_batches(&snapshot, vec![batch], number) {
            Ok(after) => snapshot = after,
            Err(error) => {
                let defect = format!("the batch of snapshot {number} does not apply: {error}");
                report.find(log, defect, "its changes");
            }
        }
    }
    snapshot
}

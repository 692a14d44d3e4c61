//! Changes on disk: a log beside the catalog's file, `<catalog>.changes`.
//!
//! `log_format.rs` has the bytes. A compiled catalog knows its snapshot number, and a reader
//! skips the records up to it. So a new compiled file and a new log need not appear in one instant.
//!
//! A log that ends early was either being written when its process or machine died, or has lost
//! acknowledged changes. The two are told apart by the shape of the last record and by what the
//! catalog's lock says was acknowledged (`lock.rs`). Lost changes are an error, with
//! `sidereal catalog check` as the way out.

use std::fs::{File, Metadata, OpenOptions};
use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::format;
use super::lock::{CatalogLock, Promise, read_promise};
use super::log_format::{self, header, record};
pub use super::log_format::{Batch, Contents, Defect, parse};
use super::replace::{
    Failed, Folder, folder_of, identity, leads_to, replace, resolve, with_suffix,
};
use crate::catalog::{Change, Snapshot, Watermark, Watermarks};
use crate::error::{Error, Result};
use crate::mapping::{check_regular, open_file};

/// The log's path beside a compiled catalog, after symbolic links: of the catalog, and of the log.
pub fn path_of(catalog: &Path) -> PathBuf {
    let resolved = resolve(catalog);
    let log = with_suffix(&resolved.unwrap_or_else(|_| catalog.to_path_buf()), ".changes");
    resolve(&log).unwrap_or(log)
}

/// The error of a log.
pub(super) fn failed(log: &Path, reason: impl Into<String>) -> Error {
    Error::ChangeLog { path: log.to_path_buf(), reason: reason.into() }
}

/// Why a log may not be used: what it lacks of what was acknowledged, or where it is damaged.
/// `snapshot` is the number of the catalog beside it.
pub(super) fn loss(
    contents: &Contents,
    snapshot: u64,
    promise: Option<Promise>,
    file: &Metadata,
) -> Option<String> {
    let promise = promise.filter(|promise| promise.is_about(contents.id, file));
    let end = contents.end();
    let must_have = promise.map_or(0, |promise| promise.must_have());
    let what = match &contents.defect {
        Some(defect) => format!("{} at byte {} of {}", defect.what, defect.at, file.len()),
        None => format!("the log ends after {} bytes", file.len()),
    };
    if end.max(snapshot) < must_have {
        return Some(format!(
            "{what}: it has the changes up to snapshot {end}, and those up to {must_have} were \
             acknowledged; `sidereal catalog check` says what can be saved"
        ));
    }
    let is_damaged = contents.defect.as_ref().is_some_and(|defect| !defect.is_unfinished);
    is_damaged.then(|| format!("{what}; `sidereal catalog check` says what can be saved"))
}

/// Checks that a log belongs to the catalog beside it and goes on from there.
pub(super) fn check_lineage(contents: &Contents, snapshot: &Snapshot) -> Option<String> {
    if contents.lineage != snapshot.base().lineage() {
        let reason = "the log belongs to another catalog than the one beside it; move it away, or \
                      put its own catalog back";
        return Some(reason.into());
    }
    (contents.after > snapshot.number()).then(|| {
        format!(
            "the catalog beside it is of snapshot {}, the log goes on after {}; put the newer \
             catalog back",
            snapshot.number(),
            contents.after
        )
    })
}

/// The snapshot after batches, without those whose watermark it has already.
///
/// # Errors
/// [`Error::InvalidChange`] for a change that does not fit the catalog.
pub(crate) fn with_batches(
    snapshot: &Snapshot,
    batches: Vec<Batch>,
    number: u64,
) -> Result<Snapshot> {
    let mut watermarks = Watermarks::clone(snapshot.watermarks());
    let mut changes = Vec::new();
    for batch in batches {
        if let Some(watermark) = &batch.watermark {
            if watermarks.covers(watermark) {
                continue;
            }
            watermarks.advance(watermark);
        }
        changes.extend(batch.changes);
    }
    Ok(snapshot.with_numbered(&changes, number)?.with_watermarks(watermarks))
}

/// The snapshot after the batches of a log that `snapshot` lacks, if it lacks any.
fn apply(log: &Path, contents: Contents, snapshot: &Snapshot) -> Result<Option<Snapshot>> {
    let number = contents.end();
    let mut batches = contents.batches;
    batches.retain(|batch| batch.snapshot > snapshot.number());
    if batches.is_empty() {
        return Ok(None);
    }
    let after = with_batches(snapshot, batches, number);
    let after = after.map_err(|error| {
        let reason = format!("a change does not fit the catalog: {error}");
        failed(log, reason)
    })?;
    Ok(Some(after))
}

/// Reads a log and checks it against the catalog beside it.
fn read(
    log: &Path,
    mut file: &File,
    promise: Option<Promise>,
    snapshot: &Snapshot,
) -> Result<Contents> {
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).map_err(|error| Error::io(log, error))?;
    let contents = log_format::read(&bytes).map_err(|reason| failed(log, reason))?;
    let metadata = file.metadata().map_err(|error| Error::io(log, error))?;
    let wrong = check_lineage(&contents, snapshot)
        .or_else(|| loss(&contents, snapshot.number(), promise, &metadata));
    wrong.map_or(Ok(contents), |reason| Err(failed(log, reason)))
}

/// The snapshot after the changes logged beside a compiled catalog, if there are any. `catalog` is a
/// resolved name.
///
/// # Errors
/// [`Error::ChangeLog`]; the operating system's.
pub(crate) fn replay(catalog: &Path, snapshot: &Snapshot) -> Result<Option<Snapshot>> {
    let log = path_of(catalog);
    // Before the log: what is acknowledged later need not be in what was read.
    let promise = read_promise(catalog);
    let file = match open_file(&log) {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::io(&log, error)),
    };
    let contents = read(&log, &file, promise, snapshot)?;
    apply(&log, contents, snapshot)
}

/// How many batches the log beside a catalog has that the compiled file lacks. Zero where there is
/// no log.
///
/// # Errors
/// [`Error::ChangeLog`] where the log cannot be read; the operating system's.
pub fn num_pending(catalog: &Path) -> Result<usize> {
    let log = path_of(catalog);
    let read = || -> std::io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        open_file(&log)?.read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    let bytes = match read() {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(0),
        Err(error) => return Err(Error::io(&log, error)),
    };
    let contents = parse(&bytes).map_err(|reason| failed(&log, reason))?;
    let snapshot = format::read_snapshot_number(catalog)?.unwrap_or(0);
    Ok(contents.batches.iter().filter(|batch| batch.snapshot > snapshot).count())
}

/// Makes way for a catalog that takes the place of another: the other's log must not have changes
/// that its file lacks, and goes.
///
/// # Errors
/// [`Error::ChangeLog`] where changes would be lost; the operating system's.
pub(crate) fn make_way(catalog: &Path) -> Result<()> {
    let log = path_of(catalog);
    let num_pending = num_pending(catalog)?;
    if num_pending > 0 {
        let reason = format!(
            "holds changes that the catalog there lacks (batches: {num_pending}); compile them in \
             with `sidereal catalog change --compact` first, or delete the log"
        );
        return Err(failed(&log, reason));
    }
    match std::fs::remove_file(&log) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(Error::io(&log, error)),
        _ => Ok(()),
    }
}

/// The log of one catalog, open for writing by this process alone.
pub(crate) struct ChangeLog {
    path: PathBuf,
    file: File,
    lock: Arc<CatalogLock>,
    lineage: u64,
    len: u64,
    /// What the lock says of the log: its last batch, and the last one on the disk.
    promise: Promise,
    /// Bytes of compiled batches that a new log takes over for [`ChangeLog::later_than`].
    keep_bytes: u64,
    /// The failure after which nothing can be written any more.
    broken: Option<String>,
}

impl ChangeLog {
    /// Opens the log beside a compiled catalog or begins one. A record that was being written when
    /// its process died is cut off. Returns the catalog's snapshot after the log, where the log has
    /// changes that `snapshot` lacks.
    ///
    /// # Errors
    /// [`Error::ChangeLog`]: damaged, or another catalog's; the operating system's.
    pub fn open(
        lock: Arc<CatalogLock>,
        catalog: &Path,
        snapshot: &Snapshot,
        keep_bytes: u64,
    ) -> Result<(ChangeLog, Option<Snapshot>)> {
        let path = path_of(catalog);
        let io = |error| Error::io(&path, error);
        let lineage = snapshot.base().lineage();
        check_regular(&path).map_err(io)?;
        let opened = match OpenOptions::new().read(true).write(true).open(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => None,
            file => Some(file.map_err(io)?),
        };
        let begin =
            |lock: Arc<CatalogLock>, after, watermarks: &Watermarks, records: &[u8], last| {
                let (file, promise, len) =
                    begin(&path, &lock, catalog, lineage, after, watermarks, records, last)
                        .map_err(|failed| io(failed.error))?;
                let (path, broken) = (path.clone(), None);
                Ok(ChangeLog { path, file, lock, lineage, len, promise, keep_bytes, broken })
            };
        let number = snapshot.number();
        let Some(file) = opened else {
            return Ok((begin(lock, number, snapshot.watermarks(), &[], number)?, None));
        };
        let contents = read(&path, &file, lock.promise(), snapshot)?;
        let last = contents.end();
        if contents.version != log_format::VERSION || is_apart(&contents, snapshot) {
            let pending = contents.batches.iter().filter(|batch| batch.snapshot > number);
            let records = records(pending)?;
            let after = apply(&path, contents, snapshot)?;
            let log = begin(lock, number, snapshot.watermarks(), &records, last.max(number))?;
            return Ok((log, after));
        }
        let (id, len) = (contents.id, contents.whole_bytes);
        let after = apply(&path, contents, snapshot)?;
        file.set_len(len).map_err(io)?;
        let metadata = file.metadata().map_err(io)?;
        // What a process before us wrote may not be on the disk yet.
        let before = lock.promise().filter(|promise| promise.is_about(id, &metadata));
        let promise = Promise {
            log_id: id,
            log_file: identity(&metadata),
            acknowledged: last,
            synced: before.map_or(0, |promise| promise.synced),
            is_same_boot: true,
        };
        lock.set_promise(&promise);
        let broken = None;
        Ok((ChangeLog { path, file, lock, lineage, len, promise, keep_bytes, broken }, after))
    }

    /// Appends a batch that makes the next snapshot. Once this returns, the batch survives the end
    /// of the process and, with `is_synced`, of the machine.
    ///
    /// # Errors
    /// The operating system's: the batch is then not in the log. [`Error::MayBeLogged`] where that
    /// cannot be said; the log then takes no further batch.
    pub fn append(
        &mut self,
        snapshot: u64,
        changes: &[Change],
        watermark: Option<&Watermark>,
        is_synced: bool,
    ) -> Result<()> {
        self.check()?;
        let next = self.promise.acknowledged + 1;
        assert_eq!(snapshot, next, "batches make one snapshot after the other");
        let record = record(snapshot, changes, watermark)?;
        let mut file = &self.file;
        let written = file.seek(SeekFrom::Start(self.len)).and_then(|_| file.write_all(&record));
        if let Err(error) = written {
            // A half-written record must go, or the next one would follow it.
            if let Err(second) = file.set_len(self.len) {
                self.broken = Some(format!("a write failed ({error}) and stays undone ({second})"));
            }
            return Err(Error::io(&self.path, error));
        }
        if is_synced && let Err(error) = self.file.sync_data() {
            self.broken = Some(format!("the disk failed: {error}"));
            let (path, source) = (self.path.clone(), Arc::new(error));
            return Err(Error::MayBeLogged { path, snapshot, source });
        }
        self.check_name()?;
        self.len += record.len() as u64;
        self.promise.acknowledged = snapshot;
        if is_synced {
            self.promise.synced = snapshot;
        }
        self.lock.set_promise(&self.promise);
        Ok(())
    }

    /// Returns when the disk has every appended batch.
    ///
    /// # Errors
    /// The operating system's. The log then takes no further batch, because the disk's state is
    /// unknown.
    pub fn sync(&mut self) -> Result<()> {
        self.check()?;
        if self.promise.synced == self.promise.acknowledged {
            return Ok(());
        }
        self.check_name()?;
        self.file.sync_data().map_err(|error| {
            self.broken = Some(format!("the disk failed: {error}"));
            Error::io(&self.path, error)
        })?;
        self.promise.synced = self.promise.acknowledged;
        self.lock.set_promise(&self.promise);
        Ok(())
    }

    /// Whether the log takes batches.
    ///
    /// # Errors
    /// [`Error::ChangeLog`] with the failure after which it takes none.
    pub fn check(&self) -> Result<()> {
        match &self.broken {
            Some(reason) => Err(failed(&self.path, format!("{reason}; open the catalog again"))),
            None => Ok(()),
        }
    }

    /// Checks that the log's name leads to this file. Nobody would find a batch in another one.
    fn check_name(&mut self) -> Result<()> {
        if matches!(leads_to(&self.path, &self.file), Ok(true)) {
            return Ok(());
        }
        self.broken = Some("the log was moved, removed or replaced under its writer".into());
        self.check()
    }

    /// The batches of the log, and the watermarks before the first.
    ///
    /// # Errors
    /// The operating system's; [`Error::ChangeLog`] where the log was damaged meanwhile.
    fn contents(&self) -> Result<(Contents, Vec<u8>)> {
        let mut bytes = Vec::new();
        let mut file = &self.file;
        let read = file.seek(SeekFrom::Start(0)).and_then(|_| file.read_to_end(&mut bytes));
        read.map_err(|error| Error::io(&self.path, error))?;
        let contents = parse(&bytes).map_err(|reason| failed(&self.path, reason))?;
        Ok((contents, bytes))
    }

    /// The batches that a catalog as of `watermarks` lacks: those with a later watermark, and those
    /// without one that follow snapshot `compiled`.
    ///
    /// # Errors
    /// [`Error::StaleBase`] where the log no longer has all batches after the watermarks.
    pub fn later_than(&self, watermarks: &Watermarks, compiled: u64) -> Result<Vec<Batch>> {
        let (contents, _) = self.contents()?;
        for first in contents.watermarks.iter() {
            let offset = watermarks.offset(&first.source, first.partition);
            if offset.is_none_or(|offset| offset < first.offset) {
                let reason = match offset {
                    Some(offset) => format!("it is as of {offset}"),
                    None => "it has no watermark of that partition".into(),
                };
                return Err(Error::StaleBase { oldest: first.to_string(), reason });
            }
        }
        let mut batches = contents.batches;
        batches.retain(|batch| match &batch.watermark {
            Some(watermark) => !watermarks.covers(watermark),
            None => batch.snapshot > compiled,
        });
        Ok(batches)
    }

    /// Drops the batches that the compiled file now has, apart from the last ones with watermarks.
    /// Where the file `is_new_base`, all go: changes that came with the base are not in the log.
    ///
    /// # Errors
    /// The operating system's; the log is then as it was, or takes no further batch.
    pub fn drop_compiled(
        &mut self,
        catalog: &Path,
        compiled: &Snapshot,
        is_new_base: bool,
    ) -> Result<()> {
        self.check()?;
        self.check_name()?;
        let (mut contents, bytes) = self.contents()?;
        let keep_bytes = if is_new_base { 0 } else { self.keep_bytes };
        let first = first_kept(&contents, compiled.number(), keep_bytes);
        for watermark in contents.batches.drain(..first).filter_map(|batch| batch.watermark) {
            contents.watermarks.advance(&watermark);
        }
        let after = contents.batches.first().map_or(compiled.number(), |batch| batch.snapshot - 1);
        let start = contents.starts.get(first).copied().unwrap_or(contents.whole_bytes);
        let records = &bytes[start as usize..contents.whole_bytes as usize];
        let lock = &self.lock;
        let watermarks = if is_new_base { compiled.watermarks() } else { &contents.watermarks };
        let last = self.promise.acknowledged;
        let begun =
            begin(&self.path, lock, catalog, self.lineage, after, watermarks, records, last);
        let (file, promise, len) = begun.map_err(|failed| {
            if failed.is_renamed {
                // The name may lead to the new file, and after a power loss to either.
                let reason = format!("the log could not be begun again: {}", failed.error);
                self.broken = Some(reason);
            }
            Error::io(&self.path, failed.error)
        })?;
        (self.file, self.promise, self.len) = (file, promise, len);
        Ok(())
    }

    /// Bytes of the file.
    pub fn len(&self) -> u64 {
        self.len
    }
}

/// The first batch that a new log takes over: of those up to `snapshot`, the last ones of up to
/// `keep_bytes`, beginning with one that has a watermark.
fn first_kept(contents: &Contents, snapshot: u64, keep_bytes: u64) -> usize {
    let needed = contents.batches.partition_point(|batch| batch.snapshot <= snapshot);
    let end = contents.starts.get(needed).copied().unwrap_or(contents.whole_bytes);
    let fits = contents.starts.partition_point(|&start| end.saturating_sub(start) > keep_bytes);
    let kept = fits.min(needed)..needed;
    kept.clone().find(|&at| contents.batches[at].watermark.is_some()).unwrap_or(kept.end)
}

/// Whether the compiled batches of a log are not all that the catalog's file has.
///
/// Where the log ends before the file (a backup of the log was put back, or the power went between
/// the two), a record that followed would be out of order. Where the file has other watermarks, it
/// is a new base, whose process died before it began the log again.
fn is_apart(contents: &Contents, snapshot: &Snapshot) -> bool {
    let mut watermarks = contents.watermarks.clone();
    for batch in contents.batches.iter().filter(|batch| batch.snapshot <= snapshot.number()) {
        batch.watermark.iter().for_each(|watermark| watermarks.advance(watermark));
    }
    contents.end() < snapshot.number() || watermarks != *snapshot.watermarks()
}

fn records<'a>(batches: impl Iterator<Item = &'a Batch>) -> Result<Vec<u8>> {
    let mut records = Vec::new();
    for Batch { snapshot, changes, watermark } in batches {
        records.extend_from_slice(&record(*snapshot, changes, watermark.as_ref())?);
    }
    Ok(records)
}

/// Puts a new log in place, whose last batch makes snapshot `last`; returns its file, its promise and
/// its length.
#[allow(clippy::too_many_arguments)] // the fields of a header, and where the file goes
fn begin(
    path: &Path,
    lock: &CatalogLock,
    catalog: &Path,
    lineage: u64,
    after: u64,
    watermarks: &Watermarks,
    records: &[u8],
    last: u64,
) -> std::result::Result<(File, Promise, u64), Failed> {
    let id = fastrand::u64(1..);
    let mut bytes = header(lineage, after, id, watermarks);
    bytes.extend_from_slice(records);
    let like = if path.exists() { path } else { catalog };
    let mut log_file = None;
    // The log's name may be a link to another folder.
    let linked = match folder_of(path) == folder_of(catalog) {
        true => None,
        false => {
            let failed = |error| Failed { error, is_renamed: false };
            Some(Folder::open(&folder_of(path)).map_err(failed)?)
        }
    };
    let file = replace(path, linked.as_ref().unwrap_or(lock.folder()), like, |mut file| {
        log_file = identity(&file.metadata()?);
        file.write_all(&bytes)
    })?;
    let promise =
        Promise { log_id: id, log_file, acknowledged: last, synced: last, is_same_boot: true };
    lock.set_promise(&promise);
    Ok((file, promise, bytes.len() as u64))
}

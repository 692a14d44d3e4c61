//! The writer of a catalog: changes while others search it, and compaction in the background.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use crate::catalog::change_log::{Batch, ChangeLog, with_batches};
use crate::catalog::compaction;
use crate::catalog::file::lock::CatalogLock;
use crate::catalog::file::{format, resolve};
use crate::catalog::sid::Sid;
use crate::catalog::{Catalog, Change, Item, Snapshot, Watermark};
use crate::error::{Error, Result};
use crate::quantizer::{Collision, Quantizer};

mod options;

pub use options::{Durability, WriterOptions};

/// What became of a batch with a watermark.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Applied {
    /// The snapshot that has the batch.
    pub snapshot: u64,
    /// Whether the batch was skipped because the catalog has it already.
    pub is_repeated: bool,
}

/// What became of a new base segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Replaced {
    /// The snapshot that has the new base.
    pub snapshot: u64,
    /// How many batches of the log were applied to the new base because it lacked them.
    pub kept_batches: usize,
}

/// Back-pressure: during a compaction, `apply` blocks once the backlog exceeds this multiple of the
/// compaction threshold.
const MAX_BACKLOG: usize = 8;
/// Deleted items start a compaction once they are one in this many of all items.
const DELETED_SHARE: usize = 4;
/// The most changes that a finished compaction replays while `apply` blocks.
const CATCH_UP: usize = 1000;
/// Rounds of replaying, each shorter than the one before; `apply` blocks during the last one.
const CATCH_UP_ROUNDS: usize = 4;

/// Changes a catalog while others search it. A catalog has at most one writer.
///
/// Every request that begins after [`apply`](CatalogWriter::apply) returns sees the change; a
/// running request keeps its snapshot. Readers never wait for the writer. From time to time a
/// thread of the writer compacts the catalog: it compiles all items, with all changes, into a new
/// base segment. Where the catalog is a file, a new file then takes the old one's place and the log
/// of changes starts again.
///
/// ```
/// use std::sync::Arc;
/// use sidereal::catalog::{Catalog, CatalogBuilder, Change, Item, sid::Sid};
/// use sidereal::{CatalogWriter, WriterOptions};
///
/// # fn main() -> sidereal::Result<()> {
/// let mut builder = CatalogBuilder::default();
/// builder.add(Item::new("lamp", Sid::new(&[3, 1])?))?;
/// let catalog = Arc::new(builder.build()?);
/// let writer = CatalogWriter::in_memory(Arc::clone(&catalog), &WriterOptions::default())?;
/// let before = catalog.snapshot();
/// writer.apply(&[
///     Change::Put(Item::new("chair", Sid::new(&[3, 2])?)),
///     Change::Delete { item: "lamp".into() },
/// ])?;
/// assert!(catalog.snapshot().find("chair").is_some());
/// assert!(before.find("lamp").is_some()); // a snapshot never changes
/// # Ok(())
/// # }
/// ```
pub struct CatalogWriter {
    shared: Arc<Shared>,
    compactor: Option<JoinHandle<()>>,
}

struct Shared {
    catalog: Arc<Catalog>,
    file: Option<OnDisk>,
    options: WriterOptions,
    state: Mutex<State>,
    /// Signalled when a change of the state may end somebody's wait.
    changed: Condvar,
    cancelled: AtomicBool,
}

/// The compiled file of a catalog.
struct OnDisk {
    /// Its resolved name.
    path: PathBuf,
    lock: Arc<CatalogLock>,
}

/// The batches since the running compaction began.
#[derive(Default)]
struct Journal {
    batches: Vec<Batch>,
    num_changes: usize,
}

#[derive(Default)]
struct State {
    log: Option<ChangeLog>,
    /// `None` while no compaction runs.
    journal: Option<Journal>,
    is_wanted: bool,
    is_closing: bool,
    num_compactions: u64,
    failure: Option<Error>,
    /// After a failed compaction: how many changed items start the next attempt.
    retry_at: usize,
}

impl CatalogWriter {
    /// Opens a compiled catalog for changes, with the log beside it (`<catalog>.changes`); starts a
    /// log where there is none. A record that a process left unfinished is cut off. The lock
    /// (`<catalog>.lock`) is held until the writer is dropped, and its file stays.
    ///
    /// # Errors
    /// The files'; [`Error::CatalogInUse`] where another writer has the catalog open.
    pub fn open(path: &Path, options: &WriterOptions) -> Result<CatalogWriter> {
        if crate::catalog::items::is_items_file(path) {
            let reason = "this is a file of items, and only a built catalog can be changed".into();
            return Err(Error::CatalogFile { path: path.to_path_buf(), reason });
        }
        let path = resolve(path).map_err(|error| Error::io(path, error))?;
        std::fs::metadata(&path).map_err(|error| Error::io(&path, error))?; // no lock of nothing
        let lock = Arc::new(CatalogLock::take(&path)?);
        let catalog = Catalog::open_without_log(&path)?;
        let before = catalog.snapshot();
        let (log, after) =
            ChangeLog::open(Arc::clone(&lock), &path, &before, options.keep_log_bytes)?;
        if let Some(after) = after {
            catalog.publish(after);
        }
        let state = State { log: Some(log), ..State::default() };
        CatalogWriter::start(Arc::new(catalog), Some(OnDisk { path, lock }), options, state)
    }

    /// Opens whatever a path leads to for changes: a compiled catalog as [`open`](CatalogWriter::open)
    /// does, or a file of items, whose changes end with the process.
    ///
    /// # Errors
    /// Those of [`Catalog::open`] and of [`open`](CatalogWriter::open).
    pub fn open_any(path: &Path, options: &WriterOptions) -> Result<CatalogWriter> {
        match crate::catalog::items::is_items_file(path) {
            true => CatalogWriter::in_memory(Arc::new(Catalog::open(path)?), options),
            false => CatalogWriter::open(path, options),
        }
    }

    /// Opens a catalog in memory for changes, which end with the process.
    ///
    /// # Errors
    /// The operating system's, where it cannot start a thread.
    pub fn in_memory(catalog: Arc<Catalog>, options: &WriterOptions) -> Result<CatalogWriter> {
        CatalogWriter::start(catalog, None, options, State::default())
    }

    fn start(
        catalog: Arc<Catalog>,
        file: Option<OnDisk>,
        options: &WriterOptions,
        state: State,
    ) -> Result<CatalogWriter> {
        let shared = Arc::new(Shared {
            catalog,
            file,
            options: options.clone(),
            state: Mutex::new(state),
            changed: Condvar::new(),
            cancelled: AtomicBool::new(false),
        });
        let thread = std::thread::Builder::new().name("sidereal-compactor".into());
        let worker = Arc::clone(&shared);
        let compactor =
            thread.spawn(move || worker.compact_when_wanted()).map_err(|error| Error::Device {
                device: "cpu".into(),
                reason: format!("a thread for the catalog could not be started: {error}"),
            })?;
        Ok(CatalogWriter { shared, compactor: Some(compactor) })
    }

    /// The catalog that the writer changes; open engines with it.
    pub fn catalog(&self) -> &Arc<Catalog> {
        &self.shared.catalog
    }

    /// Applies a batch of changes: all of them or, with an error, none. Returns the number of the
    /// snapshot that has them, which new requests see.
    ///
    /// A change of an unknown item does nothing, and so does a change that says what already is. A
    /// batch of such changes alone takes no room in the log and makes no snapshot: the current one's
    /// number comes back. So a feed may deliver its changes more than once.
    ///
    /// A batch costs a few microseconds plus a few nanoseconds for every item put since the last
    /// compaction, so one large batch is cheaper than many small ones. The call writes to the log,
    /// and during a compaction it may block until the compaction ends: call it from a thread that
    /// may wait.
    ///
    /// # Errors
    /// [`Error::InvalidChange`]; the operating system's where the log cannot be written.
    /// [`Error::MayBeLogged`] where the disk failed under [`Durability::Machine`]: the batch is not
    /// applied, may be there once the catalog is opened again, and the writer takes no other.
    pub fn apply(&self, changes: &[Change]) -> Result<u64> {
        self.apply_with(|_| Ok(changes.to_vec()))
    }

    /// Applies a batch like [`apply`](CatalogWriter::apply) and never waits for a compaction. The
    /// call still writes to the log.
    ///
    /// # Errors
    /// [`Error::WriterBusy`] where `apply` would wait; those of `apply`.
    pub fn try_apply(&self, changes: &[Change]) -> Result<u64> {
        let applied = self.commit(Wait::Never, None, |_| Ok(changes.to_vec()))?;
        Ok(applied.snapshot)
    }

    /// Applies the changes that a function makes from the current snapshot; no other change comes
    /// between the snapshot and its successor. Costs and blocks like
    /// [`apply`](CatalogWriter::apply).
    ///
    /// # Errors
    /// Those of `changes` and of [`apply`](CatalogWriter::apply).
    pub fn apply_with(
        &self,
        changes: impl FnOnce(&Snapshot) -> Result<Vec<Change>>,
    ) -> Result<u64> {
        Ok(self.commit(Wait::ForRoom, None, changes)?.snapshot)
    }

    /// Applies a batch of a feed and stores where it ends, both or neither. A batch that ends at or
    /// before the stored offset of its partition is skipped. Costs and blocks like
    /// [`apply`](CatalogWriter::apply).
    ///
    /// A feed reads [`Snapshot::watermarks`] when it starts and goes on after them. A batch without
    /// changes moves the watermark alone.
    ///
    /// ```
    /// # use std::sync::Arc;
    /// # use sidereal::catalog::{CatalogBuilder, Change, Item, Watermark, sid::Sid};
    /// # use sidereal::{CatalogWriter, WriterOptions};
    /// # fn main() -> sidereal::Result<()> {
    /// # let mut builder = CatalogBuilder::default();
    /// # builder.add(Item::new("lamp", Sid::new(&[3, 1])?))?;
    /// # let catalog = Arc::new(builder.build()?);
    /// # let writer = CatalogWriter::in_memory(Arc::clone(&catalog), &WriterOptions::default())?;
    /// let delete = [Change::Delete { item: "lamp".into() }];
    /// let message = Watermark::new("items", 0, 41);
    /// assert!(!writer.apply_from(&message, &delete)?.is_repeated);
    /// assert!(writer.apply_from(&message, &delete)?.is_repeated);
    /// assert_eq!(catalog.snapshot().watermarks().offset("items", 0), Some(41));
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// Those of [`apply`](CatalogWriter::apply); [`Error::InvalidField`] and
    /// [`Error::LimitExceeded`] for a source's name and the number of partitions.
    pub fn apply_from(&self, watermark: &Watermark, changes: &[Change]) -> Result<Applied> {
        self.commit(Wait::ForRoom, Some(watermark), |_| Ok(changes.to_vec()))
    }

    fn commit(
        &self,
        wait: Wait,
        watermark: Option<&Watermark>,
        changes: impl FnOnce(&Snapshot) -> Result<Vec<Change>>,
    ) -> Result<Applied> {
        let shared = &*self.shared;
        let mut state = shared.lock();
        while let Some((backlog, limit)) = shared.full_backlog(&state) {
            if matches!(wait, Wait::Never) {
                return Err(Error::WriterBusy { backlog, limit });
            }
            state = shared.wait(state);
        }
        let is_synced = shared.options.durability == Durability::Machine;
        let before = shared.catalog.snapshot();
        let is_repeated = watermark.is_some_and(|mark| before.watermarks().covers(mark));
        let changes = if is_repeated { Vec::new() } else { changes(&before)? };
        shared.catalog.check(&changes)?;
        let after = match watermark.filter(|_| !is_repeated) {
            Some(watermark) => {
                let after = before.with_numbered(&changes, before.number() + 1)?;
                after.with_watermark(watermark)?
            }
            None => before.with(&changes)?,
        };
        if after.number() == before.number() {
            // Everything is so already. Who acknowledged it may not have waited for the disk.
            if let Some(log) = state.log.as_mut().filter(|_| is_synced) {
                log.sync()?;
            }
            return Ok(Applied { snapshot: before.number(), is_repeated });
        }
        let snapshot = after.number();
        if let Some(log) = &mut state.log {
            log.append(snapshot, &changes, watermark, is_synced)?;
        }
        shared.catalog.publish(after);
        if let Some(journal) = &mut state.journal {
            journal.num_changes += changes.len();
            let watermark = watermark.cloned();
            journal.batches.push(Batch { snapshot, changes, watermark });
        } else if shared.should_compact(&state) {
            shared.changed.notify_all();
        }
        Ok(Applied { snapshot, is_repeated: false })
    }

    /// Puts an item by its embedding and returns its semantic ID: the quantiser gives the codes,
    /// and `collision` says what happens where another item has them. The call ignores the semantic
    /// ID in `item`.
    ///
    /// # Errors
    /// Those of [`Quantizer::sid`] and of [`apply`](CatalogWriter::apply).
    pub fn put_embedded(
        &self,
        item: Item,
        embedding: &[f32],
        quantizer: &Quantizer,
        collision: Collision,
    ) -> Result<Sid> {
        let mut sid = item.sid;
        self.apply_with(|snapshot| {
            sid = quantizer.sid(snapshot, &item.name, embedding, collision)?;
            Ok(vec![Change::Put(Item { sid, ..item })])
        })?;
        Ok(sid)
    }

    /// Blocks until the disk has every change so far.
    ///
    /// # Errors
    /// The operating system's. The writer then refuses changes until the catalog is opened again.
    pub fn sync(&self) -> Result<()> {
        self.shared.lock().log.as_mut().map_or(Ok(()), ChangeLog::sync)
    }

    /// Replaces the compiled catalog by a new full one while others search it. Batches that the new
    /// base lacks are kept: those with a later watermark than the base has, and those without a
    /// watermark that no compaction has compiled in yet. Waits for the end; changes and searches go
    /// on meanwhile.
    ///
    /// The new base says by its watermarks ([`Catalog::set_watermarks`], `catalog build
    /// --watermark`) how far each feed had been applied to its source. Snapshot numbers go on. A
    /// catalog in memory has no log: its base must cover its watermarks, and nothing is kept.
    ///
    /// # Errors
    /// [`Error::StaleBase`] where the log no longer has all batches after the base's watermarks;
    /// [`Error::LevelsMismatch`] where the base has other levels than the catalog, or items that a
    /// model which searches the catalog cannot write; the operating system's, where the new file
    /// cannot be written. The old base and the log of changes then stay as they are; where the error
    /// came after the new file took its place, the catalog has the new base once it is opened again.
    pub fn replace_base(&self, base: &Catalog) -> Result<Replaced> {
        let shared = &*self.shared;
        let mut state = shared.lock();
        while state.journal.is_some() {
            state = shared.wait(state);
        }
        let current = shared.catalog.snapshot();
        let base = base.snapshot();
        if base.num_levels() != current.num_levels() {
            let (new, old) = (base.num_levels(), current.num_levels());
            let reason = format!("the new base has {new} levels, the catalog has {old}");
            return Err(Error::LevelsMismatch { reason });
        }
        shared.catalog.check_snapshot(&base)?;
        let kept = match &state.log {
            Some(log) => log.later_than(base.watermarks(), current.base().snapshot())?,
            None => in_memory_batches(&base, &current)?,
        };
        let kept_batches = kept.len();
        let source = with_batches(&base, kept, current.number())?;
        state.journal = Some(Journal::default());
        drop(state);
        let outcome = shared.compile(&source, Some(current.base().lineage()));
        drop(shared.end_compaction(&outcome));
        shared.changed.notify_all();
        outcome?;
        Ok(Replaced { snapshot: shared.catalog.snapshot().number(), kept_batches })
    }

    /// Compacts the catalog and waits for the end; changes and searches go on meanwhile.
    ///
    /// # Errors
    /// The operating system's, where the new file cannot be written. The old file and the log of
    /// changes then stay as they are.
    pub fn compact(&self) -> Result<()> {
        let shared = &*self.shared;
        let mut state = shared.lock();
        // A running compaction may have begun before the latest change: only the next one counts.
        let wanted = state.num_compactions + if state.journal.is_some() { 2 } else { 1 };
        state.failure = None;
        while state.num_compactions < wanted {
            state.is_wanted = state.journal.is_none();
            shared.changed.notify_all();
            state = shared.wait(state);
            if let Some(error) = state.failure.take() {
                return Err(error);
            }
        }
        Ok(())
    }

    /// The number of compactions so far.
    pub fn num_compactions(&self) -> u64 {
        self.shared.lock().num_compactions
    }

    /// Takes the error of the last failed compaction in the background. The writer tries again once
    /// twice as many items have changed; no change is lost.
    pub fn take_failure(&self) -> Option<Error> {
        self.shared.lock().failure.take()
    }

    /// Bytes of the log of changes; zero for a catalog in memory.
    pub fn log_bytes(&self) -> u64 {
        self.shared.lock().log.as_ref().map_or(0, ChangeLog::len)
    }
}

impl Drop for CatalogWriter {
    /// Stops a running compaction; no change is lost.
    fn drop(&mut self) {
        self.shared.cancelled.store(true, Ordering::Relaxed);
        self.shared.lock().is_closing = true;
        self.shared.changed.notify_all();
        if let Some(compactor) = self.compactor.take() {
            let _ = compactor.join(); // a panic there has already been reported
        }
    }
}

/// What a batch does while the backlog of a compaction is full.
enum Wait {
    ForRoom,
    Never,
}

/// The batches to keep for a new base of a catalog without a log: none, if the base has them.
fn in_memory_batches(base: &Snapshot, current: &Snapshot) -> Result<Vec<Batch>> {
    match current.watermarks().iter().find(|watermark| !base.watermarks().covers(watermark)) {
        None => Ok(Vec::new()),
        Some(watermark) => Err(Error::StaleBase {
            oldest: watermark.to_string(),
            reason: "a catalog in memory has no log from which changes could be kept".into(),
        }),
    }
}

impl Shared {
    /// A panic under the lock leaves the state whole: it happens in the caller's own function, before
    /// anything is changed, or while memory is asked for.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed.wait(state).unwrap_or_else(PoisonError::into_inner)
    }

    /// The compaction threshold of put items.
    fn compact_at(&self) -> usize {
        let default =
            || (self.catalog.snapshot().base().num_items() as usize / 16).clamp(10_000, 100_000);
        self.options.compact_at.unwrap_or_else(default)
    }

    /// The compaction threshold of deleted items.
    fn compact_at_deleted(&self) -> usize {
        let num_items = self.catalog.snapshot().base().num_items() as usize;
        self.compact_at().max(num_items / DELETED_SHARE)
    }

    fn should_compact(&self, state: &State) -> bool {
        let snapshot = self.catalog.snapshot();
        let (put, deleted) = (snapshot.num_put(), snapshot.num_deleted());
        let is_due = put >= self.compact_at() || deleted >= self.compact_at_deleted();
        state.is_wanted || (is_due && put + deleted >= state.retry_at)
    }

    /// The backlog of the running compaction and its limit, once it is full.
    fn full_backlog(&self, state: &State) -> Option<(usize, usize)> {
        let journal = state.journal.as_ref()?;
        let most = |of: usize| of.saturating_mul(MAX_BACKLOG);
        let put = (self.catalog.snapshot().num_put(), most(self.compact_at()));
        let changed = (journal.num_changes, most(self.compact_at_deleted()));
        [put, changed].into_iter().find(|(backlog, limit)| backlog >= limit)
    }

    /// The loop of the compactor's thread.
    fn compact_when_wanted(&self) {
        loop {
            let mut state = self.lock();
            while !state.is_closing && (state.journal.is_some() || !self.should_compact(&state)) {
                state = self.wait(state);
            }
            if state.is_closing {
                return;
            }
            state.is_wanted = false;
            let before = self.catalog.snapshot();
            state.journal = Some(Journal::default());
            drop(state);
            let outcome = self.compile(&before, None);
            let mut state = self.end_compaction(&outcome);
            if let Err(error) = outcome {
                state.failure = Some(error);
            }
            drop(state);
            self.changed.notify_all();
        }
    }

    fn end_compaction(&self, outcome: &Result<()>) -> MutexGuard<'_, State> {
        let mut state = self.lock();
        state.journal = None;
        match outcome {
            Ok(()) => {
                state.num_compactions += 1;
                state.retry_at = 0;
            }
            Err(_) => {
                let snapshot = self.catalog.snapshot();
                state.retry_at = 2 * (snapshot.num_put() + snapshot.num_deleted());
            }
        }
        state
    }

    /// Compiles `source` into the catalog's next base segment, applies the later batches to it and
    /// publishes the result. `source` is an earlier snapshot of the catalog, or another catalog that
    /// takes the catalog's lineage and, because answers change with it, a snapshot number of its own.
    fn compile(&self, source: &Snapshot, lineage: Option<u64>) -> Result<()> {
        // Those who wait for the end of a compaction must not wait for ever.
        let compile = || self.compile_and_publish(source, lineage);
        catch_unwind(AssertUnwindSafe(compile)).unwrap_or_else(|_| {
            let reason = "the compaction of its catalog broke off; report it".into();
            Err(Error::EngineFailed { reason })
        })
    }

    fn compile_and_publish(&self, source: &Snapshot, lineage: Option<u64>) -> Result<()> {
        let goes_on = |_| !self.cancelled.load(Ordering::Relaxed);
        let Some(base) = compaction::compact(source, goes_on)? else {
            return Ok(()); // the writer is closing
        };
        let base = match lineage {
            Some(lineage) => base.with_lineage(lineage),
            None => base,
        };
        let mut next = match &self.file {
            None => Snapshot::of(base),
            Some(OnDisk { path, lock }) => {
                format::save(&base, source.watermarks(), path, lock)?;
                drop(base); // the file has it: memory need not hold a second copy
                (*Catalog::open_without_log(path)?.snapshot()).clone()
            }
        };
        next.base().warm_up_like(self.catalog.snapshot().base());
        for round in 1.. {
            let mut state = self.lock();
            let journal = state.journal.replace(Journal::default());
            let journal = journal.expect("one compaction at a time");
            let current = self.catalog.snapshot().number();
            let is_last = journal.num_changes <= CATCH_UP || round == CATCH_UP_ROUNDS;
            let state = if is_last { Some(state) } else { None };
            if current > next.number() {
                next = with_batches(&next, journal.batches, current)?;
            }
            if let Some(mut state) = state {
                if lineage.is_some() {
                    // Where the log has no room for a number, it has none for changes either.
                    let log = state.log.as_mut();
                    if log.is_none_or(|log| log.append(current + 1, &[], None, false).is_ok()) {
                        next = next.with_numbered(&[], current + 1)?;
                    }
                }
                self.catalog.publish(next);
                let path = self.file.as_ref().map(|file| &file.path);
                return match state.log.as_mut().zip(path) {
                    Some((log, path)) => log.drop_compiled(path, source, lineage.is_some()),
                    None => Ok(()),
                };
            }
        }
        unreachable!("the last round returns")
    }
}

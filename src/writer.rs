//! The writer of a catalog: changes while others search it, and compaction in the background.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;

use crate::catalog::change_log::ChangeLog;
use crate::catalog::compaction;
use crate::catalog::file::format;
use crate::catalog::sid::Sid;
use crate::catalog::{Catalog, Change, Item, Snapshot};
use crate::error::{Error, Result};
use crate::quantizer::{Collision, Quantizer};

/// The crash that an acknowledged change survives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Durability {
    /// The end of the process: the operating system has the change before it is acknowledged.
    /// After [`CatalogWriter::sync`], the change survives the end of the machine too.
    #[default]
    Process,
    /// The end of the machine: the disk has the change before it is acknowledged.
    Machine,
}

/// Options of a [`CatalogWriter`].
#[derive(Debug, Clone, Default)]
pub struct WriterOptions {
    /// The crash that an acknowledged change survives.
    pub durability: Durability,
    /// Compaction threshold: how many items are put before a compaction starts in the background.
    /// By default a sixteenth of the catalog's items, at least ten thousand and at most a hundred
    /// thousand. Deleted items cost little: they start a compaction once they are a quarter of all.
    /// `usize::MAX` turns compaction in the background off.
    pub compact_at: Option<usize>,
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
    path: Option<PathBuf>,
    options: WriterOptions,
    state: Mutex<State>,
    /// Signalled when a change of the state may end somebody's wait.
    changed: Condvar,
    cancelled: AtomicBool,
}

#[derive(Default)]
struct State {
    log: Option<ChangeLog>,
    /// The changes since the running compaction began; `None` while none runs.
    journal: Option<Vec<Change>>,
    is_wanted: bool,
    is_closing: bool,
    num_compactions: u64,
    failure: Option<Error>,
    /// After a failed compaction: how many changed items start the next attempt.
    retry_at: usize,
}

impl CatalogWriter {
    /// Opens a compiled catalog for changes, with the log beside it (`<catalog>.changes`); starts a
    /// log where there is none. A record that a process left unfinished is cut off.
    ///
    /// # Errors
    /// The files'; [`Error::ChangeLog`] where another writer has the catalog open.
    pub fn open(path: &Path, options: &WriterOptions) -> Result<CatalogWriter> {
        if crate::catalog::items::is_items_file(path) {
            let reason = "this is a file of items, and only a built catalog can be changed".into();
            return Err(Error::CatalogFile { path: path.to_path_buf(), reason });
        }
        let catalog = Catalog::open_without_log(path)?;
        let (log, after) = ChangeLog::open(path, &catalog.snapshot())?;
        if let Some(after) = after {
            catalog.publish(after);
        }
        let state = State { log: Some(log), ..State::default() };
        CatalogWriter::start(Arc::new(catalog), Some(path.to_path_buf()), options, state)
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
        path: Option<PathBuf>,
        options: &WriterOptions,
        state: State,
    ) -> Result<CatalogWriter> {
        let shared = Arc::new(Shared {
            catalog,
            path,
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
    /// number comes back. So a feed may deliver its changes more than once. A batch costs a few microseconds plus a few
    /// nanoseconds for every item put since the last compaction, so one large batch is cheaper than
    /// many small ones. The call writes to the log, and during a compaction it may block until the
    /// compaction ends: call it from a thread that may wait.
    ///
    /// # Errors
    /// [`Error::InvalidChange`]; the operating system's where the log cannot be written.
    pub fn apply(&self, changes: &[Change]) -> Result<u64> {
        self.apply_with(|_| Ok(changes.to_vec()))
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
        let shared = &*self.shared;
        let mut state = shared.lock();
        while shared.must_wait(&state) {
            state = shared.changed.wait(state).expect("no holder panics");
        }
        let before = shared.catalog.snapshot();
        let changes = changes(&before)?;
        if changes.is_empty() {
            return Ok(before.number());
        }
        shared.catalog.check(&changes)?;
        let after = before.with(&changes)?;
        if after.number() == before.number() {
            return Ok(after.number()); // every item is so already: there is nothing to log
        }
        if let Some(log) = &mut state.log {
            log.append(after.number(), &changes)?;
            if shared.options.durability == Durability::Machine {
                log.sync()?;
            }
        }
        let number = after.number();
        shared.catalog.publish(after);
        if let Some(journal) = &mut state.journal {
            journal.extend(changes);
        } else if shared.should_compact(&state) {
            shared.changed.notify_all();
        }
        Ok(number)
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
            state = shared.changed.wait(state).expect("no holder panics");
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

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no holder panics")
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

    /// Whether the backlog of the running compaction is full.
    fn must_wait(&self, state: &State) -> bool {
        let most = |of: usize| of.saturating_mul(MAX_BACKLOG);
        state.journal.as_ref().is_some_and(|journal| {
            self.catalog.snapshot().num_put() >= most(self.compact_at())
                || journal.len() >= most(self.compact_at_deleted())
        })
    }

    /// The loop of the compactor's thread.
    fn compact_when_wanted(&self) {
        loop {
            let mut state = self.lock();
            while !state.is_closing && !self.should_compact(&state) {
                state = self.changed.wait(state).expect("no holder panics");
            }
            if state.is_closing {
                return;
            }
            state.is_wanted = false;
            state.journal = Some(Vec::new());
            let before = self.catalog.snapshot();
            drop(state);
            let outcome = self.compact(&before);
            let mut state = self.lock();
            state.journal = None;
            match outcome {
                Ok(()) => {
                    state.num_compactions += 1;
                    state.retry_at = 0;
                }
                Err(error) => {
                    state.failure = Some(error);
                    let snapshot = self.catalog.snapshot();
                    state.retry_at = 2 * (snapshot.num_put() + snapshot.num_deleted());
                }
            }
            drop(state);
            self.changed.notify_all();
        }
    }

    /// Compacts `before`, replays the later changes and publishes the result.
    fn compact(&self, before: &Snapshot) -> Result<()> {
        let goes_on = |_| !self.cancelled.load(Ordering::Relaxed);
        let Some(base) = compaction::compact(before, goes_on)? else {
            return Ok(()); // the writer is closing
        };
        let mut next = match &self.path {
            None => Snapshot::of(base),
            Some(path) => {
                format::save(&base, path)?;
                drop(base); // the file has it: memory need not hold a second copy
                (*Catalog::open_without_log(path)?.snapshot()).clone()
            }
        };
        next.base().warm_up_like(before.base());
        for round in 1.. {
            let mut state = self.lock();
            let journal = state.journal.replace(Vec::new()).expect("one compaction at a time");
            let current = self.catalog.snapshot().number();
            let is_last = journal.len() <= CATCH_UP || round == CATCH_UP_ROUNDS;
            let state = if is_last { Some(state) } else { None };
            if current > next.number() {
                next = next.with_numbered(&journal, current)?;
            }
            if let Some(mut state) = state {
                self.catalog.publish(next);
                return state.log.as_mut().map_or(Ok(()), |log| log.drop_until(before.number()));
            }
        }
        unreachable!("the last round returns")
    }
}

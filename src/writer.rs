//! Changes of a catalog while it is served.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;

use crate::catalog::change_log::ChangeLog;
use crate::catalog::sid::Sid;
use crate::catalog::{Catalog, Change, Item, Snapshot, compile};
use crate::error::{Error, Result};
use crate::quantizer::{Collision, Quantizer};

/// What an acknowledged change survives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Durability {
    /// The end of the process at any instant: the operating system has the change.
    /// [`CatalogWriter::sync`] has it survive more.
    #[default]
    Process,
    /// The end of the machine as well: the disk has the change before it is acknowledged.
    Machine,
}

/// How a writer is opened.
#[derive(Debug, Clone, Default)]
pub struct WriterOptions {
    /// What an acknowledged change survives.
    pub durability: Durability,
    /// Items put from which on the catalog is compiled anew in the background; by default a
    /// sixteenth of its items, at least ten thousand and at most a hundred thousand. Deleted items
    /// cost little, and bring it about when they are a quarter of all. `usize::MAX` for never.
    pub compact_at: Option<usize>,
}

/// Items put, or changes, since the compilation under way began, as a multiple of what brings one
/// about, from which on a change waits until it is done.
const MOST_WAITING: usize = 8;
/// Deleted items, as a share of all, that bring a compilation about: one in so many.
const FORGOTTEN_SHARE: usize = 4;
/// Changes that a new compilation catches up with while other changes wait.
const CATCH_UP: usize = 1000;
/// Rounds of catching up after which they wait in any case: each is shorter than the one before.
const CATCH_UP_ROUNDS: usize = 4;

/// Changes a catalog while others search it. There is one a catalog.
///
/// A change is seen by every request that begins after [`apply`](CatalogWriter::apply) returns;
/// requests that run keep the state they began with. Nobody who reads waits, whatever is written.
/// Now and then a thread of the writer compiles the catalog anew, with all changes, beside the old
/// one; where the catalog is a file, the new file then takes its place and the log of changes
/// begins again.
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
/// assert!(before.find("lamp").is_some()); // whoever began before keeps what was there
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
    /// Something in the state changed that somebody may wait for.
    changed: Condvar,
    cancelled: AtomicBool,
}

#[derive(Default)]
struct State {
    log: Option<ChangeLog>,
    /// What was changed since the compilation under way began; `None` while none is.
    journal: Option<Vec<Change>>,
    is_wanted: bool,
    is_closing: bool,
    num_compactions: u64,
    failure: Option<Error>,
    /// After a compilation failed, changed items from which on it is tried again.
    retry_at: usize,
}

impl CatalogWriter {
    /// Opens a compiled catalog for changes, with the log beside it (`<catalog>.changes`), which is
    /// begun where there is none. What a process that died left half written is cut off.
    ///
    /// # Errors
    /// The files'; [`Error::ChangeLog`] where another process writes already.
    pub fn open(path: &Path, options: &WriterOptions) -> Result<CatalogWriter> {
        if crate::catalog::items::is_items_file(path) {
            let reason = "this is a file of items, and only a built catalog can be changed".into();
            return Err(Error::CatalogFile { path: path.to_path_buf(), reason });
        }
        let catalog = Catalog::open_compiled(path)?;
        let (log, after) = ChangeLog::open(path, &catalog.snapshot())?;
        if let Some(after) = after {
            catalog.publish(after);
        }
        let state = State { log: Some(log), ..State::default() };
        CatalogWriter::start(Arc::new(catalog), Some(path.to_path_buf()), options, state)
    }

    /// Changes a catalog in memory; what is changed is lost with the process.
    ///
    /// # Errors
    /// The operating system's, which starts a thread.
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

    /// The catalog that is changed: what engines are opened with.
    pub fn catalog(&self) -> &Arc<Catalog> {
        &self.shared.catalog
    }

    /// Applies a batch of changes: all of them or, with an error, none. Returns the number of the
    /// snapshot that has them, which new requests see.
    ///
    /// A change to an item that is not known does nothing. A batch costs a few microseconds plus
    /// some for every item that was added since the last compilation: many changes at once cost
    /// little more than one.
    ///
    /// # Errors
    /// [`Error::InvalidChange`]; the operating system's where the log cannot be written.
    pub fn apply(&self, changes: &[Change]) -> Result<u64> {
        self.apply_with(|_| Ok(changes.to_vec()))
    }

    /// The same with changes that depend on the state they change; nothing comes between.
    ///
    /// # Errors
    /// As [`apply`](CatalogWriter::apply), and those of `changes`.
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

    /// Puts an item by its embedding: the quantiser gives its codes, and `collision` says what
    /// happens where another item has them. The semantic ID that `item` has is not looked at.
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

    /// Returns when the disk has every change so far.
    ///
    /// # Errors
    /// The operating system's. No change is taken then until the catalog is opened again.
    pub fn sync(&self) -> Result<()> {
        self.shared.lock().log.as_mut().map_or(Ok(()), ChangeLog::sync)
    }

    /// Compiles the catalog anew now and waits for it; changes and searches go on meanwhile.
    ///
    /// # Errors
    /// The operating system's where the new file cannot be written. The old one and the log of
    /// changes then stay as they are.
    pub fn compact(&self) -> Result<()> {
        let shared = &*self.shared;
        let mut state = shared.lock();
        // One that is under way may have begun before the latest change: the next one counts.
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

    /// How often the catalog was compiled anew.
    pub fn num_compactions(&self) -> u64 {
        self.shared.lock().num_compactions
    }

    /// Why the last compilation in the background failed, if it did. It is tried again when twice
    /// as much has changed; no change is lost.
    pub fn take_failure(&self) -> Option<Error> {
        self.shared.lock().failure.take()
    }

    /// Bytes of the log of changes.
    pub fn log_bytes(&self) -> u64 {
        self.shared.lock().log.as_ref().map_or(0, ChangeLog::len)
    }
}

impl Drop for CatalogWriter {
    /// Stops a compilation under way, which loses nothing.
    fn drop(&mut self) {
        self.shared.cancelled.store(true, Ordering::Relaxed);
        self.shared.lock().is_closing = true;
        self.shared.changed.notify_all();
        if let Some(compactor) = self.compactor.take() {
            let _ = compactor.join(); // it holds nothing that is ours
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no holder panics")
    }

    fn compact_at(&self) -> usize {
        let default =
            || (self.catalog.snapshot().base().num_items() as usize / 16).clamp(10_000, 100_000);
        self.options.compact_at.unwrap_or_else(default)
    }

    /// The same for deleted items.
    fn compact_at_forgotten(&self) -> usize {
        let num_items = self.catalog.snapshot().base().num_items() as usize;
        self.compact_at().max(num_items / FORGOTTEN_SHARE)
    }

    fn should_compact(&self, state: &State) -> bool {
        let snapshot = self.catalog.snapshot();
        let (added, forgotten) = (snapshot.num_added(), snapshot.num_forgotten());
        let is_due = added >= self.compact_at() || forgotten >= self.compact_at_forgotten();
        state.is_wanted || (is_due && added + forgotten >= state.retry_at)
    }

    /// Whether changes come faster than a compilation under way can take.
    fn must_wait(&self, state: &State) -> bool {
        let most = |of: usize| of.saturating_mul(MOST_WAITING);
        state.journal.as_ref().is_some_and(|journal| {
            self.catalog.snapshot().num_added() >= most(self.compact_at())
                || journal.len() >= most(self.compact_at_forgotten())
        })
    }

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
                    state.retry_at = 2 * (snapshot.num_added() + snapshot.num_forgotten());
                }
            }
            drop(state);
            self.changed.notify_all();
        }
    }

    /// Compiles `before`, and publishes it with what has changed since.
    fn compact(&self, before: &Snapshot) -> Result<()> {
        let goes_on = |_| !self.cancelled.load(Ordering::Relaxed);
        let Some(base) = compile(before, goes_on)? else {
            return Ok(()); // the writer is closing
        };
        let mut next = match &self.path {
            None => Snapshot::of(base),
            Some(path) => {
                base.save(path)?;
                drop(base); // the file has it all; two in memory are enough
                (*Catalog::open_compiled(path)?.snapshot()).clone()
            }
        };
        next.base().warm_as(before.base());
        for round in 1.. {
            let mut state = self.lock();
            let journal = state.journal.replace(Vec::new()).expect("one compilation at a time");
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

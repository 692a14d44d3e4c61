//! A catalog as engines and writers hold it: the snapshot of now, and what may replace it.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use arc_swap::ArcSwap;

use super::base_segment::BaseSegment;
use super::builder::CatalogBuilder;
use super::change::Change;
use super::compaction::compact;
use super::file::lock::CatalogLock;
use super::file::{change_log, format, resolve};
use super::items;
use super::order::Ties;
use super::snapshot::Snapshot;
use super::watermark::Watermark;
use crate::error::{Error, Result};

/// Names under which a catalog is looked for beside a model, the first that exists.
const NAMES: [&str; 3] = ["catalog.sidereal", "items.jsonl", "items.index.json"];

/// How often [`Catalog::open`] reads file and log until they belong together.
const OPEN_ATTEMPTS: usize = 3;
/// Items from which on a warning of [`Catalog::warning`] makes sense.
const SMALLEST_CROWD: usize = 4;

/// How a compiled catalog is opened.
///
/// ```
/// use sidereal::catalog::CatalogOptions;
///
/// let always_mapped = CatalogOptions::default().with_map_above(0);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct CatalogOptions {
    /// Files of more bytes are mapped, smaller ones are read into memory; by default
    /// [`DEFAULT_MAP_ABOVE`](CatalogOptions::DEFAULT_MAP_ABOVE).
    ///
    /// A copy in memory is safe from whatever happens to the file. A mapped file opens in the time
    /// that its checksums take, and its pages are shared by all processes that map it, but it must
    /// not be written to in place: replace it by rename. A request that finds such a write gets
    /// [`Error::FileChanged`]. What was not yet noticed can still go wrong: a file that is made
    /// shorter in the middle of a step ends the process.
    pub map_above: u64,
}

impl CatalogOptions {
    /// 1 GiB: some twenty million items.
    pub const DEFAULT_MAP_ABOVE: u64 = 1 << 30;

    /// Sets [`map_above`](CatalogOptions::map_above): 0 maps every file, `u64::MAX` none.
    pub fn with_map_above(mut self, bytes: u64) -> CatalogOptions {
        self.map_above = bytes;
        self
    }
}

impl Default for CatalogOptions {
    fn default() -> CatalogOptions {
        CatalogOptions { map_above: CatalogOptions::DEFAULT_MAP_ABOVE }
    }
}

/// A catalog that may change while it is searched.
///
/// Readers take a [`Snapshot`], which costs a few nanoseconds and never waits; a
/// [`CatalogWriter`](crate::CatalogWriter) publishes the next one.
pub struct Catalog {
    current: ArcSwap<Snapshot>,
    /// For each model that searches the catalog: bits by level and code, whether the model has a
    /// token for the code.
    writable: Mutex<Vec<Vec<Vec<bool>>>>,
}

impl Catalog {
    /// The catalog beside a model: the first of `catalog.sidereal`, `items.jsonl` and
    /// `items.index.json` that its folder has.
    ///
    /// # Errors
    /// [`Error::ModelFolder`] where it has none.
    pub fn beside(model: &Path) -> Result<PathBuf> {
        let candidates = NAMES.map(|name| model.join(name));
        candidates.into_iter().find(|path| path.exists()).ok_or_else(|| Error::ModelFolder {
            path: model.to_path_buf(),
            reason: format!(
                "no catalog is beside the model ({}); name one (--catalog)",
                NAMES.join(", ")
            ),
        })
    }

    /// Opens a compiled catalog with the changes logged beside it, or compiles a file of items in
    /// memory ([`items::is_items_file`]).
    ///
    /// # Errors
    /// The file's: missing, damaged, of another version, or with items that cannot be read.
    pub fn open(path: &Path) -> Result<Catalog> {
        Catalog::open_with(path, &CatalogOptions::default())
    }

    /// Opens a catalog as the options say.
    ///
    /// # Errors
    /// Those of [`open`](Catalog::open).
    pub fn open_with(path: &Path, options: &CatalogOptions) -> Result<Catalog> {
        if items::is_items_file(path) {
            let mut builder = CatalogBuilder::default();
            items::read(path, &[], |item| builder.add(item), |_| {})?;
            builder.build().map_err(|error| items::whole_file_error(path, &error))
        } else {
            // A writer's compaction may end between reading the file and reading the log: the log
            // is then too new for the file, and both are read again.
            let resolved = resolve(path).map_err(|error| Error::io(path, error))?;
            let mut attempts = OPEN_ATTEMPTS;
            loop {
                attempts -= 1;
                let catalog = Catalog::of(format::open(&resolved, options.map_above)?);
                match change_log::replay(&resolved, &catalog.snapshot()) {
                    Ok(None) => return Ok(catalog),
                    Ok(Some(after)) => {
                        catalog.publish(after);
                        return Ok(catalog);
                    }
                    Err(Error::ChangeLog { .. }) if attempts > 0 => {}
                    Err(error) => return Err(error),
                }
            }
        }
    }

    /// Opens a compiled catalog without the changes logged beside it.
    pub(crate) fn open_without_log(path: &Path) -> Result<Catalog> {
        let map_above = CatalogOptions::default().map_above;
        Ok(Catalog::of(format::open(path, map_above)?))
    }

    fn of(base: BaseSegment) -> Catalog {
        Catalog::of_snapshot(Snapshot::of(base))
    }

    /// A catalog that begins with a snapshot.
    pub(super) fn of_snapshot(snapshot: Snapshot) -> Catalog {
        Catalog { current: ArcSwap::from_pointee(snapshot), writable: Mutex::default() }
    }

    /// Writes the catalog, with all its changes, as one file; an existing file is replaced as a
    /// whole or not at all, and keeps its mode. A symbolic link is followed.
    ///
    /// # Errors
    /// The operating system's; [`Error::CatalogInUse`] where a writer has the file open;
    /// [`Error::ChangeLog`] where the log beside it has changes that are not compiled in;
    /// [`Error::CatalogContents`] where the old file's sets are damaged.
    pub fn save(&self, path: &Path) -> Result<()> {
        let path = resolve(path).map_err(|error| Error::io(path, error))?;
        let lock = CatalogLock::take(&path)?;
        change_log::make_way(&path)?;
        let snapshot = self.checked_snapshot()?;
        let (base, watermarks) = (snapshot.base(), snapshot.watermarks());
        if snapshot.number() == base.snapshot && base.ties == Ties::ByName {
            format::save(base, watermarks, &path, &lock)?;
        } else {
            let base = compact(&snapshot, |_| true)?.expect("progress never stops it");
            format::save(&base, watermarks, &path, &lock)?;
        }
        lock.remove_if_new();
        Ok(())
    }

    /// Says how far feeds had been applied when the catalog's items were read from their source, so
    /// that what they send again is skipped.
    ///
    /// # Errors
    /// [`Error::InvalidField`] and [`Error::LimitExceeded`] for watermarks that cannot be.
    pub fn set_watermarks(&self, watermarks: &[Watermark]) -> Result<()> {
        let mut snapshot = Snapshot::clone(&self.snapshot());
        for watermark in watermarks {
            snapshot = snapshot.with_watermark(watermark)?;
        }
        self.publish(snapshot);
        Ok(())
    }

    /// A warning for the owner of the items, where nearly all of them have one semantic ID: no model
    /// could tell them apart, so their codes were probably misread.
    pub fn warning(&self) -> Option<String> {
        let snapshot = self.snapshot();
        let trie = snapshot.base().trie();
        let all = trie.num_items();
        let is_crowd = |items: usize| all >= SMALLEST_CROWD && items * 10 >= all * 9;
        // The others have a semantic ID each at most.
        if !is_crowd(all + 1 - trie.num_leaves().min(all)) {
            return None;
        }
        let (sid, items) = trie.leaves().max_by_key(|(_, items)| items.len())?;
        is_crowd(items.len()).then(|| {
            format!(
                "{} of {all} items have the semantic ID {:?}: check how the items file spells its codes",
                items.len(),
                sid.codes()
            )
        })
    }

    /// The state of the catalog now.
    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.current.load_full()
    }

    /// The state of the catalog now, whose file nobody has written to
    /// ([`Snapshot::check_file`]).
    ///
    /// # Errors
    /// [`Error::FileChanged`].
    pub fn checked_snapshot(&self) -> Result<Arc<Snapshot>> {
        let snapshot = self.snapshot();
        snapshot.check_file()?;
        Ok(snapshot)
    }

    /// Makes `snapshot` the one that new requests see.
    pub(crate) fn publish(&self, snapshot: Snapshot) {
        self.current.store(Arc::new(snapshot));
    }

    /// Registers a model that searches the catalog: from now on, the catalog refuses items that
    /// the model cannot write. `levels[l][c]` says whether the model has a token for code `c` of
    /// level `l`.
    ///
    /// # Errors
    /// [`Error::LevelsMismatch`] where the catalog already has items that the model cannot write.
    pub fn require(&self, levels: Vec<Vec<bool>>) -> Result<()> {
        // Registered before the check, so that an item put in between is checked by one of us.
        let is_known = {
            let mut writable = self.writable.lock().expect("no holder panics");
            let is_known = writable.contains(&levels);
            if !is_known {
                writable.push(levels.clone());
            }
            is_known
        };
        let checked = check_levels(&levels, &self.snapshot());
        if checked.is_err() && !is_known {
            self.writable.lock().expect("no holder panics").retain(|other| *other != levels);
        }
        checked
    }

    /// Checks that every registered model can write the items of a snapshot.
    ///
    /// # Errors
    /// [`Error::LevelsMismatch`].
    pub(crate) fn check_snapshot(&self, snapshot: &Snapshot) -> Result<()> {
        let writable = self.writable.lock().expect("no holder panics");
        writable.iter().try_for_each(|levels| check_levels(levels, snapshot))
    }

    /// Checks that a change can be applied: its item fits the catalog, and every registered model
    /// can write it.
    ///
    /// # Errors
    /// [`Error::InvalidField`] or [`Error::InvalidChange`] with what is wrong.
    pub fn check_change(&self, change: &Change) -> Result<()> {
        if let Change::Put(item) = change {
            item.check(self.snapshot().num_levels())?;
        }
        self.check(std::slice::from_ref(change))
    }

    /// Checks that every registered model can write the items that `changes` put.
    ///
    /// # Errors
    /// [`Error::InvalidChange`] with the first item that one of them cannot.
    pub(crate) fn check(&self, changes: &[Change]) -> Result<()> {
        let writable = self.writable.lock().expect("no holder panics");
        for (index, change) in changes.iter().enumerate() {
            let Change::Put(item) = change else { continue };
            for levels in writable.iter() {
                let mut codes = item.sid.codes().iter().zip(levels).enumerate();
                let unknown = |&(_, (&code, level)): &(usize, (&u16, &Vec<bool>))| {
                    !level.get(usize::from(code)).copied().unwrap_or(false)
                };
                if let Some((level, (code, _))) = codes.find(unknown) {
                    let reason = format!(
                        "item {:?} has code {code} on level {level}, for which the model that \
                         searches this catalog has no token",
                        item.name
                    );
                    return Err(Error::InvalidChange { index, reason });
                }
            }
        }
        Ok(())
    }
}

impl CatalogBuilder {
    /// Compiles the items.
    ///
    /// # Errors
    /// [`Error::InvalidField`] where there are none or two have the same name.
    pub fn build(self) -> Result<Catalog> {
        Ok(Catalog::of(self.compile()?))
    }
}

fn check_levels(levels: &[Vec<bool>], snapshot: &Snapshot) -> Result<()> {
    if snapshot.num_levels() != levels.len() {
        let (model, catalog) = (levels.len(), snapshot.num_levels());
        let reason = format!("the model writes {model} levels, the catalog has {catalog}");
        return Err(Error::LevelsMismatch { reason });
    }
    for (level, known) in levels.iter().enumerate() {
        let is_known = |code: u16| known.get(usize::from(code)).copied().unwrap_or(false);
        let unknown = snapshot.codes_at(level).find(|&code| !is_known(code));
        if let Some(code) = unknown {
            let size = known.len();
            let reason = format!(
                "level {level} of the catalog uses code {code}, for which the model has no \
                 token (its level has {size} codes)"
            );
            return Err(Error::LevelsMismatch { reason });
        }
    }
    Ok(())
}

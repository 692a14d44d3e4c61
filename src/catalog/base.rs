//! The compiled catalog: everything in arrays, as it stands in a file.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::{Arc, Mutex};

use lru::LruCache;
use roaring::RoaringBitmap;

use super::bitmap::{RankBitmap, any_bit};
use super::filter::Filter;
use super::snapshot::Snapshot;
use super::tags::Tags;
use super::texts::{NameIndex, Texts, TextsBuilder};
use super::trie::{Trie, TrieBuilder};
use crate::error::{Error, Result};

/// A compiled catalog. Its items are numbered in the order of their semantic IDs, those that share
/// one in the order in which they were added.
pub struct Base {
    pub(super) trie: Trie,
    pub(super) names: Texts,
    pub(super) index: NameIndex,
    pub(super) titles: Option<Texts>,
    pub(super) tags: Option<Tags>,
    /// Items that may be recommended; `None` where all may.
    pub(super) available: Option<Arc<RankBitmap>>,
    /// Names the catalog through all its changes: a log of changes belongs to one.
    pub(super) lineage: u64,
    /// The snapshot that was compiled.
    pub(super) snapshot: u64,
    pub(super) file_bytes: Option<u64>,
    pub(super) selections: Mutex<Selections>,
}

/// The items that pass a filter.
pub(super) struct Selection {
    pub filter: Filter,
    pub items: RankBitmap,
    /// Bits by node of the trie: whether one of the items below it passes.
    pub nodes: Vec<u64>,
}

impl Selection {
    fn new(filter: Filter, items: RankBitmap, trie: &Trie) -> Selection {
        let num_levels = trie.num_levels();
        let leaves = trie.nodes_at(num_levels);
        let mut nodes = vec![0u64; (leaves.end as usize).div_ceil(64)];
        // Backwards, so that a node's children are known before it.
        for node in leaves.clone().rev() {
            let passes = any_bit(items.words(), trie.items(node, num_levels));
            nodes[node as usize / 64] |= u64::from(passes) << (node % 64);
        }
        for node in (0..leaves.start).rev() {
            let passes = any_bit(&nodes, trie.children(node).0);
            nodes[node as usize / 64] |= u64::from(passes) << (node % 64);
        }
        Selection { filter, items, nodes }
    }

    /// Of nodes that follow one another, at most 8, which may have a passing item, as bits.
    #[inline]
    pub fn nodes_from(&self, first: u32) -> u8 {
        let (word, bit) = (first as usize / 64, first % 64);
        let low = self.nodes[word] >> bit;
        let high = match (bit, self.nodes.get(word + 1)) {
            (57.., Some(next)) => next << (64 - bit),
            _ => 0,
        };
        (low | high) as u8
    }

    fn size_bytes(&self) -> usize {
        self.items.size_bytes() + size_of_val(&*self.nodes)
    }
}

/// The filters that were asked for, least recently used first out.
pub(super) struct Selections {
    by_text: LruCache<String, Arc<Selection>>,
    bytes: usize,
}

/// Bytes of the sets of filters that are kept.
const MAX_SELECTION_BYTES: usize = 256 << 20;
/// Filters that are kept, however small.
const MAX_SELECTIONS: NonZeroUsize = NonZeroUsize::new(4096).expect("not zero");

impl Default for Selections {
    fn default() -> Selections {
        Selections { by_text: LruCache::new(MAX_SELECTIONS), bytes: 0 }
    }
}

impl Base {
    /// The trie of semantic IDs.
    pub fn trie(&self) -> &Trie {
        &self.trie
    }

    /// The number of items.
    pub fn num_items(&self) -> u32 {
        self.names.len() as u32
    }

    /// Size of the file that the catalog was opened from.
    pub fn file_bytes(&self) -> Option<u64> {
        self.file_bytes
    }

    /// Writes the catalog as one file; an existing one is replaced as a whole or not at all.
    ///
    /// # Errors
    /// The operating system's.
    pub fn save(&self, path: &Path) -> Result<()> {
        super::format::save(self, path)
    }

    /// The tags with the number of items that carry each.
    ///
    /// # Errors
    /// [`CatalogContents`](crate::Error::CatalogContents) where the file's sets cannot be read.
    pub fn tags(&self) -> Result<Vec<(String, u64)>> {
        let Some(tags) = &self.tags else { return Ok(Vec::new()) };
        let count = |tag| Ok((tags.names.get(tag).to_string(), tags.items(tag)?.len()));
        (0..tags.len() as u32).map(count).collect()
    }

    pub(super) fn title(&self, item: u32) -> Option<&str> {
        self.titles.as_ref().map(|titles| titles.get(item))
    }

    pub(super) fn tags_of(&self, item: u32) -> Vec<String> {
        self.tags.iter().flat_map(|tags| tags.of_item(item)).map(str::to_string).collect()
    }

    pub(super) fn find(&self, name: &str) -> Option<u32> {
        self.index.find(&self.names, name)
    }

    /// The items that pass a filter; worked out once, then kept.
    pub(super) fn select(&self, text: &str) -> Result<Arc<Selection>> {
        if let Some(selection) = self.selections().by_text.get(text) {
            return Ok(Arc::clone(selection));
        }
        let filter = Filter::parse(text)?;
        let items = match &self.tags {
            Some(tags) => tags.select(&filter, self.num_items())?,
            None if filter.passes(&|_| false) => RankBitmap::full(self.num_items()),
            None => {
                let words = vec![0; self.num_items().div_ceil(64) as usize];
                RankBitmap::new(words, self.num_items())
            }
        };
        let selection = Arc::new(Selection::new(filter, items, &self.trie));
        self.selections().keep(text, &selection);
        Ok(selection)
    }

    fn selections(&self) -> std::sync::MutexGuard<'_, Selections> {
        self.selections.lock().expect("no holder panics")
    }

    /// Works out the filters that another compiled catalog keeps, so that nobody waits for them.
    pub(crate) fn warm_as(&self, other: &Base) {
        let texts: Vec<String> =
            other.selections().by_text.iter().rev().map(|(text, _)| text.clone()).collect();
        for text in texts {
            let _ = self.select(&text); // it was a filter there, and asks again here
        }
    }

    /// Compiles a snapshot: the catalog with all its changes, in arrays again.
    ///
    /// `progress` hears how many items are done, twice over; where it says no, `None` comes back.
    pub(super) fn compile(
        snapshot: &Snapshot,
        mut progress: impl FnMut(usize) -> bool,
    ) -> Result<Option<Base>> {
        let old = snapshot.base();
        let num_items = snapshot.num_items();
        // The trie first and by itself: what it takes to build is gone when the rest begins.
        let mut trie = TrieBuilder::new(snapshot.num_levels());
        for (position, (sid, _)) in snapshot.in_order().enumerate() {
            if position.is_multiple_of(1 << 16) && !progress(position) {
                return Ok(None);
            }
            trie.push(sid.codes());
        }
        let trie = trie.finish();
        let mut names = TextsBuilder::with_capacity(num_items, old.names.bytes.len());
        let mut titles = TextsBuilder::with_capacity(
            if old.titles.is_some() { num_items } else { 0 },
            old.titles.as_ref().map_or(0, |titles| titles.bytes.len()),
        );
        let mut withdrawn: Vec<u32> = Vec::new();
        let mut added: BTreeMap<String, RoaringBitmap> = BTreeMap::new();
        let mut shifts = Shifts::default();
        for (position, (_, item)) in (0u32..).zip(snapshot.in_order()) {
            if position.is_multiple_of(1 << 16) && !progress(position as usize) {
                return Ok(None);
            }
            names.push(snapshot.name(item));
            if let Some(title) = snapshot.title(item) {
                // Items before the first that has one have empty titles.
                while titles.len() < position as usize {
                    titles.push("");
                }
                titles.push(title);
            }
            if !snapshot.is_available(item) {
                withdrawn.push(position);
            }
            if item < old.num_items() {
                shifts.push(item, position);
            } else {
                for tag in snapshot.tags(item) {
                    added.entry(tag).or_default().insert(position);
                }
            }
        }
        let has_titles = titles.len() > 0;
        while has_titles && titles.len() < num_items {
            titles.push("");
        }
        shifts.finish(old.num_items());
        let names = names.finish();
        let index = NameIndex::build(&names).map_err(|twin| {
            // Only a file that was made to deceive has a name twice.
            let reason = format!("item {:?} stands in it twice", names.get(twin));
            Error::CatalogContents { reason }
        })?;
        let mut tags = added;
        if let Some(old_tags) = &old.tags {
            for tag in 0..old_tags.len() as u32 {
                let moved = shifts.moved(&old_tags.items(tag)?);
                *tags.entry(old_tags.names.get(tag).to_string()).or_default() |= moved;
            }
        }
        let base = Base::new(trie, names, index, has_titles.then(|| titles.finish()))
            .with_tags(tags)
            .with_withdrawn(&withdrawn);
        Ok(Some(Base { lineage: old.lineage, snapshot: snapshot.number(), ..base }))
    }

    pub(super) fn new(trie: Trie, names: Texts, index: NameIndex, titles: Option<Texts>) -> Base {
        Base {
            trie,
            names,
            index,
            titles,
            tags: None,
            available: None,
            lineage: 0,
            snapshot: 1,
            file_bytes: None,
            selections: Mutex::default(),
        }
    }

    pub(super) fn with_tags(self, tags: BTreeMap<String, RoaringBitmap>) -> Base {
        let tags = Tags::build(tags);
        Base { tags: (tags.len() > 0).then_some(tags), ..self }
    }

    pub(super) fn with_withdrawn(self, withdrawn: &[u32]) -> Base {
        let without = || Arc::new(RankBitmap::full(self.num_items()).with(&[], withdrawn));
        Base { available: (!withdrawn.is_empty()).then(without), ..self }
    }
}

impl Selections {
    fn keep(&mut self, text: &str, selection: &Arc<Selection>) {
        self.bytes += selection.size_bytes();
        if let Some((_, before)) = self.by_text.push(text.into(), Arc::clone(selection)) {
            self.bytes -= before.size_bytes();
        }
        while self.bytes > MAX_SELECTION_BYTES && self.by_text.len() > 1 {
            let (_, oldest) = self.by_text.pop_lru().expect("more than one is kept");
            self.bytes -= oldest.size_bytes();
        }
    }
}

/// Where the items of one catalog are in the next: stretches that move by the same distance.
#[derive(Default)]
struct Shifts {
    /// First item of a stretch, and where it is now; ascending.
    stretches: Vec<(u32, u32)>,
    /// The first item after each stretch.
    ends: Vec<u32>,
    next: (u32, u32),
}

impl Shifts {
    /// The next item that stays, and where it is now.
    fn push(&mut self, item: u32, now: u32) {
        if self.stretches.is_empty() || (item, now) != self.next {
            if !self.stretches.is_empty() {
                self.ends.push(self.next.0);
            }
            self.stretches.push((item, now));
        }
        self.next = (item + 1, now + 1);
    }

    fn finish(&mut self, num_items: u32) {
        self.ends.push(self.next.0.min(num_items));
    }

    /// Where the items of a set are now; those that do not stay are left out.
    fn moved(&self, items: &RoaringBitmap) -> RoaringBitmap {
        let mut stretch = 0;
        let moved = items.iter().filter_map(|item| {
            while stretch < self.stretches.len() && self.ends[stretch] <= item {
                stretch += 1;
            }
            let &(first, now) = self.stretches.get(stretch)?;
            (item >= first).then(|| now + (item - first))
        });
        RoaringBitmap::from_sorted_iter(moved).expect("a move keeps the order")
    }
}

//! The base segment: a compiled catalog in arrays, in memory or as a file has them.

use std::collections::BTreeMap;
use std::sync::Arc;

use roaring::RoaringBitmap;

use super::bitmap::RankBitmap;
use super::column::Column;
use super::filter::Filter;
use super::filter_cache::FilterCache;
use super::order::{ItemWeight, Ties};
use super::selection::Selection;
use super::tags::Tags;
use super::texts::{NameIndex, Texts};
use super::trie::Trie;
use super::watermark::Watermarks;
use crate::error::Result;
use crate::mapping::Mapping;

/// Bytes of cached filters: their texts, and the items that pass.
const MAX_FILTER_CACHE_BYTES: usize = 256 << 20;

/// A compiled catalog. Its items are numbered in the order of their semantic IDs; items that share
/// one by weight, then as `ties` says.
pub struct BaseSegment {
    pub(super) trie: Trie,
    pub(super) names: Texts,
    pub(super) index: NameIndex,
    pub(super) titles: Option<Texts>,
    pub(super) tags: Option<Tags>,
    /// The available items; `None` where all are.
    pub(super) available: Option<Arc<RankBitmap>>,
    /// `[items]`; finite. `None` where no item has a weight of its own.
    pub(super) weights: Option<Column<f32>>,
    pub(super) ties: Ties,
    /// Identifies the catalog through all its changes: a log of changes belongs to one.
    pub(super) lineage: u64,
    /// The number of the compiled snapshot.
    pub(super) snapshot: u64,
    /// How far each feed was applied when the catalog was compiled.
    pub(super) watermarks: Arc<Watermarks>,
    /// The file that the arrays lie in; `None` where they were built in memory.
    pub(super) file: Option<Arc<Mapping>>,
    pub(super) selections: FilterCache<Selection>,
}

impl BaseSegment {
    /// The trie of semantic IDs.
    pub fn trie(&self) -> &Trie {
        &self.trie
    }

    /// Identifies the catalog through all its changes.
    pub(crate) fn lineage(&self) -> u64 {
        self.lineage
    }

    /// The number of the compiled snapshot.
    pub(crate) fn snapshot(&self) -> u64 {
        self.snapshot
    }

    /// The number of items.
    pub fn num_items(&self) -> u32 {
        self.names.len() as u32
    }

    /// Bytes of the file that the base segment was opened from; `None` where it was built in memory.
    pub fn file_bytes(&self) -> Option<u64> {
        self.file.as_ref().map(|file| file.bytes().len() as u64)
    }

    /// Whether the base segment reads its file where it lies ([`CatalogOptions::map_above`]).
    ///
    /// [`CatalogOptions::map_above`]: super::CatalogOptions::map_above
    pub fn is_mapped(&self) -> bool {
        self.file.as_ref().is_some_and(|file| file.is_mapped())
    }

    /// Checks that nobody has written to the mapped file; where nothing is mapped, all is well.
    ///
    /// # Errors
    /// [`Error::FileChanged`](crate::Error::FileChanged): every answer from this base segment may
    /// be wrong, and a file that became shorter ends the process when it is read.
    pub fn check_file(&self) -> Result<()> {
        self.file.as_ref().map_or(Ok(()), |file| file.check())
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

    /// The item's tags, ascending.
    pub(super) fn tags_of(&self, item: u32) -> impl Iterator<Item = &str> {
        self.tags.iter().flat_map(move |tags| tags.of_item(item))
    }

    pub(super) fn weight(&self, item: u32) -> ItemWeight {
        let weight = self.weights.as_ref().map_or(0.0, |weights| weights[item as usize]);
        ItemWeight::new(weight).unwrap_or_default() // checked when the file was opened
    }

    pub(super) fn find(&self, name: &str) -> Option<u32> {
        self.index.find(&self.names, name)
    }

    /// The items that pass a filter; worked out once, then cached.
    ///
    /// # Errors
    /// [`Error::InvalidField`](crate::Error::InvalidField) where `text` is no filter;
    /// [`Error::CatalogContents`](crate::Error::CatalogContents) where the file's sets are damaged.
    pub(super) fn select(&self, text: &str) -> Result<Arc<Selection>> {
        self.selections.get_or_make(0, text, || {
            let filter = Filter::parse(text)?;
            let items = match &self.tags {
                Some(tags) => tags.select(&filter, self.num_items())?,
                None if filter.passes(&|_| false) => RankBitmap::full(self.num_items()),
                None => {
                    let words = vec![0; self.num_items().div_ceil(64) as usize];
                    RankBitmap::new(words, self.num_items())
                }
            };
            let selection = Selection::new(items, &self.trie);
            let bytes = selection.size_bytes();
            Ok((selection, bytes))
        })
    }

    /// Works out the filters that another base segment has cached, so that no request has to.
    pub(crate) fn warm_up_like(&self, other: &BaseSegment) {
        for text in other.selections.texts() {
            let _ = self.select(&text); // on an error, the first request with the filter gets it
        }
    }

    pub(super) fn new(
        trie: Trie,
        names: Texts,
        index: NameIndex,
        titles: Option<Texts>,
    ) -> BaseSegment {
        BaseSegment {
            trie,
            names,
            index,
            titles,
            tags: None,
            available: None,
            weights: None,
            ties: Ties::ByName,
            lineage: 0,
            snapshot: 1,
            watermarks: Arc::default(),
            file: None,
            selections: FilterCache::new(MAX_FILTER_CACHE_BYTES),
        }
    }

    /// The base segment as a later state of another catalog.
    pub(crate) fn with_lineage(self, lineage: u64) -> BaseSegment {
        BaseSegment { lineage, ..self }
    }

    pub(super) fn with_tags(self, tags: BTreeMap<String, RoaringBitmap>) -> BaseSegment {
        let tags = Tags::build(tags);
        BaseSegment { tags: (tags.len() > 0).then_some(tags), ..self }
    }

    pub(super) fn with_unavailable(self, unavailable: &[u32]) -> BaseSegment {
        let without = || Arc::new(RankBitmap::full(self.num_items()).with(&[], unavailable));
        BaseSegment { available: (!unavailable.is_empty()).then(without), ..self }
    }

    /// `weights`: up to the last item that has one of its own, at least.
    pub(super) fn with_weights(self, mut weights: Vec<ItemWeight>) -> BaseSegment {
        let has_some = !weights.is_empty();
        weights.resize(self.num_items() as usize, ItemWeight::default());
        let weights: Vec<f32> = weights.into_iter().map(ItemWeight::get).collect();
        BaseSegment { weights: has_some.then(|| weights.into()), ..self }
    }
}

//! From a snapshot with a delta to one base segment: compaction.

use std::collections::BTreeMap;
use std::sync::Arc;

use roaring::RoaringBitmap;

use super::base_segment::BaseSegment;
use super::order::{ItemWeight, push_weight};
use super::snapshot::Snapshot;
use super::texts::{NameIndex, TextsBuilder};
use super::trie::TrieBuilder;
use crate::error::{Error, Result};

/// Compacts a snapshot: its items, with all changes, in the arrays of a new base segment.
///
/// Each item is visited twice, and `progress` is told how many are done each time; `None` comes
/// back where it returns false.
///
/// # Errors
/// [`Error::CatalogContents`] where the sets of a damaged file cannot be read;
/// [`Error::FileChanged`].
pub(crate) fn compact(
    snapshot: &Snapshot,
    mut progress: impl FnMut(usize) -> bool,
) -> Result<Option<BaseSegment>> {
    snapshot.check_file()?;
    let old = snapshot.base();
    let num_items = snapshot.num_items();
    // The trie first and by itself: its builder's memory is free again before the rest begins.
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
    let mut unavailable: Vec<u32> = Vec::new();
    let mut weights: Vec<ItemWeight> = Vec::new();
    let mut new_tags: BTreeMap<String, RoaringBitmap> = BTreeMap::new();
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
            unavailable.push(position);
        }
        push_weight(&mut weights, position as usize, snapshot.weight(item));
        if item < old.num_items() {
            shifts.push(item, position);
        } else {
            for tag in snapshot.tags(item) {
                new_tags.entry(tag).or_default().insert(position);
            }
        }
    }
    let has_titles = titles.len() > 0;
    while has_titles && titles.len() < num_items {
        titles.push("");
    }
    shifts.finish();
    let names = names.finish();
    let index = NameIndex::build(&names).map_err(|twin| {
        // Only a forged file has a name twice.
        let reason = format!("item {:?} stands in it twice", names.get(twin));
        Error::CatalogContents { reason }
    })?;
    let mut tags = new_tags;
    if let Some(old_tags) = &old.tags {
        for tag in 0..old_tags.len() as u32 {
            let moved = shifts.moved(&old_tags.items(tag)?);
            *tags.entry(old_tags.names.get(tag).to_string()).or_default() |= moved;
        }
    }
    let base = BaseSegment::new(trie, names, index, has_titles.then(|| titles.finish()))
        .with_tags(tags)
        .with_unavailable(&unavailable)
        .with_weights(weights);
    snapshot.check_file()?; // or what is compiled may be of two files
    let watermarks = Arc::clone(&snapshot.watermarks);
    Ok(Some(BaseSegment { lineage: old.lineage, snapshot: snapshot.number(), watermarks, ..base }))
}

/// Where the items of one base segment are in the next, as stretches that move by one distance.
#[derive(Default)]
struct Shifts {
    /// Ascending by the items' numbers before, once finished.
    stretches: Vec<Stretch>,
    /// Whether the items that stay keep their order among themselves. Those of an old file may not.
    keeps_order: bool,
}

#[derive(Clone, Copy)]
struct Stretch {
    /// The first item's number before.
    first: u32,
    /// And after.
    now: u32,
    len: u32,
}

impl Shifts {
    /// Adds the next item that stays: its number before and after.
    fn push(&mut self, item: u32, now: u32) {
        match self.stretches.last_mut() {
            Some(last) if (item, now) == (last.first + last.len, last.now + last.len) => {
                last.len += 1;
            }
            _ => self.stretches.push(Stretch { first: item, now, len: 1 }),
        }
    }

    fn finish(&mut self) {
        self.keeps_order = self.stretches.is_sorted_by_key(|stretch| stretch.first);
        self.stretches.sort_unstable_by_key(|stretch| stretch.first);
    }

    /// The numbers that a set's items have after; items that do not stay are left out.
    fn moved(&self, items: &RoaringBitmap) -> RoaringBitmap {
        let mut stretches = self.stretches.iter().peekable();
        let moved = items.iter().filter_map(|item| {
            while stretches.next_if(|stretch| stretch.first + stretch.len <= item).is_some() {}
            let &&Stretch { first, now, .. } = stretches.peek()?;
            (item >= first).then(|| now + (item - first))
        });
        match self.keeps_order {
            true => RoaringBitmap::from_sorted_iter(moved).expect("a move keeps the order"),
            false => moved.collect(),
        }
    }
}

//! The items that pass a filter, worked out once and cached.

use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex, MutexGuard};

use lru::LruCache;

use super::bitmap::{RankBitmap, any_bit};
use super::filter::Filter;
use super::trie::Trie;

/// The items of a base segment that pass a filter.
pub(super) struct Selection {
    pub filter: Filter,
    pub items: RankBitmap,
    /// Bits by node of the trie: whether an item below the node passes.
    pub nodes: Vec<u64>,
}

impl Selection {
    pub fn new(filter: Filter, items: RankBitmap, trie: &Trie) -> Selection {
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

    /// The bits of eight successive nodes from `first` on; bits beyond the last node are zero.
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

/// Selections by the text of their filter; the least recently used go first.
#[derive(Default)]
pub(super) struct SelectionCache {
    entries: Mutex<Entries>,
}

struct Entries {
    by_text: LruCache<String, Arc<Selection>>,
    bytes: usize,
}

/// Bytes of all cached selections.
const MAX_BYTES: usize = 256 << 20;
/// Cached selections, however small.
const MAX_SELECTIONS: NonZeroUsize = NonZeroUsize::new(4096).expect("not zero");

impl Default for Entries {
    fn default() -> Entries {
        Entries { by_text: LruCache::new(MAX_SELECTIONS), bytes: 0 }
    }
}

impl SelectionCache {
    /// The cached selection of a filter's text.
    pub fn get(&self, text: &str) -> Option<Arc<Selection>> {
        self.entries().by_text.get(text).map(Arc::clone)
    }

    /// Caches a selection; others may go.
    pub fn insert(&self, text: &str, selection: &Arc<Selection>) {
        let mut entries = self.entries();
        entries.bytes += selection.size_bytes();
        if let Some((_, before)) = entries.by_text.push(text.into(), Arc::clone(selection)) {
            entries.bytes -= before.size_bytes();
        }
        while entries.bytes > MAX_BYTES && entries.by_text.len() > 1 {
            let (_, oldest) = entries.by_text.pop_lru().expect("more than one is cached");
            entries.bytes -= oldest.size_bytes();
        }
    }

    /// The cached filters' texts, least recently used first.
    pub fn texts(&self) -> Vec<String> {
        self.entries().by_text.iter().rev().map(|(text, _)| text.clone()).collect()
    }

    fn entries(&self) -> MutexGuard<'_, Entries> {
        self.entries.lock().expect("no holder panics")
    }
}

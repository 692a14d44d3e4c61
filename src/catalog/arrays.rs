//! A snapshot as plain arrays, for devices that keep a copy of their own.

use std::any::Any;
use std::sync::Arc;

use super::allowed::AllowedSet;
use super::bitmap::RankBitmap;
use super::candidates::Candidates;
use super::snapshot::Snapshot;
use super::trie::Trie;

/// What tells one array from another: as long as it is held, no other is the same.
pub type Identity = Arc<dyn Any + Send + Sync>;

/// The arrays of a rank trie, as in [`Trie`].
#[derive(Clone, Copy)]
pub struct TrieArrays<'a> {
    /// `[num_levels + 2]`
    pub depth_start: &'a [u32],
    /// `[num_inner_nodes + 1]`
    pub first_edge: &'a [u32],
    /// `[num_edges]`
    pub codes: &'a [u16],
    /// The first item of nodes above the parents of leaves; node `n` at depth `d` is at `n + d`.
    pub first_item: &'a [u32],
    /// `[num_leaves + 1]`, or `None` where leaf `l` is item `l`.
    pub leaf_item: Option<&'a [u32]>,
}

impl<'a> TrieArrays<'a> {
    fn of(trie: &'a Trie) -> TrieArrays<'a> {
        TrieArrays {
            depth_start: &trie.depth_start,
            first_edge: &trie.first_edge,
            codes: &trie.code,
            first_item: &trie.first_item,
            leaf_item: trie.leaf_item.as_deref(),
        }
    }
}

/// Which items of a trie are allowed, as one bitmap.
pub struct AllowedArrays<'a> {
    /// A bit an item, with counts of members before each eight words.
    pub items: RankBitmap,
    /// A bit a node: whether the filter passes anything below it.
    pub nodes: Option<&'a [u64]>,
}

impl Snapshot {
    /// The compiled catalog's trie.
    pub fn base_trie(&self) -> (Identity, TrieArrays<'_>) {
        let (identity, base) = self.base_parts();
        (identity as Identity, TrieArrays::of(base.trie()))
    }

    /// The trie of the items that were added since; its items are numbered in their own order.
    pub fn added_trie(&self) -> Option<(Identity, TrieArrays<'_>)> {
        let added = self.added_parts()?;
        Some((Arc::clone(added) as Identity, TrieArrays::of(added.trie())))
    }
}

impl AllowedSet {
    /// What [`base_allowed`](AllowedSet::base_allowed) depends on; empty where all items are allowed.
    pub fn base_identity(&self) -> Vec<Identity> {
        let available = self.base.available.iter().map(|set| Arc::clone(set) as Identity);
        let passing = self.base.passing.iter().map(|set| Arc::clone(set) as Identity);
        available.chain(passing).collect()
    }

    /// The compiled items that are available and pass the filter; `None` where all are and do.
    pub fn base_allowed(&self) -> Option<AllowedArrays<'_>> {
        let (available, passing) = (self.base.available.as_deref(), self.base.passing.as_deref());
        let items = match (available, passing.map(|passing| &passing.items)) {
            (None, None) => return None,
            (Some(set), None) | (None, Some(set)) => set.clone(),
            (Some(available), Some(passing)) => {
                let words = available.words().iter().zip(passing.words()).map(|(a, b)| a & b);
                RankBitmap::new(words.collect(), available.num_positions())
            }
        };
        Some(AllowedArrays { items, nodes: passing.map(|passing| &passing.nodes[..]) })
    }

    /// The compiled items that are excluded although they are available and pass the filter.
    pub fn base_excluded(&self) -> Vec<u32> {
        let is_in = |set: Option<&RankBitmap>, item| set.is_none_or(|set| set.contains(item));
        let (available, passing) = (self.base.available.as_deref(), self.base.passing.as_deref());
        let items = self.base.excluded.items().iter().copied();
        items
            .filter(|&item| {
                is_in(available, item) && is_in(passing.map(|passing| &passing.items), item)
            })
            .collect()
    }

    /// Of the added items, in the order of their trie, those that are allowed.
    pub fn added_allowed(&self) -> Option<RankBitmap> {
        self.added.as_ref().map(|added| {
            let numbers = added.added.in_order();
            let mut words = vec![0; numbers.len().div_ceil(64)];
            for (position, &number) in numbers.iter().enumerate() {
                words[position / 64] |= u64::from(added.allows(number)) << (position % 64);
            }
            RankBitmap::new(words, numbers.len() as u32)
        })
    }
}

impl Candidates {
    /// The candidates among the compiled items, and among the added ones in the order of their
    /// trie; both rising.
    pub fn split(&self, snapshot: &Snapshot) -> (Vec<u32>, Vec<u32>) {
        let first_added = snapshot.num_base_items();
        let split = self.items().partition_point(|&item| item < first_added);
        let (base, added) = self.items().split_at(split);
        let order = snapshot.added_parts().map_or(&[][..], |added| added.in_order());
        let is_wanted = |number: u32| added.binary_search(&(first_added + number)).is_ok();
        let positions = (0..).zip(order).filter(|&(_, &number)| is_wanted(number));
        (base.to_vec(), positions.map(|(position, _)| position).collect())
    }
}

//! A snapshot as plain arrays, for devices that hold a copy.

use std::any::Any;
use std::sync::Arc;

use super::allowed::AllowedSet;
use super::bitmap::RankBitmap;
use super::candidates::Candidates;
use super::snapshot::Snapshot;
use super::trie::Trie;

/// Identifies an array by its address: while the identity is held, no other array can have it.
pub type Identity = Arc<dyn Any + Send + Sync>;

/// The arrays of a [`Trie`].
#[derive(Clone, Copy)]
pub struct TrieArrays<'a> {
    /// `[num_levels + 2]`
    pub depth_start: &'a [u32],
    /// `[num_inner_nodes + 1]`
    pub first_edge: &'a [u32],
    /// `[num_edges]`
    pub codes: &'a [u16],
    /// The first item of each node above the parents of leaves: node `n` at depth `d` is at `n + d`.
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

/// The allowed items of a trie as one bitmap.
pub struct AllowedArrays<'a> {
    /// One bit an item, with counts of members before each eight words.
    pub items: RankBitmap,
    /// One bit a node: whether the filter passes an item below it.
    pub nodes: Option<&'a [u64]>,
}

impl Snapshot {
    /// The base segment's trie.
    pub fn base_trie(&self) -> (Identity, TrieArrays<'_>) {
        (Arc::clone(&self.base) as Identity, TrieArrays::of(&self.base.trie))
    }

    /// The delta's trie, where there is a delta. Its items are numbered in the order of the trie.
    pub fn delta_trie(&self) -> Option<(Identity, TrieArrays<'_>)> {
        let delta = self.delta.as_ref()?;
        Some((Arc::clone(delta) as Identity, TrieArrays::of(delta.trie())))
    }
}

impl AllowedSet {
    /// The identities of the sets behind [`base_allowed`](AllowedSet::base_allowed); empty where it
    /// is `None`.
    pub fn base_identity(&self) -> Vec<Identity> {
        let available = self.base.available.iter().map(|set| Arc::clone(set) as Identity);
        let passing = self.base.passing.iter().map(|set| Arc::clone(set) as Identity);
        available.chain(passing).collect()
    }

    /// The base segment's available items that pass the filter; `None` where all items do.
    /// Exclusions are not applied ([`base_excluded`](AllowedSet::base_excluded)).
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

    /// The base segment's excluded items that are available and pass the filter.
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

    /// The allowed items where a request lists them, ascending: those of the base segment, and those
    /// of the delta by their position in the order of its trie. Then nothing else of the set says
    /// anything.
    pub fn listed(&self) -> Option<(&[u32], &[u32])> {
        self.listed.as_ref().map(|listed| (listed.in_base(), listed.in_delta()))
    }

    /// The delta's allowed items in the order of its trie; `None` without a delta.
    pub fn delta_allowed(&self) -> Option<RankBitmap> {
        self.delta.as_ref().map(|items| {
            let numbers = items.delta.in_order();
            let mut words = vec![0; numbers.len().div_ceil(64)];
            for (position, &number) in numbers.iter().enumerate() {
                words[position / 64] |= u64::from(items.allows(number)) << (position % 64);
            }
            RankBitmap::new(words, numbers.len() as u32)
        })
    }
}

impl Candidates {
    /// The candidates in the base segment, and the candidates in the delta by their position in
    /// the delta's trie; both ascending.
    pub fn split(&self, snapshot: &Snapshot) -> (Vec<u32>, Vec<u32>) {
        let first_in_delta = snapshot.num_base_items();
        let split = self.items().partition_point(|&item| item < first_in_delta);
        let (base, delta) = self.items().split_at(split);
        let order = snapshot.delta.as_ref().map_or(&[][..], |delta| delta.in_order());
        let is_wanted = |number: u32| delta.binary_search(&(first_in_delta + number)).is_ok();
        let positions = (0..).zip(order).filter(|&(_, &number)| is_wanted(number));
        (base.to_vec(), positions.map(|(position, _)| position).collect())
    }
}

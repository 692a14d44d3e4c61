//! Copies of catalogs and filters on the device, each made once.

use std::collections::HashMap;
use std::sync::Arc;

use bytemuck::Zeroable;

use super::device::Device;
use super::device_memory::DeviceMemory;
use super::driver::Driver;
use super::shared::shared_struct;
use crate::backend::SearchRule;
use crate::catalog::arrays::{AllowedArrays, Identity, TrieArrays};
use crate::catalog::sid::MAX_LEVELS;
use crate::error::{Error, Result};

shared_struct! {
    /// A rank trie: edge e leads to node e + 1, and the items below a node are one run.
    struct TrieEntry = "Trie" {
        /// By inner node, and the end.
        first_edge: u64 = "const uint32_t*",
        /// By edge.
        codes: u64 = "const uint16_t*",
        /// Of node n at depth d: at n + d, but for parents of leaves.
        first_item: u64 = "const uint32_t*",
        /// By leaf, and the end; null where leaf l is item l.
        leaf_item: u64 = "const uint32_t*",
        num_levels: u32,
        depth_start: [u32; MAX_LEVELS + 2],
        padding: u32,
    }
}

shared_struct! {
    /// Of a trie's items, those that may be answered with.
    struct AllowedEntry = "Allowed" {
        /// A bit an item; null where all are.
        pub words: u64 = "const uint64_t*",
        /// Members before each eight words.
        pub counts: u64 = "const uint32_t*",
        /// A bit a node: whether a filter passes anything below; or null.
        nodes: u64 = "const uint64_t*",
        /// Sorted members that are not allowed after all.
        pub excluded: u64 = "const uint32_t*",
        /// Sorted: the items that are scored, where no search is made, or all that are allowed.
        pub listed: u64 = "const uint32_t*",
        pub num_excluded: u32,
        pub num_listed: u32,
    }
}

/// Catalogs and filters on the device, each there once.
pub(super) struct Catalogs<D: Driver> {
    tries: Kept<Trie<D>>,
    allowed: Kept<Allowed<D>>,
}

impl<D: Driver> Default for Catalogs<D> {
    fn default() -> Catalogs<D> {
        Catalogs { tries: Kept(HashMap::new()), allowed: Kept(HashMap::new()) }
    }
}

/// Copies by the addresses of their owners. A copy whose owners nobody else holds any more is dropped
/// when another comes.
struct Kept<T>(HashMap<Vec<usize>, Copied<T>>);

struct Copied<T> {
    owners: Vec<Identity>,
    value: Arc<T>,
}

impl<T> Kept<T> {
    /// A copy that could not be made is not kept.
    fn get_or_copy(
        &mut self,
        owners: Vec<Identity>,
        copy: impl FnOnce() -> Result<T>,
    ) -> Result<Arc<T>> {
        let address = |owner: &Identity| Arc::as_ptr(owner).cast::<()>() as usize;
        let key: Vec<usize> = owners.iter().map(address).collect();
        if let Some(copied) = self.0.get(&key) {
            return Ok(Arc::clone(&copied.value));
        }
        let is_held = |owner: &Identity| Arc::strong_count(owner) > 1;
        self.0.retain(|_, copied| copied.owners.iter().all(is_held));
        let value = Arc::new(copy()?);
        self.0.insert(key, Copied { owners, value: Arc::clone(&value) });
        Ok(value)
    }
}

impl<D: Driver> Catalogs<D> {
    fn trie(
        &mut self,
        device: &Arc<Device<D>>,
        (owner, arrays): (Identity, TrieArrays<'_>),
    ) -> Result<Arc<Trie<D>>> {
        self.tries.get_or_copy(vec![owner], || Trie::new(device, &arrays))
    }
}

/// Zeros in the arrays of a trie without items: a root without edges, and the ends of its depths.
pub(super) const EMPTY_TRIE: [u32; MAX_LEVELS + 2] = [0; MAX_LEVELS + 2];

impl TrieEntry {
    /// A trie of `num_levels` without items; `zeros`: the address of [`EMPTY_TRIE`].
    pub fn empty(num_levels: usize, zeros: u64) -> TrieEntry {
        let mut depth_start = [0; MAX_LEVELS + 2];
        depth_start[1..num_levels + 2].fill(1);
        TrieEntry {
            first_edge: zeros,
            codes: zeros,
            first_item: zeros,
            leaf_item: 0,
            num_levels: num_levels as u32,
            depth_start,
            padding: 0,
        }
    }
}

/// A trie on the device.
pub(super) struct Trie<D: Driver> {
    pub entry: TrieEntry,
    /// `[num_levels + 2]`
    depth_start: Vec<u32>,
    _memory: Vec<DeviceMemory<D>>,
}

/// A set of items on the device.
pub(super) struct Allowed<D: Driver> {
    pub entry: AllowedEntry,
    _memory: Vec<DeviceMemory<D>>,
}

impl<D: Driver> Trie<D> {
    fn new(device: &Arc<Device<D>>, arrays: &TrieArrays<'_>) -> Result<Trie<D>> {
        let memory = vec![
            DeviceMemory::outside_graphs(device, arrays.first_edge, "trie's first edges")?,
            DeviceMemory::outside_graphs(device, arrays.codes, "trie's codes")?,
            DeviceMemory::outside_graphs(device, arrays.first_item, "trie's first items")?,
            DeviceMemory::outside_graphs(
                device,
                arrays.leaf_item.unwrap_or(&[]),
                "trie's leaf items",
            )?,
        ];
        let mut depth_start = [0; MAX_LEVELS + 2];
        depth_start[..arrays.depth_start.len()].copy_from_slice(arrays.depth_start);
        Ok(Trie {
            entry: TrieEntry {
                first_edge: memory[0].at(0),
                codes: memory[1].at(0),
                first_item: memory[2].at(0),
                leaf_item: arrays.leaf_item.map_or(0, |_| memory[3].at(0)),
                num_levels: arrays.depth_start.len() as u32 - 2,
                depth_start,
                padding: 0,
            },
            depth_start: arrays.depth_start.to_vec(),
            _memory: memory,
        })
    }

    fn num_nodes(&self, depth: usize) -> usize {
        match self.depth_start.get(depth..depth + 2) {
            Some(ends) => (ends[1] - ends[0]) as usize,
            None => 0,
        }
    }
}

impl<D: Driver> Allowed<D> {
    fn new(device: &Arc<Device<D>>, arrays: &AllowedArrays<'_>) -> Result<Allowed<D>> {
        let memory = vec![
            DeviceMemory::outside_graphs(device, arrays.items.words(), "allowed items")?,
            DeviceMemory::outside_graphs(device, arrays.items.counts(), "counts of allowed items")?,
            DeviceMemory::outside_graphs(
                device,
                arrays.nodes.unwrap_or(&[]),
                "nodes that a filter passes",
            )?,
        ];
        Ok(Allowed {
            entry: AllowedEntry {
                words: memory[0].at(0),
                counts: memory[1].at(0),
                nodes: arrays.nodes.map_or(0, |_| memory[2].at(0)),
                ..AllowedEntry::zeroed()
            },
            _memory: memory,
        })
    }
}

/// The arrays that one slot is searched by. Made once, at its first step.
pub(super) struct SearchArrays<D: Driver> {
    /// Why they could not be copied. The slot is then searched in a trie without items, beside
    /// other slots that have theirs, and its beams are this error.
    pub failure: Option<Error>,
    /// `None` after a failure.
    pub base: Option<Arc<Trie<D>>>,
    pub base_allowed: Option<Arc<Allowed<D>>>,
    pub added: Option<Arc<Trie<D>>>,
    /// Bits of the added items and their counts.
    pub added_words: Vec<u64>,
    pub added_counts: Vec<u32>,
    pub excluded: Vec<u32>,
    /// Candidates, or the items of an allow-list: those in the base segment, and those in the delta by
    /// their position in its trie.
    pub listed: Option<(Vec<u32>, Vec<u32>)>,
}

impl<D: Driver> SearchArrays<D> {
    pub fn new(
        device: &Arc<Device<D>>,
        catalogs: &mut Catalogs<D>,
        rule: &SearchRule<'_>,
    ) -> Result<SearchArrays<D>> {
        let SearchRule { snapshot, allowed_set, candidates, .. } = rule;
        let added_allowed = allowed_set.delta_allowed();
        let owners = allowed_set.base_identity();
        let base_allowed = (!owners.is_empty()).then(|| {
            let arrays = || allowed_set.base_allowed().expect("what has an owner is there");
            catalogs.allowed.get_or_copy(owners, || Allowed::new(device, &arrays()))
        });
        Ok(SearchArrays {
            failure: None,
            base: Some(catalogs.trie(device, snapshot.base_trie())?),
            base_allowed: base_allowed.transpose()?,
            added: snapshot.delta_trie().map(|trie| catalogs.trie(device, trie)).transpose()?,
            added_words: added_allowed.as_ref().map_or(Vec::new(), |set| set.words().to_vec()),
            added_counts: added_allowed.as_ref().map_or(Vec::new(), |set| set.counts().to_vec()),
            excluded: allowed_set.base_excluded(),
            listed: match candidates {
                Some(candidates) => Some(candidates.split(snapshot)),
                None => allowed_set.listed().map(|(base, added)| (base.to_vec(), added.to_vec())),
            },
        })
    }

    /// Stands for arrays that could not be copied.
    pub fn failed(error: Error) -> SearchArrays<D> {
        SearchArrays {
            failure: Some(error),
            base: None,
            base_allowed: None,
            added: None,
            added_words: Vec::new(),
            added_counts: Vec::new(),
            excluded: Vec::new(),
            listed: None,
        }
    }

    /// The most prefixes of `depth` codes that the catalog has.
    pub fn num_prefixes(&self, depth: usize) -> usize {
        [&self.base, &self.added].into_iter().flatten().map(|trie| trie.num_nodes(depth)).sum()
    }
}

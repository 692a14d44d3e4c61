//! The delta: items put since the base segment was compiled.
//!
//! They have a small trie of their own beside the base segment's: a beam's cursor is a node in
//! either or both. The small trie is laid out again with every change, which costs a few
//! nanoseconds for each of its items and keeps the search as simple as without changes. Once it
//! has grown, a compaction makes base segment and delta one.

use std::cmp::Ordering;
use std::sync::Arc;
use std::sync::atomic::{self, AtomicU64};

use super::chunks::Chunks;
use super::filter::Filter;
use super::filter_cache::FilterCache;
use super::item::Item;
use super::order::{OrderKey, Ties};
use super::sid::{MAX_LEVELS, Sid};
use super::texts::hash;
use super::trie::{Trie, TrieBuilder};
use crate::error::Result;

/// The items beside a base segment, numbered in the order of their putting.
pub(super) struct Delta {
    /// By number. A deleted or replaced item keeps its number.
    items: Chunks,
    /// Bits by number: neither deleted nor replaced.
    present: Vec<u64>,
    /// Bits by number: present and available.
    available: Vec<u64>,
    num_present: u32,
    /// The semantic IDs and numbers of the present items, in the order of semantic IDs, then of the
    /// items of one.
    order: Vec<(SidKey, u32)>,
    ties: Ties,
    /// `[num_present]`; the numbers of `order`.
    numbers: Vec<u32>,
    /// The trie of `order`: the items below a node are a run of it.
    trie: Trie,
    /// The hashed names and numbers of the present items, ascending.
    by_name: Vec<(u64, u32)>,
    filters: Arc<Filters>,
    /// Tells the delta from all others with the same `filters`.
    version: u64,
}

/// What all deltas over one base segment cache, each for itself.
struct Filters {
    /// Bits by number: which items pass.
    passing: FilterCache<Vec<u64>>,
    last_version: AtomicU64,
}

/// Bytes of cached filters over added items.
const MAX_FILTER_CACHE_BYTES: usize = 32 << 20;

/// A semantic ID as one number; the order of numbers is that of semantic IDs.
type SidKey = u128;

fn key(sid: &Sid) -> SidKey {
    let shift = |level: usize| 16 * (MAX_LEVELS - 1 - level);
    let codes = sid.codes().iter().enumerate();
    codes.map(|(level, &code)| SidKey::from(code) << shift(level)).sum()
}

/// The effect of a batch of changes on the delta.
#[derive(Default)]
pub(super) struct Patch {
    /// New items; the first gets the number after the last one of the delta.
    pub new: Vec<Arc<Item>>,
    /// Numbers, old or new, of deleted or replaced items.
    pub deleted: Vec<u32>,
    /// Numbers that become available or unavailable; each once.
    pub available: Vec<(u32, bool)>,
}

impl Patch {
    pub fn is_empty(&self) -> bool {
        self.new.is_empty() && self.deleted.is_empty() && self.available.is_empty()
    }
}

impl Delta {
    /// A delta without items.
    pub fn empty(num_levels: usize, ties: Ties) -> Delta {
        Delta {
            items: Chunks::default(),
            present: Vec::new(),
            available: Vec::new(),
            num_present: 0,
            order: Vec::new(),
            ties,
            numbers: Vec::new(),
            trie: TrieBuilder::new(num_levels).finish(),
            by_name: Vec::new(),
            filters: Arc::new(Filters {
                passing: FilterCache::new(MAX_FILTER_CACHE_BYTES),
                last_version: AtomicU64::new(0),
            }),
            version: 0,
        }
    }

    /// The delta after a batch of changes.
    pub fn with(&self, patch: Patch) -> Delta {
        let first_new = self.items.len() as u32;
        let mut items = self.items.clone();
        let (mut present, mut available) = (self.present.clone(), self.available.clone());
        let num_items = items.len() + patch.new.len();
        present.resize(num_items.div_ceil(64), 0);
        available.resize(num_items.div_ceil(64), 0);
        let mut order = Vec::with_capacity(patch.new.len());
        let mut by_name = Vec::with_capacity(patch.new.len());
        for (number, item) in (first_new..).zip(&patch.new) {
            order.push((key(&item.sid), number));
            by_name.push((hash(&item.name), number));
            put(&mut present, number, true);
            put(&mut available, number, item.available);
        }
        items.extend(patch.new);
        for (number, is_available) in patch.available {
            put(&mut available, number, is_available);
        }
        for &number in &patch.deleted {
            put(&mut present, number, false);
            put(&mut available, number, false);
        }
        let is_present = |number: u32| has(&present, number);
        // Only new items need sorting; the old ones are in order.
        let compare = |a: &(SidKey, u32), b: &(SidKey, u32)| {
            let key = |number: u32| order_key(self.ties, items.get(number as usize), number);
            a.0.cmp(&b.0).then_with(|| key(a.1).cmp(&key(b.1)))
        };
        order.sort_unstable_by(compare);
        by_name.sort_unstable();
        let order = merge(&self.order, &order, compare, |&(_, number)| is_present(number));
        let by_name = merge(&self.by_name, &by_name, Ord::cmp, |&(_, number)| is_present(number));
        let mut trie = TrieBuilder::new(self.trie.num_levels());
        let mut codes = [0; MAX_LEVELS];
        for (key, _) in &order {
            for (level, code) in codes.iter_mut().enumerate() {
                *code = (key >> (16 * (MAX_LEVELS - 1 - level))) as u16;
            }
            trie.push(&codes[..self.trie.num_levels()]);
        }
        Delta {
            items,
            present,
            available,
            num_present: order.len() as u32,
            numbers: order.iter().map(|&(_, number)| number).collect(),
            order,
            ties: self.ties,
            trie: trie.finish(),
            by_name,
            version: self.filters.last_version.fetch_add(1, atomic::Ordering::Relaxed) + 1,
            filters: Arc::clone(&self.filters),
        }
    }

    /// How many numbers are taken: items ever put, deleted or not.
    pub fn num_numbers(&self) -> u32 {
        self.items.len() as u32
    }

    /// How many items are present.
    pub fn num_present(&self) -> u32 {
        self.num_present
    }

    pub fn trie(&self) -> &Trie {
        &self.trie
    }

    pub fn item(&self, number: u32) -> &Item {
        self.items.get(number as usize)
    }

    pub fn is_available(&self, number: u32) -> bool {
        has(&self.available, number)
    }

    /// The number of a present item.
    pub fn find(&self, name: &str) -> Option<u32> {
        let hash = hash(name);
        let start = self.by_name.partition_point(|&(other, _)| other < hash);
        let same = self.by_name[start..].iter().take_while(|&&(other, _)| other == hash);
        same.map(|&(_, number)| number).find(|&number| self.item(number).name == name)
    }

    /// The numbers of the present items below a node of the trie, in their order.
    pub fn below(&self, node: u32, depth: usize) -> &[u32] {
        let run = self.trie.items(node, depth);
        &self.numbers[run.start as usize..run.end as usize]
    }

    /// The numbers of all present items, by semantic ID, then in the order of the items of one.
    pub fn in_order(&self) -> &[u32] {
        &self.numbers
    }

    /// Where present items are in the order of the trie, ascending; `numbers` ascend as well.
    ///
    /// Takes time in proportion to these items and to those that share their semantic IDs.
    pub fn positions(&self, numbers: &[u32]) -> Vec<u32> {
        let mut sids: Vec<SidKey> =
            numbers.iter().map(|&number| key(&self.item(number).sid)).collect();
        sids.sort_unstable();
        sids.dedup();
        let of_sid = |sid: SidKey| {
            let first = self.order.partition_point(|entry| entry.0 < sid);
            let run = self.order[first..].iter().take_while(move |entry| entry.0 == sid);
            (first as u32..).zip(run.map(|entry| entry.1))
        };
        let is_wanted = |(_, number): &(u32, u32)| numbers.binary_search(number).is_ok();
        let entries = sids.into_iter().flat_map(of_sid).filter(is_wanted);
        entries.map(|(position, _)| position).collect()
    }

    /// Bits by number: which items pass a filter. Bits from the number of items on mean nothing.
    ///
    /// # Errors
    /// [`Error::InvalidField`](crate::Error::InvalidField) where `text` is no filter.
    pub fn passing(&self, text: &str) -> Result<Arc<Vec<u64>>> {
        self.filters.passing.get_or_make(self.version, text, || {
            let bits = self.items.passing(&Filter::parse(text)?);
            let bytes = size_of_val(&*bits);
            Ok((bits, bytes))
        })
    }
}

fn order_key(ties: Ties, item: &Item, number: u32) -> OrderKey<'_> {
    OrderKey::new(ties, item.weight, &item.name, number)
}

fn put(bits: &mut [u64], at: u32, value: bool) {
    let (word, bit) = (at as usize / 64, at % 64);
    bits[word] = bits[word] & !(1 << bit) | u64::from(value) << bit;
}

fn has(bits: &[u64], at: u32) -> bool {
    bits[at as usize / 64] >> (at % 64) & 1 == 1
}

/// Merges two ascending lists and leaves out the entries that are not to stay.
fn merge<T: Copy>(
    old: &[T],
    new: &[T],
    compare: impl Fn(&T, &T) -> Ordering,
    stays: impl Fn(&T) -> bool,
) -> Vec<T> {
    let mut merged = Vec::with_capacity(old.len() + new.len());
    let mut new = new.iter().copied().filter(&stays).peekable();
    for &entry in old.iter().filter(|entry| stays(entry)) {
        while let Some(earlier) = new.next_if(|other| compare(other, &entry).is_lt()) {
            merged.push(earlier);
        }
        merged.push(entry);
    }
    merged.extend(new);
    merged
}

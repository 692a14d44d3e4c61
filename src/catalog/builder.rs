//! From items in any order to a base segment.

use std::collections::{BTreeMap, HashMap};

use roaring::RoaringBitmap;

use super::base_segment::BaseSegment;
use super::file::format::fingerprint;
use super::item::Item;
use super::order::{ItemWeight, OrderKey, Ties, push_weight};
use super::sid::MAX_LEVELS;
use super::texts::{NameIndex, TextsBuilder};
use super::trie::{Trie, TrieBuilder};
use crate::error::{Error, Result};

/// Collects items in any order and compiles them ([`build`](CatalogBuilder::build)).
#[derive(Default)]
pub struct CatalogBuilder {
    sids: SidTable,
    names: TextsBuilder,
    /// Empty, or up to the last item with a title.
    titles: TextsBuilder,
    /// By tag, the items that carry it, in the order of adding.
    tags: HashMap<String, Vec<u32>>,
    unavailable: Vec<u32>,
    /// Empty, or up to the last item with a weight of its own.
    weights: Vec<ItemWeight>,
}

impl CatalogBuilder {
    /// Adds an item.
    ///
    /// # Errors
    /// [`Error::InvalidField`] for an empty name, or another number of levels than the first item's.
    pub fn add(&mut self, item: Item) -> Result<()> {
        let num_levels = self.sids.num_levels.unwrap_or(item.sid.num_levels());
        item.check(num_levels)?;
        let number = self.names.len() as u32;
        self.sids.push(item.sid.codes())?;
        self.names.push(&item.name);
        if !item.title.is_empty() {
            while self.titles.len() < number as usize {
                self.titles.push("");
            }
            self.titles.push(&item.title);
        }
        for tag in item.tags {
            self.tags.entry(tag).or_default().push(number);
        }
        if !item.available {
            self.unavailable.push(number);
        }
        push_weight(&mut self.weights, number as usize, item.weight);
        Ok(())
    }

    /// The number of items so far.
    pub fn num_items(&self) -> usize {
        self.names.len()
    }

    pub(super) fn compile(self) -> Result<BaseSegment> {
        let CatalogBuilder { sids, names, mut titles, tags, unavailable, weights } = self;
        if names.len() == 0 {
            let reason = "there are no items; a catalog needs at least one".into();
            return Err(Error::InvalidField { field: "items", reason });
        }
        while titles.len() > 0 && titles.len() < names.len() {
            titles.push("");
        }
        let (trie, mut order) = sids.build();
        let weight = |item: u32| weights.get(item as usize).copied().unwrap_or_default();
        sort_shared(&trie, &mut order, &names, weight);
        let mut sorted = TextsBuilder::with_capacity(names.len(), names.num_bytes());
        order.iter().for_each(|&item| sorted.push(names.get(item)));
        drop(names);
        let names = sorted.finish();
        let index = NameIndex::build(&names).map_err(|twin| {
            let name = names.get(twin);
            let reason = format!("item {name:?} appears twice; names must be unique");
            Error::InvalidField { field: "item", reason }
        })?;
        let titles = (titles.len() > 0).then(|| {
            let mut sorted = TextsBuilder::with_capacity(titles.len(), titles.num_bytes());
            order.iter().for_each(|&item| sorted.push(titles.get(item)));
            sorted.finish()
        });
        let mut base = BaseSegment::new(trie, names, index, titles);
        if !tags.is_empty() || !unavailable.is_empty() {
            let mut position = vec![0; order.len()];
            for (at, &item) in (0u32..).zip(&order) {
                position[item as usize] = at;
            }
            let positions = |mut items: Vec<u32>| {
                items.iter_mut().for_each(|item| *item = position[*item as usize]);
                items.sort_unstable();
                items.dedup(); // a tag may stand twice on an item
                items
            };
            let mut sets: BTreeMap<String, RoaringBitmap> = BTreeMap::new();
            for (name, items) in tags {
                let items = RoaringBitmap::from_sorted_iter(positions(items));
                sets.insert(name, items.expect("sorted just now"));
            }
            base = base.with_tags(sets).with_unavailable(&positions(unavailable));
        }
        if !weights.is_empty() {
            base = base.with_weights(order.iter().map(|&item| weight(item)).collect());
        }
        base.lineage = fingerprint(&base);
        Ok(base)
    }
}

/// Puts the items of each shared semantic ID in their order; those of one are a run of `order`.
fn sort_shared(
    trie: &Trie,
    order: &mut [u32],
    names: &TextsBuilder,
    weight: impl Fn(u32) -> ItemWeight,
) {
    let Some(first) = &trie.leaf_item else { return };
    let key = |item: u32| OrderKey::new(Ties::ByName, weight(item), names.get(item), item);
    for run in first.windows(2).filter(|run| run[1] - run[0] > 1) {
        let items = &mut order[run[0] as usize..run[1] as usize];
        items.sort_unstable_by(|&a, &b| key(a).cmp(&key(b)));
    }
}

/// Unsorted semantic IDs, to be laid out as a [`Trie`].
#[derive(Default)]
pub struct SidTable {
    num_levels: Option<usize>,
    /// `[items, num_levels]`
    codes: Vec<u16>,
}

impl SidTable {
    /// Adds a semantic ID, which must have as many codes as the first.
    ///
    /// # Errors
    /// [`Error::InvalidField`] for another number of codes, or where the table is full (2^31).
    pub fn push(&mut self, codes: &[u16]) -> Result<()> {
        let num_levels = *self.num_levels.get_or_insert(codes.len());
        let is_sound = codes.len() == num_levels && (1..=MAX_LEVELS).contains(&num_levels);
        if !is_sound || self.len() + 1 >= 1 << 31 {
            let reason = format!(
                "semantic IDs have {num_levels} levels here, 1 to {MAX_LEVELS} are possible, \
                 and at most 2^31 of them"
            );
            return Err(Error::InvalidField { field: "sid", reason });
        }
        self.codes.extend_from_slice(codes);
        Ok(())
    }

    /// The number of semantic IDs, with repetitions.
    pub fn len(&self) -> usize {
        self.codes.len() / self.num_levels.unwrap_or(1)
    }

    /// Whether the table has no semantic ID.
    pub fn is_empty(&self) -> bool {
        self.codes.is_empty()
    }

    /// The trie, and for each of its items the position at which its semantic ID was pushed.
    pub fn build(self) -> (Trie, Vec<u32>) {
        let num_levels = self.num_levels.unwrap_or(1);
        // A semantic ID in as few bits as its codes need, and the item's number below them: one
        // integer sorts by both, so equal semantic IDs stay in the order of pushing.
        let mut largest = [0u16; MAX_LEVELS];
        for sid in self.codes.chunks_exact(num_levels) {
            for (largest, &code) in largest.iter_mut().zip(sid) {
                *largest = (*largest).max(code);
            }
        }
        let bits = largest.map(|code| u16::BITS - code.leading_zeros());
        let bits = &bits[..num_levels];
        let number_bits = usize::BITS - self.len().leading_zeros();
        match bits.iter().sum::<u32>() + number_bits {
            0..=64 => sort_and_lay_out::<u64>(self.codes, bits, number_bits),
            65..=128 => sort_and_lay_out::<u128>(self.codes, bits, number_bits),
            _ => sort_and_lay_out::<(u128, u32)>(self.codes, bits, number_bits),
        }
    }
}

/// A semantic ID and an item's number in one sortable value.
trait Key: Ord + Copy {
    fn pack(codes: u128, number: u32, number_bits: u32) -> Self;
    fn unpack(self, number_bits: u32) -> (u128, u32);
}

impl Key for u64 {
    fn pack(codes: u128, number: u32, number_bits: u32) -> u64 {
        (codes as u64) << number_bits | u64::from(number)
    }

    fn unpack(self, number_bits: u32) -> (u128, u32) {
        ((self >> number_bits).into(), (self & ((1 << number_bits) - 1)) as u32)
    }
}

impl Key for u128 {
    fn pack(codes: u128, number: u32, number_bits: u32) -> u128 {
        codes << number_bits | u128::from(number)
    }

    fn unpack(self, number_bits: u32) -> (u128, u32) {
        (self >> number_bits, (self & ((1 << number_bits) - 1)) as u32)
    }
}

impl Key for (u128, u32) {
    fn pack(codes: u128, number: u32, _: u32) -> (u128, u32) {
        (codes, number)
    }

    fn unpack(self, _: u32) -> (u128, u32) {
        self
    }
}

fn sort_and_lay_out<K: Key>(codes: Vec<u16>, bits: &[u32], number_bits: u32) -> (Trie, Vec<u32>) {
    let num_levels = bits.len();
    let sids = (0u32..).zip(codes.chunks_exact(num_levels));
    let key = |(number, sid): (u32, &[u16])| {
        let packed = sid.iter().zip(bits);
        let packed = packed.fold(0, |key, (&code, &bits)| key << bits | u128::from(code));
        K::pack(packed, number, number_bits)
    };
    let mut keys: Vec<K> = sids.map(key).collect();
    drop(codes);
    keys.sort_unstable();
    let mut trie = TrieBuilder::new(num_levels);
    let mut order = Vec::with_capacity(keys.len());
    let mut sid = [0; MAX_LEVELS];
    for key in keys {
        let (mut packed, number) = key.unpack(number_bits);
        for (code, &bits) in sid[..num_levels].iter_mut().zip(bits).rev() {
            *code = (packed & ((1 << bits) - 1)) as u16;
            packed >>= bits;
        }
        trie.push(&sid[..num_levels]);
        order.push(number);
    }
    (trie.finish(), order)
}

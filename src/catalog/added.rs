//! Items that were added since the catalog was compiled.
//!
//! They have a small trie of their own, laid over the compiled one: a beam's place is a node in
//! either or both. The small trie is laid out again with every change, which costs a few
//! nanoseconds per added item and keeps the search as simple as without changes; when it has
//! grown, everything is compiled into one again.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use super::Item;
use super::filter::Filter;
use super::sid::{MAX_LEVELS, Sid};
use super::texts::hash;
use super::trie::{Trie, TrieBuilder};

/// The items added to a compiled catalog, numbered in the order in which they came.
pub(super) struct Added {
    /// By number; those that were taken back or replaced keep theirs.
    items: Chunks<Arc<Item>>,
    /// Bits by number: not taken back or replaced.
    live: Vec<u64>,
    /// Bits by number: live, and may be recommended.
    available: Vec<u64>,
    num_live: u32,
    /// The live items' semantic IDs and numbers, ascending.
    order: Vec<(SidKey, u32)>,
    /// `[num_live]`; the numbers of `order`.
    numbers: Vec<u32>,
    /// Of `order`: the items below a node are a run of it.
    trie: Trie,
    /// The live items' names, hashed, and numbers; ascending.
    by_name: Vec<(u64, u32)>,
    /// By text: which numbers pass a filter, for as many as were there when it was asked last.
    passing: Mutex<HashMap<Arc<str>, Passing>>,
}

#[derive(Clone, Default)]
struct Passing {
    upto: u32,
    bits: Arc<Vec<u64>>,
}

/// Filters whose answers are kept.
const MAX_PASSING: usize = 1024;

/// A semantic ID as one number, in the same order.
type SidKey = u128;

fn key(sid: &Sid) -> SidKey {
    let shift = |level: usize| 16 * (MAX_LEVELS - 1 - level);
    let codes = sid.codes().iter().enumerate();
    codes.map(|(level, &code)| SidKey::from(code) << shift(level)).sum()
}

/// What a batch of changes does to the added items.
#[derive(Default)]
pub(super) struct Delta {
    /// New items, to be numbered from the present count on.
    pub new: Vec<Arc<Item>>,
    /// Numbers, old or new, that are taken back or replaced.
    pub gone: Vec<u32>,
    /// Numbers that may be recommended from now on, or no longer; each once.
    pub available: Vec<(u32, bool)>,
}

impl Delta {
    pub fn is_empty(&self) -> bool {
        self.new.is_empty() && self.gone.is_empty() && self.available.is_empty()
    }
}

impl Added {
    pub fn none(num_levels: usize) -> Added {
        Added {
            items: Chunks::default(),
            live: Vec::new(),
            available: Vec::new(),
            num_live: 0,
            order: Vec::new(),
            numbers: Vec::new(),
            trie: TrieBuilder::new(num_levels).finish(),
            by_name: Vec::new(),
            passing: Mutex::default(),
        }
    }

    /// These items after a batch of changes.
    pub fn with(&self, delta: Delta) -> Added {
        let first_new = self.items.len() as u32;
        let mut items = self.items.clone();
        let (mut live, mut available) = (self.live.clone(), self.available.clone());
        let num_items = items.len() + delta.new.len();
        live.resize(num_items.div_ceil(64), 0);
        available.resize(num_items.div_ceil(64), 0);
        let mut order = Vec::with_capacity(delta.new.len());
        let mut by_name = Vec::with_capacity(delta.new.len());
        for (number, item) in (first_new..).zip(&delta.new) {
            order.push((key(&item.sid), number));
            by_name.push((hash(&item.name), number));
            put(&mut live, number, true);
            put(&mut available, number, item.available);
        }
        items.extend(delta.new);
        for (number, is_available) in delta.available {
            put(&mut available, number, is_available);
        }
        for &number in &delta.gone {
            put(&mut live, number, false);
            put(&mut available, number, false);
        }
        let is_live = |number: u32| has(&live, number);
        // Only the new ones are sorted; where none is new or gone, everything stays as it is.
        order.sort_unstable();
        by_name.sort_unstable();
        let order = merge(&self.order, &order, |&(_, number)| is_live(number));
        let by_name = merge(&self.by_name, &by_name, |&(_, number)| is_live(number));
        let mut trie = TrieBuilder::new(self.trie.num_levels());
        let mut codes = [0; MAX_LEVELS];
        for (key, _) in &order {
            for (level, code) in codes.iter_mut().enumerate() {
                *code = (key >> (16 * (MAX_LEVELS - 1 - level))) as u16;
            }
            trie.push(&codes[..self.trie.num_levels()]);
        }
        let passing = self.passing.lock().expect("no holder panics").clone();
        Added {
            items,
            live,
            available,
            num_live: order.len() as u32,
            numbers: order.iter().map(|&(_, number)| number).collect(),
            order,
            trie: trie.finish(),
            by_name,
            passing: Mutex::new(passing),
        }
    }

    /// Items that were ever added, taken back or not.
    pub fn num_numbers(&self) -> u32 {
        self.items.len() as u32
    }

    pub fn num_live(&self) -> u32 {
        self.num_live
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

    /// The number of a live item.
    pub fn find(&self, name: &str) -> Option<u32> {
        let hash = hash(name);
        let start = self.by_name.partition_point(|&(other, _)| other < hash);
        let same = self.by_name[start..].iter().take_while(|&&(other, _)| other == hash);
        same.map(|&(_, number)| number).find(|&number| self.item(number).name == name)
    }

    /// The numbers of the live items below a node of the trie.
    pub fn below(&self, node: u32, depth: usize) -> &[u32] {
        let run = self.trie.items(node, depth);
        &self.numbers[run.start as usize..run.end as usize]
    }

    /// All live items' numbers, in the order of their semantic IDs, then of their coming.
    pub fn in_order(&self) -> &[u32] {
        &self.numbers
    }

    /// Which numbers pass a filter, as bits.
    pub fn passing(&self, text: &str, filter: &Filter) -> Arc<Vec<u64>> {
        let mut passing = self.passing.lock().expect("no holder panics");
        if passing.len() >= MAX_PASSING && !passing.contains_key(text) {
            passing.clear(); // what is asked for again is soon there again
        }
        let entry = passing.entry(text.into()).or_default();
        let num_numbers = self.num_numbers();
        if entry.upto < num_numbers || entry.bits.is_empty() {
            let mut bits = (*entry.bits).clone();
            bits.resize(num_numbers.div_ceil(64) as usize, 0);
            for number in entry.upto..num_numbers {
                let tags = &self.item(number).tags;
                let passes = filter.passes(&|tag| tags.iter().any(|other| other == tag));
                put(&mut bits, number, passes);
            }
            *entry = Passing { upto: num_numbers, bits: Arc::new(bits) };
        }
        Arc::clone(&entry.bits)
    }
}

fn put(bits: &mut [u64], at: u32, value: bool) {
    let (word, bit) = (at as usize / 64, at % 64);
    bits[word] = bits[word] & !(1 << bit) | u64::from(value) << bit;
}

fn has(bits: &[u64], at: u32) -> bool {
    bits[at as usize / 64] >> (at % 64) & 1 == 1
}

/// Two ascending lists in one, without what is not kept.
fn merge<T: Ord + Copy>(old: &[T], new: &[T], is_kept: impl Fn(&T) -> bool) -> Vec<T> {
    let mut merged = Vec::with_capacity(old.len() + new.len());
    let mut new = new.iter().copied().filter(&is_kept).peekable();
    for &entry in old.iter().filter(|entry| is_kept(entry)) {
        while let Some(earlier) = new.next_if(|other| *other < entry) {
            merged.push(earlier);
        }
        merged.push(entry);
    }
    merged.extend(new);
    merged
}

/// A list that grows at its end and whose copies share what was there before.
#[derive(Clone)]
struct Chunks<T> {
    chunks: Vec<Arc<Vec<T>>>,
    len: usize,
}

const CHUNK: usize = 1024;

impl<T> Default for Chunks<T> {
    fn default() -> Chunks<T> {
        Chunks { chunks: Vec::new(), len: 0 }
    }
}

impl<T: Clone> Chunks<T> {
    fn len(&self) -> usize {
        self.len
    }

    fn get(&self, at: usize) -> &T {
        &self.chunks[at / CHUNK][at % CHUNK]
    }

    fn extend(&mut self, values: impl IntoIterator<Item = T>) {
        for value in values {
            if self.len.is_multiple_of(CHUNK) {
                self.chunks.push(Arc::new(Vec::with_capacity(CHUNK)));
            }
            let last = self.chunks.last_mut().expect("pushed when full");
            Arc::make_mut(last).push(value);
            self.len += 1;
        }
    }
}

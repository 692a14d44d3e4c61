//! The delta's items by number, in chunks that one delta shares with the next.

use std::collections::HashMap;
use std::sync::{Arc, OnceLock};

use super::filter::Filter;
use super::item::Item;

/// Items of a chunk.
const CHUNK: usize = 1024;
/// Words of 64 items.
const WORDS: usize = CHUNK / 64;

/// A list of items that grows at its end; copies share the chunks that were full before.
#[derive(Clone, Default)]
pub(super) struct Chunks {
    chunks: Vec<Arc<Chunk>>,
    len: usize,
}

/// Successive items, with the places of those that carry each tag.
#[derive(Default)]
struct Chunk {
    items: Vec<Arc<Item>>,
    /// Made by the first filter: a writer spends nothing on it.
    by_tag: OnceLock<HashMap<Box<str>, Vec<u16>>>,
}

impl Clone for Chunk {
    /// A chunk to be extended, so its index is left out.
    fn clone(&self) -> Chunk {
        let mut items = Vec::with_capacity(CHUNK);
        items.extend_from_slice(&self.items);
        Chunk { items, by_tag: OnceLock::new() }
    }
}

impl Chunks {
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn get(&self, at: usize) -> &Item {
        &self.chunks[at / CHUNK].items[at % CHUNK]
    }

    pub fn extend(&mut self, items: impl IntoIterator<Item = Arc<Item>>) {
        for item in items {
            if self.len.is_multiple_of(CHUNK) {
                self.chunks.push(Arc::default());
            }
            let last = self.chunks.last_mut().expect("pushed when full");
            let last = Arc::make_mut(last);
            last.by_tag.take();
            last.items.push(item);
            self.len += 1;
        }
    }

    /// Bits by number: which items pass a filter. Bits from the number of items on mean nothing.
    pub fn passing(&self, filter: &Filter) -> Vec<u64> {
        let mut bits: Vec<u64> =
            self.chunks.iter().flat_map(|chunk| chunk.passing(filter)).collect();
        bits.truncate(self.len.div_ceil(64));
        bits
    }
}

impl Chunk {
    fn passing(&self, filter: &Filter) -> [u64; WORDS] {
        let fold = |filters: &[Filter], start: u64, combine: fn(u64, u64) -> u64| {
            filters.iter().fold([start; WORDS], |words, filter| {
                let other = self.passing(filter);
                std::array::from_fn(|at| combine(words[at], other[at]))
            })
        };
        match filter {
            Filter::All => [u64::MAX; WORDS],
            Filter::Tag(tag) => {
                let mut words = [0; WORDS];
                for &at in self.by_tag().get(&**tag).into_iter().flatten() {
                    words[usize::from(at) / 64] |= 1 << (at % 64);
                }
                words
            }
            Filter::And(all) => fold(all, u64::MAX, |one, other| one & other),
            Filter::Or(any) => fold(any, 0, |one, other| one | other),
            Filter::Not(filter) => self.passing(filter).map(|word| !word),
        }
    }

    fn by_tag(&self) -> &HashMap<Box<str>, Vec<u16>> {
        self.by_tag.get_or_init(|| {
            let mut by_tag: HashMap<Box<str>, Vec<u16>> = HashMap::new();
            for (at, item) in (0..).zip(&self.items) {
                for tag in &item.tags {
                    match by_tag.get_mut(&**tag) {
                        Some(places) => places.push(at),
                        None => drop(by_tag.insert(tag.as_str().into(), vec![at])),
                    }
                }
            }
            by_tag
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::sid::Sid;

    /// A filter of up to seven tags, at random.
    fn filter(rng: &mut fastrand::Rng, depth: usize) -> Filter {
        let filters = |rng: &mut fastrand::Rng| {
            let count = rng.usize(1..4);
            (0..count).map(|_| filter(rng, depth - 1)).collect()
        };
        match rng.u8(0..if depth == 0 { 4 } else { 9 }) {
            0 => Filter::All,
            1..4 => Filter::Tag(format!("t{}", rng.u8(0..7))),
            4 => Filter::Not(Box::new(filter(rng, depth - 1))),
            5 | 6 => Filter::And(filters(rng)),
            _ => Filter::Or(filters(rng)),
        }
    }

    #[test]
    fn the_index_passes_what_each_item_by_itself_passes() {
        let mut rng = fastrand::Rng::with_seed(1);
        let item = |rng: &mut fastrand::Rng| {
            let mut item = Item::new("item", Sid::new(&[1]).expect("one code"));
            let count = rng.usize(0..4);
            item.tags = (0..count).map(|_| format!("t{}", rng.u8(0..6))).collect();
            Arc::new(item)
        };
        let mut chunks = Chunks::default();
        for count in [1, 63, 1, 959, 1, 2000] {
            let before = chunks.clone();
            chunks.extend((0..count).map(|_| item(&mut rng)));
            for _ in 0..20 {
                let filter = filter(&mut rng, 3);
                for chunks in [&before, &chunks] {
                    let bits = chunks.passing(&filter);
                    for at in 0..chunks.len() {
                        let tags = &chunks.get(at).tags;
                        let passes = filter.passes(&|tag| tags.iter().any(|other| other == tag));
                        assert_eq!(bits[at / 64] >> (at % 64) & 1 == 1, passes, "{at}: {filter}");
                    }
                }
            }
        }
    }
}

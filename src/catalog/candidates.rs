//! Candidates: given items to score, as paths through the catalog.

use std::collections::HashMap;

use super::cursor::Cursor;
use super::snapshot::Snapshot;

/// Items of a snapshot packed as a trie: a prefix that several items share is in it once.
#[derive(Debug, Clone, Default)]
pub struct Candidates {
    /// Item numbers, ascending.
    items: Vec<u32>,
    /// The codes that follow a cursor, ascending.
    codes: HashMap<Cursor, Vec<u16>>,
    /// The number of distinct prefixes by level.
    widths: Vec<usize>,
}

impl Candidates {
    /// The paths of those `items` that are available.
    pub fn new(snapshot: &Snapshot, items: &[u32]) -> Candidates {
        let mut items: Vec<u32> =
            items.iter().copied().filter(|&item| snapshot.is_available(item)).collect();
        items.sort_unstable();
        items.dedup();
        let mut codes: HashMap<Cursor, Vec<u16>> = HashMap::new();
        let mut widths = vec![0; snapshot.num_levels()];
        for &item in &items {
            let mut cursor = snapshot.root();
            for (&code, width) in snapshot.sid(item).codes().iter().zip(&mut widths) {
                let next = codes.entry(cursor).or_default();
                if let Err(at) = next.binary_search(&code) {
                    next.insert(at, code);
                    *width += 1;
                }
                cursor = snapshot.child(cursor, code).expect("an item's path is in the catalog");
            }
        }
        Candidates { items, codes, widths }
    }

    /// The items, ascending.
    pub fn items(&self) -> &[u32] {
        &self.items
    }

    /// The codes that may follow a cursor.
    pub fn codes_after(&self, cursor: Cursor) -> &[u16] {
        self.codes.get(&cursor).map_or(&[], Vec::as_slice)
    }

    /// How many distinct prefixes there are at each level: a beam search of these widths reaches all
    /// candidates.
    pub fn widths(&self) -> &[usize] {
        &self.widths
    }

    /// Whether an item is a candidate.
    pub fn contains(&self, item: u32) -> bool {
        self.items.binary_search(&item).is_ok()
    }
}

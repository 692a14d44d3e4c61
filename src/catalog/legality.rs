//! What a request may be answered with: the available items that pass its filter, less those that
//! it excludes.

use std::ops::Range;
use std::sync::Arc;

use super::added::Added;
use super::bitmap::{RankBitmap, words_of};
use super::snapshot::{Place, Snapshot};

/// The items that a request may be answered with.
///
/// A node is legal if and only if one of the items below it is allowed, which is asked of bitmaps
/// and not of a walk: so no beam ever walks into a dead end, whatever the filter.
#[derive(Clone)]
pub struct Legality {
    pub(super) base: BaseItems,
    pub(super) added: Option<AddedItems>,
}

/// Of the compiled catalog's items.
#[derive(Clone)]
pub(super) struct BaseItems {
    /// `None` where all are available.
    pub available: Option<Arc<RankBitmap>>,
    /// Those that pass the filter; `None` without one.
    pub passing: Option<Arc<RankBitmap>>,
    /// Sorted.
    pub excluded: Vec<u32>,
}

/// Of the items that were added since.
#[derive(Clone)]
pub(super) struct AddedItems {
    pub added: Arc<Added>,
    /// Bits by number; `None` without a filter.
    pub passing: Option<Arc<Vec<u64>>>,
    /// Sorted numbers.
    pub excluded: Vec<u32>,
}

/// Stretches of items that are longer are first asked how many they have.
const LONG: usize = 512;

impl Legality {
    /// Whether no check is needed: every item is allowed.
    pub fn is_everything(&self) -> bool {
        let BaseItems { available, passing, excluded } = &self.base;
        available.is_none() && passing.is_none() && excluded.is_empty() && self.added.is_none()
    }

    /// What is allowed below one place, at which many places will be asked for.
    #[inline]
    pub fn below<'a>(&'a self, snapshot: &'a Snapshot, place: Place, depth: usize) -> Below<'a> {
        let excluded = match self.base.excluded.as_slice() {
            [] => &[],
            excluded => {
                let items = snapshot.base_items(place, depth);
                let start = excluded.partition_point(|&item| item < items.start);
                let len = excluded[start..].partition_point(|&item| item < items.end);
                &excluded[start..start + len]
            }
        };
        let is_everything = excluded.is_empty()
            && self.base.available.is_none()
            && self.base.passing.is_none()
            && place.added.is_none();
        Below { snapshot, legality: self, excluded, is_everything }
    }

    /// Whether a single item may come back.
    pub fn allows(&self, snapshot: &Snapshot, item: u32) -> bool {
        match item.checked_sub(snapshot.num_base_items()) {
            None => self.base.any(item..item + 1, &self.base.excluded),
            Some(number) => self.added.as_ref().is_some_and(|added| added.allows(number)),
        }
    }
}

/// What is allowed below one place.
pub struct Below<'a> {
    snapshot: &'a Snapshot,
    legality: &'a Legality,
    /// Of the place's items.
    excluded: &'a [u32],
    is_everything: bool,
}

impl Below<'_> {
    /// Whether an allowed item is below `place`, which `depth` codes lead to.
    #[inline]
    pub fn any(&self, place: Place, depth: usize) -> bool {
        if self.is_everything {
            return true;
        }
        self.legality.base.any(self.snapshot.base_items(place, depth), self.excluded)
            || self.legality.added.as_ref().is_some_and(|added| added.any(place, depth))
    }
}

impl BaseItems {
    #[inline]
    fn any(&self, items: Range<u32>, excluded: &[u32]) -> bool {
        let excluded_in = |items: &Range<u32>| -> usize {
            let start = excluded.partition_point(|&item| item < items.start);
            excluded[start..].partition_point(|&item| item < items.end)
        };
        let (available, passing) = (self.available.as_deref(), self.passing.as_deref());
        if available.is_none() && passing.is_none() {
            return items.len() > if excluded.is_empty() { 0 } else { excluded_in(&items) };
        }
        if items.len() > LONG {
            let count = |set: Option<&RankBitmap>| {
                set.map_or(items.len(), |set| set.count(items.clone()) as usize)
            };
            let (available, passing) = (count(available), count(passing));
            if available == 0 || passing == 0 {
                return false;
            }
            // Two large enough sets must meet in more items than are excluded.
            if available + passing > items.len() + excluded_in(&items) {
                return true;
            }
        }
        let mut excluded = excluded;
        for (word, mask) in words_of(items) {
            let mut bits = mask;
            bits &= available.map_or(u64::MAX, |set| set.words()[word]);
            bits &= passing.map_or(u64::MAX, |set| set.words()[word]);
            if bits == 0 {
                continue;
            }
            if !excluded.is_empty() {
                let start = excluded.partition_point(|&item| (item as usize / 64) < word);
                excluded = &excluded[start..];
                for &item in excluded.iter().take_while(|&&item| item as usize / 64 == word) {
                    bits &= !(1 << (item % 64));
                }
            }
            if bits != 0 {
                return true;
            }
        }
        false
    }
}

impl AddedItems {
    fn allows(&self, number: u32) -> bool {
        let (word, bit) = (number as usize / 64, number % 64);
        self.added.is_available(number)
            && self.passing.as_ref().is_none_or(|bits| bits[word] >> bit & 1 == 1)
            && self.excluded.binary_search(&number).is_err()
    }

    fn any(&self, place: Place, depth: usize) -> bool {
        let Some(node) = place.added.get() else { return false };
        self.added.below(node, depth).iter().any(|&number| self.allows(number))
    }
}

//! What a request may be answered with: the available items that pass its filter, less those that
//! it excludes.

use std::ops::Range;
use std::sync::Arc;

use super::added::Added;
use super::base::Selection;
use super::bitmap::{RankBitmap, words_of};
use super::snapshot::{Cursor, Run, Snapshot};

/// The items that a request may be answered with.
///
/// A node is legal if and only if one of the items below it is allowed, which is asked of bitmaps
/// and not of a walk: so no beam ever walks into a dead end, whatever the filter.
#[derive(Clone)]
pub struct AllowedSet {
    pub(super) base: BaseItems,
    pub(super) added: Option<AddedItems>,
}

/// Of the compiled catalog's items.
#[derive(Clone)]
pub(super) struct BaseItems {
    /// `None` where all are available.
    pub available: Option<Arc<RankBitmap>>,
    /// Those that pass the filter; `None` without one.
    pub passing: Option<Arc<Selection>>,
    pub excluded: Excluded,
}

/// Sorted items, with the way to the first from any item on.
#[derive(Clone)]
pub(super) struct Excluded {
    items: Vec<u32>,
    /// `[blocks + 1]`; the excluded items of block `b`, which has `2^shift` items, are
    /// `items[first[b]..first[b + 1]]`.
    first: Vec<u32>,
    shift: u32,
}

impl Excluded {
    /// `items`: sorted, below `num_items`.
    pub fn new(items: Vec<u32>, num_items: u32) -> Excluded {
        // About one excluded item a block.
        let shift = num_items.checked_div(items.len() as u32).map_or(31, u32::ilog2);
        let num_blocks = if items.is_empty() { 0 } else { (num_items >> shift) + 1 };
        let mut first = vec![0; num_blocks as usize + 1];
        items.iter().for_each(|item| first[(item >> shift) as usize + 1] += 1);
        let mut count = 0;
        for first in &mut first {
            count += *first;
            *first = count;
        }
        Excluded { items, first, shift }
    }

    pub fn items(&self) -> &[u32] {
        &self.items
    }

    fn from(&self, item: u32) -> usize {
        let block = (item >> self.shift) as usize;
        let Some(&[start, end]) = self.first.get(block..block + 2) else { return self.items.len() };
        let block = &self.items[start as usize..end as usize];
        start as usize + block.partition_point(|&other| other < item)
    }

    fn within(&self, items: Range<u32>) -> &[u32] {
        match self.items.is_empty() {
            true => &[],
            false => &self.items[self.from(items.start)..self.from(items.end)],
        }
    }
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

impl AllowedSet {
    /// What is allowed below one cursor, of whose children many will be asked for.
    #[inline]
    pub fn below<'a>(
        &'a self,
        snapshot: &'a Snapshot,
        cursor: Cursor,
        depth: usize,
    ) -> AllowedChildren<'a> {
        let excluded = match self.base.excluded.items.is_empty() {
            true => &[],
            false => self.base.excluded.within(snapshot.base_items(cursor, depth)),
        };
        let is_everything = excluded.is_empty()
            && self.base.available.is_none()
            && self.base.passing.is_none()
            && cursor.added.is_none();
        AllowedChildren { snapshot, allowed_set: self, excluded, is_everything, depth: depth + 1 }
    }

    /// Whether a single item may come back.
    pub fn allows(&self, snapshot: &Snapshot, item: u32) -> bool {
        match item.checked_sub(snapshot.num_base_items()) {
            None => {
                self.base.excluded.within(item..item + 1).is_empty()
                    && self.base.any(item..item + 1, &[])
            }
            Some(number) => self.added.as_ref().is_some_and(|added| added.allows(number)),
        }
    }
}

/// What is allowed below the children of one cursor.
pub struct AllowedChildren<'a> {
    snapshot: &'a Snapshot,
    allowed_set: &'a AllowedSet,
    /// Of the cursor's items, those not yet passed by.
    excluded: &'a [u32],
    is_everything: bool,
    /// Codes that lead to a child.
    depth: usize,
}

impl AllowedChildren<'_> {
    /// Which of up to 8 children in a run, from one on, can have an allowed item below them: a bit
    /// each. Where it is zero the filter passes nothing there; where it is one, ask
    /// [`is_match`](AllowedChildren::is_match).
    #[inline]
    pub fn can_match(&self, run: &Run<'_>, from: usize) -> u8 {
        match (&self.allowed_set.base.passing, run.child(from)) {
            (Some(passing), Cursor { base, added }) if added.is_none() => {
                base.get().map_or(0, |node| passing.nodes_from(node))
            }
            _ => u8::MAX,
        }
    }

    /// Whether an allowed item is below a child. To be asked in the order of the codes.
    #[inline]
    pub fn is_match(&mut self, child: Cursor) -> bool {
        if self.is_everything {
            return true;
        }
        let base = &self.allowed_set.base;
        let is_plain = self.excluded.is_empty() && base.available.is_none();
        let in_base = match (&base.passing, child.base.get()) {
            (_, None) => false,
            (Some(passing), Some(node)) if is_plain => passing.nodes_from(node) & 1 == 1,
            (None, Some(_)) if is_plain => true,
            _ => {
                let items = self.snapshot.base_items(child, self.depth);
                let passed = self.excluded.iter().take_while(|&&item| item < items.start).count();
                self.excluded = &self.excluded[passed..];
                base.any(items, self.excluded)
            }
        };
        in_base || self.allowed_set.added.as_ref().is_some_and(|added| added.any(child, self.depth))
    }
}

/// Words of the bitmaps that are looked at before their counts are.
const WORDS_AT_ONCE: u32 = 4;

impl BaseItems {
    /// Whether one of a stretch of items is allowed; `excluded` has none before it.
    fn any(&self, items: Range<u32>, excluded: &[u32]) -> bool {
        let (available, passing) = (self.available.as_deref(), self.passing.as_deref());
        if available.is_none() && passing.is_none() {
            // The next excluded ones are all of them only if they follow one another.
            let last = excluded.get(items.len() - 1);
            return last.is_none_or(|&last| last >= items.end);
        }
        let middle = items.end.min((items.start / 64 + WORDS_AT_ONCE) * 64);
        if self.any_of_words(items.start..middle, excluded) {
            return true;
        }
        if middle == items.end {
            return false;
        }
        let rest = middle..items.end;
        let count = |set: Option<&RankBitmap>| {
            set.map_or(rest.len(), |set| set.count(rest.clone()) as usize)
        };
        let (available, passing) = (count(available), count(passing.map(|passing| &passing.items)));
        if available == 0 || passing == 0 {
            return false;
        }
        // Two large enough sets must meet in more items than are excluded.
        let excluded = &excluded[excluded.partition_point(|&item| item < rest.start)..];
        let num_excluded = excluded.partition_point(|&item| item < rest.end);
        available + passing > rest.len() + num_excluded || self.any_of_words(rest, excluded)
    }

    fn any_of_words(&self, items: Range<u32>, mut excluded: &[u32]) -> bool {
        for (word, mask) in words_of(items) {
            let mut bits = mask;
            bits &= self.available.as_ref().map_or(u64::MAX, |set| set.words()[word]);
            bits &= self.passing.as_ref().map_or(u64::MAX, |passing| passing.items.words()[word]);
            while let Some((&item, later)) = excluded.split_first()
                && item as usize / 64 <= word
            {
                if item as usize / 64 == word {
                    bits &= !(1 << (item % 64));
                }
                excluded = later;
            }
            if bits != 0 {
                return true;
            }
        }
        false
    }
}

impl AddedItems {
    pub fn allows(&self, number: u32) -> bool {
        let (word, bit) = (number as usize / 64, number % 64);
        self.added.is_available(number)
            && self.passing.as_ref().is_none_or(|bits| bits[word] >> bit & 1 == 1)
            && self.excluded.binary_search(&number).is_err()
    }

    fn any(&self, cursor: Cursor, depth: usize) -> bool {
        let Some(node) = cursor.added.get() else { return false };
        self.added.below(node, depth).iter().any(|&number| self.allows(number))
    }
}

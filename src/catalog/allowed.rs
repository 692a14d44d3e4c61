//! The allowed set of a request: the available items that pass its filter, without its exclusions,
//! and of these the listed ones where the request has a list.

use std::ops::Range;
use std::sync::Arc;

use super::bitmap::{RankBitmap, words_of};
use super::cursor::{Cursor, Run};
use super::delta::Delta;
use super::selection::Selection;
use super::snapshot::Snapshot;
use crate::error::Result;

/// The items that may answer a request.
///
/// A node is legal if and only if one of the items below it is allowed. Bitmaps answer that without
/// a walk, so no beam ever enters a dead end, whatever the filter. Where the request lists what may
/// come back, the list itself is searched, at a cost that does not depend on the catalog's size.
#[derive(Clone)]
pub struct AllowedSet {
    pub(super) base: BaseItems,
    pub(super) delta: Option<DeltaItems>,
    /// All that is allowed, where the request lists it: `base` and `delta` say nothing then.
    pub(super) listed: Option<Arc<Listed>>,
}

/// The items that a request lists and that nothing else in it forbids.
pub(super) struct Listed {
    /// Item numbers, ascending.
    items: Vec<u32>,
    /// How many of them are the base segment's.
    num_base: usize,
    /// Where the others are in the order of the delta's trie, ascending.
    in_delta: Vec<u32>,
}

impl Listed {
    pub fn in_base(&self) -> &[u32] {
        &self.items[..self.num_base]
    }

    pub fn in_delta(&self) -> &[u32] {
        &self.in_delta
    }
}

/// The part of an allowed set that concerns the base segment's items.
#[derive(Clone)]
pub(super) struct BaseItems {
    /// The available items; `None` where all are.
    pub available: Option<Arc<RankBitmap>>,
    /// The items that pass the filter; `None` without a filter.
    pub passing: Option<Arc<Selection>>,
    pub excluded: Excluded,
}

/// Excluded items, with a directory that finds the first one from any item on.
#[derive(Clone)]
pub(super) struct Excluded {
    /// Ascending.
    items: Vec<u32>,
    /// `[stretches + 1]`; the excluded items of stretch `s`, which has `2^shift` item numbers, are
    /// `items[first[s]..first[s + 1]]`.
    first: Vec<u32>,
    shift: u32,
}

impl Excluded {
    /// `items`: sorted, below `num_items`.
    pub fn new(items: Vec<u32>, num_items: u32) -> Excluded {
        // About one excluded item a stretch.
        let shift = num_items.checked_div(items.len() as u32).map_or(31, u32::ilog2);
        let num_stretches = if items.is_empty() { 0 } else { (num_items >> shift) + 1 };
        let mut first = vec![0; num_stretches as usize + 1];
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

    /// The position of the first excluded item from `item` on.
    fn from(&self, item: u32) -> usize {
        let at = (item >> self.shift) as usize;
        let Some(&[start, end]) = self.first.get(at..at + 2) else { return self.items.len() };
        let stretch = &self.items[start as usize..end as usize];
        start as usize + stretch.partition_point(|&other| other < item)
    }

    fn within(&self, items: Range<u32>) -> &[u32] {
        match self.items.is_empty() {
            true => &[],
            false => &self.items[self.from(items.start)..self.from(items.end)],
        }
    }
}

/// The part of an allowed set that concerns the delta's items.
#[derive(Clone)]
pub(super) struct DeltaItems {
    pub delta: Arc<Delta>,
    /// Bits by number: the items that pass the filter; `None` without a filter.
    pub passing: Option<Arc<Vec<u64>>>,
    /// Sorted numbers.
    pub excluded: Vec<u32>,
}

impl Snapshot {
    /// The allowed set of a request with these exclusions and this filter
    /// ([`Filter::parse`](super::filter::Filter::parse)).
    ///
    /// A semantic ID stays legal while one of its items is allowed.
    ///
    /// # Errors
    /// [`Error::InvalidField`](crate::Error::InvalidField) where `filter` cannot be parsed;
    /// [`Error::CatalogContents`](crate::Error::CatalogContents) where the file's sets are damaged.
    ///
    /// # Panics
    /// Where `excluded` is not sorted or has repetitions.
    pub fn allowed_set(&self, excluded: &[u32], filter: Option<&str>) -> Result<AllowedSet> {
        assert!(excluded.is_sorted_by(|a, b| a < b), "excluded items must be sorted, distinct");
        let filter = filter.map(|text| Ok((text, self.base.select(text)?))).transpose()?;
        let first_in_delta = self.num_base_items();
        let split = excluded.partition_point(|&item| item < first_in_delta);
        let delta = self.delta.as_ref().map(|delta| {
            Ok(DeltaItems {
                delta: Arc::clone(delta),
                passing: filter.as_ref().map(|(text, _)| delta.passing(text)).transpose()?,
                excluded: excluded[split..].iter().map(|item| item - first_in_delta).collect(),
            })
        });
        let base = BaseItems {
            available: self.available.clone(),
            passing: filter.map(|(_, selection)| selection),
            excluded: Excluded::new(excluded[..split].to_vec(), first_in_delta),
        };
        Ok(AllowedSet { base, delta: delta.transpose()?, listed: None })
    }
}

impl AllowedSet {
    /// The items of the set that are among `items`.
    ///
    /// # Panics
    /// Where `items` is not sorted or has repetitions.
    #[must_use]
    pub fn restricted_to(&self, snapshot: &Snapshot, items: &[u32]) -> AllowedSet {
        assert!(items.is_sorted_by(|a, b| a < b), "listed items must be sorted, distinct");
        let is_allowed = |&item: &u32| self.allows(snapshot, item);
        let items: Vec<u32> = items.iter().copied().filter(is_allowed).collect();
        let first_in_delta = snapshot.num_base_items();
        let num_base = items.partition_point(|&item| item < first_in_delta);
        let numbers: Vec<u32> =
            items[num_base..].iter().map(|item| item - first_in_delta).collect();
        let in_delta =
            snapshot.delta.as_ref().map_or(Vec::new(), |delta| delta.positions(&numbers));
        AllowedSet {
            base: BaseItems {
                available: None,
                passing: None,
                excluded: Excluded::new(Vec::new(), first_in_delta),
            },
            delta: None,
            listed: Some(Arc::new(Listed { items, num_base, in_delta })),
        }
    }

    /// The allowed children of a cursor that `depth` codes lead to.
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
        let listed = self.listed.as_ref().map(|listed| {
            let base = within(listed.in_base(), snapshot.base_items(cursor, depth));
            (base, within(listed.in_delta(), snapshot.delta_positions(cursor, depth)))
        });
        let is_everything = excluded.is_empty()
            && listed.is_none()
            && self.base.available.is_none()
            && self.base.passing.is_none()
            && cursor.delta.is_none();
        let depth = depth + 1;
        AllowedChildren { snapshot, allowed_set: self, excluded, listed, is_everything, depth }
    }

    /// Whether all items of the base segment are allowed.
    pub(super) fn is_whole_base(&self) -> bool {
        let BaseItems { available, passing, excluded } = &self.base;
        self.listed.is_none()
            && available.is_none()
            && passing.is_none()
            && excluded.items.is_empty()
    }

    /// Whether an item is allowed.
    pub fn allows(&self, snapshot: &Snapshot, item: u32) -> bool {
        if let Some(listed) = &self.listed {
            return listed.items.binary_search(&item).is_ok();
        }
        match item.checked_sub(snapshot.num_base_items()) {
            None => {
                self.base.excluded.within(item..item + 1).is_empty()
                    && self.base.any(item..item + 1, &[])
            }
            Some(number) => self.delta.as_ref().is_some_and(|items| items.allows(number)),
        }
    }
}

/// The part of an ascending list that lies in a range.
fn within(list: &[u32], range: Range<u32>) -> &[u32] {
    let start = list.partition_point(|&item| item < range.start);
    let len = list[start..].partition_point(|&item| item < range.end);
    &list[start..start + len]
}

/// Whether an ascending list has a member in a range. Members before the range are dropped from it.
fn reaches(list: &mut &[u32], range: Range<u32>) -> bool {
    // One by one: all children of a cursor together pass each member once.
    let passed = list.iter().take_while(|&&item| item < range.start).count();
    *list = &list[passed..];
    list.first().is_some_and(|&item| item < range.end)
}

/// Answers which children of one cursor have an allowed item below them.
pub struct AllowedChildren<'a> {
    snapshot: &'a Snapshot,
    allowed_set: &'a AllowedSet,
    /// The excluded items below the cursor, from the next child on.
    excluded: &'a [u32],
    /// The listed items below the cursor, from the next child on: the base segment's, and positions
    /// in the delta's trie.
    listed: Option<(&'a [u32], &'a [u32])>,
    is_everything: bool,
    /// The number of codes that lead to a child.
    depth: usize,
}

impl AllowedChildren<'_> {
    /// A bit for each of 8 children of a run, from child `from` on: zero where the filter passes
    /// no item below the child, one where only [`is_match`](AllowedChildren::is_match) can tell.
    #[inline]
    pub fn can_match(&self, run: &Run<'_>, from: usize) -> u8 {
        match (&self.allowed_set.base.passing, run.child(from)) {
            (Some(passing), Cursor { base, delta }) if delta.is_none() => {
                base.get().map_or(0, |node| passing.nodes_from(node))
            }
            _ => u8::MAX,
        }
    }

    /// Whether an allowed item is below a child. Children must be asked in the order of their codes.
    #[inline]
    pub fn is_match(&mut self, child: Cursor) -> bool {
        if self.is_everything {
            return true;
        }
        if let Some((base, delta)) = &mut self.listed {
            let in_base = reaches(base, self.snapshot.base_items(child, self.depth));
            return in_base || reaches(delta, self.snapshot.delta_positions(child, self.depth));
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
        in_base || self.allowed_set.delta.as_ref().is_some_and(|items| items.any(child, self.depth))
    }
}

/// Words of the bitmaps that are read before their counts are.
const WORDS_AT_ONCE: u32 = 4;

impl BaseItems {
    /// Whether one of successive items is allowed; `excluded` has none before them.
    fn any(&self, items: Range<u32>, excluded: &[u32]) -> bool {
        let (available, passing) = (self.available.as_deref(), self.passing.as_deref());
        if available.is_none() && passing.is_none() {
            // All items are excluded only if the next excluded ones follow one another.
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
        // Two large enough sets have more items in common than are excluded.
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

impl DeltaItems {
    pub fn allows(&self, number: u32) -> bool {
        let (word, bit) = (number as usize / 64, number % 64);
        self.delta.is_available(number)
            && self.passing.as_ref().is_none_or(|bits| bits[word] >> bit & 1 == 1)
            && self.excluded.binary_search(&number).is_err()
    }

    fn any(&self, cursor: Cursor, depth: usize) -> bool {
        let Some(node) = cursor.delta.get() else { return false };
        self.delta.below(node, depth).iter().any(|&number| self.allows(number))
    }
}

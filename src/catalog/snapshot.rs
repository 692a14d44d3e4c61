//! One immutable state of the catalog.

use std::ops::Range;
use std::sync::{Arc, OnceLock};

use super::base_segment::BaseSegment;
use super::bitmap::RankBitmap;
use super::change::Change;
use super::cursor::{Cursor, Node, Runs};
use super::delta::Delta;
use super::item::Item;
use super::order::{ItemWeight, OrderKey, Ties};
use super::sid::Sid;
use super::trie::Trie;
use super::watermark::{Watermark, Watermarks};
use crate::error::Result;

/// One immutable state of a catalog. A request sees one snapshot from its start to its end.
///
/// Items are numbered within a snapshot: first the base segment's, in the order of their semantic
/// IDs, then the delta's, in the order of their putting.
#[derive(Clone)]
pub struct Snapshot {
    pub(super) number: u64,
    pub(super) base: Arc<BaseSegment>,
    /// The base segment's available items; `None` where all are.
    pub(super) available: Option<Arc<RankBitmap>>,
    /// The base segment's deleted or replaced items; `None` where none is.
    pub(super) deleted: Option<Arc<RankBitmap>>,
    pub(super) delta: Option<Arc<Delta>>,
    pub(super) watermarks: Arc<Watermarks>,
    /// By level, ascending: the codes that some item has there. Worked out when first asked for.
    pub(super) occurring: OnceLock<Arc<Vec<Vec<u16>>>>,
}

impl Snapshot {
    /// The snapshot of a base segment without later changes.
    pub(crate) fn of(base: BaseSegment) -> Snapshot {
        Snapshot {
            number: base.snapshot,
            available: base.available.clone(),
            deleted: None,
            delta: None,
            watermarks: Arc::clone(&base.watermarks),
            occurring: OnceLock::new(),
            base: Arc::new(base),
        }
    }

    /// The snapshot's number; every batch of changes makes the next.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// How far each feed has been applied.
    pub fn watermarks(&self) -> &Watermarks {
        &self.watermarks
    }

    /// The snapshot with a further watermark.
    ///
    /// # Errors
    /// Those of a source's name and of the number of partitions.
    pub(crate) fn with_watermark(self, watermark: &Watermark) -> Result<Snapshot> {
        let watermarks = self.watermarks.with(watermark)?;
        Ok(self.with_watermarks(watermarks))
    }

    /// The snapshot with other watermarks.
    pub(crate) fn with_watermarks(self, watermarks: Watermarks) -> Snapshot {
        Snapshot { watermarks: Arc::new(watermarks), ..self }
    }

    /// The compiled catalog under the snapshot's changes.
    pub fn base(&self) -> &BaseSegment {
        &self.base
    }

    /// Checks that nobody has written to the file of the base segment
    /// ([`BaseSegment::check_file`]).
    ///
    /// # Errors
    /// [`Error::FileChanged`](crate::Error::FileChanged).
    pub fn check_file(&self) -> Result<()> {
        self.base.check_file()
    }

    /// The number of items, available or not.
    pub fn num_items(&self) -> usize {
        let deleted = self.deleted.as_ref().map_or(0, |set| set.num_members());
        let delta = self.delta.as_ref().map_or(0, |delta| delta.num_present());
        (self.num_base_items() - deleted + delta) as usize
    }

    /// The items, available or not, in no promised order.
    pub fn all_items(&self) -> impl Iterator<Item = u32> + '_ {
        let base = (0..self.num_base_items()).filter(|&item| !self.is_deleted(item));
        let first = self.num_base_items();
        let delta = self.delta.iter().flat_map(|delta| delta.in_order());
        base.chain(delta.map(move |&number| first + number))
    }

    /// How many items were put since the catalog was compiled, deleted ones included.
    pub fn num_put(&self) -> usize {
        self.delta.as_ref().map_or(0, |delta| delta.num_numbers() as usize)
    }

    /// How many of the base segment's items were deleted or replaced.
    pub fn num_deleted(&self) -> usize {
        self.deleted.as_ref().map_or(0, |set| set.num_members() as usize)
    }

    /// How many codes a semantic ID has.
    pub fn num_levels(&self) -> usize {
        self.base.trie.num_levels()
    }

    /// The item with a name.
    pub fn find(&self, name: &str) -> Option<u32> {
        let in_delta = self.delta.as_ref().and_then(|delta| delta.find(name));
        match in_delta {
            Some(number) => Some(self.num_base_items() + number),
            None => self.base.find(name).filter(|&item| !self.is_deleted(item)),
        }
    }

    fn delta_item(&self, item: u32) -> Option<&Item> {
        let number = item.checked_sub(self.num_base_items())?;
        let delta = self.delta.as_ref().filter(|delta| number < delta.num_numbers());
        Some(delta.unwrap_or_else(|| panic!("item {item} is not in the catalog")).item(number))
    }

    /// The item's name in histories, exclusions and answers.
    ///
    /// # Panics
    /// Where the snapshot has no such item, like every method that takes an item.
    pub fn name(&self, item: u32) -> &str {
        self.delta_item(item).map_or_else(|| self.base.names.get(item), |item| &item.name)
    }

    /// The item's title, where it has one.
    pub fn title(&self, item: u32) -> Option<&str> {
        let title = match self.delta_item(item) {
            Some(item) => Some(item.title.as_str()),
            None => self.base.title(item),
        };
        title.filter(|title| !title.is_empty())
    }

    /// The item's semantic ID.
    pub fn sid(&self, item: u32) -> Sid {
        self.delta_item(item).map_or_else(|| self.base.trie.sid(item), |item| item.sid)
    }

    /// The item's tags, ascending.
    pub fn tags(&self, item: u32) -> Vec<String> {
        self.tag_names(item).map(str::to_string).collect()
    }

    pub(super) fn tag_names(&self, item: u32) -> impl Iterator<Item = &str> {
        let in_delta = self.delta_item(item);
        let in_base = in_delta.is_none().then(|| self.base.tags_of(item));
        let in_delta = in_delta.into_iter().flat_map(|item| &item.tags);
        in_delta.map(String::as_str).chain(in_base.into_iter().flatten())
    }

    /// Whether the item may be recommended.
    pub fn is_available(&self, item: u32) -> bool {
        match (item.checked_sub(self.num_base_items()), &self.delta) {
            (None, _) => self.available.as_ref().is_none_or(|items| items.contains(item)),
            (Some(number), Some(delta)) => delta.is_available(number),
            (Some(_), None) => panic!("item {item} is not in the catalog"),
        }
    }

    /// The item's weight among the items that share its semantic ID.
    pub fn weight(&self, item: u32) -> ItemWeight {
        self.delta_item(item).map_or_else(|| self.base.weight(item), |item| item.weight)
    }

    fn order_key(&self, ties: Ties, item: u32) -> OrderKey<'_> {
        OrderKey::new(ties, self.weight(item), self.name(item), item)
    }

    /// The item with all its fields.
    pub fn item(&self, item: u32) -> Item {
        Item {
            name: self.name(item).into(),
            sid: self.sid(item),
            title: self.title(item).unwrap_or_default().into(),
            tags: self.tags(item),
            available: self.is_available(item),
            weight: self.weight(item),
        }
    }

    fn is_deleted(&self, item: u32) -> bool {
        self.deleted.as_ref().is_some_and(|items| items.contains(item))
    }

    /// The empty prefix.
    pub fn root(&self) -> Cursor {
        let delta = if self.delta.is_some() { Node::new(Trie::ROOT) } else { Node::NONE };
        Cursor { base: Node::new(Trie::ROOT), delta }
    }

    /// The children of a cursor that is not a leaf.
    #[inline]
    pub fn children<'a>(&'a self, cursor: Cursor) -> Runs<'a> {
        let of = |trie: &'a Trie, node: u32| {
            let (nodes, codes) = trie.children(node);
            (Node::new(nodes.start), codes)
        };
        let none = (Node::NONE, &[][..]);
        let delta = cursor.delta.get().zip(self.delta.as_ref());
        Runs {
            base: cursor.base.get().map_or(none, |node| of(&self.base.trie, node)),
            delta: delta.map_or(none, |(node, delta)| of(delta.trie(), node)),
        }
    }

    /// The codes that semantic IDs have on a level, with repetitions, in no promised order.
    pub fn codes_at(&self, level: usize) -> impl Iterator<Item = u16> + '_ {
        let delta = self.delta.iter().flat_map(move |delta| delta.trie().codes_at(level));
        self.base.trie.codes_at(level).iter().chain(delta).copied()
    }

    /// The child of a cursor by a code, if there is one.
    pub fn child(&self, cursor: Cursor, code: u16) -> Option<Cursor> {
        let base = cursor.base.get().and_then(|node| self.base.trie.child(node, code));
        let delta = cursor.delta.get().zip(self.delta.as_ref());
        let delta = delta.and_then(|(node, delta)| delta.trie().child(node, code));
        let node = |node: Option<u32>| node.map_or(Node::NONE, Node::new);
        (base.is_some() || delta.is_some()).then(|| Cursor { base: node(base), delta: node(delta) })
    }

    /// The cursor of a prefix, if any semantic ID begins with it.
    pub fn cursor(&self, codes: &[u16]) -> Option<Cursor> {
        codes.iter().try_fold(self.root(), |cursor, &code| self.child(cursor, code))
    }

    /// The base segment's items below a cursor.
    #[inline]
    pub(super) fn base_items(&self, cursor: Cursor, depth: usize) -> Range<u32> {
        cursor.base.get().map_or(0..0, |node| self.base.trie.items(node, depth))
    }

    /// The delta's items below a cursor, as positions in the order of its trie.
    pub(super) fn delta_positions(&self, cursor: Cursor, depth: usize) -> Range<u32> {
        let delta = cursor.delta.get().zip(self.delta.as_ref());
        delta.map_or(0..0, |(node, delta)| delta.trie().items(node, depth))
    }

    /// The items below a cursor that `depth` codes lead to, deleted and unavailable ones included:
    /// an [`AllowedSet`](super::allowed::AllowedSet) says which of them count.
    ///
    /// They come by semantic ID; those of one by weight, the largest first, then by name in the
    /// order of its bytes. In a catalog file of format 2 age takes the place of the name until the
    /// file is compacted.
    pub fn items(&self, cursor: Cursor, depth: usize) -> impl Iterator<Item = u32> + '_ {
        let first = self.num_base_items();
        let delta = cursor.delta.get().zip(self.delta.as_ref());
        let delta = delta.map_or(&[][..], |(node, delta)| delta.below(node, depth));
        let delta = delta.iter().map(move |&number| first + number);
        let is_leaf = depth == self.num_levels();
        let comes_before = move |a: &u32, b: &u32| {
            let key =
                |item| ((!is_leaf).then(|| self.sid(item)), self.order_key(self.base.ties, item));
            key(*a) < key(*b)
        };
        let base = self.base_items(cursor, depth).peekable();
        Merged { base, delta: delta.peekable(), comes_before }
    }

    /// Puts items in the order of those that share a semantic ID, whatever theirs are.
    pub fn sort_shared(&self, items: &mut [u32]) {
        let key = |item: u32| self.order_key(Ties::ByName, item);
        items.sort_unstable_by(|&a, &b| key(a).cmp(&key(b)));
    }

    pub(super) fn num_base_items(&self) -> u32 {
        self.base.num_items()
    }

    /// Whether a change does nothing because the snapshot has no item of that name.
    pub fn is_without_effect(&self, change: &Change) -> bool {
        match change {
            Change::Put(_) => false,
            Change::Delete { item }
            | Change::Availability { item, .. }
            | Change::Tag { item, .. }
            | Change::Weight { item, .. } => self.find(item).is_none(),
        }
    }

    /// The items in the order of a base segment, each with its semantic ID.
    pub(super) fn in_order(&self) -> impl Iterator<Item = (Sid, u32)> + '_ {
        let first_in_delta = self.num_base_items();
        let base =
            self.base.trie.leaves().flat_map(|(sid, items)| items.map(move |item| (sid, item)));
        let base = base.filter(|&(_, item)| !self.is_deleted(item)).peekable();
        let delta = self.delta.iter().flat_map(move |delta| {
            let entry = move |&number: &u32| (delta.item(number).sid, first_in_delta + number);
            delta.in_order().iter().map(entry)
        });
        let comes_before = |a: &(Sid, u32), b: &(Sid, u32)| a.0 < b.0;
        let mut merged = Merged { base, delta: delta.peekable(), comes_before }.peekable();
        // The items of one semantic ID are few, and base segment and delta have each its own in
        // order already, unless the base segment is of an old file.
        let mut rest: Vec<(Sid, u32)> = Vec::new();
        let key = |item| self.order_key(Ties::ByName, item);
        std::iter::from_fn(move || {
            if rest.is_empty() {
                rest.push(merged.next()?);
                let sid = rest[0].0;
                while let Some(item) = merged.next_if(|item| item.0 == sid) {
                    rest.push(item);
                }
                rest.sort_unstable_by(|a, b| key(b.1).cmp(&key(a.1)));
            }
            rest.pop()
        })
    }
}

/// Merges two sequences; where neither comes before the other, the base segment's items go first.
struct Merged<A: Iterator, B: Iterator, C> {
    base: std::iter::Peekable<A>,
    delta: std::iter::Peekable<B>,
    comes_before: C,
}

impl<T, A, B, C> Iterator for Merged<A, B, C>
where
    A: Iterator<Item = T>,
    B: Iterator<Item = T>,
    C: Fn(&T, &T) -> bool,
{
    type Item = T;

    fn next(&mut self) -> Option<T> {
        match (self.base.peek(), self.delta.peek()) {
            (Some(base), Some(delta)) if (self.comes_before)(delta, base) => self.delta.next(),
            (Some(_), _) => self.base.next(),
            (None, _) => self.delta.next(),
        }
    }
}

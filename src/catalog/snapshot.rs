//! One immutable state of the catalog.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use super::added::{Added, Delta};
use super::allowed::{AddedItems, AllowedSet, BaseItems, Excluded};
use super::base::Base;
use super::bitmap::RankBitmap;
use super::sid::Sid;
use super::trie::Trie;
use super::{Change, Item};
use crate::error::{Error, Result};

/// One immutable state of a catalog: what a request sees from its start to its end.
///
/// Items are numbered within a snapshot: the compiled ones in the order of their semantic IDs,
/// then those that were added since, in the order in which they came.
#[derive(Clone)]
pub struct Snapshot {
    number: u64,
    base: Arc<Base>,
    /// Of the compiled items: may be recommended. `None` where all may.
    available: Option<Arc<RankBitmap>>,
    /// Of the compiled items: deleted or replaced. `None` where none is.
    forgotten: Option<Arc<RankBitmap>>,
    added: Option<Arc<Added>>,
}

/// A prefix of codes as a cursor in the catalog: a node of the compiled trie, of the trie of added
/// items, or of both.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Cursor {
    /// In the compiled trie.
    pub base: Node,
    /// In the trie of added items.
    pub added: Node,
}

/// A node that may be missing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Node(u32);

impl Node {
    /// No node.
    pub const NONE: Node = Node(u32::MAX);

    /// The node of a number; [`u32::MAX`] is none.
    pub fn new(node: u32) -> Node {
        Node(node)
    }

    /// The node's number.
    #[inline]
    pub fn get(self) -> Option<u32> {
        (self != Node::NONE).then_some(self.0)
    }

    /// Whether there is none.
    #[inline]
    pub fn is_none(self) -> bool {
        self == Node::NONE
    }

    /// The node so many nodes on in its trie.
    #[inline]
    fn plus(self, count: u32) -> Node {
        if self.is_none() { self } else { Node(self.0 + count) }
    }
}

/// Children of a cursor whose codes follow one another in the tries: child `i` has code `codes[i]`.
pub struct Run<'a> {
    first: Cursor,
    /// Ascending.
    pub codes: &'a [u16],
}

impl Run<'_> {
    /// The cursor of a child.
    #[inline]
    pub fn child(&self, index: usize) -> Cursor {
        let Cursor { base, added } = self.first;
        Cursor { base: base.plus(index as u32), added: added.plus(index as u32) }
    }
}

/// The children of a cursor, in the order of their codes, in as few runs as can be.
pub struct Runs<'a> {
    base: (Node, &'a [u16]),
    added: (Node, &'a [u16]),
}

fn cut<'a>((node, codes): &mut (Node, &'a [u16]), count: usize) -> (Node, &'a [u16]) {
    let (now, later) = codes.split_at(count);
    let first = *node;
    (*node, *codes) = (first.plus(count as u32), later);
    (first, now)
}

impl<'a> Iterator for Runs<'a> {
    type Item = Run<'a>;

    #[inline]
    fn next(&mut self) -> Option<Run<'a>> {
        let (base, added) = (self.base.1, self.added.1);
        let (base_len, added_len) = match (base.first(), added.first()) {
            (None, None) => return None,
            (_, None) => (base.len(), 0),
            (None, _) => (0, added.len()),
            (Some(a), Some(b)) if a == b => (1, 1),
            (Some(a), Some(b)) if a < b => (base.partition_point(|code| code < b), 0),
            (Some(a), _) => (0, added.partition_point(|code| code < a)),
        };
        let (base, base_codes) = cut(&mut self.base, base_len);
        let (added, added_codes) = cut(&mut self.added, added_len);
        let first = Cursor {
            base: if base_len > 0 { base } else { Node::NONE },
            added: if added_len > 0 { added } else { Node::NONE },
        };
        Some(Run { first, codes: if base_len > 0 { base_codes } else { added_codes } })
    }
}

impl Snapshot {
    pub(crate) fn of(base: Base) -> Snapshot {
        Snapshot {
            number: base.snapshot,
            available: base.available.clone(),
            forgotten: None,
            added: None,
            base: Arc::new(base),
        }
    }

    /// The snapshot's number; every batch of changes makes the next.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// The compiled catalog that the snapshot stands on.
    pub fn base(&self) -> &Base {
        &self.base
    }

    /// The number of items that are known, whether they may be recommended or not.
    pub fn num_items(&self) -> usize {
        let forgotten = self.forgotten.as_ref().map_or(0, |set| set.num_members());
        let added = self.added.as_ref().map_or(0, |added| added.num_live());
        (self.num_base_items() - forgotten + added) as usize
    }

    /// The known items, in no promised order.
    pub fn all_items(&self) -> impl Iterator<Item = u32> + '_ {
        let base = (0..self.num_base_items()).filter(|&item| !self.is_forgotten(item));
        let first = self.num_base_items();
        let added = self.added.iter().flat_map(|added| added.in_order());
        base.chain(added.map(move |&number| first + number))
    }

    /// Items put since the catalog was compiled, whether they are still there or not.
    pub fn num_added(&self) -> usize {
        self.added.as_ref().map_or(0, |added| added.num_numbers() as usize)
    }

    /// Compiled items that were deleted or replaced since.
    pub fn num_forgotten(&self) -> usize {
        self.forgotten.as_ref().map_or(0, |set| set.num_members() as usize)
    }

    /// Codes of a semantic ID.
    pub fn num_levels(&self) -> usize {
        self.base.trie.num_levels()
    }

    /// The item of a name.
    pub fn find(&self, name: &str) -> Option<u32> {
        let in_added = self.added.as_ref().and_then(|added| added.find(name));
        match in_added {
            Some(number) => Some(self.num_base_items() + number),
            None => self.base.find(name).filter(|&item| !self.is_forgotten(item)),
        }
    }

    fn added_item(&self, item: u32) -> Option<&Item> {
        let number = item.checked_sub(self.num_base_items())?;
        let added = self.added.as_ref().filter(|added| number < added.num_numbers());
        Some(added.unwrap_or_else(|| panic!("item {item} is not in the catalog")).item(number))
    }

    /// The item's name in the files.
    ///
    /// # Panics
    /// Where the snapshot has no such item; so do the other questions about an item.
    pub fn name(&self, item: u32) -> &str {
        self.added_item(item).map_or_else(|| self.base.names.get(item), |item| &item.name)
    }

    /// The item's title, where it has one.
    pub fn title(&self, item: u32) -> Option<&str> {
        let title = match self.added_item(item) {
            Some(item) => Some(item.title.as_str()),
            None => self.base.title(item),
        };
        title.filter(|title| !title.is_empty())
    }

    /// The item's semantic ID.
    pub fn sid(&self, item: u32) -> Sid {
        self.added_item(item).map_or_else(|| self.base.trie.sid(item), |item| item.sid)
    }

    /// The item's tags, ascending.
    pub fn tags(&self, item: u32) -> Vec<String> {
        self.added_item(item).map_or_else(|| self.base.tags_of(item), |item| item.tags.clone())
    }

    /// Whether the item can be recommended at all.
    pub fn is_available(&self, item: u32) -> bool {
        match (item.checked_sub(self.num_base_items()), &self.added) {
            (None, _) => self.available.as_ref().is_none_or(|items| items.contains(item)),
            (Some(number), Some(added)) => added.is_available(number),
            (Some(_), None) => panic!("item {item} is not in the catalog"),
        }
    }

    /// All that is known of an item.
    pub fn item(&self, item: u32) -> Item {
        Item {
            name: self.name(item).into(),
            sid: self.sid(item),
            title: self.title(item).unwrap_or_default().into(),
            tags: self.tags(item),
            available: self.is_available(item),
        }
    }

    fn is_forgotten(&self, item: u32) -> bool {
        self.forgotten.as_ref().is_some_and(|items| items.contains(item))
    }

    // Search.

    /// The empty prefix.
    pub fn root(&self) -> Cursor {
        let added = if self.added.is_some() { Node::new(Trie::ROOT) } else { Node::NONE };
        Cursor { base: Node::new(Trie::ROOT), added }
    }

    /// The children of a cursor that is not a leaf.
    #[inline]
    pub fn children<'a>(&'a self, cursor: Cursor) -> Runs<'a> {
        let of = |trie: &'a Trie, node: u32| {
            let (nodes, codes) = trie.children(node);
            (Node::new(nodes.start), codes)
        };
        let none = (Node::NONE, &[][..]);
        let added = cursor.added.get().zip(self.added.as_ref());
        Runs {
            base: cursor.base.get().map_or(none, |node| of(&self.base.trie, node)),
            added: added.map_or(none, |(node, added)| of(added.trie(), node)),
        }
    }

    /// The codes of a level that semantic IDs have, with repetitions, in no promised order.
    pub fn codes_at(&self, level: usize) -> impl Iterator<Item = u16> + '_ {
        let added = self.added.iter().flat_map(move |added| added.trie().codes_at(level));
        self.base.trie.codes_at(level).iter().chain(added).copied()
    }

    /// The child of a cursor by a code, if there is one.
    pub fn child(&self, cursor: Cursor, code: u16) -> Option<Cursor> {
        let base = cursor.base.get().and_then(|node| self.base.trie.child(node, code));
        let added = cursor.added.get().zip(self.added.as_ref());
        let added = added.and_then(|(node, added)| added.trie().child(node, code));
        let node = |node: Option<u32>| node.map_or(Node::NONE, Node::new);
        (base.is_some() || added.is_some()).then(|| Cursor { base: node(base), added: node(added) })
    }

    /// The cursor of a prefix, if any semantic ID begins with it.
    pub fn cursor(&self, codes: &[u16]) -> Option<Cursor> {
        codes.iter().try_fold(self.root(), |cursor, &code| self.child(cursor, code))
    }

    /// The compiled items below a cursor.
    #[inline]
    pub(super) fn base_items(&self, cursor: Cursor, depth: usize) -> Range<u32> {
        cursor.base.get().map_or(0..0, |node| self.base.trie.items(node, depth))
    }

    /// The items below a cursor that `depth` codes lead to: known or forgotten, available or not,
    /// so ask a [`AllowedSet`] about each. Of one semantic ID, in the order in which they came.
    pub fn items(&self, cursor: Cursor, depth: usize) -> impl Iterator<Item = u32> + '_ {
        let first = self.num_base_items();
        let added = cursor.added.get().zip(self.added.as_ref());
        let added = added.map_or(&[][..], |(node, added)| added.below(node, depth));
        self.base_items(cursor, depth).chain(added.iter().map(move |&number| first + number))
    }

    /// The compiled part, as it is shared among snapshots.
    pub(super) fn base_parts(&self) -> (Arc<Base>, &Base) {
        (Arc::clone(&self.base), &self.base)
    }

    pub(super) fn added_parts(&self) -> Option<&Arc<Added>> {
        self.added.as_ref()
    }

    pub(super) fn num_base_items(&self) -> u32 {
        self.base.num_items()
    }

    /// What a request may be answered with that excludes these items and wants those that pass a
    /// filter ([`Filter::parse`](super::filter::Filter::parse)).
    ///
    /// `excluded` is sorted and without repetition. A semantic ID stays legal while one of its
    /// items is allowed.
    ///
    /// # Errors
    /// [`Error::InvalidField`] where the filter is not one; [`Error::CatalogContents`].
    pub fn allowed_set(&self, excluded: &[u32], filter: Option<&str>) -> Result<AllowedSet> {
        assert!(excluded.is_sorted_by(|a, b| a < b), "excluded items must be sorted, distinct");
        let filter = filter.map(|text| Ok((text, self.base.select(text)?))).transpose()?;
        let first_added = self.num_base_items();
        let split = excluded.partition_point(|&item| item < first_added);
        let added = self.added.as_ref().map(|added| AddedItems {
            added: Arc::clone(added),
            passing: filter
                .as_ref()
                .map(|(text, selection)| added.passing(text, &selection.filter)),
            excluded: excluded[split..].iter().map(|item| item - first_added).collect(),
        });
        let base = BaseItems {
            available: self.available.clone(),
            passing: filter.map(|(_, selection)| selection),
            excluded: Excluded::new(excluded[..split].to_vec(), first_added),
        };
        Ok(AllowedSet { base, added })
    }

    // Changes.

    /// This snapshot after a batch of changes, which all happen or none; it has the next number.
    ///
    /// # Errors
    /// [`Error::InvalidChange`] with the first change that cannot be.
    pub fn with(&self, changes: &[Change]) -> Result<Snapshot> {
        self.with_numbered(changes, self.number + 1)
    }

    /// The same with a number of its own: several batches at once.
    pub(crate) fn with_numbered(&self, changes: &[Change], number: u64) -> Result<Snapshot> {
        let mut edit = Edit::new(self);
        for (index, change) in changes.iter().enumerate() {
            edit.apply(change)
                .map_err(|error| Error::InvalidChange { index, reason: error.to_string() })?;
        }
        Ok(edit.finish(number))
    }

    /// Whether a change names an item that is not known: it then does nothing.
    pub fn is_without_effect(&self, change: &Change) -> bool {
        match change {
            Change::Put(_) => false,
            Change::Delete { item }
            | Change::Availability { item, .. }
            | Change::Tag { item, .. } => self.find(item).is_none(),
        }
    }

    /// The items in the order of a compiled catalog, each with the semantic ID that it has.
    pub(super) fn in_order(&self) -> impl Iterator<Item = (Sid, u32)> + '_ {
        let first_added = self.num_base_items();
        let base =
            self.base.trie.leaves().flat_map(|(sid, items)| items.map(move |item| (sid, item)));
        let base = base.filter(|&(_, item)| !self.is_forgotten(item)).peekable();
        let added = self.added.iter().flat_map(move |added| {
            let cursor = move |&number: &u32| (added.item(number).sid, first_added + number);
            added.in_order().iter().map(cursor)
        });
        Merged { base, added: added.peekable() }
    }
}

/// Two sequences by semantic ID, the first one's items first where they share one.
struct Merged<A: Iterator, B: Iterator> {
    base: std::iter::Peekable<A>,
    added: std::iter::Peekable<B>,
}

impl<A: Iterator<Item = (Sid, u32)>, B: Iterator<Item = (Sid, u32)>> Iterator for Merged<A, B> {
    type Item = (Sid, u32);

    fn next(&mut self) -> Option<(Sid, u32)> {
        match (self.base.peek(), self.added.peek()) {
            (Some(base), Some(added)) if added.0 < base.0 => self.added.next(),
            (Some(_), _) => self.base.next(),
            (None, _) => self.added.next(),
        }
    }
}

/// A batch of changes on its way.
struct Edit<'a> {
    snapshot: &'a Snapshot,
    /// Items of this batch, by name: where they are now, `None` where they were deleted.
    touched: HashMap<String, Option<u32>>,
    /// Items that may be recommended from now on, or no longer.
    availability: HashMap<u32, bool>,
    forgotten: Vec<u32>,
    delta: Delta,
    num_added: u32,
}

impl<'a> Edit<'a> {
    fn new(snapshot: &'a Snapshot) -> Edit<'a> {
        Edit {
            snapshot,
            touched: Default::default(),
            availability: Default::default(),
            forgotten: Vec::new(),
            delta: Delta::default(),
            num_added: snapshot.added.as_ref().map_or(0, |added| added.num_numbers()),
        }
    }

    fn apply(&mut self, change: &Change) -> Result<()> {
        match change {
            Change::Put(item) => {
                item.check(self.snapshot.num_levels())?;
                self.put(item.clone());
            }
            Change::Delete { item } => {
                if let Some(at) = self.find(item) {
                    self.forget(at);
                    self.touched.insert(item.clone(), None);
                }
            }
            Change::Availability { item, available } => {
                if let Some(at) = self.find(item) {
                    self.availability.insert(at, *available);
                }
            }
            Change::Tag { item, add, remove } => {
                if let Some(at) = self.find(item) {
                    let mut item = self.item(at);
                    item.tags.retain(|tag| !remove.contains(tag));
                    item.tags.extend(add.iter().cloned());
                    self.put(item);
                }
            }
        }
        Ok(())
    }

    fn find(&self, name: &str) -> Option<u32> {
        match self.touched.get(name) {
            Some(at) => *at,
            None => self.snapshot.find(name),
        }
    }

    fn put(&mut self, mut item: Item) {
        item.tags.sort_unstable();
        item.tags.dedup();
        if let Some(old) = self.find(&item.name) {
            self.forget(old);
        }
        let number = self.num_added + self.delta.new.len() as u32;
        self.touched.insert(item.name.clone(), Some(self.snapshot.num_base_items() + number));
        self.delta.new.push(Arc::new(item));
    }

    fn number(&self, item: u32) -> Option<u32> {
        item.checked_sub(self.snapshot.num_base_items())
    }

    fn forget(&mut self, item: u32) {
        self.availability.insert(item, false);
        match self.number(item) {
            Some(number) => self.delta.gone.push(number),
            None => self.forgotten.push(item),
        }
    }

    /// What the item is after the changes so far.
    fn item(&self, at: u32) -> Item {
        let new = self.number(at).and_then(|number| number.checked_sub(self.num_added));
        let mut item = match new {
            Some(new) => (*self.delta.new[new as usize]).clone(),
            None => self.snapshot.item(at),
        };
        item.available = self.availability.get(&at).copied().unwrap_or(item.available);
        item
    }

    fn finish(self, number: u64) -> Snapshot {
        let Edit { snapshot, availability, forgotten, mut delta, .. } = self;
        let num_items = snapshot.num_base_items();
        let (mut set, mut clear) = (Vec::new(), Vec::new());
        for (item, is_available) in availability {
            match item.checked_sub(num_items) {
                Some(number) => delta.available.push((number, is_available)),
                None if is_available => set.push(item),
                None => clear.push(item),
            }
        }
        let none = || RankBitmap::new(vec![0; num_items.div_ceil(64) as usize], num_items);
        let available = match (set.is_empty() && clear.is_empty(), &snapshot.available) {
            (true, before) => before.clone(),
            (false, Some(before)) => Some(Arc::new(before.with(&set, &clear))),
            (false, None) => Some(Arc::new(RankBitmap::full(num_items).with(&set, &clear))),
        };
        let forgotten = match (forgotten.is_empty(), &snapshot.forgotten) {
            (true, before) => before.clone(),
            (false, Some(before)) => Some(Arc::new(before.with(&forgotten, &[]))),
            (false, None) => Some(Arc::new(none().with(&forgotten, &[]))),
        };
        let added = match (delta.is_empty(), &snapshot.added) {
            (true, before) => before.clone(),
            (false, Some(before)) => Some(Arc::new(before.with(delta))),
            (false, None) => Some(Arc::new(Added::none(snapshot.num_levels()).with(delta))),
        };
        Snapshot { number, base: Arc::clone(&snapshot.base), available, forgotten, added }
    }
}

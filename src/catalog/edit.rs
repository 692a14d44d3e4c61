//! A batch of changes applied to a snapshot, which makes the next snapshot.

use std::collections::HashMap;
use std::sync::{Arc, OnceLock};

use super::bitmap::RankBitmap;
use super::change::Change;
use super::delta::{Delta, Patch};
use super::item::Item;
use super::snapshot::Snapshot;
use crate::error::{Error, Result};

impl Snapshot {
    /// The snapshot after a batch of changes. All changes apply or none. It has the next number, or
    /// this one's where every item already is as the changes say.
    ///
    /// # Errors
    /// [`Error::InvalidChange`] with the first change that is invalid; [`Error::FileChanged`].
    pub fn with(&self, changes: &[Change]) -> Result<Snapshot> {
        self.check_file()?;
        let edit = Edit::of(self, changes)?;
        let number = if edit.is_empty() { self.number } else { self.number + 1 };
        Ok(edit.finish(number))
    }

    /// The snapshot after several batches at once, with the number of the last.
    ///
    /// # Errors
    /// [`Error::InvalidChange`] with the first change that is invalid; [`Error::FileChanged`].
    pub(crate) fn with_numbered(&self, changes: &[Change], number: u64) -> Result<Snapshot> {
        self.check_file()?;
        Ok(Edit::of(self, changes)?.finish(number))
    }
}

/// The effect of the changes so far.
struct Edit<'a> {
    snapshot: &'a Snapshot,
    /// Items that the batch put or deleted, by name: their number, or `None` once deleted.
    touched: HashMap<String, Option<u32>>,
    /// Items that become available or unavailable.
    availability: HashMap<u32, bool>,
    /// Items of the base segment.
    deleted: Vec<u32>,
    patch: Patch,
    /// Numbers that the delta takes without the batch.
    num_put: u32,
}

impl<'a> Edit<'a> {
    fn of(snapshot: &'a Snapshot, changes: &[Change]) -> Result<Edit<'a>> {
        let mut edit = Edit {
            snapshot,
            touched: Default::default(),
            availability: Default::default(),
            deleted: Vec::new(),
            patch: Patch::default(),
            num_put: snapshot.delta.as_ref().map_or(0, |delta| delta.num_numbers()),
        };
        for (index, change) in changes.iter().enumerate() {
            edit.apply(change)
                .map_err(|error| Error::InvalidChange { index, reason: error.to_string() })?;
        }
        let first_new = snapshot.num_base_items() + edit.num_put;
        edit.availability.retain(|&item, is_available| {
            item >= first_new || snapshot.is_available(item) != *is_available
        });
        Ok(edit)
    }

    /// Whether every item is as it was.
    fn is_empty(&self) -> bool {
        self.patch.is_empty() && self.availability.is_empty() && self.deleted.is_empty()
    }

    fn apply(&mut self, change: &Change) -> Result<()> {
        match change {
            Change::Put(item) => {
                item.check(self.snapshot.num_levels())?;
                self.put(item.clone());
            }
            Change::Delete { item } => {
                if let Some(at) = self.find(item) {
                    self.delete(at);
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
            &Change::Weight { ref item, weight } => {
                if let Some(at) = self.find(item) {
                    self.put(Item { weight, ..self.item(at) });
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
            if self.is_already(old, &item) {
                return;
            }
            self.delete(old);
        }
        let number = self.num_put + self.patch.new.len() as u32;
        self.touched.insert(item.name.clone(), Some(self.snapshot.num_base_items() + number));
        self.patch.new.push(Arc::new(item));
    }

    /// The item's number in the delta; `None` for an item of the base segment.
    fn number(&self, item: u32) -> Option<u32> {
        item.checked_sub(self.snapshot.num_base_items())
    }

    fn delete(&mut self, item: u32) {
        self.availability.insert(item, false);
        match self.number(item) {
            Some(number) => self.patch.deleted.push(number),
            None => self.deleted.push(item),
        }
    }

    /// The item as the batch put it, where it did.
    fn new_item(&self, at: u32) -> Option<&Item> {
        let new = self.number(at).and_then(|number| number.checked_sub(self.num_put));
        new.map(|new| &*self.patch.new[new as usize])
    }

    /// The item after the changes so far.
    fn item(&self, at: u32) -> Item {
        let mut item = self.new_item(at).cloned().unwrap_or_else(|| self.snapshot.item(at));
        item.available = self.availability.get(&at).copied().unwrap_or(item.available);
        item
    }

    /// Whether the item at `at` is `item` after the changes so far.
    fn is_already(&self, at: u32, item: &Item) -> bool {
        let is_available = |before| self.availability.get(&at).copied().unwrap_or(before);
        match self.new_item(at) {
            Some(new) => {
                let available = is_available(new.available);
                Item { available, ..new.clone() } == *item
            }
            None => {
                let snapshot = self.snapshot;
                is_available(snapshot.is_available(at)) == item.available
                    && snapshot.sid(at) == item.sid
                    && snapshot.weight(at) == item.weight
                    && snapshot.title(at).unwrap_or_default() == item.title
                    && snapshot.tag_names(at).eq(item.tags.iter().map(String::as_str))
            }
        }
    }

    fn finish(self, number: u64) -> Snapshot {
        let Edit { snapshot, availability, deleted, mut patch, .. } = self;
        let num_items = snapshot.num_base_items();
        let (mut set, mut clear) = (Vec::new(), Vec::new());
        for (item, is_available) in availability {
            match item.checked_sub(num_items) {
                Some(number) => patch.available.push((number, is_available)),
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
        let deleted = match (deleted.is_empty(), &snapshot.deleted) {
            (true, before) => before.clone(),
            (false, Some(before)) => Some(Arc::new(before.with(&deleted, &[]))),
            (false, None) => Some(Arc::new(none().with(&deleted, &[]))),
        };
        let delta = match (patch.is_empty(), &snapshot.delta) {
            (true, before) => before.clone(),
            (false, Some(before)) => Some(Arc::new(before.with(patch))),
            (false, None) => {
                let delta = Delta::empty(snapshot.num_levels(), snapshot.base.ties);
                Some(Arc::new(delta.with(patch)))
            }
        };
        let (base, watermarks) = (Arc::clone(&snapshot.base), Arc::clone(&snapshot.watermarks));
        let occurring = OnceLock::new();
        Snapshot { number, base, available, deleted, delta, watermarks, occurring }
    }
}

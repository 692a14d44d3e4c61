//! A batch of changes applied to a snapshot, which makes the next snapshot.

use std::collections::HashMap;
use std::sync::Arc;

use super::bitmap::RankBitmap;
use super::change::Change;
use super::delta::{Delta, Patch};
use super::item::Item;
use super::snapshot::Snapshot;
use crate::error::{Error, Result};

impl Snapshot {
    /// The snapshot after a batch of changes, with the next number. All changes apply or none.
    ///
    /// # Errors
    /// [`Error::InvalidChange`] with the first change that is invalid.
    pub fn with(&self, changes: &[Change]) -> Result<Snapshot> {
        self.with_numbered(changes, self.number + 1)
    }

    /// The snapshot after several batches at once, with the number of the last.
    ///
    /// # Errors
    /// [`Error::InvalidChange`] with the first change that is invalid.
    pub(crate) fn with_numbered(&self, changes: &[Change], number: u64) -> Result<Snapshot> {
        let mut edit = Edit::new(self);
        for (index, change) in changes.iter().enumerate() {
            edit.apply(change)
                .map_err(|error| Error::InvalidChange { index, reason: error.to_string() })?;
        }
        Ok(edit.finish(number))
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
    fn new(snapshot: &'a Snapshot) -> Edit<'a> {
        Edit {
            snapshot,
            touched: Default::default(),
            availability: Default::default(),
            deleted: Vec::new(),
            patch: Patch::default(),
            num_put: snapshot.delta.as_ref().map_or(0, |delta| delta.num_numbers()),
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

    /// The item after the changes so far.
    fn item(&self, at: u32) -> Item {
        let new = self.number(at).and_then(|number| number.checked_sub(self.num_put));
        let mut item = match new {
            Some(new) => (*self.patch.new[new as usize]).clone(),
            None => self.snapshot.item(at),
        };
        item.available = self.availability.get(&at).copied().unwrap_or(item.available);
        item
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
            (false, None) => Some(Arc::new(Delta::empty(snapshot.num_levels()).with(patch))),
        };
        let (base, watermarks) = (Arc::clone(&snapshot.base), Arc::clone(&snapshot.watermarks));
        Snapshot { number, base, available, deleted, delta, watermarks }
    }
}

//! The items of each tag.

use std::collections::BTreeMap;
use std::sync::OnceLock;

use roaring::RoaringBitmap;

use super::bitmap::RankBitmap;
use super::column::Column;
use super::filter::Filter;
use super::texts::{Texts, TextsBuilder};
use crate::error::{Error, Result};

/// The items of each tag, compressed (Roaring bitmaps, Lemire et al. 2018).
///
/// A tag's set is unpacked once a filter names the tag, so many tags do not slow opening a catalog.
pub(super) struct Tags {
    /// Ascending.
    pub names: Texts,
    /// Roaring's portable format, tag after tag.
    pub sets: Column<u8>,
    /// `[tags + 1]`; the set of tag `t` is `sets[start[t]..start[t + 1]]`.
    pub start: Column<u64>,
    /// All sets, unpacked by the first request for the tags of an item; `None` for an unreadable set.
    unpacked: OnceLock<Vec<Option<RoaringBitmap>>>,
}

impl Tags {
    pub fn build(items_by_tag: BTreeMap<String, RoaringBitmap>) -> Tags {
        let mut names = TextsBuilder::default();
        let (mut sets, mut start) = (Vec::new(), vec![0]);
        for (name, mut items) in items_by_tag {
            if items.is_empty() {
                continue;
            }
            names.push(&name);
            items.optimize();
            items.serialize_into(&mut sets).expect("a vector takes all bytes");
            start.push(sets.len() as u64);
        }
        Tags::new(names.finish(), sets.into(), start.into())
    }

    pub fn new(names: Texts, sets: Column<u8>, start: Column<u64>) -> Tags {
        Tags { names, sets, start, unpacked: OnceLock::new() }
    }

    pub fn len(&self) -> usize {
        self.names.len()
    }

    /// The items of a tag by its number.
    ///
    /// # Errors
    /// [`Error::CatalogContents`] where the file's bytes are no set.
    pub fn items(&self, tag: u32) -> Result<RoaringBitmap> {
        let bytes = self.start[tag as usize] as usize..self.start[tag as usize + 1] as usize;
        RoaringBitmap::deserialize_from(&self.sets[bytes]).map_err(|error| {
            let name = self.names.get(tag);
            let reason = format!("the items of tag {name:?} cannot be read: {error}");
            Error::CatalogContents { reason }
        })
    }

    fn find(&self, name: &str) -> Option<u32> {
        let (mut from, mut to) = (0, self.len() as u32);
        while from < to {
            let middle = (from + to) / 2;
            match self.names.get(middle).cmp(name) {
                std::cmp::Ordering::Equal => return Some(middle),
                std::cmp::Ordering::Less => from = middle + 1,
                std::cmp::Ordering::Greater => to = middle,
            }
        }
        None
    }

    /// The names of an item's tags, ascending.
    pub fn of_item(&self, item: u32) -> impl Iterator<Item = &str> {
        let all = || (0..self.len() as u32).map(|tag| self.items(tag).ok()).collect();
        let sets = self.unpacked.get_or_init(all).iter();
        let carried = (0..)
            .zip(sets)
            .filter(move |(_, set)| set.as_ref().is_some_and(|set| set.contains(item)));
        carried.map(|(tag, _)| self.names.get(tag))
    }

    /// The items below `num_items` that pass a filter.
    ///
    /// # Errors
    /// [`Error::CatalogContents`] where the file's sets are damaged.
    pub fn select(&self, filter: &Filter, num_items: u32) -> Result<RankBitmap> {
        let items = self.evaluate(filter, num_items)?;
        let mut words = vec![0u64; num_items.div_ceil(64) as usize];
        if items.max().is_some_and(|largest| largest >= num_items) {
            let reason = "a tag is on an item that the catalog does not have".into();
            return Err(Error::CatalogContents { reason });
        }
        for item in &items {
            words[item as usize / 64] |= 1 << (item % 64);
        }
        Ok(RankBitmap::new(words, num_items))
    }

    fn evaluate(&self, filter: &Filter, num_items: u32) -> Result<RoaringBitmap> {
        let all = || {
            let mut all = RoaringBitmap::new();
            all.insert_range(0..num_items);
            all
        };
        Ok(match filter {
            Filter::All => all(),
            Filter::Tag(name) => match self.find(name) {
                Some(tag) => self.items(tag)?,
                None => RoaringBitmap::new(),
            },
            Filter::And(filters) => {
                // Negated filters are subtracted from the others: no complement is written out.
                let mut passing: Option<RoaringBitmap> = None;
                let (mut not, mut yes): (Vec<&Filter>, Vec<&Filter>) = (Vec::new(), Vec::new());
                for filter in filters {
                    match filter {
                        Filter::Not(inner) => not.push(inner),
                        other => yes.push(other),
                    }
                }
                for filter in yes {
                    let items = self.evaluate(filter, num_items)?;
                    passing = Some(match passing {
                        Some(passing) => passing & items,
                        None => items,
                    });
                }
                let mut passing = passing.unwrap_or_else(all);
                for filter in not {
                    passing -= self.evaluate(filter, num_items)?;
                }
                passing
            }
            Filter::Or(filters) => {
                let mut passing = RoaringBitmap::new();
                for filter in filters {
                    passing |= self.evaluate(filter, num_items)?;
                }
                passing
            }
            Filter::Not(filter) => all() - self.evaluate(filter, num_items)?,
        })
    }

    /// The first defect of arrays that come from a file. Reading a set checks the set itself.
    pub fn defect(&self) -> Option<&'static str> {
        let count = self.start.len().saturating_sub(1);
        let covers = self.start.first() == Some(&0)
            && self.start[count] == self.sets.len() as u64
            && self.start.is_sorted();
        if !covers {
            return Some("the sets of the tags do not cover their bytes");
        }
        if let Some(defect) = self.names.defect(count) {
            return Some(defect);
        }
        let ascending = (1..count as u32).all(|tag| self.names.get(tag - 1) < self.names.get(tag));
        (!ascending).then_some("the tags are out of order")
    }
}

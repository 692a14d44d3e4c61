//! The catalog: items, their semantic IDs, and which of them are available.
//!
//! A catalog is built once from a file of items ([`items`]), written as one file ([`format`]) and
//! memory-mapped where it is used. Its heart is the rank [`trie`]; what a request may be answered
//! with is a [`legality`].

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use crate::error::{Error, Result};
use column::Column;
use legality::{Legality, RankBitmap};
use sid::Sid;
use trie::Trie;

pub(crate) mod column;
mod format;
pub mod items;
pub mod legality;
pub mod sid;
pub mod trie;

/// Items and their semantic IDs, ready to be searched.
///
/// Items are numbered in the order of their semantic IDs, those that share one in the order in
/// which they were added; so the items of a leaf are one run.
pub struct Catalog {
    trie: Trie,
    /// `[num_leaves + 1]`; the items of leaf `l` are `first_item[l]..first_item[l + 1]`.
    first_item: Column<u32>,
    names: Texts,
    /// `[num_items]`; the items in the order of their names' bytes.
    by_name: Column<u32>,
    titles: Option<Texts>,
    file_bytes: Option<u64>,
    available_items: Option<RankBitmap>,
    available_leaves: Arc<RankBitmap>,
    snapshot: u64,
}

impl Catalog {
    /// Opens a compiled catalog, or compiles a file of items (`.json`, `.jsonl`) in memory.
    ///
    /// # Errors
    /// The file's: missing, damaged, of another version, or with items that cannot be read.
    pub fn open(path: &Path) -> Result<Catalog> {
        if items::is_items_file(path) {
            let mut builder = CatalogBuilder::default();
            items::read(path, |item| builder.add(item), |_| {})?;
            builder.build().map_err(|error| items::whole_file_error(path, &error))
        } else {
            format::open(path)
        }
    }

    /// Writes the catalog as one file; an existing one is replaced as a whole or not at all.
    ///
    /// # Errors
    /// The operating system's.
    pub fn save(&self, path: &Path) -> Result<()> {
        format::save(self, path)
    }

    /// The trie of semantic IDs.
    pub fn trie(&self) -> &Trie {
        &self.trie
    }

    /// The number of items.
    pub fn num_items(&self) -> usize {
        self.by_name.len()
    }

    /// The item's name in the files.
    ///
    /// # Panics
    /// As indexing does, from `num_items` on; so do the other questions about an item.
    pub fn name(&self, item: u32) -> &str {
        self.names.get(item)
    }

    /// The item's title, where the catalog has titles.
    pub fn title(&self, item: u32) -> Option<&str> {
        self.titles.as_ref().map(|titles| titles.get(item)).filter(|title| !title.is_empty())
    }

    /// The item of a name.
    pub fn find(&self, name: &str) -> Option<u32> {
        let at = self.by_name.binary_search_by(|&item| self.name(item).cmp(name));
        at.ok().map(|at| self.by_name[at])
    }

    /// The item's semantic ID.
    pub fn sid(&self, item: u32) -> Sid {
        self.trie.codes(self.leaf_of(item))
    }

    /// The items that share a semantic ID, whether available or not.
    pub fn items(&self, leaf: u32) -> Range<u32> {
        self.first_item[leaf as usize]..self.first_item[leaf as usize + 1]
    }

    /// Whether the item can be recommended at all.
    pub fn is_available(&self, item: u32) -> bool {
        self.available_items.as_ref().is_none_or(|items| items.contains(item))
    }

    /// The number of the state that a search sees now; it grows with every change.
    pub fn snapshot(&self) -> u64 {
        self.snapshot
    }

    /// Size of the file that the catalog was opened from.
    pub fn file_bytes(&self) -> Option<u64> {
        self.file_bytes
    }

    /// Takes items out of every later answer. They may still stand in histories.
    pub fn withdraw(&mut self, items: &[u32]) {
        let gone = |item: usize| items.contains(&(item as u32));
        let stays = |item: usize| self.is_available(item as u32) && !gone(item);
        let available = RankBitmap::from_fn(self.num_items(), stays);
        let has_item = |leaf: usize| self.items(leaf as u32).any(|item| available.contains(item));
        let leaves = RankBitmap::from_fn(self.trie.num_leaves(), has_item);
        self.available_leaves = Arc::new(leaves);
        self.available_items = Some(available);
        self.snapshot += 1;
    }

    /// What a request may be answered with that excludes these items.
    ///
    /// `excluded` is sorted and without repetition. A semantic ID stays legal while one of its
    /// items is available and not excluded.
    pub fn legality(&self, excluded: &[u32]) -> Legality {
        assert!(excluded.is_sorted_by(|a, b| a < b), "excluded items must be sorted, distinct");
        let mut blocked = Vec::new();
        let mut rest = excluded;
        while let Some(&item) = rest.first() {
            let leaf = self.leaf_of(item);
            let items = self.items(leaf);
            let (here, later) = rest.split_at(rest.partition_point(|&item| item < items.end));
            let allowed = |item: &u32| self.is_available(*item) && !here.contains(item);
            if self.available_leaves.contains(leaf) && !items.clone().any(|item| allowed(&item)) {
                blocked.push(leaf);
            }
            rest = later;
        }
        Legality::new(Arc::clone(&self.available_leaves), blocked)
    }

    fn leaf_of(&self, item: u32) -> u32 {
        assert!((item as usize) < self.num_items(), "item {item} is not in the catalog");
        self.first_item.partition_point(|&first| first <= item) as u32 - 1
    }

    fn new(
        trie: Trie,
        first_item: Column<u32>,
        names: Texts,
        by_name: Column<u32>,
        titles: Option<Texts>,
        file_bytes: Option<u64>,
    ) -> Catalog {
        let all_leaves = RankBitmap::from_fn(trie.num_leaves(), |_| true);
        Catalog {
            trie,
            first_item,
            names,
            by_name,
            titles,
            file_bytes,
            available_items: None,
            available_leaves: Arc::new(all_leaves),
            snapshot: 1,
        }
    }
}

/// One item on its way into a catalog.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Item {
    /// Its name in histories, exclusions and answers; unique in the catalog.
    pub name: String,
    /// Its semantic ID; several items may share one.
    pub sid: Sid,
    /// What a person calls it; may be empty.
    pub title: String,
}

/// Collects items and lays them out.
#[derive(Default)]
pub struct CatalogBuilder {
    items: Vec<Item>,
}

impl CatalogBuilder {
    /// Adds an item.
    ///
    /// # Errors
    /// [`Error::InvalidField`] where it has no name or another number of levels than the first.
    pub fn add(&mut self, item: Item) -> Result<()> {
        if item.name.is_empty() {
            return Err(Error::InvalidField { field: "item", reason: "the name is empty".into() });
        }
        let num_levels = self.items.first().map_or(item.sid.num_levels(), |i| i.sid.num_levels());
        if item.sid.num_levels() != num_levels {
            let reason = format!(
                "item {:?} has {} levels, the items before it have {num_levels}",
                item.name,
                item.sid.num_levels()
            );
            return Err(Error::InvalidField { field: "sid", reason });
        }
        self.items.push(item);
        Ok(())
    }

    /// Lays the items out.
    ///
    /// # Errors
    /// [`Error::InvalidField`] where there are none or two have the same name.
    pub fn build(mut self) -> Result<Catalog> {
        if self.items.is_empty() {
            let reason = "there are no items; a catalog needs at least one".into();
            return Err(Error::InvalidField { field: "items", reason });
        }
        self.items.sort_by_key(|item| item.sid);
        let mut sids = Vec::new();
        let mut first_item = Vec::new();
        for (at, item) in self.items.iter().enumerate() {
            if sids.last() != Some(&item.sid) {
                sids.push(item.sid);
                first_item.push(at as u32);
            }
        }
        first_item.push(self.items.len() as u32);
        let name = |item: &u32| &self.items[*item as usize].name;
        let mut by_name: Vec<u32> = (0..self.items.len() as u32).collect();
        by_name.sort_unstable_by_key(name);
        if let Some(twins) = by_name.windows(2).find(|pair| name(&pair[0]) == name(&pair[1])) {
            let reason = format!("item {:?} appears twice; names must be unique", name(&twins[0]));
            return Err(Error::InvalidField { field: "item", reason });
        }
        let has_titles = self.items.iter().any(|item| !item.title.is_empty());
        let titles = has_titles.then(|| self.items.iter().map(|i| i.title.as_str()).collect());
        Ok(Catalog::new(
            Trie::build(&sids),
            first_item.into(),
            self.items.iter().map(|item| item.name.as_str()).collect(),
            by_name.into(),
            titles,
            None,
        ))
    }
}

/// Many strings in one stretch of bytes.
struct Texts {
    bytes: Column<u8>,
    /// `[count + 1]`; string `i` is `bytes[start[i]..start[i + 1]]`, valid UTF-8.
    start: Column<u64>,
}

impl Texts {
    fn get(&self, index: u32) -> &str {
        let bytes = self.start[index as usize] as usize..self.start[index as usize + 1] as usize;
        std::str::from_utf8(&self.bytes[bytes]).expect("checked when the catalog was opened")
    }

    /// What is wrong with arrays that come from a file, if anything.
    fn defect(&self, count: usize) -> Option<&'static str> {
        let covers = self.start.len() == count + 1
            && self.start[0] == 0
            && self.start[count] == self.bytes.len() as u64
            && self.start.is_sorted();
        if !covers {
            return Some("a table of texts does not cover its bytes");
        }
        // Each text must be whole: no boundary may split a character.
        let Ok(text) = std::str::from_utf8(&self.bytes) else {
            return Some("a text is not UTF-8");
        };
        let whole = self.start.iter().all(|&start| text.is_char_boundary(start as usize));
        (!whole).then_some("a text starts inside a character")
    }
}

impl<'a> FromIterator<&'a str> for Texts {
    fn from_iter<I: IntoIterator<Item = &'a str>>(texts: I) -> Texts {
        let (mut bytes, mut start) = (Vec::new(), vec![0]);
        for text in texts {
            bytes.extend_from_slice(text.as_bytes());
            start.push(bytes.len() as u64);
        }
        Texts { bytes: bytes.into(), start: start.into() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn catalog() -> Catalog {
        let mut builder = CatalogBuilder::default();
        let items = [("b", [1, 1]), ("a", [0, 2]), ("c", [1, 1]), ("d", [0, 1])];
        for (name, codes) in items {
            let sid = Sid::new(&codes).expect("two levels");
            let item = Item { name: name.into(), sid, title: String::new() };
            builder.add(item).expect("levels agree");
        }
        builder.build().expect("names are unique")
    }

    #[test]
    fn items_that_share_a_sid_are_one_run_in_the_order_added() {
        let catalog = catalog();
        let names: Vec<&str> = (0..4).map(|item| catalog.name(item)).collect();
        assert_eq!(names, ["d", "a", "b", "c"]);
        assert_eq!(catalog.items(2), 2..4);
        assert_eq!(catalog.find("c"), Some(3));
        assert_eq!(catalog.find("e"), None);
        assert_eq!(catalog.sid(3).codes(), [1, 1]);
    }

    #[test]
    fn a_sid_stays_legal_while_one_of_its_items_is_allowed() {
        let mut catalog = catalog();
        assert_eq!(catalog.legality(&[2]).count(0..3), 3);
        assert_eq!(catalog.legality(&[2, 3]).count(0..3), 2);
        catalog.withdraw(&[3]);
        assert_eq!(catalog.legality(&[]).count(0..3), 3);
        assert_eq!(catalog.legality(&[2]).count(0..3), 2);
        catalog.withdraw(&[0]);
        assert_eq!(catalog.legality(&[0, 2]).count(0..3), 1);
        assert_eq!(catalog.snapshot(), 3);
    }
}

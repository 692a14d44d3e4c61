//! The catalog: items, their semantic IDs, and which of them may be recommended now.
//!
//! A catalog is compiled once from a file of items ([`items`]) and written as one file, which its
//! users read or map into memory. The compiled arrays are the [`base_segment`]; its heart is the rank
//! [`trie`]. A later change (an item arrives, leaves, moves or gets other tags) goes to a small
//! delta beside the base segment, and a compaction makes both into a new base segment. A request
//! sees one immutable [`Snapshot`] from its start to its end; an [`allowed::AllowedSet`] says which
//! of the snapshot's items may answer it.

pub mod allowed;
pub mod arrays;
pub mod base_segment;
pub mod bitmap;
mod builder;
pub mod candidates;
#[allow(clippy::module_inception)] // the module's main type has the module's name
mod catalog;
mod change;
mod chunks;
pub(crate) mod column;
pub(crate) mod compaction;
pub mod constraint;
pub mod cursor;
mod delta;
mod edit;
pub mod file;
pub mod filter;
mod filter_cache;
mod item;
pub mod items;
mod occurring;
mod order;
mod packed;
pub mod phrases;
mod selection;
pub mod sid;
pub mod snapshot;
mod tags;
mod texts;
pub mod token_trie;
pub mod trie;
mod watermark;

pub use builder::{CatalogBuilder, SidTable};
pub use catalog::{Catalog, CatalogOptions};
pub use change::Change;
pub use file::{change_log, check};
pub use item::Item;
pub use order::ItemWeight;
pub use snapshot::Snapshot;
pub use watermark::{Watermark, Watermarks};

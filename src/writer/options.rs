//! How a writer of a catalog is opened.

/// The crash that an acknowledged change survives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Durability {
    /// The end of the process: the operating system has the change before it is acknowledged.
    /// After [`CatalogWriter::sync`](super::CatalogWriter::sync), the change survives the end of the machine too.
    #[default]
    Process,
    /// The end of the machine: the disk has the change before it is acknowledged.
    Machine,
}

/// Options of a [`CatalogWriter`](super::CatalogWriter).
///
/// ```
/// use sidereal::{Durability, WriterOptions};
///
/// let options = WriterOptions::default().with_durability(Durability::Machine);
/// ```
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct WriterOptions {
    /// The crash that an acknowledged change survives.
    pub durability: Durability,
    /// Compaction threshold: how many items are put before a compaction starts in the background.
    /// By default a sixteenth of the catalog's items, at least ten thousand and at most a hundred
    /// thousand. Deleted items cost little: they start a compaction once they are a quarter of all.
    /// `usize::MAX` turns compaction in the background off.
    pub compact_at: Option<usize>,
    /// Bytes of compiled batches with watermarks that a new log takes over, so that
    /// [`CatalogWriter::replace_base`](super::CatalogWriter::replace_base) finds the changes that a new base lacks. 16 MiB by default.
    pub keep_log_bytes: u64,
}

impl Default for WriterOptions {
    fn default() -> WriterOptions {
        WriterOptions {
            durability: Durability::Process,
            compact_at: None,
            keep_log_bytes: 16 << 20,
        }
    }
}

impl WriterOptions {
    /// Sets [`durability`](WriterOptions::durability).
    pub fn with_durability(mut self, durability: Durability) -> WriterOptions {
        self.durability = durability;
        self
    }

    /// Sets [`compact_at`](WriterOptions::compact_at).
    pub fn with_compact_at(mut self, items: usize) -> WriterOptions {
        self.compact_at = Some(items);
        self
    }

    /// Sets [`keep_log_bytes`](WriterOptions::keep_log_bytes).
    pub fn with_keep_log_bytes(mut self, bytes: u64) -> WriterOptions {
        self.keep_log_bytes = bytes;
        self
    }
}

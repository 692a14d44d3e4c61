//! Changes of a catalog.

use engine::catalog::Catalog;
use engine::wire::ChangeBatch;
use engine::{CatalogWriter, Error, Result};
use std::path::Path;

/// Changes of one batch.
const MAX_CHANGES: usize = 1 << 20;

/// Applies a batch of changes, all or with an error none. Returns the snapshot that has them, and
/// whether the catalog had them before, as their watermark says.
pub fn apply(writer: &CatalogWriter, json: &str) -> Result<(u64, bool)> {
    let ChangeBatch { changes, watermark, .. } = ChangeBatch::parse(json, MAX_CHANGES)?;
    match watermark {
        Some(watermark) => {
            let applied = writer.apply_from(&watermark, &changes)?;
            Ok((applied.snapshot, applied.is_repeated))
        }
        None => Ok((writer.apply(&changes)?, false)),
    }
}

/// Puts a full catalog, a file, in the place of the one that is searched, and returns the snapshot.
pub fn replace(writer: &CatalogWriter, path: &Path) -> Result<u64> {
    Ok(writer.replace_base(&Catalog::open(path)?)?.snapshot)
}

/// The error where a catalog was opened for reading alone.
pub fn read_only() -> Error {
    Error::Unsupported {
        what: "a change of a catalog that was opened for reading alone".into(),
        way_out: "open it with read_only=False".into(),
    }
}

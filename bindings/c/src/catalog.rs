//! Changes of the catalog.

use std::path::Path;

use engine::catalog::Catalog;
use engine::wire::ChangeBatch;
use engine::{CatalogWriter, Error, Result};

use crate::error::{SIDEREAL_OK, entry};
use crate::recommender::{SiderealRecommender, borrow};
use crate::structs::{SizedStruct, write};
use crate::text::SiderealText;

/// Changes of one batch.
const MAX_CHANGES: usize = 1 << 20;

/// The result of a batch of changes.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct SiderealChanged {
    /// sizeof(sidereal_changed).
    pub struct_size: usize,
    /// The snapshot that has the batch.
    pub snapshot: u64,
    /// 1 where the batch's watermark says that the catalog has it already, and nothing was done.
    pub is_repeated: i32,
}

// SAFETY: numbers alone.
unsafe impl SizedStruct for SiderealChanged {
    const NAME: &'static str = "sidereal_changed";
}

/// Applies a batch of changes, all of them or with an error none:
/// {"changes": [{"put": {"item": "9", "sid": [1, 2, 3]}}, {"delete": {"item": "4"}}],
/// "watermark": {"source": "items", "partition": 0, "offset": 41}}. Waits for the log. `changed` may be NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sidereal_change(
    recommender: *const SiderealRecommender,
    json: SiderealText,
    changed: *mut SiderealChanged,
) -> i32 {
    entry(|| {
        // SAFETY: the program's recommender and text.
        let (writer, json) = unsafe { (writer(recommender)?, json.read("json")?) };
        let ChangeBatch { changes, watermark, .. } = ChangeBatch::parse(json, MAX_CHANGES)?;
        let (snapshot, is_repeated) = match watermark {
            Some(watermark) => {
                let applied = writer.apply_from(&watermark, &changes)?;
                (applied.snapshot, applied.is_repeated)
            }
            None => (writer.apply(&changes)?, false),
        };
        // SAFETY: the program's struct.
        unsafe { report(changed, snapshot, is_repeated) }
    })
}

/// Puts a new full catalog, a file, in the place of the one that is searched; changes after its watermarks
/// are kept. Waits for the end; requests go on meanwhile. `changed` may be NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sidereal_replace_catalog(
    recommender: *const SiderealRecommender,
    path: SiderealText,
    changed: *mut SiderealChanged,
) -> i32 {
    entry(|| {
        // SAFETY: the program's recommender and text.
        let (writer, path) = unsafe { (writer(recommender)?, path.read("path")?) };
        let replaced = writer.replace_base(&Catalog::open(Path::new(path))?)?;
        // SAFETY: the program's struct.
        unsafe { report(changed, replaced.snapshot, false) }
    })
}

/// Waits until the disk has every change so far.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sidereal_sync(recommender: *const SiderealRecommender) -> i32 {
    entry(|| {
        // SAFETY: the program's recommender.
        unsafe { writer(recommender)? }.sync()?;
        Ok(SIDEREAL_OK)
    })
}

/// # Safety
/// As for [`borrow`].
unsafe fn writer<'a>(recommender: *const SiderealRecommender) -> Result<&'a CatalogWriter> {
    // SAFETY: the caller's promise.
    let recommender = unsafe { borrow(recommender)? };
    recommender.writer.as_ref().ok_or_else(|| Error::Unsupported {
        what: "a change of a catalog that was opened for reading alone".into(),
        way_out: "open it without read_only".into(),
    })
}

/// # Safety
/// NULL or the program's struct.
unsafe fn report(to: *mut SiderealChanged, snapshot: u64, is_repeated: bool) -> Result<i32> {
    if !to.is_null() {
        let is_repeated = is_repeated.into();
        // SAFETY: the caller's promise.
        unsafe { write(to, &SiderealChanged { struct_size: 0, snapshot, is_repeated })? };
    }
    Ok(SIDEREAL_OK)
}

//! Recommenders: opened, asked, closed.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use engine::catalog::Catalog;
use engine::{CatalogWriter, Durability, Recommender, RecommenderOptions, Result, WriterOptions};

use crate::error::{SIDEREAL_OK, entry, invalid};
use crate::structs::{SizedStruct, read};
use crate::text::SiderealText;

/// A model and a catalog on a device, until it is closed.
pub struct SiderealRecommender {
    /// The engine.
    pub recommender: Recommender,
    /// `None` where the catalog was opened for reading alone.
    pub writer: Option<CatalogWriter>,
}

/// How a recommender is opened.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct SiderealOptions {
    /// sizeof(sidereal_options).
    pub struct_size: usize,
    /// The model folder.
    pub model: SiderealText,
    /// The catalog: a compiled one, or a file of items.
    pub catalog: SiderealText,
    /// "cpu", "cuda" or "cuda:1"; no text for the CPU.
    pub device: SiderealText,
    /// The folder of the base, where the model's folder is that of a LoRA adapter.
    pub base: SiderealText,
    /// Threads to compute on; 0 for all cores.
    pub threads: u32,
    /// Nonzero opens the catalog for reading alone, so that another process may change its files.
    pub read_only: i32,
    /// The most input tokens of a request; 0 for 8192.
    pub max_context: u64,
    /// Tokens of all contexts together; 0 for the default.
    pub context_tokens: u64,
    /// Requests that may wait; 0 for 1024.
    pub max_queued: u64,
    /// How long a new request may be expected to wait, in milliseconds; 0 for any time.
    pub max_wait_ms: u64,
    /// Nonzero makes an acknowledged change survive the end of the machine, zero the end of the process.
    pub machine_durability: i32,
}

// SAFETY: numbers and texts, of which all may be zero.
unsafe impl SizedStruct for SiderealOptions {
    const NAME: &'static str = "sidereal_options";
}

/// The recommender behind a pointer.
///
/// # Safety
/// NULL, or a recommender that was opened and not closed.
pub unsafe fn borrow<'a>(
    recommender: *const SiderealRecommender,
) -> Result<&'a SiderealRecommender> {
    // SAFETY: the caller's promise.
    unsafe { recommender.as_ref() }.ok_or_else(|| invalid("recommender", "it is NULL"))
}

/// The place for something that is handed out, emptied.
///
/// # Safety
/// NULL or writable.
pub unsafe fn place<'a, T>(out: *mut *mut T) -> Result<&'a mut *mut T> {
    if out.is_null() || !out.is_aligned() {
        return Err(invalid("out", "it is no place to write to"));
    }
    // SAFETY: checked, and writable by the caller's promise.
    unsafe {
        out.write(std::ptr::null_mut());
        Ok(&mut *out)
    }
}

/// Opens a model and a catalog. This takes as long as reading them.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sidereal_open(
    options: *const SiderealOptions,
    out: *mut *mut SiderealRecommender,
) -> i32 {
    entry(|| {
        // SAFETY: the program's places and texts.
        let (out, options) = unsafe { (place(out)?, read(options)?) };
        // SAFETY: the same.
        let opened = unsafe { open(&options)? };
        *out = Box::into_raw(Box::new(opened));
        Ok(SIDEREAL_OK)
    })
}

/// # Safety
/// The texts are readable.
unsafe fn open(given: &SiderealOptions) -> Result<SiderealRecommender> {
    // SAFETY: the caller's promise.
    let text = |text: SiderealText, field| unsafe { text.read(field) };
    let (model, catalog) = (text(given.model, "model")?, text(given.catalog, "catalog")?);
    for (field, path) in [("model", model), ("catalog", catalog)] {
        if path.is_empty() {
            return Err(invalid(field, "name a path"));
        }
    }
    let device = match text(given.device, "device")? {
        "" => "cpu",
        device => device,
    };
    let mut options = RecommenderOptions::new(device).with_threads(given.threads as usize);
    let set = |to: &mut usize, number: u64| {
        if number > 0 {
            *to = usize::try_from(number).unwrap_or(usize::MAX);
        }
    };
    set(&mut options.engine.max_context, given.max_context);
    set(&mut options.engine.context_tokens, given.context_tokens);
    set(&mut options.max_queued, given.max_queued);
    if given.max_wait_ms > 0 {
        options.max_wait = Some(Duration::from_millis(given.max_wait_ms));
    }
    let base = text(given.base, "base")?;
    if !base.is_empty() {
        options.base = Some(base.into());
    }
    let (catalog, writer) = match given.read_only != 0 {
        true => (Arc::new(Catalog::open(Path::new(catalog))?), None),
        false => {
            let durability = match given.machine_durability != 0 {
                true => Durability::Machine,
                false => Durability::Process,
            };
            let options = WriterOptions::default().with_durability(durability);
            let writer = CatalogWriter::open_any(Path::new(catalog), &options)?;
            (Arc::clone(writer.catalog()), Some(writer))
        }
    };
    let recommender = Recommender::open(Path::new(model), catalog, &options)?;
    Ok(SiderealRecommender { recommender, writer })
}

/// Takes no more requests, and waits until those that were accepted are answered; those that take longer
/// than `within_ms` fail. The recommender still has to be closed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sidereal_shutdown(
    recommender: *const SiderealRecommender,
    within_ms: u64,
) -> i32 {
    entry(|| {
        // SAFETY: the program's recommender.
        let recommender = unsafe { borrow(recommender)? };
        recommender.recommender.shutdown(Duration::from_millis(within_ms))?;
        Ok(SIDEREAL_OK)
    })
}

/// Ends a recommender and frees it. Requests that run fail; calls that are open stay valid until they are
/// freed. No other thread may use the recommender during this call or after it, and no callback may make it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sidereal_close(recommender: *mut SiderealRecommender) {
    entry(|| {
        if !recommender.is_null() {
            // SAFETY: it was opened, and is closed once.
            drop(unsafe { Box::from_raw(recommender) });
        }
        Ok(SIDEREAL_OK)
    });
}

/// A text that was made for the program, until it is freed.
pub struct SiderealBuffer {
    text: String,
}

/// The text of a buffer; {NULL, 0} for NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sidereal_buffer_text(buffer: *const SiderealBuffer) -> SiderealText {
    // SAFETY: NULL, or a buffer that was handed out and not freed.
    unsafe { buffer.as_ref() }.map_or(SiderealText::NONE, |buffer| SiderealText::of(&buffer.text))
}

/// Frees a buffer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sidereal_buffer_free(buffer: *mut SiderealBuffer) {
    if !buffer.is_null() {
        // SAFETY: it was handed out, and is freed once.
        drop(unsafe { Box::from_raw(buffer) });
    }
}

/// Writes the engine's state as JSON: requests that wait and run, free pages, snapshot. Does not wait.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sidereal_status(
    recommender: *const SiderealRecommender,
    out: *mut *mut SiderealBuffer,
) -> i32 {
    entry(|| {
        // SAFETY: the program's recommender and place.
        let (out, recommender) = unsafe { (place(out)?, borrow(recommender)?) };
        let status = recommender.recommender.status_as_json()?;
        *out = Box::into_raw(Box::new(SiderealBuffer { text: status.to_string() }));
        Ok(SIDEREAL_OK)
    })
}

/// Writes counters and histograms as Prometheus' text. Does not wait.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sidereal_metrics(
    recommender: *const SiderealRecommender,
    out: *mut *mut SiderealBuffer,
) -> i32 {
    entry(|| {
        // SAFETY: the program's recommender and place.
        let (out, recommender) = unsafe { (place(out)?, borrow(recommender)?) };
        let text = recommender.recommender.metrics()?.to_prometheus();
        *out = Box::into_raw(Box::new(SiderealBuffer { text }));
        Ok(SIDEREAL_OK)
    })
}

/// The library's version, such as "0.1.0".
#[unsafe(no_mangle)]
pub extern "C" fn sidereal_version() -> SiderealText {
    SiderealText::of(env!("CARGO_PKG_VERSION"))
}

/// The number of the ABI, which is that of the shared library's name too: it changes where old programs
/// have to be compiled again.
#[unsafe(no_mangle)]
pub extern "C" fn sidereal_abi_version() -> u32 {
    0
}

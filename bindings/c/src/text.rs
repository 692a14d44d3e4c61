//! Texts that cross.

use std::ffi::c_char;
use std::ptr;

use engine::Result;

use crate::error::invalid;

/// A text: UTF-8, not ended by zero.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct SiderealText {
    /// The first byte; NULL for no text.
    pub data: *const c_char,
    /// Bytes.
    pub len: usize,
}

/// The most bytes of a text that is given: what is longer is a pointer or a length gone wrong.
const MAX_BYTES: usize = 1 << 30;

impl SiderealText {
    /// The text of something that outlives it.
    pub fn of(text: &str) -> SiderealText {
        SiderealText { data: text.as_ptr().cast(), len: text.len() }
    }

    /// No text.
    pub const NONE: SiderealText = SiderealText { data: ptr::null(), len: 0 };

    /// The text that a caller gave; empty for no text.
    ///
    /// # Safety
    /// `data` is readable for `len` bytes as long as the text is used.
    pub unsafe fn read<'a>(self, field: &'static str) -> Result<&'a str> {
        // SAFETY: the caller's promise.
        let bytes = unsafe { read_slice(self.data.cast::<u8>(), self.len, field)? };
        std::str::from_utf8(bytes).map_err(|error| invalid(field, format!("no UTF-8: {error}")))
    }
}

/// The array that a caller gave; a NULL of no elements is empty.
///
/// # Safety
/// `data` is readable for `len` elements as long as the array is used.
pub unsafe fn read_slice<'a, T>(
    data: *const T,
    len: usize,
    field: &'static str,
) -> Result<&'a [T]> {
    if len == 0 {
        return Ok(&[]);
    }
    if data.is_null() {
        return Err(invalid(field, format!("a NULL of {len} elements")));
    }
    if !data.is_aligned() {
        return Err(invalid(field, "the pointer is not aligned"));
    }
    if len > MAX_BYTES / size_of::<T>().max(1) {
        return Err(invalid(field, format!("{len} elements cannot be")));
    }
    // SAFETY: not NULL, aligned, not longer than memory can be; readable by the caller's promise.
    Ok(unsafe { std::slice::from_raw_parts(data, len) })
}

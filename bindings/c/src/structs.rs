//! Structs that begin with their size, so that programs and libraries of different versions agree.

use std::mem::MaybeUninit;

use engine::Result;

use crate::error::invalid;

/// A struct whose first field is `struct_size: usize`, and for which all bits zero is a value.
///
/// # Safety
/// `#[repr(C)]`, its first field is that `usize`, and all bits zero is a value of every field.
pub unsafe trait SizedStruct: Copy {
    /// Its name, for errors.
    const NAME: &'static str;
}

/// Reads a struct that a program gave: of an older program the beginning, and zeros behind it; of a
/// newer one what this library knows, where the rest is zero.
///
/// # Safety
/// `given` is NULL or leads to a struct of at least the size that its first field says.
pub unsafe fn read<T: SizedStruct>(given: *const T) -> Result<T> {
    let (size, own) = (stated_size(given)?, size_of::<T>());
    let mut value = MaybeUninit::<T>::zeroed();
    // SAFETY: both are readable and writable for that many bytes.
    unsafe {
        std::ptr::copy_nonoverlapping(
            given.cast::<u8>(),
            value.as_mut_ptr().cast::<u8>(),
            size.min(own),
        );
    }
    if size > own {
        // SAFETY: the struct has as many bytes as it says.
        let rest = unsafe { std::slice::from_raw_parts(given.cast::<u8>().add(own), size - own) };
        if rest.iter().any(|&byte| byte != 0) {
            let reason = "it is of a newer version and sets what this library does not know";
            return Err(invalid(T::NAME, reason));
        }
    }
    // SAFETY: zeros, or what the program wrote, which for all fields is a value.
    Ok(unsafe { value.assume_init() })
}

/// Writes as much of a struct as the program's has room for.
///
/// # Safety
/// `to` is NULL or leads to a writable struct of at least the size that its first field says.
pub unsafe fn write<T: SizedStruct>(to: *mut T, value: &T) -> Result<()> {
    let size = stated_size(to.cast_const())?;
    let skipped = size_of::<usize>(); // the size stays as the program set it
    let bytes = size.min(size_of::<T>()) - skipped;
    // SAFETY: both have that many bytes behind their sizes.
    unsafe {
        let from = std::ptr::from_ref(value).cast::<u8>().add(skipped);
        std::ptr::copy_nonoverlapping(from, to.cast::<u8>().add(skipped), bytes);
    }
    Ok(())
}

/// The size that a struct says, where it is one that a program could have.
fn stated_size<T: SizedStruct>(given: *const T) -> Result<usize> {
    const MOST: usize = 1 << 16;
    if given.is_null() {
        return Err(invalid(T::NAME, "it is NULL"));
    }
    if !given.is_aligned() {
        return Err(invalid(T::NAME, "the pointer is not aligned"));
    }
    // SAFETY: not NULL and aligned; every such struct begins with its size.
    let size = unsafe { given.cast::<usize>().read() };
    match (size_of::<usize>()..=MOST).contains(&size) {
        true => Ok(size),
        false => {
            let reason = format!("struct_size is {size}; set it to sizeof the struct");
            Err(invalid(T::NAME, reason))
        }
    }
}

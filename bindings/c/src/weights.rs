//! Weights, exchanged in memory.

use engine::{Result, Tensor};
use half::{bf16, f16};

use crate::error::{SIDEREAL_OK, entry, invalid};
use crate::recommender::{SiderealRecommender, borrow};
use crate::structs::{SizedStruct, read};
use crate::text::{SiderealText, read_slice};

/// IEEE single precision.
pub const SIDEREAL_F32: i32 = 0;
/// IEEE half precision.
pub const SIDEREAL_F16: i32 = 1;
/// The upper half of single precision.
pub const SIDEREAL_BF16: i32 = 2;

/// A tensor: dense and row-major.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct SiderealTensor {
    /// sizeof(sidereal_tensor).
    pub struct_size: usize,
    /// Its name in the checkpoint.
    pub name: SiderealText,
    /// Sizes of its dimensions.
    pub shape: *const u64,
    /// Dimensions.
    pub num_dims: usize,
    /// SIDEREAL_F32, SIDEREAL_F16 or SIDEREAL_BF16.
    pub dtype: i32,
    /// Its numbers, aligned for their type.
    pub data: *const u8,
    /// Bytes of the numbers.
    pub num_bytes: usize,
}

// SAFETY: numbers, pointers and texts, of which all may be zero.
unsafe impl SizedStruct for SiderealTensor {
    const NAME: &'static str = "sidereal_tensor";
}

/// Puts other tensors in the place of those of the same names. Waits for requests that run, which are
/// finished with the old weights. `version`, where it is not NULL, gets the number that answers carry.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sidereal_replace_weights(
    recommender: *const SiderealRecommender,
    tensors: *const *const SiderealTensor,
    num_tensors: usize,
    version: *mut u64,
) -> i32 {
    entry(|| {
        // SAFETY: the program's recommender and array.
        let (recommender, tensors) =
            unsafe { (borrow(recommender)?, read_slice(tensors, num_tensors, "tensors")?) };
        // SAFETY: the program's tensors.
        let tensors = tensors.iter().map(|&tensor| unsafe { read_tensor(tensor) });
        let tensors: Vec<(String, Tensor)> = tensors.collect::<Result<_>>()?;
        let number = recommender.recommender.replace_weights(tensors)?;
        if !version.is_null() && version.is_aligned() {
            // SAFETY: the program's number.
            unsafe { version.write(number) };
        }
        Ok(SIDEREAL_OK)
    })
}

/// # Safety
/// `tensor` and all pointers in it are readable.
unsafe fn read_tensor(tensor: *const SiderealTensor) -> Result<(String, Tensor)> {
    // SAFETY: the caller's promise.
    let given = unsafe { read(tensor)? };
    // SAFETY: the same.
    let name = unsafe { given.name.read("name")? };
    // SAFETY: the same.
    let shape = unsafe { read_slice(given.shape, given.num_dims, "shape")? };
    let shape: Option<Vec<usize>> = shape.iter().map(|&size| size.try_into().ok()).collect();
    let elements = shape.as_ref().and_then(|shape| {
        shape.iter().try_fold(1usize, |product, &size| product.checked_mul(size))
    });
    let (Some(shape), Some(elements)) = (shape, elements) else {
        return Err(invalid("shape", format!("{name} has more elements than memory")));
    };
    let width = match given.dtype {
        SIDEREAL_F32 => 4,
        SIDEREAL_F16 | SIDEREAL_BF16 => 2,
        other => return Err(invalid("dtype", format!("{other} of {name} is no number type"))),
    };
    if elements.checked_mul(width) != Some(given.num_bytes) {
        let reason = format!("{name} has {} bytes for {elements} numbers", given.num_bytes);
        return Err(invalid("num_bytes", reason));
    }
    let values = match given.dtype {
        // SAFETY: the caller's promise; the length was checked.
        SIDEREAL_F32 => unsafe { read_slice(given.data.cast::<f32>(), elements, "data")? }.to_vec(),
        SIDEREAL_F16 => {
            // SAFETY: the same.
            let numbers = unsafe { read_slice(given.data.cast::<f16>(), elements, "data")? };
            numbers.iter().map(|number| number.to_f32()).collect()
        }
        _ => {
            // SAFETY: the same.
            let numbers = unsafe { read_slice(given.data.cast::<bf16>(), elements, "data")? };
            numbers.iter().map(|number| number.to_f32()).collect()
        }
    };
    Ok((name.to_string(), Tensor::new(&shape, values)))
}

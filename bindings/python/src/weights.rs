//! Weights, as the Python half hands them over: type, shape and bytes.

use engine::{Result, Tensor};
use half::{bf16, f16};

use crate::error::invalid;

/// The tensor of bytes in this machine's order.
pub fn tensor(name: &str, dtype: &str, shape: &[usize], bytes: &[u8]) -> Result<Tensor> {
    let elements = shape.iter().try_fold(1usize, |product, &size| product.checked_mul(size));
    let values: Vec<f32> = match dtype {
        "float32" => numbers(bytes, f32::from_ne_bytes),
        "float16" => numbers(bytes, |bytes| f16::from_ne_bytes(bytes).to_f32()),
        "bfloat16" => numbers(bytes, |bytes| bf16::from_ne_bytes(bytes).to_f32()),
        other => {
            let reason = format!("{name} is {other}; float32, float16 and bfloat16 are read");
            return Err(invalid("weights", reason));
        }
    };
    if elements != Some(values.len()) {
        let reason = format!("{name} has {} numbers for the shape {shape:?}", values.len());
        return Err(invalid("weights", reason));
    }
    Ok(Tensor::new(shape, values))
}

fn numbers<const N: usize>(bytes: &[u8], number: impl Fn([u8; N]) -> f32) -> Vec<f32> {
    bytes.as_chunks::<N>().0.iter().map(|bytes| number(*bytes)).collect()
}

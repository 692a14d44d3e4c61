//! Files of the format safetensors.

use std::path::Path;
use std::sync::Arc;

use safetensors::SafeTensors;

use super::tensors::Tensors;
use crate::error::{Error, Result};
use crate::mapping::Mapping;
use crate::tensor::{Dtype, Tensor};

/// Maps a file.
///
/// # Errors
/// The operating system's; [`Error::WeightsFile`] where the file is damaged.
pub(crate) fn open(path: &Path) -> Result<Tensors> {
    let mapping = Arc::new(Mapping::open(path, 0)?);
    let parsed = SafeTensors::deserialize(mapping.bytes()).map_err(|source| {
        let reason = format!("not a whole safetensors file ({source})");
        Error::WeightsFile { path: path.to_path_buf(), reason }
    })?;
    let first_byte = mapping.bytes().as_ptr().addr();
    let mut tensors = Tensors::default();
    for (name, view) in parsed.tensors() {
        let dtype = match view.dtype() {
            safetensors::Dtype::F32 => Dtype::F32,
            safetensors::Dtype::F16 => Dtype::F16,
            safetensors::Dtype::BF16 => Dtype::Bf16,
            safetensors::Dtype::F64 => {
                let numbers = view.data().as_chunks::<8>().0.iter();
                let values = numbers.map(|bytes| f64::from_le_bytes(*bytes) as f32).collect();
                tensors.floats.insert(name, Tensor::new(view.shape(), values));
                continue;
            }
            other => {
                tensors.others.insert(name, format!("{other:?}"));
                continue;
            }
        };
        let start = view.data().as_ptr().addr() - first_byte;
        let bytes = start..start + view.data().len();
        let tensor = Tensor::mapped(view.shape(), Arc::clone(&mapping), bytes, dtype);
        tensors.floats.insert(name, tensor);
    }
    Ok(tensors)
}

//! Weights as a file holds them: a shape and numbers of 16 or 32 bits.

use std::ops::Range;
use std::sync::Arc;

use half::{bf16, f16};
use rayon::prelude::*;

use crate::error::Result;
use crate::mapping::Mapping;

/// The number types of weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// The upper half of single precision.
    Bf16,
}

impl Dtype {
    /// Its name, as `bf16`.
    pub fn name(self) -> &'static str {
        match self {
            Dtype::F32 => "f32",
            Dtype::F16 => "f16",
            Dtype::Bf16 => "bf16",
        }
    }

    /// Bytes of one number.
    pub fn size(self) -> usize {
        match self {
            Dtype::F32 => 4,
            Dtype::F16 | Dtype::Bf16 => 2,
        }
    }
}

/// A dense, row-major tensor of weights; cheap to clone.
#[derive(Clone)]
pub struct Tensor {
    shape: Vec<usize>,
    data: Data,
}

#[derive(Clone)]
enum Data {
    Owned(Arc<Vec<f32>>),
    Mapped { mapping: Arc<Mapping>, bytes: Range<usize>, dtype: Dtype },
}

impl Tensor {
    /// A tensor of numbers in memory.
    ///
    /// # Panics
    /// Where `values` is not as long as `shape` says.
    pub fn new(shape: &[usize], values: Vec<f32>) -> Tensor {
        assert_eq!(values.len(), shape.iter().product::<usize>(), "values must fill {shape:?}");
        Tensor { shape: shape.to_vec(), data: Data::Owned(Arc::new(values)) }
    }

    /// A stretch of a mapped file, already checked to be inside it and of the right length.
    pub(crate) fn mapped(
        shape: &[usize],
        mapping: Arc<Mapping>,
        bytes: Range<usize>,
        dtype: Dtype,
    ) -> Tensor {
        assert_eq!(bytes.len(), shape.iter().product::<usize>() * dtype.size());
        Tensor { shape: shape.to_vec(), data: Data::Mapped { mapping, bytes, dtype } }
    }

    /// The tensor in memory, out of reach of whoever writes to its file.
    pub(crate) fn into_memory(self) -> Tensor {
        let Data::Mapped { mapping, bytes, dtype } = &self.data else { return self };
        let (copy, len, dtype) = (mapping.copy(bytes.clone()), bytes.len(), *dtype);
        let data = Data::Mapped { mapping: Arc::new(copy), bytes: 0..len, dtype };
        Tensor { data, ..self }
    }

    /// Checks that nobody has written to the tensor's file since it was mapped.
    ///
    /// # Errors
    /// [`Error::FileChanged`](crate::Error::FileChanged).
    pub(crate) fn check_file(&self) -> Result<()> {
        match &self.data {
            Data::Owned(_) => Ok(()),
            Data::Mapped { mapping, .. } => mapping.check(),
        }
    }

    /// Its dimensions.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// How many numbers it holds.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether it holds none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The numbers of a flat range, in f32.
    pub fn read(&self, range: Range<usize>, out: &mut [f32]) {
        assert_eq!(range.len(), out.len(), "the output must be as long as the range");
        match &self.data {
            Data::Owned(values) => out.copy_from_slice(&values[range]),
            Data::Mapped { mapping, bytes, dtype } => {
                let size = dtype.size();
                let start = bytes.start + range.start * size;
                let bytes = &mapping.bytes()[start..start + range.len() * size];
                match dtype {
                    Dtype::F32 => convert(bytes, out, f32::from_le_bytes),
                    Dtype::F16 => convert(bytes, out, |b| f16::from_le_bytes(b).to_f32()),
                    Dtype::Bf16 => convert(bytes, out, |b| bf16::from_le_bytes(b).to_f32()),
                }
            }
        }
    }

    /// All numbers, in f32.
    pub fn to_vec(&self) -> Vec<f32> {
        let mut values = vec![0.0; self.len()];
        values.par_chunks_mut(CHUNK).enumerate().for_each(|(chunk, values)| {
            let start = chunk * CHUNK;
            self.read(start..start + values.len(), values);
        });
        values
    }

    /// Whether two tensors have the same shape and, bit by bit, the same numbers in f32.
    pub fn is_equal(&self, other: &Tensor) -> bool {
        if self.shape != other.shape {
            return false;
        }
        if let (Data::Owned(own), Data::Owned(theirs)) = (&self.data, &other.data)
            && Arc::ptr_eq(own, theirs)
        {
            return true;
        }
        if let (
            Data::Mapped { mapping, bytes, dtype },
            Data::Mapped { mapping: their_mapping, bytes: their_bytes, dtype: their_dtype },
        ) = (&self.data, &other.data)
            && Arc::ptr_eq(mapping, their_mapping)
            && (bytes, dtype) == (their_bytes, their_dtype)
        {
            return true;
        }
        (0..self.len().div_ceil(CHUNK)).into_par_iter().all(|chunk| {
            let range = chunk * CHUNK..self.len().min((chunk + 1) * CHUNK);
            let (mut own, mut theirs) = (vec![0.0f32; range.len()], vec![0.0; range.len()]);
            self.read(range.clone(), &mut own);
            other.read(range, &mut theirs);
            own.iter().zip(&theirs).all(|(own, theirs)| own.to_bits() == theirs.to_bits())
        })
    }

    /// The flat index of the first number that is NaN or infinite.
    pub fn first_non_finite(&self) -> Option<usize> {
        (0..self.len().div_ceil(CHUNK)).into_par_iter().find_map_first(|chunk| {
            let range = chunk * CHUNK..self.len().min((chunk + 1) * CHUNK);
            let mut values = vec![0.0; range.len()];
            self.read(range.clone(), &mut values);
            values.iter().position(|value| !value.is_finite()).map(|at| range.start + at)
        })
    }
}

const CHUNK: usize = 1 << 16;

fn convert<const N: usize>(bytes: &[u8], out: &mut [f32], number: impl Fn([u8; N]) -> f32) {
    for (out, bytes) in out.iter_mut().zip(bytes.as_chunks::<N>().0) {
        *out = number(*bytes);
    }
}

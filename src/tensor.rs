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
    /// Whole numbers of 8 bits times a scale. Products alone are in it: no file's weights are.
    Int8,
}

impl Dtype {
    /// Its name, as `bf16`.
    pub fn name(self) -> &'static str {
        match self {
            Dtype::F32 => "f32",
            Dtype::F16 => "f16",
            Dtype::Bf16 => "bf16",
            Dtype::Int8 => "int8",
        }
    }

    /// Bytes of one number.
    pub fn size(self) -> usize {
        match self {
            Dtype::F32 => 4,
            Dtype::F16 | Dtype::Bf16 => 2,
            Dtype::Int8 => 1,
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
    /// A stretch of these.
    Owned(Arc<Vec<f32>>, Range<usize>),
    Mapped {
        mapping: Arc<Mapping>,
        bytes: Range<usize>,
        dtype: Dtype,
    },
}

impl Tensor {
    /// A tensor of numbers in memory.
    ///
    /// # Panics
    /// Where `values` is not as long as `shape` says.
    pub fn new(shape: &[usize], values: Vec<f32>) -> Tensor {
        assert_eq!(values.len(), shape.iter().product::<usize>(), "values must fill {shape:?}");
        let all = 0..values.len();
        Tensor { shape: shape.to_vec(), data: Data::Owned(Arc::new(values), all) }
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
            Data::Owned(..) => Ok(()),
            Data::Mapped { mapping, .. } => mapping.check(),
        }
    }

    /// The number type that it is stored in.
    pub fn dtype(&self) -> Dtype {
        match &self.data {
            Data::Owned(..) => Dtype::F32,
            Data::Mapped { dtype, .. } => *dtype,
        }
    }

    /// Some of its rows, along the first dimension.
    ///
    /// # Panics
    /// Where it has not so many.
    pub(crate) fn rows(&self, rows: Range<usize>) -> Tensor {
        assert!(rows.end <= self.shape[0], "rows of a tensor");
        let row_len: usize = self.shape[1..].iter().product();
        let numbers = rows.start * row_len..rows.end * row_len;
        let data = match &self.data {
            Data::Owned(values, range) => {
                let start = range.start;
                Data::Owned(Arc::clone(values), start + numbers.start..start + numbers.end)
            }
            Data::Mapped { mapping, bytes, dtype } => {
                let at = |number: usize| bytes.start + number * dtype.size();
                let bytes = at(numbers.start)..at(numbers.end);
                Data::Mapped { mapping: Arc::clone(mapping), bytes, dtype: *dtype }
            }
        };
        Tensor { shape: [&[rows.len()], &self.shape[1..]].concat(), data }
    }

    /// Gives back the memory that a flat range of a mapped file takes, which was read and will not
    /// be for a while. It can be read again.
    pub(crate) fn forget(&self, range: Range<usize>) {
        if let Data::Mapped { mapping, bytes, dtype } = &self.data {
            let at = |number: usize| bytes.start + number * dtype.size();
            mapping.forget(at(range.start)..at(range.end));
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

    /// All numbers as they lie in memory, where they are in f32 and begin where an f32 may.
    pub(crate) fn as_f32(&self) -> Option<&[f32]> {
        match &self.data {
            Data::Owned(values, all) => Some(&values[all.clone()]),
            Data::Mapped { mapping, bytes, dtype: Dtype::F32 }
                if cfg!(target_endian = "little") =>
            {
                bytemuck::try_cast_slice(&mapping.bytes()[bytes.clone()]).ok()
            }
            Data::Mapped { .. } => None,
        }
    }

    /// The numbers of a flat range, in f32.
    pub fn read(&self, range: Range<usize>, out: &mut [f32]) {
        assert_eq!(range.len(), out.len(), "the output must be as long as the range");
        match &self.data {
            Data::Owned(values, all) => out.copy_from_slice(&values[all.clone()][range]),
            Data::Mapped { mapping, bytes, dtype } => {
                let size = dtype.size();
                let start = bytes.start + range.start * size;
                let bytes = &mapping.bytes()[start..start + range.len() * size];
                match dtype {
                    Dtype::F32 => convert(bytes, out, f32::from_le_bytes),
                    Dtype::F16 => convert(bytes, out, |b| f16::from_le_bytes(b).to_f32()),
                    Dtype::Bf16 => convert(bytes, out, |b| bf16::from_le_bytes(b).to_f32()),
                    Dtype::Int8 => unreachable!("no file's weights are in 8 bits"),
                }
            }
        }
    }

    /// The numbers of a flat range, rounded to bf16 where they are stored in another type: their bits.
    pub(crate) fn read_bf16(&self, range: Range<usize>, out: &mut [u16]) {
        assert_eq!(range.len(), out.len(), "the output must be as long as the range");
        if let Data::Mapped { mapping, bytes, dtype: Dtype::Bf16 } = &self.data {
            let start = bytes.start + 2 * range.start;
            let bytes = &mapping.bytes()[start..start + 2 * range.len()];
            let words = bytes.as_chunks().0.iter().map(|bytes| u16::from_le_bytes(*bytes));
            out.iter_mut().zip(words).for_each(|(out, word)| *out = word);
            return;
        }
        let mut values = [0.0; 1024];
        for (first, out) in range.step_by(values.len()).zip(out.chunks_mut(values.len())) {
            let values = &mut values[..out.len()];
            self.read(first..first + values.len(), values);
            out.iter_mut().zip(values).for_each(|(out, value)| *out = round_to_bf16(*value));
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

    /// Whether two tensors are the same stretch of the same memory, in the same shape.
    pub(crate) fn is_same(&self, other: &Tensor) -> bool {
        let data = match (&self.data, &other.data) {
            (Data::Owned(own, range), Data::Owned(theirs, their_range)) => {
                Arc::ptr_eq(own, theirs) && range == their_range
            }
            (
                Data::Mapped { mapping, bytes, dtype },
                Data::Mapped { mapping: their_mapping, bytes: their_bytes, dtype: their_dtype },
            ) => {
                Arc::ptr_eq(mapping, their_mapping) && (bytes, dtype) == (their_bytes, their_dtype)
            }
            _ => false,
        };
        data && self.shape == other.shape
    }

    /// Whether two tensors have the same shape and, bit by bit, the same numbers in f32.
    pub fn is_equal(&self, other: &Tensor) -> bool {
        if self.shape != other.shape {
            return false;
        }
        if self.is_same(other) {
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
            let found = match &self.data {
                Data::Owned(values, all) => {
                    let values = &values[all.clone()][range.clone()];
                    position(values, |value| !value.is_finite())
                }
                Data::Mapped { mapping, bytes, dtype } => {
                    let start = bytes.start + range.start * dtype.size();
                    let bytes = &mapping.bytes()[start..start + range.len() * dtype.size()];
                    // All bits of the exponent are set.
                    let is_full = |exponent: u16| {
                        move |bytes: &[u8; 2]| u16::from_le_bytes(*bytes) & exponent == exponent
                    };
                    match dtype {
                        Dtype::F32 => position(bytes.as_chunks().0, |bytes| {
                            !f32::from_le_bytes(*bytes).is_finite()
                        }),
                        Dtype::F16 => position(bytes.as_chunks().0, is_full(0x7c00)),
                        Dtype::Bf16 => position(bytes.as_chunks().0, is_full(0x7f80)),
                        Dtype::Int8 => unreachable!("no file's weights are in 8 bits"),
                    }
                }
            };
            self.forget(range.clone());
            found.map(|at| range.start + at)
        })
    }
}

/// The first element that is so. All are looked at without a branch, which is several times faster,
/// and then once more where one is.
fn position<T>(elements: &[T], is_so: impl Fn(&T) -> bool) -> Option<usize> {
    let any = elements.iter().fold(false, |any, element| any | is_so(element));
    if any { elements.iter().position(is_so) } else { None }
}

/// The bits of the nearest number in bf16, ties to even. NaN stays NaN.
#[inline(always)]
pub(crate) fn round_to_bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    let quiet = (bits >> 16) | 0x40;
    (if value.is_nan() { quiet } else { rounded }) as u16
}

const CHUNK: usize = 1 << 16;

fn convert<const N: usize>(bytes: &[u8], out: &mut [f32], number: impl Fn([u8; N]) -> f32) {
    for (out, bytes) in out.iter_mut().zip(bytes.as_chunks::<N>().0) {
        *out = number(*bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_is_to_the_nearest_and_ties_to_even() {
        let mut rng = fastrand::Rng::with_seed(1);
        let ties = [1.0 + 1.0 / 256.0, 1.0 + 3.0 / 256.0, f32::MAX, f32::INFINITY, f32::NAN, -0.0];
        let random = std::iter::repeat_with(|| f32::from_bits(rng.u32(..))).take(100_000);
        for value in ties.into_iter().chain(random) {
            let expected = bf16::from_f32(value);
            let found = bf16::from_bits(round_to_bf16(value));
            assert!(found == expected || (found.is_nan() && expected.is_nan()), "{value}");
        }
    }
}

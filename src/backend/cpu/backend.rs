//! The backend itself: its number type, and a count of what its matrix products compute.

use std::sync::atomic::{AtomicU64, Ordering};

use super::matmul::{Instructions, MAX_INPUTS};
use crate::error::{Error, Result};
use crate::tensor::{Dtype, Tensor};

/// The operations on the CPU, on the threads of the rayon pool that calls them.
#[derive(Debug, Default)]
pub struct CpuBackend {
    pub(super) matrix_flops: AtomicU64,
    pub(super) numbers: Numbers,
}

/// The numbers that products with weights are of, and what such products are made with.
#[derive(Debug, Clone, Copy, Default)]
pub(super) enum Numbers {
    #[default]
    F32,
    Bf16(Instructions),
    /// But for the output head, whose products are in bf16.
    Int8(Instructions),
}

impl Numbers {
    /// What products with weights in bf16 are made with, unless they are in f32.
    pub fn of_bf16(self) -> Option<Instructions> {
        match self {
            Numbers::F32 => None,
            Numbers::Bf16(instructions) => Some(instructions),
            Numbers::Int8(Instructions::Amx) => Some(Instructions::Amx),
            Numbers::Int8(Instructions::Widened) => Some(Instructions::Widened),
            Numbers::Int8(_) => Some(Instructions::best(Dtype::Bf16)),
        }
    }

    /// What products in 8 bits are made with.
    pub fn of_int8(self) -> Instructions {
        match self {
            Numbers::Int8(instructions) => instructions,
            _ => Instructions::Widened,
        }
    }
}

impl CpuBackend {
    /// A backend whose products with weights are in `dtype`: f32, bf16 with sums in f32, or int8 with
    /// sums of whole numbers and a scale for each row and each output; then the output head is in bf16.
    /// Activations, keys and values are f32.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for other types; [`Error::Device`] where the environment variable
    /// `SIDEREAL_CPU_PRODUCTS` asks for instructions that this machine does not have.
    pub fn new(dtype: Dtype) -> Result<CpuBackend> {
        match dtype {
            Dtype::F32 => Ok(CpuBackend::default()),
            Dtype::Bf16 | Dtype::Int8 => {
                Ok(CpuBackend::with_instructions(dtype, Instructions::choose(dtype)?))
            }
            Dtype::F16 => Err(Error::Unsupported {
                what: "computing in f16 on the CPU".into(),
                way_out: "f32, bf16 and int8 are there; a checkpoint in f16 is read by all".into(),
            }),
        }
    }

    /// A backend whose products are in bf16 or int8, by instructions that this machine must have.
    ///
    /// # Panics
    /// Where it does not, and for other types.
    pub fn with_instructions(dtype: Dtype, instructions: Instructions) -> CpuBackend {
        assert!(instructions.is_available(), "this machine has no {instructions}");
        let numbers = match dtype {
            Dtype::Bf16 => Numbers::Bf16(instructions),
            Dtype::Int8 => Numbers::Int8(instructions),
            Dtype::F32 | Dtype::F16 => panic!("products in {} have no choice", dtype.name()),
        };
        CpuBackend { numbers, ..CpuBackend::default() }
    }

    /// The number type that a matrix of these parts is kept in: that of the parts where products are
    /// in f32, since widening is exact.
    pub(super) fn kept(&self, parts: &[Tensor]) -> Dtype {
        let stored = parts[0].dtype();
        match self.numbers {
            Numbers::Bf16(_) => Dtype::Bf16,
            Numbers::Int8(_) if parts[0].shape()[1] <= MAX_INPUTS => Dtype::Int8,
            Numbers::Int8(_) => Dtype::Bf16,
            Numbers::F32 if parts.iter().all(|part| part.dtype() == stored) => stored,
            Numbers::F32 => Dtype::F32,
        }
    }

    /// The number type that the output head is kept in.
    pub(super) fn kept_of_head(&self, weight: &Tensor) -> Dtype {
        match self.numbers {
            Numbers::Int8(_) => Dtype::Bf16,
            _ => self.kept(std::slice::from_ref(weight)),
        }
    }

    pub(super) fn count_flops(&self, rows: usize, inner: usize, columns: usize) {
        self.matrix_flops.fetch_add(2 * (rows * inner * columns) as u64, Ordering::Relaxed);
    }
}

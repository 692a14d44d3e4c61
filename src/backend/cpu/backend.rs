//! The backend itself: its number type, and a count of what its matrix products compute.

use std::sync::atomic::{AtomicU64, Ordering};

use super::matmul::Instructions;
use crate::error::{Error, Result};
use crate::tensor::{Dtype, Tensor};

/// The operations on the CPU, on the threads of the rayon pool that calls them.
#[derive(Debug, Default)]
pub struct CpuBackend {
    pub(super) matrix_flops: AtomicU64,
    /// What products in bf16 are made with, unless all products are in f32.
    pub(super) bf16_products: Option<Instructions>,
}

impl CpuBackend {
    /// A backend whose products with weights are in `dtype`: f32, or bf16 with sums in f32.
    /// Activations, keys and values are f32.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for other types; [`Error::Device`] where the environment variable
    /// `SIDEREAL_CPU_PRODUCTS` asks for instructions that this machine does not have.
    pub fn new(dtype: Dtype) -> Result<CpuBackend> {
        match dtype {
            Dtype::F32 => Ok(CpuBackend::default()),
            Dtype::Bf16 => Ok(CpuBackend::with_instructions(Instructions::choose()?)),
            Dtype::F16 => Err(Error::Unsupported {
                what: "computing in f16 on the CPU".into(),
                way_out: "f32 and bf16 are there; a checkpoint in f16 is read by both".into(),
            }),
        }
    }

    /// A backend whose products are in bf16, by instructions that this machine must have.
    ///
    /// # Panics
    /// Where it does not.
    pub fn with_instructions(instructions: Instructions) -> CpuBackend {
        assert!(instructions.is_available(), "this machine has no {instructions}");
        CpuBackend { bf16_products: Some(instructions), ..CpuBackend::default() }
    }

    /// The number type that a matrix of these parts is kept in: that of the parts where products are
    /// in f32, since widening is exact.
    pub(super) fn kept(&self, parts: &[Tensor]) -> Dtype {
        let stored = parts[0].dtype();
        match self.bf16_products {
            Some(_) => Dtype::Bf16,
            None if parts.iter().all(|part| part.dtype() == stored) => stored,
            None => Dtype::F32,
        }
    }

    pub(super) fn count_flops(&self, rows: usize, inner: usize, columns: usize) {
        self.matrix_flops.fetch_add(2 * (rows * inner * columns) as u64, Ordering::Relaxed);
    }
}

//! The backend itself, which counts what its matrix products compute.

use std::sync::atomic::{AtomicU64, Ordering};

/// The operations on the CPU, on the threads of the rayon pool that calls them.
#[derive(Debug, Default)]
pub struct CpuBackend {
    pub(super) matrix_flops: AtomicU64,
}

impl CpuBackend {
    pub(super) fn count_flops(&self, rows: usize, inner: usize, columns: usize) {
        self.matrix_flops.fetch_add(2 * (rows * inner * columns) as u64, Ordering::Relaxed);
    }
}

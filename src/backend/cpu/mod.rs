//! The CPU backend: f32, any number of threads, no GPU needed.
//!
//! Products, with weights as with keys and values, are `matmul`'s; everything else is a fused loop.
//! All are written on `rten-simd`, so one binary uses AVX-512, AVX2 or NEON as the machine has it.
//! There is no unsafe code here.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use rten_simd::ops::BitOps;
use rten_simd::{Isa, SimdOp};

use super::{DeviceOps, MemorySpec, SlotSpec};
use crate::error::Result;
use crate::tensor::{Dtype, Tensor};

mod advance_beams;
mod append_tail;
mod apply_rope;
mod attend_beams;
mod attend_prefill;
mod context;
mod embed;
mod gather_last;
mod glu;
mod head;
mod lm_head;
mod matmul;
mod memory;
mod read_beams;
mod rms_norm;
mod rope_tables;
mod scratch;
mod slot;
mod softmax;
mod step;
mod store_context;

/// Default memory for contexts.
const CONTEXT_BYTES: usize = 256 << 20;

pub use head::Head;
pub use lm_head::Logits;
pub use matmul::Matrix;
pub use memory::Memory;
pub use slot::Slot;

use scratch::Scratch;

/// The operations on the CPU, on the threads of the rayon pool that calls them.
#[derive(Debug, Default)]
pub struct CpuBackend {
    matrix_flops: AtomicU64,
}

/// The numbers of a register.
struct Lanes;

impl SimdOp for Lanes {
    type Output = usize;

    #[inline(always)]
    fn eval<I: Isa>(self, isa: I) -> usize {
        isa.f32().len()
    }
}

impl CpuBackend {
    fn count_flops(&self, rows: usize, inner: usize, columns: usize) {
        self.matrix_flops.fetch_add(2 * (rows * inner * columns) as u64, Ordering::Relaxed);
    }
}

/// Activations `[rows, columns]`, dense.
pub struct Buffer {
    values: Scratch,
    columns: usize,
}

impl Default for Buffer {
    fn default() -> Buffer {
        Buffer { values: Scratch::new(0), columns: 0 }
    }
}

impl Buffer {
    /// A buffer of these values.
    ///
    /// # Panics
    /// Where `values` are not whole rows.
    pub fn new(values: Vec<f32>, columns: usize) -> Buffer {
        assert!(values.len().is_multiple_of(columns), "rows must be whole");
        Buffer { values: Scratch::from(values), columns }
    }

    /// All values, row after row.
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// The number of rows.
    pub fn num_rows(&self) -> usize {
        self.values.len().checked_div(self.columns).unwrap_or(0)
    }

    /// The number of columns.
    pub fn num_columns(&self) -> usize {
        self.columns
    }

    fn row(&self, row: usize) -> &[f32] {
        &self.values[row * self.columns..(row + 1) * self.columns]
    }

    /// Takes a shape; the values are then arbitrary.
    fn reshape(&mut self, rows: usize, columns: usize) {
        self.values.resize(rows * columns);
        self.columns = columns;
    }

    /// Makes `out` of some of the rows.
    fn copy_rows(&self, rows: impl Iterator<Item = Range<usize>>, out: &mut Buffer) {
        let rows: Vec<Range<usize>> = rows.collect();
        out.reshape(rows.iter().map(Range::len).sum(), self.columns);
        let mut rest = &mut out.values[..];
        for rows in rows {
            let (to, after) = rest.split_at_mut(rows.len() * self.columns);
            to.copy_from_slice(&self.values[rows.start * self.columns..rows.end * self.columns]);
            rest = after;
        }
    }
}

impl DeviceOps for CpuBackend {
    const COMPUTES_ON_CALLERS: bool = true;

    type Buffer = Buffer;
    type Matrix = Matrix;
    type Vector = Vec<f32>;
    type Table = Tensor;
    type Head = Head;
    type Logits = Logits;
    type Memory = Memory;
    type Slot = Slot;
    type Pass = ();

    fn description(&self) -> String {
        format!("{} f32x{}", std::env::consts::ARCH, Lanes.dispatch())
    }

    fn dtype(&self) -> Dtype {
        Dtype::F32
    }

    fn matrix_flops(&self) -> u64 {
        self.matrix_flops.load(Ordering::Relaxed)
    }

    fn take_failure(&self) -> Result<()> {
        Ok(())
    }

    fn matrix(&self, parts: &[Tensor]) -> Result<Matrix> {
        Ok(Matrix::stack(parts))
    }

    fn vector(&self, parts: &[Tensor]) -> Result<Vec<f32>> {
        Ok(parts.iter().flat_map(Tensor::to_vec).collect())
    }

    fn table(&self, weight: Tensor) -> Result<Tensor> {
        Ok(weight)
    }

    fn head(&self, weight: Tensor, levels: &[Vec<u32>], known_tokens: &[u32]) -> Result<Head> {
        Ok(Head::new(&weight, levels, known_tokens))
    }

    fn buffer(&self) -> Buffer {
        Buffer::default()
    }

    fn upload(&self, values: &[f32], columns: usize) -> Buffer {
        Buffer::new(values.to_vec(), columns)
    }

    fn download(&self, buffer: &Buffer) -> Result<Vec<f32>> {
        Ok(buffer.values().to_vec())
    }

    fn logits(&self) -> Logits {
        Logits::default()
    }

    fn context_bytes(&self) -> Result<usize> {
        Ok(CONTEXT_BYTES)
    }

    fn memory(&self, spec: &MemorySpec) -> Result<Memory> {
        spec.kv.check()?;
        Ok(Memory::new(spec))
    }

    fn max_steps(&self) -> usize {
        usize::MAX
    }

    fn open_slot(&self, spec: SlotSpec) -> Result<Slot> {
        Ok(Slot::new(spec))
    }

    fn num_beams(&self, slot: &Slot) -> usize {
        slot.beams.len()
    }

    fn num_steps(&self, slot: &Slot) -> usize {
        slot.beams.num_steps
    }

    fn context_len(&self, slot: &Slot) -> usize {
        slot.spec.context_len
    }
}

//! The CPU backend: f32, any number of threads, no GPU needed.
//!
//! Products with weights are `matmul`'s own, those of activations (attention) `rten-gemm`'s.
//! Everything else is a fused loop. All are written on `rten-simd`, so one binary uses AVX-512,
//! AVX2 or NEON as the machine has it. There is no unsafe code here.

use std::sync::atomic::{AtomicU64, Ordering};

use rten_gemm::{GemmExecutor, GemmInputA, GemmInputB, GemmOptions, PackedBMatrix};
use rten_tensor::{Layout, NdTensorView};

use super::{
    Activation, Backend, Beam, Epilogue, Heads, Mask, Reach, SearchRule, SlotSpec, StepTokens,
};
use crate::error::Result;
use crate::tensor::Tensor;

mod advance_beams;
mod append_tail;
mod attend_beams;
mod attend_prefill;
mod embed;
mod embed_beams;
mod fork;
mod gate;
mod head;
mod last_rows;
mod matmul;
mod restricted_head;
mod rms_norm;
mod rotary;
mod rotation;
mod scratch;
mod slot;
mod softmax;
mod store_context;

pub use head::Head;
pub use matmul::Matrix;
pub use restricted_head::Logits;
pub use slot::Slot;

use scratch::Scratch;

/// The operations on the CPU, on the threads of the rayon pool that calls them.
#[derive(Debug, Default)]
pub struct CpuBackend {
    matrix_flops: AtomicU64,
}

thread_local! {
    /// The matrix kernels for this machine; an executor does not go from thread to thread.
    static GEMM: GemmExecutor = GemmExecutor::new();
}

impl CpuBackend {
    /// The matrix kernel in use, as `x86_64-f32-avx512`.
    pub fn kernel_name(&self) -> String {
        GEMM.with(|gemm| gemm.kernel_name().to_string())
    }

    /// Floating-point operations of all matrix products so far: what a benchmark divides by time.
    pub fn matrix_flops(&self) -> u64 {
        self.matrix_flops.load(Ordering::Relaxed)
    }

    fn count_flops(&self, rows: usize, inner: usize, columns: usize) {
        self.matrix_flops.fetch_add(2 * (rows * inner * columns) as u64, Ordering::Relaxed);
    }

    /// `out = scale * a b`, `out` dense `[a.rows, b.columns]`: products of activations.
    fn product(&self, a: NdTensorView<f32, 2>, b: GemmInputB<f32>, scale: f32, out: &mut [f32]) {
        let options = GemmOptions { alpha: scale, ..GemmOptions::default() };
        self.count_flops(a.shape()[0], a.shape()[1], b.cols());
        let product = GEMM.with(|gemm| gemm.gemm(out, GemmInputA::Unpacked(a), b, options));
        product.expect("shapes were checked");
    }

    /// The transpose of `[out, in]` rows, or any view, laid out for products.
    fn pack(&self, view: NdTensorView<f32, 2>) -> PackedBMatrix<f32> {
        GEMM.with(|gemm| gemm.prepack_b(view))
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

    /// `columns` of the rows `rows`, as a matrix.
    fn view(
        &self,
        rows: std::ops::Range<usize>,
        columns: std::ops::Range<usize>,
    ) -> NdTensorView<'_, f32, 2> {
        let shape = [rows.len(), columns.len()];
        if rows.is_empty() {
            return NdTensorView::from_data(shape, &[][..]);
        }
        let first = rows.start * self.columns + columns.start;
        let last = (rows.end - 1) * self.columns + columns.end;
        let strides = [self.columns, 1];
        NdTensorView::from_data_with_strides(shape, &self.values[first..last], strides)
            .expect("the range is inside the buffer")
    }
}

impl Backend for CpuBackend {
    type Buffer = Buffer;
    type Matrix = Matrix;
    type Vector = Vec<f32>;
    type Table = Tensor;
    type Head = Head;
    type Logits = Logits;
    type Slot = Slot;

    fn matrix(&self, parts: &[Tensor]) -> Matrix {
        Matrix::stack(parts)
    }

    fn vector(&self, parts: &[Tensor]) -> Vec<f32> {
        parts.iter().flat_map(Tensor::to_vec).collect()
    }

    fn table(&self, weight: Tensor) -> Tensor {
        weight
    }

    fn head(&self, weight: Tensor, steps: &[StepTokens]) -> Head {
        Head::new(&weight, steps)
    }

    fn buffer(&self) -> Buffer {
        Buffer::default()
    }

    fn logits(&self) -> Logits {
        Logits::default()
    }

    fn open_slot(&self, spec: &SlotSpec) -> Slot {
        Slot::new(spec)
    }

    fn num_beams(&self, slot: &Slot) -> usize {
        slot.beams.len()
    }

    fn context_len(&self, slot: &Slot) -> usize {
        slot.spec.context_len
    }

    fn embed(&self, table: &Tensor, tokens: &[u32], out: &mut Buffer) {
        embed::embed(table, tokens, out);
    }

    fn embed_beams(&self, table: &Tensor, slots: &[Slot], out: &mut Buffer) {
        embed_beams::embed_beams(table, slots, out);
    }

    fn rms_norm(&self, x: &Buffer, weight: &Vec<f32>, epsilon: f32, out: &mut Buffer) {
        rms_norm::rms_norm(x, weight, epsilon, out);
    }

    fn matmul(
        &self,
        x: &Buffer,
        weight: &Matrix,
        bias: Option<&Vec<f32>>,
        epilogue: Epilogue,
        out: &mut Buffer,
    ) {
        self.matmul(x, weight, bias.map(Vec::as_slice), epilogue, out);
    }

    fn gate(&self, x: &Buffer, activation: Activation, out: &mut Buffer) {
        gate::gate(x, activation, out);
    }

    fn rotation(&self, positions: &[u32], frequencies: &[f32], out: &mut Buffer) {
        rotation::rotation(positions, frequencies, out);
    }

    fn rotary(
        &self,
        qkv: &mut Buffer,
        heads: Heads,
        norms: Option<(&Vec<f32>, &Vec<f32>, f32)>,
        rotation: &Buffer,
    ) {
        rotary::rotary(qkv, heads, norms, rotation);
    }

    fn attend_prefill(
        &self,
        qkv: &Buffer,
        heads: Heads,
        mask: Mask,
        scale: f32,
        relative_bias: Option<&[f32]>,
        slots: &[Slot],
        out: &mut Buffer,
    ) {
        self.attend_prefill(qkv, heads, mask, scale, relative_bias, slots, out);
    }

    fn store_context(
        &self,
        layer: usize,
        kv: &Buffer,
        offset: usize,
        heads: Heads,
        slots: &mut [Slot],
    ) {
        self.store_context(layer, kv, offset, heads, slots);
    }

    fn last_rows(&self, x: &Buffer, slots: &[Slot], out: &mut Buffer) {
        last_rows::last_rows(x, slots, out);
    }

    fn append_tail(&self, layer: usize, qkv: &Buffer, heads: Heads, slots: &mut [Slot]) {
        append_tail::append_tail(layer, qkv, heads, slots);
    }

    fn attend_beams(
        &self,
        layer: usize,
        queries: &Buffer,
        heads: Heads,
        reach: Reach,
        scale: f32,
        tail_bias: Option<&[f32]>,
        slots: &[Slot],
        out: &mut Buffer,
    ) {
        self.attend_beams(layer, queries, heads, reach, scale, tail_bias, slots, out);
    }

    fn fork(&self, slots: Vec<Slot>, copies: &[usize], hidden: &mut Buffer) -> Vec<Slot> {
        fork::fork(slots, copies, hidden)
    }

    fn restricted_head(
        &self,
        hidden: &Buffer,
        head: &Head,
        step: usize,
        rules: &[SearchRule<'_>],
        slots: &[Slot],
        out: &mut Logits,
    ) {
        self.restricted_head(hidden, head, step, rules, slots, out);
    }

    fn advance_beams(
        &self,
        logits: &Logits,
        head: &Head,
        step: usize,
        rules: &[SearchRule<'_>],
        slots: &mut [Slot],
    ) {
        advance_beams::advance_beams(logits, head, step, rules, slots);
    }

    fn read_beams(&self, slot: &Slot) -> Result<Vec<Beam>> {
        slot.beams.read()
    }
}

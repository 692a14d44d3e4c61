//! Products with weights, and with keys and values: the greater part of all arithmetic.
//!
//! A matrix `[out, in]` is kept as panels of 32 output columns, so that a tile of rows and columns
//! is summed in registers while the panel streams by. Decoding reads every weight for few rows (10
//! to 128), and a model's weights do not stay in the fast caches from step to step: what bounds
//! such a product is the wait for the next panel. So each tile asks for its share of the next panel
//! ahead of time. Measured against `rten-gemm` with packed weights on 50 x 128 x 1024: as fast from
//! the cache, 1.3 times as fast from memory.
//!
//! Every element is one chain of fused multiply-adds over `in`, first to last, whatever the other
//! rows, the tile or the number of threads: that is why answers do not depend on their company.

use rayon::prelude::*;
use rten_simd::ops::{BitOps, FloatOps, NumOps};
use rten_simd::{Isa, SimdOp, SimdUnaryOp};
use rten_vecmath::{Exp, Gelu, Silu};

use super::{Buffer, CpuBackend};
use crate::backend::{Activation, Epilogue, Matmul};
use crate::tensor::Tensor;

/// Values that one task of an elementwise operation works on.
pub(super) const VALUES_PER_TASK: usize = 1 << 14;

/// Output columns of a panel: two registers of AVX-512, four of AVX2, eight of NEON.
pub(super) const PANEL: usize = 32;
/// Rows that are worked on with one panel after the other, so that they stay in the cache.
const ROWS_PER_BLOCK: usize = 240;
/// Floats of a cache line.
const LINE: usize = 16;

/// A weight matrix `[out, in]`, in panels.
pub struct Matrix {
    /// `[out / 32][in][32]`, the last panel filled up with zeros.
    panels: Vec<f32>,
    pub(super) num_in: usize,
    pub(super) num_out: usize,
}

impl Matrix {
    /// Stacks `[out_i, in]` matrices.
    pub(super) fn stack(parts: &[Tensor]) -> Matrix {
        let num_in = parts[0].shape()[1];
        assert!(parts.iter().all(|part| part.shape()[1] == num_in), "parts must agree");
        match parts {
            [whole] => Matrix::new(&whole.to_vec(), num_in),
            _ => {
                let values: Vec<f32> = parts.iter().flat_map(Tensor::to_vec).collect();
                Matrix::new(&values, num_in)
            }
        }
    }

    /// A dense `[out, in]` matrix.
    pub(super) fn new(values: &[f32], num_in: usize) -> Matrix {
        let num_out = values.len() / num_in;
        let mut panels = vec![0.0; num_out.div_ceil(PANEL) * num_in * PANEL];
        let rows = values.par_chunks(PANEL * num_in);
        panels.par_chunks_mut(PANEL * num_in).zip(rows).for_each(|(panel, rows)| {
            for (column, row) in rows.chunks_exact(num_in).enumerate() {
                for (at, value) in row.iter().enumerate() {
                    panel[at * PANEL + column] = *value;
                }
            }
        });
        Matrix { panels, num_in, num_out }
    }
}

impl Matmul for CpuBackend {
    fn matmul(
        &self,
        x: &Buffer,
        weight: &Matrix,
        bias: Option<&Vec<f32>>,
        epilogue: Epilogue,
        out: &mut Buffer,
    ) {
        let (num_rows, num_in, num_out) = (x.num_rows(), weight.num_in, weight.num_out);
        assert_eq!(x.columns, num_in, "rows must be as wide as the weight's input");
        if epilogue == Epilogue::Add {
            assert_eq!((out.num_rows(), out.columns), (num_rows, num_out));
        } else {
            out.reshape(num_rows, num_out);
        }
        self.count_flops(num_rows, num_in, num_out);
        let threads = rayon::current_num_threads();
        let panels_per_task = num_out.div_ceil(PANEL).div_ceil(threads);
        let panels: Vec<&[f32]> = weight.panels.chunks_exact(num_in * PANEL).collect();
        let mut tasks = split_columns(&mut out.values, num_out, panels_per_task * PANEL);
        tasks.par_iter_mut().enumerate().for_each(|(task, out)| {
            let first = task * panels_per_task;
            let panels = &panels[first..];
            let bias = bias.map(|bias| &bias[first * PANEL..]);
            let adds = epilogue == Epilogue::Add;
            for (x, out) in
                x.values.chunks(ROWS_PER_BLOCK * num_in).zip(out.chunks_mut(ROWS_PER_BLOCK))
            {
                Product { x, stride: num_in, num_in, panels, bias, adds, out }.dispatch();
            }
            if let Epilogue::Activate(activation) = epilogue {
                out.iter_mut().for_each(|row| activate(activation, row));
            }
        });
    }
}

/// The rows of `out` cut into stretches of columns: by stretch, then by row.
pub(super) fn split_columns(
    out: &mut [f32],
    columns: usize,
    stretch: usize,
) -> Vec<Vec<&mut [f32]>> {
    let mut tasks: Vec<Vec<&mut [f32]>> = Vec::new();
    tasks.resize_with(columns.div_ceil(stretch), || Vec::with_capacity(out.len() / columns));
    for row in out.chunks_exact_mut(columns) {
        for (task, part) in tasks.iter_mut().zip(row.chunks_mut(stretch)) {
            task.push(part);
        }
    }
    tasks
}

/// `out = x Wᵀ (+ bias)`, or `out +=` that, for a stretch of output columns.
pub(super) struct Product<'a, 'out> {
    /// Rows of `num_in`, each so far after the one before.
    pub x: &'a [f32],
    pub stride: usize,
    pub num_in: usize,
    /// From the stretch's first panel on; each of `num_in` rows at least, the rest is not read.
    pub panels: &'a [&'a [f32]],
    pub bias: Option<&'a [f32]>,
    pub adds: bool,
    /// By row: the stretch.
    pub out: &'a mut [&'out mut [f32]],
}

impl SimdOp for Product<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn eval<I: Isa>(self, isa: I) {
        // As many rows as the registers hold sums for, beside a row of the panel.
        match isa.f32().len() {
            16 => self.run::<I, 2, 12>(isa),
            8 => self.run::<I, 4, 3>(isa),
            _ => self.run::<I, 8, 3>(isa),
        }
    }
}

impl Product<'_, '_> {
    #[inline(always)]
    fn run<I: Isa, const REGISTERS: usize, const ROWS: usize>(self, isa: I) {
        let columns = self.out.first().map_or(0, |row| row.len());
        // Tiles of like height: a low one would leave the multipliers waiting.
        let num_tiles = self.out.len().div_ceil(ROWS).max(1);
        let rows_per_tile = self.out.len().div_ceil(num_tiles).max(1);
        let Product { stride, num_in, bias, adds, .. } = self;
        for (panel, first_column) in (0..columns).step_by(PANEL).enumerate() {
            let next = self.panels.get(panel + 1).map_or(&[][..], |next| &next[..num_in * PANEL]);
            let panel = &self.panels[panel][..num_in * PANEL];
            let tile = Tile { panel, stride, num_in, first_column, bias, adds };
            let ahead = next.len().div_ceil(num_tiles).next_multiple_of(LINE);
            let mut ahead = next.chunks(ahead.max(LINE));
            let rows = self.x.chunks(rows_per_tile * stride);
            for (x, out) in rows.zip(self.out.chunks_mut(rows_per_tile)) {
                let ahead = ahead.next().unwrap_or_default();
                match out.len() {
                    12 if ROWS == 12 => tile.run::<I, REGISTERS, 12>(isa, x, ahead, out),
                    11 if ROWS == 12 => tile.run::<I, REGISTERS, 11>(isa, x, ahead, out),
                    10 if ROWS == 12 => tile.run::<I, REGISTERS, 10>(isa, x, ahead, out),
                    9 if ROWS == 12 => tile.run::<I, REGISTERS, 9>(isa, x, ahead, out),
                    8 if ROWS == 12 => tile.run::<I, REGISTERS, 8>(isa, x, ahead, out),
                    7 if ROWS == 12 => tile.run::<I, REGISTERS, 7>(isa, x, ahead, out),
                    6 if ROWS == 12 => tile.run::<I, REGISTERS, 6>(isa, x, ahead, out),
                    5 if ROWS == 12 => tile.run::<I, REGISTERS, 5>(isa, x, ahead, out),
                    4 if ROWS == 12 => tile.run::<I, REGISTERS, 4>(isa, x, ahead, out),
                    3 => tile.run::<I, REGISTERS, 3>(isa, x, ahead, out),
                    2 => tile.run::<I, REGISTERS, 2>(isa, x, ahead, out),
                    _ => tile.run::<I, REGISTERS, 1>(isa, x, ahead, out),
                }
            }
        }
    }
}

/// What the tiles of one panel share.
struct Tile<'a> {
    /// `[num_in][32]`
    panel: &'a [f32],
    stride: usize,
    num_in: usize,
    first_column: usize,
    bias: Option<&'a [f32]>,
    adds: bool,
}

impl Tile<'_> {
    /// `ROWS` rows against the panel, sums in `ROWS * REGISTERS` registers.
    #[expect(clippy::needless_range_loop, reason = "counted loops keep the sums in registers")]
    #[inline(always)]
    fn run<I: Isa, const REGISTERS: usize, const ROWS: usize>(
        &self,
        isa: I,
        x: &[f32],
        ahead: &[f32],
        out: &mut [&mut [f32]],
    ) {
        let ops = isa.f32();
        let lanes = ops.len();
        let num_in = self.num_in;
        let rows: [&[f32]; ROWS] = std::array::from_fn(|row| &x[row * self.stride..][..num_in]);
        let mut sums = [[ops.zero(); REGISTERS]; ROWS];
        let mut ahead = ahead.chunks(LINE);
        for (at, weights) in self.panel.chunks_exact(PANEL).enumerate() {
            if let Some(line) = ahead.next() {
                ops.prefetch(line.as_ptr());
            }
            let weights: [I::F32; REGISTERS] =
                std::array::from_fn(|r| ops.load(&weights[r * lanes..(r + 1) * lanes]));
            for row in 0..ROWS {
                // Always so; but a check that could panic would keep the sums in memory.
                if at < rows[row].len() {
                    let x = ops.splat(rows[row][at]);
                    for r in 0..REGISTERS {
                        sums[row][r] = ops.mul_add(x, weights[r], sums[row][r]);
                    }
                }
            }
        }
        let columns = self.first_column..out[0].len().min(self.first_column + PANEL);
        // Counted loops: an index that is not known here would keep the sums in memory.
        let mut stored = [[0.0; PANEL]; ROWS];
        if self.bias.is_none() && columns.len() == PANEL {
            for row in 0..ROWS {
                if let Some(out) = out.get_mut(row).and_then(|out| out.get_mut(columns.clone())) {
                    for r in 0..REGISTERS {
                        if let Some(out) = out.get_mut(r * lanes..(r + 1) * lanes) {
                            let sum = match self.adds {
                                true => ops.add(ops.load(out), sums[row][r]),
                                false => sums[row][r],
                            };
                            ops.store(sum, out);
                        }
                    }
                }
            }
            return;
        }
        for row in 0..ROWS {
            for r in 0..REGISTERS {
                ops.store(sums[row][r], &mut stored[row][r * lanes..(r + 1) * lanes]);
            }
        }
        for (sums, out) in stored.iter_mut().zip(out) {
            if let Some(bias) = self.bias {
                let bias = &bias[columns.clone()];
                sums.iter_mut().zip(bias).for_each(|(sum, bias)| *sum += bias);
            }
            let out = &mut out[columns.clone()];
            match self.adds {
                true => add(out, sums),
                false => out.copy_from_slice(&sums[..out.len()]),
            }
        }
    }
}

#[inline(always)]
fn add(out: &mut [f32], sums: &[f32]) {
    out.iter_mut().zip(sums).for_each(|(out, sum)| *out += sum);
}

pub(super) fn activate(activation: Activation, values: &mut [f32]) {
    match activation {
        Activation::Relu => values.iter_mut().for_each(|value| *value = value.max(0.0)),
        Activation::Gelu => Gelu {}.map_mut(values),
        Activation::GeluTanh => GeluTanh.map_mut(values),
        Activation::Silu => Silu {}.map_mut(values),
    }
}

/// GELU by its tanh approximation, `x / 2 * (1 + tanh(y))` with `y = sqrt(2 / pi) (x + 0.044715 x^3)`,
/// written as `x * sigmoid(2 y)`: the sum would cancel for negative `x`.
struct GeluTanh;

impl SimdUnaryOp<f32> for GeluTanh {
    #[inline(always)]
    fn eval<I: Isa>(&self, isa: I, x: I::F32) -> I::F32 {
        let ops = isa.f32();
        let cube = ops.mul(ops.mul(x, x), x);
        let inner = ops.mul_add(cube, ops.splat(0.044_715), x);
        let minus_twice = ops.splat(-2.0 * (2.0 * std::f32::consts::FRAC_1_PI).sqrt());
        let exponential = Exp::apply(isa, ops.mul(inner, minus_twice));
        ops.div(x, ops.add(ops.one(), exponential))
    }
}

//! Products in f32, with weights of any type.

use half::bf16;
use rayon::prelude::*;
use rten_simd::ops::{BitOps, NumOps};
use rten_simd::{Isa, SimdOp};

use super::super::buffer::{Buffer, VALUES_PER_TASK};
use super::super::scratch::Scratch;
use super::panel::{PANEL, Weight};
use crate::tensor::round_to_bf16;

/// Bytes of a cache line.
const LINE: usize = 64;

/// `out = x Wᵀ (+ bias)`, or `out +=` that, for a stretch of output columns.
pub struct Product<'a, 'out, W = f32> {
    /// Rows of `num_in`, each so far after the one before.
    pub x: &'a [f32],
    pub stride: usize,
    pub num_in: usize,
    /// From the stretch's first panel on; of `num_in` inputs at least, the rest is not read.
    pub panels: &'a [&'a [W]],
    pub bias: Option<&'a [f32]>,
    pub adds: bool,
    /// By row: the stretch.
    pub out: &'a mut [&'out mut [f32]],
}

impl<W: Weight> SimdOp for Product<'_, '_, W> {
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

impl<W: Weight> Product<'_, '_, W> {
    #[inline(always)]
    fn run<I: Isa, const REGISTERS: usize, const ROWS: usize>(self, isa: I) {
        let columns = self.out.first().map_or(0, |row| row.len());
        // Tiles of like height: a low one would leave the multipliers waiting.
        let num_tiles = self.out.len().div_ceil(ROWS).max(1);
        let rows_per_tile = self.out.len().div_ceil(num_tiles).max(1);
        let Product { stride, num_in, bias, adds, .. } = self;
        let (len, line) = (num_in.div_ceil(W::INPUTS) * PANEL, LINE / size_of::<W>());
        for (panel, first_column) in (0..columns).step_by(PANEL).enumerate() {
            let next = self.panels.get(panel + 1).map_or(&[][..], |next| &next[..len]);
            let panel = &self.panels[panel][..len];
            let tile = Tile { panel, stride, num_in, first_column, bias, adds };
            let ahead = next.len().div_ceil(num_tiles).next_multiple_of(line);
            let mut ahead = next.chunks(ahead.max(line));
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
struct Tile<'a, W> {
    panel: &'a [W],
    stride: usize,
    num_in: usize,
    first_column: usize,
    bias: Option<&'a [f32]>,
    adds: bool,
}

impl<W: Weight> Tile<'_, W> {
    /// `ROWS` rows against the panel, sums in `ROWS * REGISTERS` registers.
    #[expect(clippy::needless_range_loop, reason = "counted loops keep the sums in registers")]
    #[inline(always)]
    fn run<I: Isa, const REGISTERS: usize, const ROWS: usize>(
        &self,
        isa: I,
        x: &[f32],
        ahead: &[W],
        out: &mut [&mut [f32]],
    ) {
        let ops = isa.f32();
        let lanes = ops.len();
        let num_in = self.num_in;
        let rows: [&[f32]; ROWS] = std::array::from_fn(|row| &x[row * self.stride..][..num_in]);
        let mut sums = [[ops.zero(); REGISTERS]; ROWS];
        let mut ahead = ahead.chunks(LINE / size_of::<W>());
        for (first, panel_row) in self.panel.chunks_exact(PANEL).enumerate() {
            if let Some(line) = ahead.next() {
                ops.prefetch(line.as_ptr().cast());
            }
            for input in 0..W::INPUTS {
                let at = first * W::INPUTS + input;
                let weights: [I::F32; REGISTERS] = W::widen(isa, panel_row, input);
                for row in 0..ROWS {
                    // Always so but for the last of an odd number; and a check that could panic
                    // would keep the sums in memory.
                    if at < rows[row].len() {
                        let x = ops.splat(rows[row][at]);
                        for r in 0..REGISTERS {
                            sums[row][r] = ops.mul_add(x, weights[r], sums[row][r]);
                        }
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
        finish(&mut stored, self.first_column, self.bias, self.adds, out);
    }
}

/// Puts the sums of a panel's columns into the rows of `out`.
#[inline(always)]
pub fn finish(
    sums: &mut [[f32; PANEL]],
    first_column: usize,
    bias: Option<&[f32]>,
    adds: bool,
    out: &mut [&mut [f32]],
) {
    for (sums, out) in sums.iter_mut().zip(out) {
        let columns = first_column..out.len().min(first_column + PANEL);
        if let Some(bias) = bias {
            let bias = &bias[columns.clone()];
            sums.iter_mut().zip(bias).for_each(|(sum, bias)| *sum += bias);
        }
        let out = &mut out[columns];
        match (adds, <&mut [f32; PANEL]>::try_from(&mut *out)) {
            // Of known length, which saves calls for a few lines.
            (false, Ok(out)) => *out = *sums,
            (true, Ok(out)) => (0..PANEL).for_each(|at| out[at] += sums[at]),
            (false, Err(_)) => out.copy_from_slice(&sums[..out.len()]),
            (true, Err(_)) => out.iter_mut().zip(sums).for_each(|(out, sum)| *out += *sum),
        }
    }
}

/// Rows rounded to bf16, in f32.
pub fn rounded(x: &Buffer) -> Scratch {
    let mut rounded = Scratch::new(x.values.len());
    let tasks = rounded.par_chunks_mut(VALUES_PER_TASK).zip(x.values.par_chunks(VALUES_PER_TASK));
    tasks.for_each(|(rounded, values)| {
        for (rounded, value) in rounded.iter_mut().zip(values) {
            *rounded = bf16::from_bits(round_to_bf16(*value)).to_f32();
        }
    });
    rounded
}

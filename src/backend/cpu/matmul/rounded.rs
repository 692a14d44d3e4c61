//! Rows rounded to bf16.

use rayon::prelude::*;
use rten_simd::{Isa, SimdOp};

use super::super::buffer::{Buffer, VALUES_PER_TASK};
use super::super::scratch::Scratch;
use super::panel::{PAIRED_INPUTS, Pair};
use crate::tensor::round_to_bf16;

/// Bytes of a cache line.
const LINE: usize = 64;
const PAIRS_PER_LINE: usize = LINE / size_of::<u32>();

/// Rows in bf16, as instructions read them: `[rows / R][inputs / 32][R][32]`, where `R` rows make a
/// tile, filled up with zeros.
pub struct Rounded {
    /// Two numbers each.
    pairs: Scratch,
    /// The first of them, at the start of a cache line.
    start: usize,
    len: usize,
    inputs: usize,
}

/// One thread's share of a product of rounded rows.
pub struct RoundedProduct<'a, 'out> {
    pub x: &'a Rounded,
    /// From the stretch's first panel on, each `[in / 2][32]`.
    pub panels: &'a [&'a [Pair]],
    pub bias: Option<&'a [f32]>,
    pub adds: bool,
    /// By row: the stretch.
    pub out: &'a mut [&'out mut [f32]],
}

impl Rounded {
    /// Rounds rows to the nearest, ties to even, and fills them up to whole tiles of so many rows and
    /// to whole [pairs](Pair) of a panel.
    pub fn new(x: &Buffer, rows_per_tile: usize) -> Rounded {
        let inputs = x.columns.next_multiple_of(PAIRED_INPUTS);
        let len = x.num_rows().next_multiple_of(rows_per_tile) * inputs / 2;
        let mut pairs = Scratch::new(len + PAIRS_PER_LINE);
        let start = pairs.as_ptr().align_offset(LINE).min(PAIRS_PER_LINE);
        let words: &mut [u16] = bytemuck::cast_slice_mut(&mut pairs[start..start + len]);
        // Whole tiles.
        let rows_per_task = (VALUES_PER_TASK / inputs).max(1).next_multiple_of(rows_per_tile);
        let round = |(words, values)| {
            RoundRows { values, columns: x.columns, rows_per_tile, inputs, words }.dispatch();
        };
        if x.values.len() <= VALUES_PER_TASK {
            round((words, &x.values[..]));
        } else {
            let tasks = words.par_chunks_mut(rows_per_task * inputs);
            tasks.zip(x.values.par_chunks(rows_per_task * x.columns)).for_each(round);
        }
        Rounded { pairs, start, len, inputs }
    }

    /// Inputs of a row, those that fill it up among them.
    pub fn inputs(&self) -> usize {
        self.inputs
    }

    /// All rows.
    pub fn pairs(&self) -> &[u32] {
        bytemuck::cast_slice(&self.pairs[self.start..self.start + self.len])
    }
}

struct RoundRows<'a> {
    values: &'a [f32],
    columns: usize,
    rows_per_tile: usize,
    inputs: usize,
    words: &'a mut [u16],
}

impl SimdOp for RoundRows<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<I: Isa>(self, _isa: I) {
        let RoundRows { values, columns, rows_per_tile, inputs, words } = self;
        let mut rows = values.chunks_exact(columns);
        for tile in words.chunks_exact_mut(rows_per_tile * inputs) {
            let tile = tile.as_chunks_mut::<PAIRED_INPUTS>().0;
            for row_of_tile in 0..rows_per_tile {
                let row = rows.next().unwrap_or_default();
                let (whole, rest) = row.as_chunks::<PAIRED_INPUTS>();
                let mut parts = tile.iter_mut().skip(row_of_tile).step_by(rows_per_tile);
                for (part, values) in parts.by_ref().take(whole.len()).zip(whole) {
                    // A loop of known length, which the compiler makes vector instructions of.
                    for at in 0..PAIRED_INPUTS {
                        part[at] = round_to_bf16(values[at]);
                    }
                }
                let mut rest = rest.iter();
                for part in parts {
                    part.fill_with(|| rest.next().map_or(0, |value| round_to_bf16(*value)));
                }
            }
        }
    }
}

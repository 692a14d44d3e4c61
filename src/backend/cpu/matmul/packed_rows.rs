//! Rows as instructions for products in bf16 and in 8 bits read them.

use rayon::prelude::*;
use rten_simd::{Isa, SimdOp};

use super::super::buffer::{Buffer, VALUES_PER_TASK};
use super::super::scratch::Scratch;
use super::panel::{Element, PANEL, Pair, Quad, WORDS_OF_TILE, words_of_row};
use crate::tensor::round_to_bf16;

/// Bytes of a cache line.
const LINE: usize = 64;
const WORDS_PER_LINE: usize = LINE / size_of::<u32>();
/// The largest whole number in 8 bits, of either sign.
pub const MOST: f32 = 127.0;

/// Rows in words of two numbers in bf16 or four in 8 bits: `[rows / R][words / 16][R][16]`, where `R`
/// rows make a tile, filled up with zeros.
pub struct PackedRows {
    words: Scratch,
    /// The first of them, at the start of a cache line.
    start: usize,
    len: usize,
    words_of_row: usize,
    /// By row, what its numbers in 8 bits are multiples of; none in bf16.
    scales: Vec<f32>,
}

/// One thread's share of a product of packed rows.
pub struct PackedProduct<'a, 'out, E> {
    pub x: &'a PackedRows,
    /// From the stretch's first panel on, each `[words][32]`.
    pub panels: &'a [&'a [E]],
    pub bias: Option<&'a [f32]>,
    pub adds: bool,
    /// By row: the stretch.
    pub out: &'a mut [&'out mut [f32]],
}

impl PackedRows {
    /// Rounds rows to bf16, to the nearest, ties to even, and fills them up to whole tiles of so many
    /// rows.
    pub fn rounded(x: &Buffer, rows_per_tile: usize) -> PackedRows {
        PackedRows::pack::<Pair>(x, rows_per_tile, 0)
    }

    /// Rounds rows to multiples of their largest number over 127, to the nearest, ties to even. A row
    /// with a number that is not finite has no finite scale, and so no finite product.
    pub fn quantized(x: &Buffer, rows_per_tile: usize) -> PackedRows {
        PackedRows::pack::<Quad>(x, rows_per_tile, x.num_rows())
    }

    fn pack<E: Element>(x: &Buffer, rows_per_tile: usize, num_scales: usize) -> PackedRows {
        let words_of_row = words_of_row::<E>(x.columns);
        let len = x.num_rows().next_multiple_of(rows_per_tile) * words_of_row;
        let mut words = Scratch::new(len + WORDS_PER_LINE);
        let start = words.as_ptr().align_offset(LINE).min(WORDS_PER_LINE);
        let packed: &mut [u32] = bytemuck::cast_slice_mut(&mut words[start..start + len]);
        // Whole tiles.
        let rows_per_task =
            (VALUES_PER_TASK / x.columns.max(1)).max(1).next_multiple_of(rows_per_tile);
        let mut scales = vec![0.0; num_scales];
        let pack = |words: &mut [u32], values: &[f32], scales: &mut [f32]| {
            let columns = x.columns;
            PackRows { values, columns, rows_per_tile, words_of_row, scales, words }.dispatch();
        };
        if x.values.len() <= VALUES_PER_TASK {
            pack(packed, &x.values[..], &mut scales);
        } else {
            let tasks = packed
                .par_chunks_mut(rows_per_task * words_of_row)
                .zip(x.values.par_chunks(rows_per_task * x.columns));
            match num_scales {
                0 => tasks.for_each(|(words, values)| pack(words, values, &mut [])),
                _ => tasks
                    .zip(scales.par_chunks_mut(rows_per_task))
                    .for_each(|((words, values), scales)| pack(words, values, scales)),
            }
        }
        PackedRows { words, start, len, words_of_row, scales }
    }

    /// Words of a row, those that fill it up among them.
    pub fn words_of_row(&self) -> usize {
        self.words_of_row
    }

    /// All rows.
    pub fn words(&self) -> &[u32] {
        bytemuck::cast_slice(&self.words[self.start..self.start + self.len])
    }

    /// By row, in 8 bits.
    pub fn scales(&self) -> &[f32] {
        &self.scales
    }
}

/// The largest number of either sign; one that is not finite is larger than all that are.
#[inline(always)]
pub fn largest(values: &[f32]) -> f32 {
    let largest = values.iter().fold(0, |largest: u32, value| largest.max(value.abs().to_bits()));
    f32::from_bits(largest)
}

/// `value` as a whole number of 8 bits, where its row's largest number is 127; anything where the row has
/// no finite one.
#[inline(always)]
pub fn quantize(value: f32, inverse: f32) -> u8 {
    // Where the last bit of a float counts ones, its sum is rounded to the nearest, ties to even.
    const ONES: f32 = 12_582_912.0;
    (value * inverse + ONES).to_bits() as u8
}

/// What numbers are multiplied by to become whole ones; nothing of a row of zeros.
#[inline(always)]
pub fn inverse(scale: f32) -> f32 {
    if scale < f32::MIN_POSITIVE { 0.0 } else { 1.0 / scale }
}

/// A row's sums with the columns of a panel: whole numbers, exact in any order.
pub type Sums = [i32; PANEL];

/// The sums of a row and a panel, scaled.
#[inline(always)]
pub fn scaled(sums: &Sums, row_scale: f32, scales: &[Quad]) -> [f32; PANEL] {
    let mut out = [0.0; PANEL];
    for (column, Quad(scale)) in scales.iter().enumerate().take(PANEL) {
        out[column] = sums[column] as f32 * (row_scale * f32::from_bits(*scale));
    }
    out
}

struct PackRows<'a> {
    values: &'a [f32],
    columns: usize,
    rows_per_tile: usize,
    words_of_row: usize,
    /// By row, to be found, in 8 bits.
    scales: &'a mut [f32],
    words: &'a mut [u32],
}

impl SimdOp for PackRows<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<I: Isa>(self, _isa: I) {
        let PackRows { values, columns, rows_per_tile, words_of_row, scales, words } = self;
        let mut rows = values.chunks_exact(columns);
        let is_rounded = scales.is_empty();
        let mut scales = scales.iter_mut();
        for tile in words.chunks_exact_mut(rows_per_tile * words_of_row) {
            let lines = tile.as_chunks_mut::<WORDS_OF_TILE>().0;
            for row_of_tile in 0..rows_per_tile {
                let row = rows.next().unwrap_or_default();
                let lines = lines.iter_mut().skip(row_of_tile).step_by(rows_per_tile);
                match is_rounded {
                    true => fill(lines, row, round_to_bf16),
                    false => {
                        let scale = largest(row) / MOST;
                        if let Some(found) = scales.next() {
                            *found = scale;
                        }
                        let inverse = inverse(scale);
                        fill(lines, row, |value| quantize(value, inverse));
                    }
                }
            }
        }
    }
}

/// Packs a row into the lines that are its own. `N` numbers take a line.
#[inline(always)]
fn fill<'a, T: bytemuck::Pod, const N: usize>(
    mut lines: impl Iterator<Item = &'a mut [u32; WORDS_OF_TILE]>,
    row: &[f32],
    number: impl Fn(f32) -> T,
) where
    [u32; WORDS_OF_TILE]: InNumbers<T, N>,
{
    let (whole, rest) = row.as_chunks::<N>();
    for (line, values) in lines.by_ref().take(whole.len()).zip(whole) {
        let line = line.numbers();
        // A loop of known length, which the compiler makes vector instructions of.
        for at in 0..N {
            line[at] = number(values[at]);
        }
    }
    let mut rest = rest.iter();
    for line in lines {
        line.numbers().fill_with(|| rest.next().map_or(T::zeroed(), |value| number(*value)));
    }
}

/// A cache line as the numbers that it holds.
trait InNumbers<T, const N: usize> {
    fn numbers(&mut self) -> &mut [T; N];
}

impl InNumbers<u16, 32> for [u32; WORDS_OF_TILE] {
    fn numbers(&mut self) -> &mut [u16; 32] {
        bytemuck::cast_mut(self)
    }
}

impl InNumbers<u8, 64> for [u32; WORDS_OF_TILE] {
    fn numbers(&mut self) -> &mut [u8; 64] {
        bytemuck::cast_mut(self)
    }
}

//! Products in 8 bits: what all instructions share, and those of any machine.

use super::f32::finish;
use super::packed_rows::{PackedProduct, scaled};
use super::panel::{PANEL, Quad, ROWS_PER_BLOCK};

/// A row's sums with the columns of a panel: whole numbers, exact in any order.
pub type Sums = [i32; PANEL];

/// The most inputs of a product whose sums fit in 32 bits, those of rows without a sign included.
pub const MAX_INPUTS: usize = i32::MAX as usize / (255 * 127) - 4;

/// Calls `multiply` with tiles of at most `ROWS` rows, the words of a row, a panel, the part of the next
/// panel that is to come to the cache meanwhile, and the tile's sums; scales them.
pub fn in_tiles<const ROWS: usize>(
    product: PackedProduct<'_, '_, Quad>,
    multiply: impl Fn(&[u32], usize, &[Quad], &[Quad], &mut [Sums]),
) {
    let PackedProduct { x, panels, bias, adds, out } = product;
    let columns = out.first().map_or(0, |row| row.len());
    let words = x.words_of_row();
    let mut sums = [[0; PANEL]; ROWS];
    let blocks = x.words().chunks(ROWS_PER_BLOCK * words).zip(out.chunks_mut(ROWS_PER_BLOCK));
    for ((x_of_block, out), scales) in blocks.zip(x.scales().chunks(ROWS_PER_BLOCK)) {
        // Tiles of like height: a low one would leave the multipliers waiting.
        let num_tiles = out.len().div_ceil(ROWS);
        let rows_per_tile = out.len().div_ceil(num_tiles);
        for (first_column, panel) in (0..columns).step_by(PANEL).zip(0..) {
            let (panel, next) = (panels[panel], panels.get(panel + 1).copied().unwrap_or_default());
            let mut ahead = next.chunks(next.len().div_ceil(num_tiles).max(1));
            let tiles = x_of_block.chunks(rows_per_tile * words).zip(out.chunks_mut(rows_per_tile));
            for ((x, out), scales) in tiles.zip(scales.chunks(rows_per_tile)) {
                let ahead = ahead.next().unwrap_or_default();
                let sums = &mut sums[..out.len()];
                multiply(x, words, panel, ahead, sums);
                for ((sums, &scale), out) in sums.iter().zip(scales).zip(out.chunks_mut(1)) {
                    let mut scaled = [scaled(sums, scale, &panel[words * PANEL..])];
                    finish(&mut scaled, first_column, bias, adds, out);
                }
            }
        }
    }
}

/// Multiplies rows by panels, by what any machine has.
pub fn product(product: PackedProduct<'_, '_, Quad>) {
    in_tiles::<4>(product, |x, words, panel, _, sums| {
        #[cfg(target_arch = "x86_64")]
        if super::avx2_int8::is_available() {
            return super::avx2_int8::multiply(x, words, panel, sums);
        }
        multiply(x, words, panel, sums);
    });
}

/// Rows, each of so many words, times a panel.
fn multiply(x: &[u32], words: usize, panel: &[Quad], sums: &mut [Sums]) {
    for (x, sums) in x.chunks(words).zip(sums) {
        *sums = [0; PANEL];
        for (x, weights) in x.iter().zip(panel.as_chunks::<PANEL>().0) {
            let x = x.to_le_bytes().map(|byte| i32::from(byte.cast_signed()));
            for (sum, Quad(weights)) in sums.iter_mut().zip(weights) {
                let products = weights.to_le_bytes().into_iter().zip(x);
                *sum += products.map(|(byte, x)| i32::from(byte.cast_signed()) * x).sum::<i32>();
            }
        }
    }
}

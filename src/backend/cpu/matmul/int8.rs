//! Products in 8 bits: what all instructions share, and those of any machine.

use super::f32::finish;
use super::packed_rows::{PackedProduct, Sums, scaled};
use super::panel::{PANEL, Quad, ROWS_PER_BLOCK};

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_loops_sum_what_instructions_do() {
        let mut rng = fastrand::Rng::with_seed(1);
        let words = 48;
        let panel: Vec<Quad> = (0..(words + 2) * PANEL).map(|_| Quad(rng.u32(..))).collect();
        for rows in 1..=4 {
            let x: Vec<u32> = (0..rows * words).map(|_| rng.u32(..)).collect();
            let mut sums = vec![[1; PANEL]; rows];
            multiply(&x, words, &panel, &mut sums);
            let of = |word: u32| word.to_le_bytes().map(|byte| i32::from(byte.cast_signed()));
            for (row, sums) in sums.iter().enumerate() {
                for (column, &sum) in sums.iter().enumerate() {
                    let word = |word: usize| {
                        (of(x[row * words + word]), of(panel[word * PANEL + column].0))
                    };
                    let expected: i32 = (0..words)
                        .map(word)
                        .map(|(x, weight)| (0..4).map(|at| x[at] * weight[at]).sum::<i32>())
                        .sum();
                    assert_eq!(sum, expected);
                }
            }
            #[cfg(target_arch = "x86_64")]
            if crate::backend::cpu::matmul::avx2_int8::is_available() {
                let mut by_avx2 = vec![[1; PANEL]; rows];
                crate::backend::cpu::matmul::avx2_int8::multiply(&x, words, &panel, &mut by_avx2);
                assert_eq!(by_avx2, sums);
            }
        }
    }
}

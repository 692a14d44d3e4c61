//! Products in 8 bits by AVX2: numbers are widened to 16 bits in registers, and pairs of products added.
#![allow(unsafe_code)] // instructions that not every machine has

use std::arch::x86_64::{
    __m256i, _mm256_add_epi32, _mm256_loadu_si256, _mm256_madd_epi16, _mm256_set1_epi32,
    _mm256_setzero_si256, _mm256_slli_epi16, _mm256_srai_epi16, _mm256_storeu_si256,
};

use super::packed_rows::Sums;
use super::panel::{PANEL, Quad};

const LANES: usize = 8;
/// Registers of a row of a panel that are summed at once.
const REGISTERS: usize = 2;

/// Whether the processor has the instructions.
pub fn is_available() -> bool {
    is_x86_feature_detected!("avx2")
}

/// Rows, each of so many words, times a panel.
///
/// # Panics
/// Where the processor has no AVX2.
pub fn multiply(x: &[u32], words: usize, panel: &[Quad], sums: &mut [Sums]) {
    assert!(is_available(), "AVX2 is asked for first");
    // SAFETY: so the instructions are there.
    unsafe {
        match sums.len() {
            4 => tile::<4>(x, words, panel, sums),
            3 => tile::<3>(x, words, panel, sums),
            2 => tile::<2>(x, words, panel, sums),
            _ => tile::<1>(x, words, panel, sums),
        }
    }
}

/// `N` rows times a panel, in stretches of 16 columns.
#[expect(clippy::needless_range_loop, reason = "counted loops keep the sums in registers")]
#[target_feature(enable = "avx2")]
fn tile<const N: usize>(x: &[u32], words: usize, panel: &[Quad], out: &mut [Sums]) {
    let rows: [&[u32]; N] = std::array::from_fn(|row| &x[row * words..][..words]);
    for first in (0..PANEL).step_by(REGISTERS * LANES) {
        let mut sums: [[__m256i; REGISTERS]; N] = [[_mm256_setzero_si256(); REGISTERS]; N];
        for (word, weights) in panel.as_chunks::<PANEL>().0.iter().take(words).enumerate() {
            // The second and fourth, and the first and third of four inputs, as 16 bits each.
            let mut weights_of: [[__m256i; 2]; REGISTERS] =
                [[_mm256_setzero_si256(); 2]; REGISTERS];
            for register in 0..REGISTERS {
                let lanes = &weights[first + register * LANES..][..LANES];
                // SAFETY: 8 words of 4 bytes are what a register holds.
                weights_of[register] = widen(unsafe { _mm256_loadu_si256(lanes.as_ptr().cast()) });
            }
            for row in 0..N {
                if word < rows[row].len() {
                    let x = widen(_mm256_set1_epi32(rows[row][word].cast_signed()));
                    for register in 0..REGISTERS {
                        for half in 0..2 {
                            let pair = _mm256_madd_epi16(x[half], weights_of[register][half]);
                            sums[row][register] = _mm256_add_epi32(sums[row][register], pair);
                        }
                    }
                }
            }
        }
        for row in 0..N {
            if let Some(out) = out.get_mut(row) {
                for register in 0..REGISTERS {
                    let lanes = &mut out[first + register * LANES..][..LANES];
                    // SAFETY: 8 whole numbers are what a register holds.
                    unsafe { _mm256_storeu_si256(lanes.as_mut_ptr().cast(), sums[row][register]) };
                }
            }
        }
    }
}

/// The odd and the even ones of four numbers in 8 bits, in 16 bits each.
#[inline]
#[target_feature(enable = "avx2")]
fn widen(quads: __m256i) -> [__m256i; 2] {
    [_mm256_srai_epi16::<8>(quads), _mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(quads))]
}

//! Products in 8 bits by AVX512-VNNI, which adds the products of four inputs to a sum.
//!
//! The instruction takes the rows' numbers without a sign: 128 is added to each, and 128 times the sum of
//! a column's weights is taken away again. Sums are whole numbers, exact in any order (VPDPBUSD, Intel 64
//! and IA-32 Architectures Software Developer's Manual, volume 2).
#![allow(unsafe_code)] // instructions that not every machine has

use std::arch::x86_64::{
    __m512i, _MM_HINT_T0, _mm_prefetch, _mm512_dpbusd_epi32, _mm512_loadu_si512, _mm512_set1_epi32,
    _mm512_setzero_si512, _mm512_slli_epi32, _mm512_storeu_si512, _mm512_sub_epi32,
};

use super::int8::in_tiles;
use super::packed_rows::{PackedProduct, Sums};
use super::panel::{PANEL, Quad};

/// Rows whose sums the registers hold, beside a row of the panel.
const ROWS: usize = 12;
const LANES: usize = 16;

/// Whether the processor has the instructions.
pub fn is_available() -> bool {
    is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512vnni")
}

/// Multiplies rows by panels.
pub fn product(product: PackedProduct<'_, '_, Quad>) {
    in_tiles::<ROWS>(product, |x, words, panel, ahead, sums| {
        // SAFETY: `is_available` was asked before these instructions were chosen.
        unsafe { multiply(x, words, panel, ahead, sums) }
    });
}

#[target_feature(enable = "avx512f,avx512vnni")]
fn multiply(x: &[u32], words: usize, panel: &[Quad], ahead: &[Quad], sums: &mut [Sums]) {
    match sums.len() {
        12 => tile::<12>(x, words, panel, ahead, sums),
        11 => tile::<11>(x, words, panel, ahead, sums),
        10 => tile::<10>(x, words, panel, ahead, sums),
        9 => tile::<9>(x, words, panel, ahead, sums),
        8 => tile::<8>(x, words, panel, ahead, sums),
        7 => tile::<7>(x, words, panel, ahead, sums),
        6 => tile::<6>(x, words, panel, ahead, sums),
        5 => tile::<5>(x, words, panel, ahead, sums),
        4 => tile::<4>(x, words, panel, ahead, sums),
        3 => tile::<3>(x, words, panel, ahead, sums),
        2 => tile::<2>(x, words, panel, ahead, sums),
        _ => tile::<1>(x, words, panel, ahead, sums),
    }
}

/// `N` rows, each of so many words, times a panel.
#[expect(clippy::needless_range_loop, reason = "counted loops keep the sums in registers")]
#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
fn tile<const N: usize>(x: &[u32], words: usize, panel: &[Quad], ahead: &[Quad], out: &mut [Sums]) {
    const SIGNS: u32 = 0x8080_8080; // added to each byte modulo 256, they add 128
    let rows: [&[u32]; N] = std::array::from_fn(|row| &x[row * words..][..words]);
    let mut sums: [[__m512i; 2]; N] = [[_mm512_setzero_si512(); 2]; N];
    let mut ahead = ahead.chunks(LANES);
    let (numbers, ends) = panel.split_at(words * PANEL);
    for (word, weights) in numbers.as_chunks::<PANEL>().0.iter().enumerate() {
        if let Some(line) = ahead.next() {
            _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().cast());
        }
        let weights = load(weights);
        for row in 0..N {
            if word < rows[row].len() {
                let x = _mm512_set1_epi32((rows[row][word] ^ SIGNS).cast_signed());
                for half in 0..2 {
                    sums[row][half] = _mm512_dpbusd_epi32(sums[row][half], x, weights[half]);
                }
            }
        }
    }
    let column_sums = load(&ends.as_chunks::<PANEL>().0[1]);
    for row in 0..N {
        if let Some(out) = out.get_mut(row) {
            for half in 0..2 {
                let added = _mm512_slli_epi32::<7>(column_sums[half]);
                let sum = _mm512_sub_epi32(sums[row][half], added);
                // SAFETY: half a row of sums is 16 whole numbers.
                unsafe { _mm512_storeu_si512(out[half * LANES..].as_mut_ptr().cast(), sum) };
            }
        }
    }
}

/// A row of a panel.
#[inline]
#[target_feature(enable = "avx512f")]
fn load(row: &[Quad; PANEL]) -> [__m512i; 2] {
    let (low, high) = row.split_at(LANES);
    // SAFETY: both halves are 16 words of 4 bytes, which is what a register holds.
    unsafe { [_mm512_loadu_si512(low.as_ptr().cast()), _mm512_loadu_si512(high.as_ptr().cast())] }
}

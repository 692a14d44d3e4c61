//! Products in bf16 by AVX512-BF16, which adds the products of a pair of inputs to a sum.
//!
//! A pair is one chain of two fused multiply-adds, the second input first (VDPBF16PS, Intel 64 and
//! IA-32 Architectures Software Developer's Manual, volume 2); subnormal numbers count as zeros.
#![allow(unsafe_code)] // instructions that not every machine has

use std::arch::x86_64::{
    __cpuid, __m512, __m512bh, __m512i, _MM_HINT_T0, _mm_prefetch, _mm512_dpbf16_ps,
    _mm512_loadu_si512, _mm512_set1_epi32, _mm512_setzero_ps, _mm512_storeu_ps,
};
use std::mem::transmute;

use super::f32::finish;
use super::packed_rows::PackedProduct;
use super::panel::{PANEL, Pair, ROWS_PER_BLOCK};

/// Rows whose sums the registers hold, beside a row of the panel.
const ROWS: usize = 12;
const LANES: usize = 16;

/// Whether the processor has the instructions.
pub fn is_available() -> bool {
    is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bf16")
}

/// Whether they are faster than multiply-adds in f32. On Intel's processors they take 1.5 times as long,
/// which have tiles instead.
pub fn are_fast() -> bool {
    let vendor = __cpuid(0);
    [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes).as_flattened() != b"GenuineIntel"
}

/// Multiplies rows by panels.
pub fn product(product: PackedProduct<'_, '_, Pair>) {
    let PackedProduct { x, panels, bias, adds, out } = product;
    let columns = out.first().map_or(0, |row| row.len());
    let pairs_of_row = x.words_of_row();
    let mut sums = [[0.0; PANEL]; ROWS];
    let blocks = x.words().chunks(ROWS_PER_BLOCK * pairs_of_row);
    for (x, out) in blocks.zip(out.chunks_mut(ROWS_PER_BLOCK)) {
        // Tiles of like height: a low one would leave the multipliers waiting.
        let num_tiles = out.len().div_ceil(ROWS);
        let rows_per_tile = out.len().div_ceil(num_tiles);
        for (first_column, panel) in (0..columns).step_by(PANEL).zip(0..) {
            let (panel, next) = (panels[panel], panels.get(panel + 1).copied().unwrap_or_default());
            let mut ahead = next.chunks(next.len().div_ceil(num_tiles).max(1));
            let rows = x.chunks(rows_per_tile * pairs_of_row);
            for (x, out) in rows.zip(out.chunks_mut(rows_per_tile)) {
                let ahead = ahead.next().unwrap_or_default();
                let sums = &mut sums[..out.len()];
                // SAFETY: `is_available` was asked before these instructions were chosen.
                unsafe { multiply(x, pairs_of_row, panel, ahead, sums) };
                finish(sums, first_column, bias, adds, out);
            }
        }
    }
}

#[target_feature(enable = "avx512f,avx512bf16")]
fn multiply(x: &[u32], pairs: usize, panel: &[Pair], ahead: &[Pair], sums: &mut [[f32; PANEL]]) {
    match sums.len() {
        12 => tile::<12>(x, pairs, panel, ahead, sums),
        11 => tile::<11>(x, pairs, panel, ahead, sums),
        10 => tile::<10>(x, pairs, panel, ahead, sums),
        9 => tile::<9>(x, pairs, panel, ahead, sums),
        8 => tile::<8>(x, pairs, panel, ahead, sums),
        7 => tile::<7>(x, pairs, panel, ahead, sums),
        6 => tile::<6>(x, pairs, panel, ahead, sums),
        5 => tile::<5>(x, pairs, panel, ahead, sums),
        4 => tile::<4>(x, pairs, panel, ahead, sums),
        3 => tile::<3>(x, pairs, panel, ahead, sums),
        2 => tile::<2>(x, pairs, panel, ahead, sums),
        _ => tile::<1>(x, pairs, panel, ahead, sums),
    }
}

/// `N` rows, each of so many pairs, times a panel.
#[expect(clippy::needless_range_loop, reason = "counted loops keep the sums in registers")]
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn tile<const N: usize>(
    x: &[u32],
    pairs: usize,
    panel: &[Pair],
    ahead: &[Pair],
    out: &mut [[f32; PANEL]],
) {
    let rows: [&[u32]; N] = std::array::from_fn(|row| &x[row * pairs..][..pairs]);
    let mut sums: [[__m512; 2]; N] = [[_mm512_setzero_ps(); 2]; N];
    let mut ahead = ahead.chunks(LANES);
    for (pair, weights) in panel.as_chunks::<PANEL>().0.iter().enumerate() {
        if let Some(line) = ahead.next() {
            _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().cast());
        }
        let (low, high) = weights.split_at(LANES);
        // SAFETY: both halves are 16 pairs of 4 bytes, which is what a register holds.
        let weights: [__m512bh; 2] = unsafe {
            [
                transmute::<__m512i, __m512bh>(_mm512_loadu_si512(low.as_ptr().cast())),
                transmute::<__m512i, __m512bh>(_mm512_loadu_si512(high.as_ptr().cast())),
            ]
        };
        for row in 0..N {
            if pair < rows[row].len() {
                // SAFETY: the same bits in a register of another name.
                let x: __m512bh = unsafe {
                    transmute::<__m512i, __m512bh>(_mm512_set1_epi32(rows[row][pair].cast_signed()))
                };
                for half in 0..2 {
                    sums[row][half] = _mm512_dpbf16_ps(sums[row][half], x, weights[half]);
                }
            }
        }
    }
    for row in 0..N {
        if let Some(out) = out.get_mut(row) {
            for half in 0..2 {
                // SAFETY: half a row of sums is 16 floats.
                unsafe { _mm512_storeu_ps(out[half * LANES..].as_mut_ptr(), sums[row][half]) };
            }
        }
    }
}

//! The numbers of panels: 32 output columns of a weight matrix.
//!
//! Panels in 8 bits have two more rows, of 32 words each: the columns' scales, and the sums of their
//! numbers.

use half::f16;
use rten_simd::ops::{BitOps, Extend, IntOps};
use rten_simd::{Isa, Simd};

/// Output columns of a panel: two registers of AVX-512 or tiles of AMX, four registers of AVX2,
/// eight of NEON.
pub const PANEL: usize = 32;
/// Rows that are worked on with one panel after the other, so that they stay in the cache.
pub const ROWS_PER_BLOCK: usize = 240;

/// Two inputs' weights of one column in bf16, the first in the lower half: what instructions for
/// products in bf16 multiply at once.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(transparent)]
pub struct Pair(pub u32);

/// Four inputs' weights of one column in 8 bits, the first in the lowest: what instructions for products
/// in 8 bits multiply at once.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(transparent)]
pub struct Quad(pub u32);

/// The type of the elements of panels, which lie row after row, each of 32 columns.
pub trait Element: Copy + Send + Sync {
    /// Inputs of a row.
    const INPUTS: usize;

    /// Elements of a panel of so many inputs.
    fn panel_len(num_in: usize) -> usize {
        num_in.div_ceil(Self::INPUTS) * PANEL
    }
}

/// What products in f32 widen.
///
/// By counted loops: a closure has the instructions of a set only where it is inlined, which builds of
/// less optimisation may not do, and then every instruction is a call.
pub trait Weight: Element {
    /// Widens the weights of one input of a row.
    fn widen<I: Isa, const REGISTERS: usize>(
        isa: I,
        row: &[Self],
        input: usize,
    ) -> [I::F32; REGISTERS];
}

impl Element for f32 {
    const INPUTS: usize = 1;
}

impl Weight for f32 {
    #[inline(always)]
    fn widen<I: Isa, const REGISTERS: usize>(
        isa: I,
        row: &[f32],
        _input: usize,
    ) -> [I::F32; REGISTERS] {
        let ops = isa.f32();
        let lanes = ops.len();
        let mut widened = [ops.zero(); REGISTERS];
        for r in 0..REGISTERS {
            widened[r] = ops.load(&row[r * lanes..(r + 1) * lanes]);
        }
        widened
    }
}

impl Element for f16 {
    const INPUTS: usize = 1;
}

impl Weight for f16 {
    #[inline(always)]
    fn widen<I: Isa, const REGISTERS: usize>(
        isa: I,
        row: &[f16],
        _input: usize,
    ) -> [I::F32; REGISTERS] {
        let ops = isa.f16();
        let lanes = ops.len();
        let row: &[u16] = bytemuck::cast_slice(row);
        let mut widened = [isa.f32().zero(); REGISTERS];
        for r in 0..REGISTERS {
            let bits = isa.u16().load(&row[r / 2 * lanes..(r / 2 + 1) * lanes]);
            let halves = ops.from_bits(bits.to_bits());
            widened[r] = match r % 2 {
                0 => ops.extend_low(halves),
                _ => ops.extend_high(halves),
            };
        }
        widened
    }
}

/// Words of a row that panels in bf16 and in 8 bits are filled up to with zeros: the depth of a tile of
/// AMX, which is a cache line.
pub const WORDS_OF_TILE: usize = 16;

impl Element for Pair {
    const INPUTS: usize = 2;

    fn panel_len(num_in: usize) -> usize {
        words_of_row::<Pair>(num_in) * PANEL
    }
}

impl Element for Quad {
    const INPUTS: usize = 4;

    fn panel_len(num_in: usize) -> usize {
        (words_of_row::<Quad>(num_in) + 2) * PANEL
    }
}

/// Words of a row of so many inputs, those that fill it up among them.
pub fn words_of_row<E: Element>(num_in: usize) -> usize {
    num_in.div_ceil(E::INPUTS).next_multiple_of(WORDS_OF_TILE)
}

impl Weight for Pair {
    #[inline(always)]
    fn widen<I: Isa, const REGISTERS: usize>(
        isa: I,
        row: &[Pair],
        input: usize,
    ) -> [I::F32; REGISTERS] {
        let ops = isa.i32();
        let lanes = ops.len();
        let row: &[i32] = bytemuck::cast_slice(row);
        let mut widened = [isa.f32().zero(); REGISTERS];
        for r in 0..REGISTERS {
            let pairs = ops.load(&row[r * lanes..(r + 1) * lanes]);
            let bits = match input {
                0 => ops.shift_left::<16>(pairs),
                _ => ops.and(pairs, ops.splat(0xffff_0000_u32.cast_signed())),
            };
            widened[r] = isa.f32().from_bits(bits.to_bits());
        }
        widened
    }
}

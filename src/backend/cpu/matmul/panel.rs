//! The numbers of panels: 32 output columns of a weight matrix.

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

/// The type of the elements of panels, which lie row after row, each of 32 columns.
pub trait Weight: Copy + Send + Sync {
    /// Inputs of a row.
    const INPUTS: usize;

    /// Elements of a panel of so many inputs.
    fn panel_len(num_in: usize) -> usize {
        num_in.div_ceil(Self::INPUTS) * PANEL
    }

    /// Widens the weights of one input of a row.
    fn widen<I: Isa, const REGISTERS: usize>(
        isa: I,
        row: &[Self],
        input: usize,
    ) -> [I::F32; REGISTERS];
}

impl Weight for f32 {
    const INPUTS: usize = 1;

    #[inline(always)]
    fn widen<I: Isa, const REGISTERS: usize>(
        isa: I,
        row: &[f32],
        _input: usize,
    ) -> [I::F32; REGISTERS] {
        let ops = isa.f32();
        let lanes = ops.len();
        std::array::from_fn(|r| ops.load(&row[r * lanes..(r + 1) * lanes]))
    }
}

impl Weight for f16 {
    const INPUTS: usize = 1;

    #[inline(always)]
    fn widen<I: Isa, const REGISTERS: usize>(
        isa: I,
        row: &[f16],
        _input: usize,
    ) -> [I::F32; REGISTERS] {
        let ops = isa.f16();
        let lanes = ops.len();
        let row: &[u16] = bytemuck::cast_slice(row);
        std::array::from_fn(|r| {
            let bits = isa.u16().load(&row[r / 2 * lanes..(r / 2 + 1) * lanes]);
            let halves = ops.from_bits(bits.to_bits());
            match r % 2 {
                0 => ops.extend_low(halves),
                _ => ops.extend_high(halves),
            }
        })
    }
}

/// Inputs that panels in bf16 are filled up to with zeros: the depth of a tile of AMX.
pub const PAIRED_INPUTS: usize = 32;

impl Weight for Pair {
    const INPUTS: usize = 2;

    fn panel_len(num_in: usize) -> usize {
        num_in.next_multiple_of(PAIRED_INPUTS) / 2 * PANEL
    }

    #[inline(always)]
    fn widen<I: Isa, const REGISTERS: usize>(
        isa: I,
        row: &[Pair],
        input: usize,
    ) -> [I::F32; REGISTERS] {
        let ops = isa.i32();
        let lanes = ops.len();
        let row: &[i32] = bytemuck::cast_slice(row);
        std::array::from_fn(|r| {
            let pairs = ops.load(&row[r * lanes..(r + 1) * lanes]);
            let bits = match input {
                0 => ops.shift_left::<16>(pairs),
                _ => ops.and(pairs, ops.splat(0xffff_0000_u32.cast_signed())),
            };
            isa.f32().from_bits(bits.to_bits())
        })
    }
}

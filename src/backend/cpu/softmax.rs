//! Largest values and sums of exponentials: the parts of a softmax.

use rten_simd::functional::simd_map;
use rten_simd::ops::{BitOps, NumOps};
use rten_simd::{Isa, Simd, SimdIterable, SimdOp, SimdUnaryOp};
use rten_vecmath::Exp;

/// The largest of some values; minus infinity for none.
pub(super) struct Largest<'a>(pub &'a [f32]);

impl SimdOp for Largest<'_> {
    type Output = f32;

    #[inline(always)]
    fn eval<I: Isa>(self, isa: I) -> f32 {
        let ops = isa.f32();
        let mut largest = ops.splat(f32::NEG_INFINITY);
        let vectors = self.0.chunks_exact(ops.len());
        let rest = vectors.remainder();
        for vector in vectors {
            largest = ops.max(ops.load(vector), largest);
        }
        largest.to_array().into_iter().chain(rest.iter().copied()).fold(f32::NEG_INFINITY, f32::max)
    }
}

/// Replaces each value by `exp(value - offset)` and gives their sum.
pub(super) struct ExpSum<'a> {
    pub values: &'a mut [f32],
    pub offset: f32,
}

impl SimdOp for ExpSum<'_> {
    type Output = f32;

    #[inline(always)]
    fn eval<I: Isa>(self, isa: I) -> f32 {
        let ops = isa.f32();
        let offset = ops.splat(self.offset);
        let values = simd_map(
            ops,
            self.values,
            #[inline(always)]
            |x| Exp::apply(isa, ops.sub(x, offset)),
        );
        let sum = values.simd_iter(ops).fold(
            ops.zero(),
            #[inline(always)]
            |sum, x| ops.add(sum, x),
        );
        ops.sum(sum)
    }
}

/// The largest value and the sum of `exp((value - largest) * scale)`.
///
/// `scale * largest + ln(sum)` is then the log of the summed exponentials of `scale * values`.
pub(super) struct LogSumExpParts<'a> {
    pub values: &'a [f32],
    pub scale: f32,
}

impl SimdOp for LogSumExpParts<'_> {
    type Output = (f32, f32);

    #[inline(always)]
    fn eval<I: Isa>(self, isa: I) -> (f32, f32) {
        let ops = isa.f32();
        let largest = Largest(self.values).eval(isa);
        let (offset, scale) = (ops.splat(largest), ops.splat(self.scale));
        let sum = self.values.simd_iter(ops).fold(
            ops.zero(),
            #[inline(always)]
            |sum, x| ops.add(sum, Exp::apply(isa, ops.mul(ops.sub(x, offset), scale))),
        );
        (largest, ops.sum(sum))
    }
}

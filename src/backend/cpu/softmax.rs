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

#[cfg(test)]
mod tests {
    use rten_simd::isa::GenericIsa;
    #[cfg(target_arch = "x86_64")]
    use rten_simd::isa::{Avx2Isa, Avx512Isa};

    use super::*;

    /// The parts by each instruction set that this machine has.
    fn by_instruction_set(values: &[f32], scale: f32) -> Vec<(&'static str, (f32, f32))> {
        let parts = || LogSumExpParts { values, scale };
        let mut found = vec![("generic", parts().eval(GenericIsa::new()))];
        #[cfg(target_arch = "x86_64")]
        {
            found.extend(Avx2Isa::new().map(|isa| ("AVX2", parts().eval(isa))));
            found.extend(Avx512Isa::new().map(|isa| ("AVX-512", parts().eval(isa))));
        }
        found
    }

    /// What is promised of answers on machines of one kind, and what of machines of several.
    #[test]
    fn one_instruction_set_gives_equal_bits_and_several_differ_by_rounding() {
        let mut rng = fastrand::Rng::with_seed(3);
        for _ in 0..200 {
            let values: Vec<f32> =
                (0..rng.usize(1..3000)).map(|_| 20.0 * rng.f32() - 10.0).collect();
            let scale = 0.25 + rng.f32();
            let largest = values.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let term = |&x: &f32| (f64::from(x - largest) * f64::from(scale)).exp();
            let truth: f64 = values.iter().map(term).sum();
            let found = by_instruction_set(&values, scale);
            for (name, (max, sum)) in &found {
                assert_eq!(*max, largest, "{name}");
                // A score is minus the log of a sum: this is its difference.
                let difference = (f64::from(*sum) / truth).ln().abs();
                assert!(difference < 3e-6, "{name}: {difference:e} of {} values", values.len());
            }
            let chosen = LogSumExpParts { values: &values, scale }.dispatch();
            let is_one = found.iter().any(|(_, parts)| *parts == chosen);
            assert!(is_one || cfg!(not(target_arch = "x86_64")), "{chosen:?} is of {found:?}");
            assert_eq!(LogSumExpParts { values: &values, scale }.dispatch(), chosen);
        }
    }
}

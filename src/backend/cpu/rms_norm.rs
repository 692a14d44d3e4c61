use rayon::prelude::*;
use rten_simd::functional::simd_map;
use rten_simd::ops::{BitOps, NumOps};
use rten_simd::{Isa, SimdIterable, SimdOp};

use super::Buffer;
use super::matmul::VALUES_PER_TASK;

pub(super) fn rms_norm(x: &Buffer, weight: &[f32], epsilon: f32, out: &mut Buffer) {
    assert_eq!(x.columns, weight.len(), "a weight for each column");
    out.reshape(x.num_rows(), x.columns);
    let per_task = (VALUES_PER_TASK / x.columns).max(1) * x.columns;
    out.values.par_chunks_mut(per_task).zip(x.values.par_chunks(per_task)).for_each(|(out, x)| {
        out.copy_from_slice(x);
        NormRows { rows: out, weight, epsilon }.dispatch();
    });
}

/// The RMS norm of each stretch of `weight.len()` values, in place.
pub(super) struct NormRows<'a> {
    pub rows: &'a mut [f32],
    pub weight: &'a [f32],
    pub epsilon: f32,
}

impl SimdOp for NormRows<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<I: Isa>(self, isa: I) {
        let ops = isa.f32();
        let columns = self.weight.len();
        for row in self.rows.chunks_exact_mut(columns) {
            let squares = row.simd_iter(ops).fold_unroll::<4>(
                ops.zero(),
                #[inline(always)]
                |sum, x| ops.mul_add(x, x, sum),
                #[inline(always)]
                |a, b| ops.add(a, b),
            );
            let mean = ops.sum(squares) / columns as f32;
            let scale = ops.splat(1.0 / (mean + self.epsilon).sqrt());
            let mut weights = self.weight.simd_iter_pad(ops);
            simd_map(
                ops,
                row,
                #[inline(always)]
                |x| {
                    let weight = weights.next().expect("as long as the row");
                    ops.mul(ops.mul(x, scale), weight)
                },
            );
        }
    }
}

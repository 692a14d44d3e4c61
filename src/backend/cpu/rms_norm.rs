//! Rows divided by their root mean square.

use rayon::prelude::*;
use rten_simd::ops::{BitOps, NumOps};
use rten_simd::{Isa, SimdIterable, SimdOp};

use super::buffer::VALUES_PER_TASK;
use super::{Buffer, CpuBackend};
use crate::backend::RmsNorm;

impl RmsNorm for CpuBackend {
    fn rms_norm(&self, x: &Buffer, weight: &Vec<f32>, epsilon: f32, out: &mut Buffer) {
        assert_eq!(x.columns, weight.len(), "a weight for each column");
        out.reshape(x.num_rows(), x.columns);
        let per_task = (VALUES_PER_TASK / x.columns).max(1) * x.columns;
        out.values.par_chunks_mut(per_task).zip(x.values.par_chunks(per_task)).for_each(
            |(out, x)| {
                NormRows { x: Some(x), weight, epsilon, out }.dispatch();
            },
        );
    }
}

/// The RMS norm of each stretch of `weight.len()` values of `x`, or of `out` itself.
pub(super) struct NormRows<'a> {
    pub x: Option<&'a [f32]>,
    pub weight: &'a [f32],
    pub epsilon: f32,
    pub out: &'a mut [f32],
}

impl SimdOp for NormRows<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<I: Isa>(self, isa: I) {
        let ops = isa.f32();
        let (columns, lanes) = (self.weight.len(), ops.len());
        for (row, out) in self.out.chunks_exact_mut(columns).enumerate() {
            if let Some(x) = self.x {
                out.copy_from_slice(&x[row * columns..(row + 1) * columns]);
            }
            let squares = out.simd_iter(ops).fold_unroll::<4>(
                ops.zero(),
                #[inline(always)]
                |sum, x| ops.mul_add(x, x, sum),
                #[inline(always)]
                |a, b| ops.add(a, b),
            );
            let scale = 1.0 / (ops.sum(squares) / columns as f32 + self.epsilon).sqrt();
            let vectors = columns / lanes * lanes;
            let (whole, rest) = out.split_at_mut(vectors);
            let (weights, last_weights) = self.weight.split_at(vectors);
            let scales = ops.splat(scale);
            for (out, weight) in whole.chunks_exact_mut(lanes).zip(weights.chunks_exact(lanes)) {
                let scaled = ops.mul(ops.mul(ops.load(out), scales), ops.load(weight));
                ops.store(scaled, out);
            }
            for (out, weight) in rest.iter_mut().zip(last_weights) {
                *out = *out * scale * weight;
            }
        }
    }
}

//! Rows less their mean, divided by their standard deviation.

use rayon::prelude::*;
use rten_simd::ops::{BitOps, NumOps};
use rten_simd::{Isa, SimdIterable, SimdOp};

use super::buffer::VALUES_PER_TASK;
use super::{Buffer, CpuBackend};
use crate::backend::{Affine, LayerNorm};

impl LayerNorm for CpuBackend {
    fn layer_norm(
        &self,
        x: &Buffer,
        affine: Option<Affine<'_, CpuBackend>>,
        epsilon: f32,
        out: &mut Buffer,
    ) {
        let columns = x.columns;
        if let Some(affine) = affine {
            let lens = (affine.scale.len(), affine.shift.len());
            assert_eq!(lens, (columns, columns), "a scale and a shift for each column");
        }
        out.reshape(x.num_rows(), columns);
        let per_task = (VALUES_PER_TASK / columns).max(1) * columns;
        out.values.par_chunks_mut(per_task).zip(x.values.par_chunks(per_task)).for_each(
            |(out, x)| {
                norm_rows(x, columns, epsilon, out);
                let Some(Affine { scale, shift }) = affine else { return };
                for row in out.chunks_exact_mut(columns) {
                    for ((value, scale), shift) in row.iter_mut().zip(scale).zip(shift) {
                        *value = *value * scale + shift;
                    }
                }
            },
        );
    }
}

/// The layer norm of each stretch of `columns` values of `x`, without weights.
pub(super) fn norm_rows(x: &[f32], columns: usize, epsilon: f32, out: &mut [f32]) {
    CenterRows { x, columns, epsilon, out }.dispatch();
}

/// [`norm_rows`], for any instruction set.
struct CenterRows<'a> {
    x: &'a [f32],
    columns: usize,
    epsilon: f32,
    out: &'a mut [f32],
}

impl SimdOp for CenterRows<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<I: Isa>(self, isa: I) {
        let ops = isa.f32();
        let rows = self.x.chunks_exact(self.columns);
        for (x, out) in rows.zip(self.out.chunks_exact_mut(self.columns)) {
            let sum = x.simd_iter(ops).fold_unroll::<4>(
                ops.zero(),
                #[inline(always)]
                |sum, x| ops.add(sum, x),
                #[inline(always)]
                |a, b| ops.add(a, b),
            );
            let mean = ops.sum(sum) / self.columns as f32;
            out.iter_mut().zip(x).for_each(|(out, x)| *out = x - mean);
            // The squares of the differences, and not those of `x`: a mean far from zero would leave
            // nothing of the variance.
            let squares = out.simd_iter(ops).fold_unroll::<4>(
                ops.zero(),
                #[inline(always)]
                |sum, x| ops.mul_add(x, x, sum),
                #[inline(always)]
                |a, b| ops.add(a, b),
            );
            let variance = ops.sum(squares) / self.columns as f32;
            let scale = 1.0 / (variance + self.epsilon).sqrt();
            out.iter_mut().for_each(|out| *out *= scale);
        }
    }
}

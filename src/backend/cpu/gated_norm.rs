//! Rows less their mean, divided by their standard deviation, and multiplied by a gate.

use rayon::prelude::*;

use super::buffer::VALUES_PER_TASK;
use super::layer_norm::norm_rows;
use super::{Buffer, CpuBackend};
use crate::backend::{Affine, GateActivation, GatedNorm, GatedNormSpec, GatedOutput};

impl GatedNorm for CpuBackend {
    fn gated_norm(
        &self,
        gate: &Buffer,
        x: &Buffer,
        spec: &GatedNormSpec<'_, CpuBackend>,
        out: &mut Buffer,
    ) {
        let columns = spec.num_blocks * spec.block_columns;
        assert_eq!(gate.columns, columns, "a gate for each column that counts");
        if let Some(affine) = spec.affine {
            let len = if spec.is_by_block { spec.num_blocks } else { columns };
            let lens = (affine.scale.len(), affine.shift.len());
            assert_eq!(lens, (len, len), "a scale and a shift for each column, or block");
        }
        let out_columns = spec.output.num_parts() * columns;
        out.reshape(x.num_rows(), out_columns);
        let width = x.columns;
        let rows_per_task = (VALUES_PER_TASK / width).max(1);
        let gates = gate.values.par_chunks(rows_per_task * columns);
        let inputs = x.values.par_chunks(rows_per_task * width);
        let outputs = out.values.par_chunks_mut(rows_per_task * out_columns);
        outputs.zip(gates).zip(inputs).for_each_init(
            || (vec![0.0; columns], vec![0.0; columns]),
            |(compact, normed), ((out, gate), x)| {
                let rows = gate.chunks_exact(columns).zip(x.chunks_exact(width));
                for (out, (gate, x)) in out.chunks_exact_mut(out_columns).zip(rows) {
                    row(gate, x, spec, compact, normed, out);
                }
            },
        );
    }
}

/// One row of the output; `compact` and `normed` are as wide as the gate.
fn row(
    gate: &[f32],
    x: &[f32],
    spec: &GatedNormSpec<'_, CpuBackend>,
    compact: &mut [f32],
    normed: &mut [f32],
    out: &mut [f32],
) {
    let (columns, width) = (gate.len(), x.len() / spec.num_blocks);
    for (to, from) in compact.chunks_exact_mut(spec.block_columns).zip(x.chunks_exact(width)) {
        to.copy_from_slice(&from[..spec.block_columns]);
    }
    let per_norm = if spec.is_by_block { spec.block_columns } else { columns };
    norm_rows(compact, per_norm, spec.epsilon, normed);
    if let Some(Affine { scale, shift }) = spec.affine {
        let per_weight = if spec.is_by_block { spec.block_columns } else { 1 };
        let weights = scale.iter().zip(shift);
        for (values, (scale, shift)) in normed.chunks_exact_mut(per_weight).zip(weights) {
            values.iter_mut().for_each(|value| *value = *value * scale + shift);
        }
    }
    let gated = match spec.output {
        GatedOutput::Gated => out,
        GatedOutput::WithNormed | GatedOutput::WithInput => {
            let beside = if spec.output == GatedOutput::WithInput { &*compact } else { &*normed };
            let (gates, rest) = out.split_at_mut(columns);
            let (middle, gated) = rest.split_at_mut(columns);
            gates.copy_from_slice(gate);
            middle.copy_from_slice(beside);
            gated
        }
    };
    for ((gated, gate), normed) in gated.iter_mut().zip(gate).zip(normed) {
        *gated = match spec.activation {
            GateActivation::Identity => gate * *normed,
            GateActivation::Sigmoid => gate / (1.0 + (-*normed).exp()),
        };
    }
}

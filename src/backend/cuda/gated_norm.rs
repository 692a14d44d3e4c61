//! Launches `gated_norm.cu`: normed rows multiplied by a gate.

use super::backend::CudaBackend;
use super::buffer::Buffer;
use super::driver::Driver;
use super::shared::shared_struct;
use crate::backend::{GateActivation, GatedNorm, GatedNormSpec, GatedOutput};

shared_struct! {
    /// A layer norm of rows whose result is multiplied by a gate.
    struct Params = "gated_norm::Params" {
        out: u64 = "void*",
        gate: u64 = "const void*",
        x: u64 = "const void*",
        /// `[columns]` or `[num_blocks]`, or null, as the shift is then.
        scale: u64 = "const float*",
        shift: u64 = "const float*",
        num_blocks: u32,
        block_columns: u32,
        /// Of a block of `x`.
        block_width: u32,
        is_by_block: u32,
        has_sigmoid: u32,
        /// 0: gated columns alone; 1: also the normed ones; 2: also those of `x`.
        output: u32,
        epsilon: f32,
        padding: u32,
    }
}

impl<D: Driver> GatedNorm for CudaBackend<D> {
    fn gated_norm(
        &self,
        gate: &Buffer<D>,
        x: &Buffer<D>,
        spec: &GatedNormSpec<'_, CudaBackend<D>>,
        out: &mut Buffer<D>,
    ) {
        let columns = spec.num_blocks * spec.block_columns;
        assert_eq!(gate.columns, columns, "a gate for each column that counts");
        if let Some(affine) = spec.affine {
            let len = if spec.is_by_block { spec.num_blocks } else { columns };
            let lens = (affine.scale.len, affine.shift.len);
            assert_eq!(lens, (len, len), "a scale and a shift for each column, or block");
        }
        out.reshape(x.rows, spec.output.num_parts() * columns, self.dtype);
        let params = Params {
            out: out.memory.at(0),
            gate: gate.memory.at(0),
            x: x.memory.at(0),
            scale: spec.affine.map_or(0, |affine| affine.scale.values.at(0)),
            shift: spec.affine.map_or(0, |affine| affine.shift.values.at(0)),
            num_blocks: spec.num_blocks as u32,
            block_columns: spec.block_columns as u32,
            block_width: (x.columns / spec.num_blocks) as u32,
            is_by_block: u32::from(spec.is_by_block),
            has_sigmoid: u32::from(spec.activation == GateActivation::Sigmoid),
            output: match spec.output {
                GatedOutput::Gated => 0,
                GatedOutput::WithNormed => 1,
                GatedOutput::WithInput => 2,
            },
            epsilon: spec.epsilon,
            padding: 0,
        };
        let kernel = self.kernel("gated_norm_f32", "gated_norm_bf16");
        self.device.launch(kernel, [x.rows, 1, 1], 256, 0, &params);
    }
}

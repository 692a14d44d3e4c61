//! Launches `layer_norm.cu`: rows less their mean, divided by their standard deviation.

use super::backend::CudaBackend;
use super::buffer::Buffer;
use super::driver::Driver;
use super::shared::shared_struct;
use crate::backend::{Affine, LayerNorm};

shared_struct! {
    /// A layer norm of rows.
    struct Params = "layer_norm::Params" {
        out: u64 = "void*",
        x: u64 = "const void*",
        /// `[columns]`, or null, as the shift is then.
        scale: u64 = "const float*",
        shift: u64 = "const float*",
        columns: u32,
        epsilon: f32,
    }
}

impl<D: Driver> LayerNorm for CudaBackend<D> {
    fn layer_norm(
        &self,
        x: &Buffer<D>,
        affine: Option<Affine<'_, CudaBackend<D>>>,
        epsilon: f32,
        out: &mut Buffer<D>,
    ) {
        if let Some(affine) = affine {
            let lens = (affine.scale.len, affine.shift.len);
            assert_eq!(lens, (x.columns, x.columns), "a scale and a shift for each column");
        }
        out.reshape(x.rows, x.columns, self.dtype);
        let params = Params {
            out: out.memory.at(0),
            x: x.memory.at(0),
            scale: affine.map_or(0, |affine| affine.scale.values.at(0)),
            shift: affine.map_or(0, |affine| affine.shift.values.at(0)),
            columns: x.columns as u32,
            epsilon,
        };
        let kernel = self.kernel("layer_norm_f32", "layer_norm_bf16");
        self.device.launch(kernel, [x.rows, 1, 1], 256, 0, &params);
    }
}

//! Launches `rms_norm.cu`: rows divided by their root mean square.

use super::backend::CudaBackend;
use super::buffer::{Buffer, Vector};
use super::driver::Driver;
use super::shared::shared_struct;
use crate::backend::RmsNorm;

shared_struct! {
    /// An RMS norm of rows.
    struct Params = "rms_norm::Params" {
        out: u64 = "void*",
        x: u64 = "const void*",
        weight: u64 = "const float*",
        columns: u32,
        epsilon: f32,
    }
}

impl<D: Driver> RmsNorm for CudaBackend<D> {
    fn rms_norm(&self, x: &Buffer<D>, weight: &Vector<D>, epsilon: f32, out: &mut Buffer<D>) {
        assert_eq!(x.columns, weight.len, "a weight for each column");
        out.reshape(x.rows, x.columns, self.dtype);
        let params = Params {
            out: out.memory.at(0),
            x: x.memory.at(0),
            weight: weight.values.at(0),
            columns: x.columns as u32,
            epsilon,
        };
        let kernel = self.kernel("rms_norm_f32", "rms_norm_bf16");
        self.device.launch(kernel, [x.rows, 1, 1], 256, 0, &params);
    }
}

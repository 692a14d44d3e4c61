//! Launches `rms_norm.cu`: rows divided by their root mean square.

use bytemuck::{Pod, Zeroable};

use super::driver::Driver;
use super::{Buffer, CudaBackend, Vector};
use crate::backend::RmsNorm;

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Params {
    out: u64,
    x: u64,
    weight: u64,
    columns: u32,
    epsilon: f32,
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

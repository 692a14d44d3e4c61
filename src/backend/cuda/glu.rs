//! Launches `glu.cu`: gated columns.

use super::backend::CudaBackend;
use super::buffer::Buffer;
use super::driver::Driver;
use super::matmul::activation_number;
use super::shared::shared_struct;
use crate::backend::{Activation, Glu};

shared_struct! {
    /// A gated linear unit.
    struct Params = "glu::Params" {
        out: u64 = "void*",
        x: u64 = "const void*",
        columns: u32,
        activation: u32,
    }
}

impl<D: Driver> Glu for CudaBackend<D> {
    fn glu(&self, x: &Buffer<D>, activation: Activation, out: &mut Buffer<D>) {
        let columns = x.columns / 2;
        out.reshape(x.rows, columns, self.dtype);
        let params = Params {
            out: out.memory.at(0),
            x: x.memory.at(0),
            columns: columns as u32,
            activation: activation_number(activation),
        };
        let kernel = self.kernel("glu_f32", "glu_bf16");
        let columns_per_block = 256 * (16 / self.dtype.size());
        let grid = [x.rows, columns.div_ceil(columns_per_block), 1];
        self.device.launch(kernel, grid, 256, 0, &params);
    }
}

//! Launches `rope_tables.cu`: cosines and sines of positions.

use bytemuck::{Pod, Zeroable};

use super::driver::Driver;
use super::tables::BatchParams;
use super::{Buffer, CudaBackend, Vector};
use crate::backend::{Batch, RopeTables};
use crate::tensor::Dtype;

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Params {
    out: u64,
    frequencies: u64,
    batch: BatchParams,
    num_frequencies: u32,
    padding: u32,
}

impl<D: Driver> RopeTables for CudaBackend<D> {
    fn rope_tables(
        &self,
        frequencies: &Vector<D>,
        batch: &Batch<'_, CudaBackend<D>>,
        out: &mut Buffer<D>,
    ) {
        let tables = self.tables(&mut self.state(), batch.chunks, batch.slots);
        let rows = tables.batch.num_rows as usize;
        out.reshape(rows, 2 * frequencies.len, Dtype::F32);
        let params = Params {
            out: out.memory.at(0),
            frequencies: frequencies.values.at(0),
            batch: tables.batch,
            num_frequencies: frequencies.len as u32,
            padding: 0,
        };
        self.device.launch("rope_tables_f32", [rows, 1, 1], 64, 0, &params);
    }
}

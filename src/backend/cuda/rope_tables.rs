//! Launches `rope_tables.cu`: cosines and sines of positions.

use super::backend::CudaBackend;
use super::buffer::{Buffer, Vector};
use super::driver::Driver;
use super::metadata::BatchParams;
use super::shared::shared_struct;
use crate::backend::{Batch, RopeTables};
use crate::tensor::Dtype;

shared_struct! {
    /// Cosines and sines of positions.
    struct Params = "rope_tables::Params" {
        /// `[rows, 2 * num_frequencies]`
        out: u64 = "float*",
        /// `[num_frequencies]`
        frequencies: u64 = "const float*",
        batch: BatchParams,
        num_frequencies: u32,
        padding: u32,
    }
}

impl<D: Driver> RopeTables for CudaBackend<D> {
    fn rope_tables(
        &self,
        frequencies: &Vector<D>,
        batch: &Batch<'_, CudaBackend<D>>,
        out: &mut Buffer<D>,
    ) {
        let (metadata, _scratch) = self.enter(batch);
        let rows = metadata.batch.num_rows as usize;
        out.reshape(rows, 2 * frequencies.len, Dtype::F32);
        let params = Params {
            out: out.memory.at(0),
            frequencies: frequencies.values.at(0),
            batch: metadata.batch,
            num_frequencies: frequencies.len as u32,
            padding: 0,
        };
        self.device.launch("rope_tables_f32", [rows, 1, 1], 64, 0, &params);
    }
}

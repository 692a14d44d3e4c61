//! Launches `gather_last.cu`: the rows that a step is scored by.

use super::backend::CudaBackend;
use super::buffer::Buffer;
use super::driver::Driver;
use super::shared::shared_struct;
use crate::backend::{Batch, GatherLast};

shared_struct! {
    /// A copy of some rows.
    struct Params = "gather_last::Params" {
        out: u64 = "void*",
        x: u64 = "const void*",
        rows: u64 = "const uint32_t*",
        columns: u32,
        padding: u32,
    }
}

impl<D: Driver> GatherLast for CudaBackend<D> {
    fn gather_last(
        &self,
        x: &Buffer<D>,
        first: usize,
        batch: &Batch<'_, CudaBackend<D>>,
        out: &mut Buffer<D>,
    ) {
        let (metadata, mut scratch) = self.enter(batch);
        let (rows, list) = match batch.chunks {
            // All rows of beams are wanted, in their order.
            [] => (x.rows, metadata.row_numbers),
            chunks => {
                let ends = chunks.iter().scan(0, |end, chunk| {
                    *end += chunk.len() as u32;
                    Some(*end)
                });
                let last = ends.skip(first).map(|end| end - 1);
                let beams = batch.num_prompt_rows() as u32..x.rows as u32;
                let rows: Vec<u32> = last.chain(beams).collect();
                scratch.row_list.write_often(&rows);
                (rows.len(), scratch.row_list.at(0))
            }
        };
        out.reshape(rows, x.columns, self.dtype);
        let params = Params {
            out: out.memory.at(0),
            x: x.memory.at(0),
            rows: list,
            columns: x.columns as u32,
            padding: 0,
        };
        let kernel = self.kernel("gather_last_f32", "gather_last_bf16");
        self.device.launch(kernel, [rows, 1, 1], 128, 0, &params);
    }
}

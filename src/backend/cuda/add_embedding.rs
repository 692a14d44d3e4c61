//! Launches `add_embedding.cu`: rows of a table added to rows of prompts.

use super::backend::CudaBackend;
use super::buffer::{Buffer, Weights};
use super::driver::Driver;
use super::shared::shared_struct;
use crate::backend::{AddEmbedding, Batch};

shared_struct! {
    /// A lookup whose rows are added.
    struct Params = "add_embedding::Params" {
        x: u64 = "void*",
        table: u64 = "const void*",
        /// Of the rows of prompts.
        indices: u64 = "const uint32_t*",
        columns: u32,
        padding: u32,
    }
}

impl<D: Driver> AddEmbedding for CudaBackend<D> {
    fn add_embedding(
        &self,
        table: &Weights<D>,
        indices: &[u32],
        batch: &Batch<'_, CudaBackend<D>>,
        x: &mut Buffer<D>,
    ) {
        assert_eq!(indices.len(), batch.num_prompt_rows(), "an index for each row of a prompt");
        assert_eq!(table.columns, x.columns, "rows must be as wide as the table's");
        let is_inside = |&index: &u32| (index as usize) < table.rows;
        assert!(indices.iter().all(is_inside), "an index must be that of a row of the table");
        let (_metadata, mut scratch) = self.enter(batch);
        scratch.row_list.write_often(indices);
        let params = Params {
            x: x.memory.at(0),
            table: table.memory.at(0),
            indices: scratch.row_list.at(0),
            columns: table.columns as u32,
            padding: 0,
        };
        let kernel = self.kernel("add_embedding_f32", "add_embedding_bf16");
        self.device.launch(kernel, [indices.len(), 1, 1], 128, 0, &params);
    }
}

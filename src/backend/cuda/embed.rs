//! Launches `embed.cu`: rows of an embedding table.

use super::backend::CudaBackend;
use super::buffer::{Buffer, Weights};
use super::driver::Driver;
use super::memory::Beams;
use super::metadata::BatchParams;
use super::shared::shared_struct;
use crate::backend::{Batch, Embed};

shared_struct! {
    /// A lookup of embeddings.
    struct Params = "embed::Params" {
        out: u64 = "void*",
        table: u64 = "const void*",
        /// Of the rows of prompts.
        tokens: u64 = "const uint32_t*",
        batch: BatchParams,
        beams: Beams,
        columns: u32,
        num_tokens: u32,
    }
}

impl<D: Driver> Embed for CudaBackend<D> {
    fn embed(
        &self,
        table: &Weights<D>,
        tokens: &[u32],
        batch: &Batch<'_, CudaBackend<D>>,
        out: &mut Buffer<D>,
    ) {
        assert_eq!(tokens.len(), batch.num_prompt_rows(), "a token for each row of a prompt");
        let (metadata, mut scratch) = self.enter(batch);
        scratch.tokens.write_often(tokens);
        let rows = metadata.batch.num_rows as usize;
        out.reshape(rows, table.columns, self.dtype);
        let params = Params {
            out: out.memory.at(0),
            table: table.memory.at(0),
            tokens: scratch.tokens.at(0),
            batch: metadata.batch,
            beams: batch.memory.0.beams(),
            columns: table.columns as u32,
            num_tokens: tokens.len() as u32,
        };
        let kernel = self.kernel("embed_f32", "embed_bf16");
        self.device.launch(kernel, [rows, 1, 1], 128, 0, &params);
    }
}

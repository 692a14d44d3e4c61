//! Launches `embed.cu`: rows of an embedding table.

use bytemuck::Zeroable;

use super::driver::Driver;
use super::memory::Beams;
use super::metadata::BatchParams;
use super::shared::shared_struct;
use super::{Buffer, CudaBackend, Slot, Weights};
use crate::backend::Embed;

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
    fn embed(&self, table: &Weights<D>, tokens: &[u32], beams: &[Slot<D>], out: &mut Buffer<D>) {
        let state = &mut *self.state();
        let batch = self.metadata(state, &[], beams).batch;
        state.tokens.write_often(tokens);
        let rows = tokens.len() + batch.num_rows as usize;
        out.reshape(rows, table.columns, self.dtype);
        let arrays = beams.first().map(|slot| slot.arrays.beams());
        let params = Params {
            out: out.memory.at(0),
            table: table.memory.at(0),
            tokens: state.tokens.at(0),
            batch,
            beams: arrays.unwrap_or(Beams::zeroed()),
            columns: table.columns as u32,
            num_tokens: tokens.len() as u32,
        };
        let kernel = self.kernel("embed_f32", "embed_bf16");
        self.device.launch(kernel, [rows, 1, 1], 128, 0, &params);
    }
}

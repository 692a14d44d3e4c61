//! Launches `gru.cu`: a gated recurrent unit over prompts.

use super::backend::CudaBackend;
use super::buffer::{Buffer, Vector, Weights};
use super::driver::Driver;
use super::metadata::BatchParams;
use super::shared::shared_struct;
use crate::backend::{Batch, DeviceOps, Gru};

shared_struct! {
    /// The states of a recurrent cell.
    struct Params = "gru::Params" {
        out: u64 = "void*",
        /// `[rows, 3 * width]`
        inputs: u64 = "const void*",
        /// `[3 * width, width]`
        weight: u64 = "const void*",
        /// `[3 * width]`, or null.
        bias: u64 = "const float*",
        batch: BatchParams,
        width: u32,
        padding: u32,
    }
}

/// Where arrays of shared memory begin.
const ALIGNMENT: usize = 128;

impl<D: Driver> Gru for CudaBackend<D> {
    fn gru(
        &self,
        inputs: &Buffer<D>,
        weight: &Weights<D>,
        bias: Option<&Vector<D>>,
        batch: &Batch<'_, CudaBackend<D>>,
        out: &mut Buffer<D>,
    ) {
        let width = weight.columns;
        assert_eq!(inputs.columns, 3 * width, "inputs of three gates");
        assert_eq!(weight.rows, 3 * width, "weights of three gates");
        for (chunk, slot) in batch.prompts() {
            let is_whole = *chunk == (0..self.context_len(slot));
            assert!(is_whole, "a recurrent network reads a prompt as a whole");
        }
        let (metadata, _scratch) = self.enter(batch);
        out.reshape(inputs.rows, width, self.dtype);
        let params = Params {
            out: out.memory.at(0),
            inputs: inputs.memory.at(0),
            weight: weight.memory.at(0),
            bias: bias.map_or(0, |bias| bias.values.at(0)),
            batch: metadata.batch,
            width: width as u32,
            padding: 0,
        };
        let state_bytes = width * size_of::<f32>();
        let shared_bytes = state_bytes.next_multiple_of(ALIGNMENT) + state_bytes;
        let kernel = self.kernel("gru_f32", "gru_bf16");
        self.device.launch(kernel, [batch.chunks.len(), 1, 1], 256, shared_bytes, &params);
    }
}

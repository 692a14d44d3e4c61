//! Launches `append_tail.cu`: keys and values of beams.

use super::backend::CudaBackend;
use super::buffer::Buffer;
use super::driver::Driver;
use super::store_context::Params;
use crate::backend::{AppendTail, Batch, Heads};

impl<D: Driver> AppendTail for CudaBackend<D> {
    fn append_tail(
        &self,
        layer: usize,
        qkv: &Buffer<D>,
        heads: Heads,
        batch: &mut Batch<'_, CudaBackend<D>>,
    ) {
        self.begin_tails(batch);
        let (metadata, _scratch) = self.enter(batch);
        let params = Params {
            kv: qkv.memory.at(0),
            batch: metadata.batch,
            pages: batch.memory.0.pages(),
            columns: qkv.columns as u32,
            offset: heads.query_dim() as u32,
            layer: layer as u32,
            padding: 0,
        };
        let kernel = self.kernel("append_tail_f32", "append_tail_bf16");
        let rows = metadata.batch.num_rows - metadata.batch.num_prompt_rows;
        self.device.launch(kernel, [rows as usize, 1, 1], 128, 0, &params);
    }
}

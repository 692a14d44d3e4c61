//! Launches `store_context.cu`: keys and values of prompts.

use super::backend::CudaBackend;
use super::buffer::Buffer;
use super::driver::Driver;
use super::memory::Pages;
use super::metadata::BatchParams;
use super::shared::shared_struct;
use crate::backend::{Batch, Heads, StoreContext};

shared_struct! {
    /// Keys and values on their way into contexts or tails.
    struct Params = "StoreParams" {
        /// `[rows, columns]`; from `offset` on the key heads, then the value heads.
        pub kv: u64 = "const void*",
        pub batch: BatchParams,
        pub pages: Pages,
        pub columns: u32,
        pub offset: u32,
        pub layer: u32,
        pub padding: u32,
    }
}

impl<D: Driver> StoreContext for CudaBackend<D> {
    fn store_context(
        &self,
        set: usize,
        kv: &Buffer<D>,
        offset: usize,
        _heads: Heads,
        batch: &Batch<'_, CudaBackend<D>>,
    ) {
        let (metadata, _scratch) = self.enter(batch);
        let params = Params {
            kv: kv.memory.at(0),
            batch: metadata.batch,
            pages: batch.memory.0.pages(),
            columns: kv.columns as u32,
            offset: offset as u32,
            layer: set as u32,
            padding: 0,
        };
        let kernel = self.kernel("store_context_f32", "store_context_bf16");
        let rows = metadata.batch.num_prompt_rows as usize;
        self.device.launch(kernel, [rows, 1, 1], 128, 0, &params);
    }
}

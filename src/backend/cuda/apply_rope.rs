//! Launches `apply_rope.cu`: queries and keys turned to their positions, keys and values stored.

use super::backend::CudaBackend;
use super::buffer::Buffer;
use super::driver::Driver;
use super::memory::Pages;
use super::metadata::BatchParams;
use super::shared::shared_struct;
use crate::backend::{ApplyRope, Batch, HeadNorms, Heads};

shared_struct! {
    /// Rotation of queries and keys.
    struct Params = "apply_rope::Params" {
        /// `[rows, (num_heads + 2 * num_kv_heads) * head_dim]`
        qkv: u64 = "void*",
        /// `[rows, head_dim]`: cosines, then sines.
        rope: u64 = "const float*",
        /// `[head_dim]`, or null.
        query_norm: u64 = "const float*",
        /// `[head_dim]`, or null.
        key_norm: u64 = "const float*",
        batch: BatchParams,
        pages: Pages,
        num_heads: u32,
        layer: u32,
        epsilon: f32,
        padding: u32,
    }
}

impl<D: Driver> ApplyRope for CudaBackend<D> {
    fn apply_rope(
        &self,
        layer: usize,
        qkv: &mut Buffer<D>,
        heads: Heads,
        norms: Option<HeadNorms<'_, CudaBackend<D>>>,
        rope_tables: &Buffer<D>,
        batch: &mut Batch<'_, CudaBackend<D>>,
    ) {
        self.begin_tails(batch);
        let (metadata, _scratch) = self.enter(batch);
        let params = Params {
            qkv: qkv.memory.at(0),
            rope: rope_tables.memory.at(0),
            query_norm: norms.map_or(0, |norms| norms.query.values.at(0)),
            key_norm: norms.map_or(0, |norms| norms.key.values.at(0)),
            batch: metadata.batch,
            pages: batch.memory.0.pages(),
            num_heads: heads.num_heads as u32,
            layer: layer as u32,
            epsilon: norms.map_or(0.0, |norms| norms.epsilon),
            padding: 0,
        };
        let kernel = self.kernel("apply_rope_f32", "apply_rope_bf16");
        self.device.launch(kernel, [qkv.rows, 1, 1], 256, 0, &params);
    }
}

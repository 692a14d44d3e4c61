use bytemuck::{Pod, Zeroable};

use super::driver::Driver;
use super::memory::Pages;
use super::tables::BatchParams;
use super::{Buffer, CudaBackend, Heads, Vector};
use crate::backend::Batch;

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Params {
    qkv: u64,
    rope: u64,
    query_norm: u64,
    key_norm: u64,
    batch: BatchParams,
    pages: Pages,
    num_heads: u32,
    layer: u32,
    epsilon: f32,
    padding: u32,
}

impl<D: Driver> CudaBackend<D> {
    pub(super) fn apply_rope(
        &self,
        layer: usize,
        qkv: &mut Buffer<D>,
        heads: Heads,
        norms: Option<(&Vector<D>, &Vector<D>, f32)>,
        rope: &Buffer<D>,
        batch: &mut Batch<'_, CudaBackend<D>>,
    ) {
        self.begin_tails(batch);
        let tables = self.tables(&mut self.state(), batch.chunks, batch.slots);
        let params = Params {
            qkv: qkv.memory.at(0),
            rope: rope.memory.at(0),
            query_norm: norms.map_or(0, |(query, _, _)| query.values.at(0)),
            key_norm: norms.map_or(0, |(_, key, _)| key.values.at(0)),
            batch: tables.batch,
            pages: batch.memory.0.pages(),
            num_heads: heads.num_heads as u32,
            layer: layer as u32,
            epsilon: norms.map_or(0.0, |(_, _, epsilon)| epsilon),
            padding: 0,
        };
        let kernel = self.kernel("apply_rope_f32", "apply_rope_bf16");
        self.device.launch(kernel, [qkv.rows, 1, 1], 256, 0, &params);
    }

    /// The beams' newest position has keys and values from now on.
    pub(super) fn begin_tails(&self, batch: &mut Batch<'_, CudaBackend<D>>) {
        for slot in &mut batch.slots[batch.chunks.len()..] {
            slot.tail_from.get_or_insert(slot.num_steps);
        }
    }
}

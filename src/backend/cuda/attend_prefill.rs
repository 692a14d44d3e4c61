use bytemuck::{Pod, Zeroable};

use super::driver::Driver;
use super::memory::Pages;
use super::tables::{BatchParams, NARROW_ROWS, PLAIN_ROWS, WIDE_ROWS};
use super::{Buffer, CudaBackend, Heads, Mask, shared_bytes};
use crate::backend::Batch;
use crate::pages::PAGE_LEN;

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Params {
    out: u64,
    queries: u64,
    tiles: u64,
    bias: u64,
    batch: BatchParams,
    pages: Pages,
    query_columns: u32,
    num_heads: u32,
    layer: u32,
    longest: u32,
    is_causal: u32,
    scale: f32,
}

/// Bytes of shared memory of `TensorAttention` and `PlainAttention` in
/// kernels/common/attention.cuh, with ancestors of `positions` a row.
pub(super) fn attention_bytes(tile_rows: usize, head_dim: usize, positions: usize) -> usize {
    let ancestors = tile_rows * positions * 4;
    if tile_rows == PLAIN_ROWS {
        let (rows, page) = (tile_rows * head_dim * 4, PAGE_LEN * (head_dim + 1) * 4);
        let (weights, of_row) = (tile_rows * PAGE_LEN * 4, tile_rows * 4);
        return shared_bytes(&[rows, rows, page, weights, of_row, of_row, of_row, ancestors]);
    }
    let row = (head_dim + 8) * 2;
    let buffers = 2 * PAGE_LEN * row;
    shared_bytes(&[tile_rows * row, buffers, buffers, ancestors])
}

/// Threads of a block of attention.
pub(super) const ATTENTION_THREADS: u32 = 128;

impl<D: Driver> CudaBackend<D> {
    pub(super) fn attend_prefill(
        &self,
        layer: usize,
        queries: &Buffer<D>,
        heads: Heads,
        mask: Mask,
        scale: f32,
        relative_bias: Option<&[f32]>,
        batch: &Batch<'_, CudaBackend<D>>,
        out: &mut Buffer<D>,
    ) {
        let state = &mut *self.state();
        let tables = self.tables(state, batch.chunks, batch.slots);
        out.reshape(queries.rows, heads.query_dim(), self.dtype);
        if let Some(bias) = relative_bias
            && state.bias.0 != bias
        {
            state.bias.1.write_often(bias);
            // Without memory for it, it is not there.
            state.bias.0 = self.device.check().map_or(Vec::new(), |()| bias.to_vec());
        }
        let num_biases = relative_bias.map_or(0, |bias| bias.len() / heads.num_heads);
        let params = Params {
            out: out.memory.at(0),
            queries: queries.memory.at(0),
            tiles: tables.prompt_tiles,
            bias: relative_bias.map_or(0, |_| state.bias.1.at(0)),
            batch: tables.batch,
            pages: batch.memory.0.pages(),
            query_columns: queries.columns as u32,
            num_heads: heads.num_heads as u32,
            layer: layer as u32,
            longest: num_biases.div_ceil(2) as u32,
            is_causal: u32::from(mask == Mask::Causal),
            scale,
        };
        let tile_rows = tables.prompt_tile_rows;
        let kernel = match (tile_rows, heads.head_dim) {
            (NARROW_ROWS, 64) => "attend_prefill_bf16_64",
            (NARROW_ROWS, _) => "attend_prefill_bf16_128",
            (WIDE_ROWS, 64) => "attend_prefill_bf16_64_wide",
            (WIDE_ROWS, _) => "attend_prefill_bf16_128_wide",
            _ => self.kernel("attend_prefill_f32", "attend_prefill_bf16"),
        };
        let grid = [tables.num_prompt_tiles, heads.num_kv_heads, 1];
        let shared = attention_bytes(tile_rows, heads.head_dim, 0);
        self.device.launch(kernel, grid, ATTENTION_THREADS, shared, &params);
    }
}

use bytemuck::{Pod, Zeroable};

use super::attend_prefill::{ATTENTION_THREADS, attention_bytes};
use super::driver::Driver;
use super::memory::{Beams, Pages};
use super::tables::{BatchParams, MAX_POSITIONS, NARROW_ROWS, WIDE_ROWS};
use super::{Buffer, CudaBackend, Heads, KvScope, Vector};
use crate::backend::Batch;

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Params {
    out: u64,
    queries: u64,
    parts: u64,
    part_sums: u64,
    tiles: u64,
    tail_bias: u64,
    batch: BatchParams,
    pages: Pages,
    beams: Beams,
    query_columns: u32,
    num_heads: u32,
    layer: u32,
    num_biases: u32,
    num_splits: u32,
    reaches_context: u32,
    reaches_tail: u32,
    scale: f32,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct CombineParams {
    out: u64,
    parts: u64,
    part_sums: u64,
    batch: BatchParams,
    num_heads: u32,
    head_dim: u32,
    num_splits: u32,
    padding: u32,
}

/// Rows and query heads that a block of `attend_beams_combine` puts together: one a warp.
const COMBINE_ROWS: usize = 4;

impl<D: Driver> CudaBackend<D> {
    pub(super) fn attend_beams(
        &self,
        layer: usize,
        queries: &Buffer<D>,
        heads: Heads,
        scope: KvScope,
        scale: f32,
        tail_bias: Option<&Vector<D>>,
        batch: &Batch<'_, CudaBackend<D>>,
        out: &mut Buffer<D>,
    ) {
        let state = &mut *self.state();
        let tables = self.tables(state, batch.chunks, batch.slots);
        out.reshape(queries.rows, heads.query_dim(), self.dtype);
        let num_splits = if scope == KvScope::Tail { 1 } else { tables.num_splits };
        let tile_rows = tables.beam_tile_rows;
        let num_rows = (tables.batch.num_rows - tables.batch.num_prompt_rows) as usize;
        if scope != KvScope::Tail {
            // Once for all passes.
            let most = self.attention(heads).most_split_rows();
            let parts = most.max(if num_splits > 1 { num_splits * num_rows } else { 0 });
            let parts = parts * heads.num_heads;
            state.parts.reserve(parts * heads.head_dim * size_of::<f32>());
            state.part_sums.reserve(parts * size_of::<[f32; 2]>());
        }
        let (parts, part_sums) = (state.parts.at(0), state.part_sums.at(0));
        let params = Params {
            out: out.memory.at(0),
            queries: queries.memory.at(0),
            parts,
            part_sums,
            tiles: tables.beam_tiles,
            tail_bias: tail_bias.map_or(0, |bias| bias.values.at(0)),
            batch: tables.batch,
            pages: batch.memory.0.pages(),
            beams: batch.memory.0.beams(),
            query_columns: queries.columns as u32,
            num_heads: heads.num_heads as u32,
            layer: layer as u32,
            num_biases: tail_bias.map_or(0, |bias| bias.len / heads.num_heads) as u32,
            num_splits: num_splits as u32,
            reaches_context: u32::from(scope != KvScope::Tail),
            reaches_tail: u32::from(scope != KvScope::Context),
            scale,
        };
        let kernel = match (tile_rows, heads.head_dim) {
            (NARROW_ROWS, 64) => "attend_beams_bf16_64",
            (NARROW_ROWS, _) => "attend_beams_bf16_128",
            (WIDE_ROWS, 64) => "attend_beams_bf16_64_wide",
            (WIDE_ROWS, _) => "attend_beams_bf16_128_wide",
            _ => self.kernel("attend_beams_f32", "attend_beams_bf16"),
        };
        let grid = [tables.num_beam_tiles, heads.num_kv_heads, num_splits];
        let shared = attention_bytes(tile_rows, heads.head_dim, MAX_POSITIONS);
        self.device.launch(kernel, grid, ATTENTION_THREADS, shared, &params);
        if num_splits > 1 {
            let params = CombineParams {
                out: out.memory.at(0),
                parts,
                part_sums,
                batch: tables.batch,
                num_heads: heads.num_heads as u32,
                head_dim: heads.head_dim as u32,
                num_splits: num_splits as u32,
                padding: 0,
            };
            let kernel = self.kernel("attend_beams_combine_f32", "attend_beams_combine_bf16");
            let grid = [(num_rows * heads.num_heads).div_ceil(COMBINE_ROWS), 1, 1];
            self.device.launch(kernel, grid, ATTENTION_THREADS, 0, &params);
        }
    }
}

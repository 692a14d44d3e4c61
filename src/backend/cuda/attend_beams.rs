//! Launches `attend_beams.cu`: attention of beams over contexts, split where that pays, and tails.

use super::backend::CudaBackend;
use super::buffer::Buffer;
use super::driver::Driver;
use super::memory::{Beams, Pages};
use super::metadata::BatchParams;
use super::shared::shared_struct;
use super::tiling::MAX_POSITIONS;
use crate::backend::{AttendBeams, AttentionSpec, Batch, BeamAttention, KvScope, ScoreRule};

shared_struct! {
    /// Attention of beams.
    struct Params = "attend_beams::Params" {
        /// `[rows, num_heads * head_dim]`
        out: u64 = "void*",
        /// `[rows, query_columns]`
        queries: u64 = "const void*",
        /// `[part rows, num_heads, head_dim]`: unscaled sums.
        parts: u64 = "float*",
        /// `[part rows, num_heads]`: largest in powers of two, sum.
        part_sums: u64 = "float2*",
        /// The slot, or kNone, and the first of its rows.
        tiles: u64 = "const uint2*",
        /// `[num_heads, num_biases]` over the distance back, or null.
        tail_bias: u64 = "const float*",
        batch: BatchParams,
        pages: Pages,
        beams: Beams,
        query_columns: u32,
        num_heads: u32,
        layer: u32,
        num_biases: u32,
        reaches_context: u32,
        reaches_tail: u32,
        scale: f32,
        padding: u32,
    }
}

shared_struct! {
    /// Merging the parts of contexts.
    struct CombineParams = "attend_beams::CombineParams" {
        /// `[rows, num_heads * head_dim]`
        out: u64 = "void*",
        /// `[part rows, num_heads, head_dim]`
        parts: u64 = "const float*",
        /// `[part rows, num_heads]`
        part_sums: u64 = "const float2*",
        batch: BatchParams,
        num_heads: u32,
        head_dim: u32,
    }
}

/// Rows and query heads that a block of `attend_beams_combine` merges the parts of: one a warp.
const COMBINE_ROWS: usize = 4;
const COMBINE_THREADS: u32 = 128;

impl<D: Driver> AttendBeams for CudaBackend<D> {
    fn attend_beams(
        &self,
        layer: usize,
        queries: &Buffer<D>,
        attention: &BeamAttention<'_, CudaBackend<D>>,
        batch: &Batch<'_, CudaBackend<D>>,
        out: &mut Buffer<D>,
    ) {
        let AttentionSpec { heads, score_rule: ScoreRule::Softmax, scope, scale, bias } =
            *attention;
        let (metadata, scratch) = self.enter(batch);
        out.reshape(queries.rows, heads.out_dim(), self.dtype);
        let num_splits = if scope == KvScope::Tail { 1 } else { metadata.num_splits };
        let tile_rows = metadata.beam_tile_rows;
        let num_rows = (metadata.batch.num_rows - metadata.batch.num_prompt_rows) as usize;
        let (parts, part_sums) = (scratch.parts.at(0), scratch.part_sums.at(0));
        let params = Params {
            out: out.memory.at(0),
            queries: queries.memory.at(0),
            parts,
            part_sums,
            tiles: metadata.beam_tiles,
            tail_bias: bias.map_or(0, |bias| bias.values.at(0)),
            batch: metadata.batch,
            pages: batch.memory.0.pages(),
            beams: batch.memory.0.beams(),
            query_columns: queries.columns as u32,
            num_heads: heads.num_heads as u32,
            layer: layer as u32,
            num_biases: bias.map_or(0, |bias| bias.len / heads.num_heads) as u32,
            reaches_context: u32::from(scope != KvScope::Tail),
            reaches_tail: u32::from(scope != KvScope::Context),
            scale,
            padding: 0,
        };
        let tiling = self.tiling(heads);
        let plain = self.kernel("attend_beams_f32", "attend_beams_bf16");
        let kernel = match heads.head_dim() {
            64 => tiling.pick(
                tile_rows,
                plain,
                ["attend_beams_bf16_64", "attend_beams_bf16_64_wide"],
                ["attend_beams_bf16_64_warpgroup", "attend_beams_bf16_64_warpgroups"],
            ),
            _ => tiling.pick(
                tile_rows,
                plain,
                ["attend_beams_bf16_128", "attend_beams_bf16_128_wide"],
                ["attend_beams_bf16_128_warpgroup", "attend_beams_bf16_128_warpgroups"],
            ),
        };
        let grid = [metadata.num_beam_tiles, heads.num_kv_heads, num_splits];
        let shared = tiling.shared_bytes(tile_rows, MAX_POSITIONS);
        self.device.launch(kernel, grid, tiling.threads(tile_rows), shared, &params);
        if num_splits > 1 {
            let params = CombineParams {
                out: out.memory.at(0),
                parts,
                part_sums,
                batch: metadata.batch,
                num_heads: heads.num_heads as u32,
                head_dim: heads.head_dim() as u32,
            };
            let kernel = self.kernel("attend_beams_combine_f32", "attend_beams_combine_bf16");
            let grid = [(num_rows * heads.num_heads).div_ceil(COMBINE_ROWS), 1, 1];
            self.device.launch(kernel, grid, COMBINE_THREADS, 0, &params);
        }
    }
}

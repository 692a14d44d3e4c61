//! Launches `attend_prefill.cu`: attention of prompts.

use super::backend::CudaBackend;
use super::buffer::Buffer;
use super::driver::Driver;
use super::memory::Pages;
use super::metadata::BatchParams;
use super::shared::shared_struct;
use crate::backend::{AttendPrefill, AttentionSpec, Batch, Mask, PrefillAttention, ScoreRule};

shared_struct! {
    /// Attention of prompts.
    struct Params = "attend_prefill::Params" {
        /// `[rows, num_heads * head_dim]`
        out: u64 = "void*",
        /// `[rows, query_columns]`
        queries: u64 = "const void*",
        /// The prompt, and the first of its rows.
        tiles: u64 = "const uint2*",
        /// `[num_heads, 2 * longest - 1]`, or null.
        bias: u64 = "const float*",
        batch: BatchParams,
        pages: Pages,
        query_columns: u32,
        num_heads: u32,
        layer: u32,
        longest: u32,
        is_causal: u32,
        scale: f32,
    }
}

impl<D: Driver> AttendPrefill for CudaBackend<D> {
    fn attend_prefill(
        &self,
        set: usize,
        queries: &Buffer<D>,
        attention: &PrefillAttention<'_>,
        batch: &Batch<'_, CudaBackend<D>>,
        out: &mut Buffer<D>,
    ) {
        let AttentionSpec { heads, score_rule: ScoreRule::Softmax, scope: mask, scale, bias } =
            *attention;
        let (metadata, mut scratch) = self.enter(batch);
        out.reshape(queries.rows, heads.out_dim(), self.dtype);
        if let Some(bias) = bias
            && scratch.bias.0 != bias
        {
            scratch.bias.1.write_often(bias);
            // Without memory for it, it is not there.
            scratch.bias.0 = self.device.check().map_or(Vec::new(), |()| bias.to_vec());
        }
        let num_biases = bias.map_or(0, |bias| bias.len() / heads.num_heads);
        let params = Params {
            out: out.memory.at(0),
            queries: queries.memory.at(0),
            tiles: metadata.prompt_tiles,
            bias: bias.map_or(0, |_| scratch.bias.1.at(0)),
            batch: metadata.batch,
            pages: batch.memory.0.pages(),
            query_columns: queries.columns as u32,
            num_heads: heads.num_heads as u32,
            layer: set as u32,
            longest: num_biases.div_ceil(2) as u32,
            is_causal: u32::from(mask == Mask::Causal),
            scale,
        };
        let tile_rows = metadata.prompt_tile_rows;
        let tiling = self.tiling(heads);
        let plain = self.kernel("attend_prefill_f32", "attend_prefill_bf16");
        let kernel = match heads.head_dim() {
            64 => tiling.pick(
                tile_rows,
                plain,
                ["attend_prefill_bf16_64", "attend_prefill_bf16_64_wide"],
                ["attend_prefill_bf16_64_warpgroup", "attend_prefill_bf16_64_warpgroups"],
            ),
            _ => tiling.pick(
                tile_rows,
                plain,
                ["attend_prefill_bf16_128", "attend_prefill_bf16_128_wide"],
                ["attend_prefill_bf16_128_warpgroup", "attend_prefill_bf16_128_warpgroups"],
            ),
        };
        let grid = [metadata.num_prompt_tiles, heads.num_kv_heads, 1];
        let shared = tiling.shared_bytes(tile_rows, 0);
        self.device.launch(kernel, grid, tiling.threads(tile_rows), shared, &params);
    }
}

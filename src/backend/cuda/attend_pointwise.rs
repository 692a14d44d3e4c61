//! Launches `attend_pointwise.cu`: attention of prompts whose weights are no distribution.

use super::backend::CudaBackend;
use super::buffer::Buffer;
use super::driver::Driver;
use super::memory::Pages;
use super::metadata::BatchParams;
use super::shared::shared_struct;
use crate::backend::{AttendPointwise, Batch, PointwiseAttention, Seen};
use crate::pages::PAGE_LEN;

/// Rows that a block works on.
pub(super) const TILE_ROWS: usize = 8;

shared_struct! {
    /// What a row of a prompt attends to.
    struct RowEntry = "PointwiseRow" {
        position: u32,
        /// Positions before the targets.
        from: u32,
        to: u32,
        /// The row of the first target that it sees.
        target_row: u32,
        num_targets: u32,
        prompt: u32,
        /// Multiplies the weights.
        share: f32,
        /// Where the times of its prompt begin.
        first_time: u32,
    }
}

shared_struct! {
    /// Pointwise attention of prompts.
    struct Params = "attend_pointwise::Params" {
        /// `[rows, num_heads * head_dim]`
        out: u64 = "void*",
        /// `[rows, query_columns]`: queries, keys, values
        queries: u64 = "const void*",
        rows: u64 = "const PointwiseRow*",
        /// The first row, and how many.
        tiles: u64 = "const uint2*",
        /// `[2 * longest - 1]`, or null, as what follows is then.
        positions: u64 = "const float*",
        times: u64 = "const float*",
        thresholds: u64 = "const uint64_t*",
        seconds: u64 = "const int64_t*",
        batch: BatchParams,
        pages: Pages,
        query_columns: u32,
        num_heads: u32,
        layer: u32,
        longest: u32,
        num_thresholds: u32,
        scale: f32,
    }
}

impl<D: Driver> AttendPointwise for CudaBackend<D> {
    fn attend_pointwise(
        &self,
        set: usize,
        queries: &Buffer<D>,
        attention: &PointwiseAttention<'_, CudaBackend<D>>,
        batch: &Batch<'_, CudaBackend<D>>,
        out: &mut Buffer<D>,
    ) {
        let heads = attention.heads;
        assert_eq!(heads.num_heads, heads.num_kv_heads, "a key head for each query head");
        let (metadata, mut scratch) = self.enter(batch);
        out.reshape(queries.rows, heads.out_dim(), self.dtype);
        let entries = Entries::of(attention, batch);
        if entries.tiles.is_empty() {
            return;
        }
        let mut bytes: Vec<u8> = Vec::new();
        let mut put = |part: &[u8]| {
            bytes.resize(bytes.len().next_multiple_of(16), 0);
            let offset = bytes.len();
            bytes.extend_from_slice(part);
            offset
        };
        let thresholds = attention.bias.map_or(&[][..], |bias| bias.thresholds);
        let offsets = [
            put(bytemuck::cast_slice(&entries.rows)),
            put(bytemuck::cast_slice(&entries.tiles)),
            put(bytemuck::cast_slice(thresholds)),
            put(bytemuck::cast_slice(&entries.seconds)),
        ];
        scratch.row_list.write_often(&bytes);
        let [rows, tiles, thresholds, seconds] = offsets.map(|at| scratch.row_list.at(at));
        let bias = attention.bias;
        let params = Params {
            out: out.memory.at(0),
            queries: queries.memory.at(0),
            rows,
            tiles,
            positions: bias.map_or(0, |bias| bias.positions.values.at(0)),
            times: bias.map_or(0, |bias| bias.times.values.at(0)),
            thresholds: bias.map_or(0, |_| thresholds),
            seconds: bias.map_or(0, |_| seconds),
            batch: metadata.batch,
            pages: batch.memory.0.pages(),
            query_columns: queries.columns as u32,
            num_heads: heads.num_heads as u32,
            layer: set as u32,
            longest: bias.map_or(0, |bias| bias.positions.len.div_ceil(2)) as u32,
            num_thresholds: bias.map_or(0, |bias| bias.thresholds.len()) as u32,
            scale: attention.scale,
        };
        let floats = TILE_ROWS * (2 * heads.head_dim() + PAGE_LEN);
        let shared = (floats + 3 * 128 / size_of::<f32>()) * size_of::<f32>();
        let kernel = self.kernel("attend_pointwise_f32", "attend_pointwise_bf16");
        let grid = [entries.tiles.len(), heads.num_heads, 1];
        self.device.launch(kernel, grid, 128, shared, &params);
    }
}

/// What a launch is told of its rows.
#[derive(Default)]
struct Entries {
    rows: Vec<RowEntry>,
    tiles: Vec<[u32; 2]>,
    seconds: Vec<i64>,
}

impl Entries {
    fn of<D: Driver>(
        attention: &PointwiseAttention<'_, CudaBackend<D>>,
        batch: &Batch<'_, CudaBackend<D>>,
    ) -> Entries {
        let mut entries = Entries::default();
        for (prompt, (chunk, _)) in batch.prompts().enumerate() {
            let first_row = entries.rows.len();
            let first_target = attention.first_targets[prompt];
            let first_time = entries.seconds.len() as u32;
            if let Some(bias) = attention.bias {
                entries.seconds.extend_from_slice(&bias.seconds[prompt]);
            }
            for position in chunk.clone() {
                let Seen { before, targets } = attention.mask.seen(position, first_target);
                assert!(
                    targets.is_empty() || targets.start >= chunk.start,
                    "a group of targets is read as a whole"
                );
                let target_row = first_row + targets.start.saturating_sub(chunk.start);
                entries.rows.push(RowEntry {
                    position: position as u32,
                    from: before.start as u32,
                    to: before.end as u32,
                    target_row: target_row as u32,
                    num_targets: targets.len() as u32,
                    prompt: prompt as u32,
                    share: 1.0 / attention.divisors[prompt],
                    first_time,
                });
            }
            let firsts = (first_row..entries.rows.len()).step_by(TILE_ROWS);
            let end = entries.rows.len();
            let tile = |first: usize| [first as u32, (end - first).min(TILE_ROWS) as u32];
            entries.tiles.extend(firsts.map(tile));
        }
        entries
    }
}

//! How attention is cut into blocks of threads: rows of a tile, and parts of a context.
//!
//! An answer must not depend on the other requests of a pass. So the parts that a context is split
//! into (Flash-Decoding, Dao et al. 2023) follow from its slot and the device alone; tiles of more
//! rows compute each row as tiles of fewer do, so their size may follow from the whole pass.

use crate::backend::Heads;
use crate::pages::PAGE_LEN;
use crate::tensor::Dtype;

/// Positions that a tail may have: the start, and one for each step.
pub(super) const MAX_POSITIONS: usize = 16;
/// Rows of a tile without tensor cores, and with them, of 16 and of 32 rows a warp, or of one and of
/// two warpgroups.
pub(super) const PLAIN_ROWS: usize = 16;
pub(super) const NARROW_ROWS: usize = 64;
pub(super) const WIDE_ROWS: usize = 128;
/// Parts of a context at most: each is written in f32 and read again.
pub(super) const MAX_SPLITS: usize = 8;
/// Pages of a part at least: it reads its queries and writes its sums once more, and that wants
/// pages to pay for it; fewer where a slot has so few tiles that most of the device would idle.
const MIN_SPLIT_PAGES: usize = 8;
const MIN_SPLIT_PAGES_OF_FEW_TILES: usize = 4;

/// What chooses the kernels of attention: heads, number type and device.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tiling {
    pub heads: Heads,
    pub dtype: Dtype,
    pub num_processors: usize,
    pub max_shared_bytes: usize,
    /// Whether the device multiplies by warpgroups.
    pub has_warpgroups: bool,
}

/// The kinds of kernels of attention. Which one a model's heads have, follows from them and the
/// device: the kinds do not add up numbers in the same order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Family {
    /// Without tensor cores.
    Plain,
    /// With tensor cores, a warp at a time.
    Warps,
    /// With tensor cores, a warpgroup at a time.
    Warpgroups,
}

/// The parts of one slot's context, read by blocks of their own and put together in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Splits {
    pub count: usize,
    /// Pages of each part; the last may have fewer.
    pub pages: usize,
}

impl Tiling {
    /// The kernels for the heads.
    fn family(self) -> Family {
        let has_tensor_kernel =
            self.dtype == Dtype::Bf16 && matches!(self.heads.head_dim(), 64 | 128);
        let has_room =
            |family| self.bytes_of(family, NARROW_ROWS, MAX_POSITIONS) <= self.max_shared_bytes;
        match has_tensor_kernel {
            true if self.has_warpgroups && has_room(Family::Warpgroups) => Family::Warpgroups,
            true if has_room(Family::Warps) => Family::Warps,
            _ => Family::Plain,
        }
    }

    /// Whether the device has the shared memory for any tile.
    pub fn is_possible(self) -> bool {
        self.bytes_of(self.family(), self.tile_rows([1]), MAX_POSITIONS) <= self.max_shared_bytes
    }

    /// Picks the kernel for tiles of `tile_rows`: without tensor cores, narrow or wide by warps,
    /// narrow or wide by warpgroups.
    pub fn pick<T: Copy>(self, tile_rows: usize, plain: T, warps: [T; 2], warpgroups: [T; 2]) -> T {
        let is_wide = usize::from(tile_rows == WIDE_ROWS);
        match self.family() {
            Family::Plain => plain,
            Family::Warps => warps[is_wide],
            Family::Warpgroups => warpgroups[is_wide],
        }
    }

    /// Threads of a block of attention.
    pub fn threads(self, tile_rows: usize) -> u32 {
        self.pick(tile_rows, 128, [128, 128], [128, 256])
    }

    /// Bytes of shared memory of a block of attention, with ancestors at `positions` positions for
    /// each row.
    pub fn shared_bytes(self, tile_rows: usize, positions: usize) -> usize {
        self.bytes_of(self.family(), tile_rows, positions)
    }

    /// As `TensorAttention` and `PlainAttention` in kernels/common/attention.cuh and
    /// `WarpgroupAttention` in kernels/common/warpgroup_attention.cuh take it.
    fn bytes_of(self, family: Family, tile_rows: usize, positions: usize) -> usize {
        let head_dim = self.heads.head_dim();
        let ancestors = tile_rows * positions * 4;
        let padded_row = (head_dim + 8) * 2;
        let queries = tile_rows * padded_row;
        match family {
            Family::Plain => {
                let (rows, page) = (tile_rows * head_dim * 4, PAGE_LEN * (head_dim + 1) * 4);
                let (weights, of_row) = (tile_rows * PAGE_LEN * 4, tile_rows * 4);
                shared_bytes(&[rows, rows, page, weights, of_row, of_row, of_row, ancestors])
            }
            Family::Warps => {
                let buffers = 2 * PAGE_LEN * padded_row;
                shared_bytes(&[buffers, buffers, queries, ancestors])
            }
            Family::Warpgroups => {
                let page = PAGE_LEN * head_dim * 2;
                let pages_ahead = tile_rows / NARROW_ROWS;
                let (keys, values) = ((pages_ahead + 1) * page, (pages_ahead + 2) * page);
                shared_bytes(&[keys, values, queries, ancestors])
            }
        }
    }

    /// Query heads that share a KV head: rows of a tile for each prompt token or beam.
    pub fn group(self) -> usize {
        self.heads.num_heads / self.heads.num_kv_heads
    }

    /// Rows of a tile in a pass over prompts or slots with `counts` tokens or beams: tensor cores
    /// take more, and most where there are blocks for the whole device even so. A row's result does
    /// not depend on it (`TensorAttention` in kernels/common/attention.cuh).
    pub fn tile_rows(self, counts: impl IntoIterator<Item = usize>) -> usize {
        let family = self.family();
        if family == Family::Plain {
            return PLAIN_ROWS;
        }
        let rows = counts.into_iter().map(|count| count * self.group());
        let (num_tiles, most) = rows.fold((0, 0), |(num_tiles, most), rows| {
            (num_tiles + rows.div_ceil(WIDE_ROWS), most.max(rows))
        });
        let num_blocks = num_tiles * self.heads.num_kv_heads;
        let is_full = num_blocks >= self.blocks_at_once(WIDE_ROWS) && most > NARROW_ROWS;
        let has_room = self.bytes_of(family, WIDE_ROWS, MAX_POSITIONS) <= self.max_shared_bytes;
        if is_full && has_room { WIDE_ROWS } else { NARROW_ROWS }
    }

    /// Blocks of a tile of `tile_rows` that the device runs at a time: as many a processor as it
    /// has registers and shared memory for.
    fn blocks_at_once(self, tile_rows: usize) -> usize {
        // Registers: kernels/README.md. A block takes 1 KiB of shared memory for the system.
        let by_registers = self.pick(tile_rows, 4, [2, 2], [2, 1]);
        let bytes = self.shared_bytes(tile_rows, MAX_POSITIONS) + 1024;
        let by_shared = (self.max_shared_bytes + 1024) / bytes;
        self.num_processors * by_shared.clamp(1, by_registers)
    }

    /// The parts of the context of a slot with `num_beams` rows: so many that the slot alone gives
    /// all processors something to do, in blocks that all run at once.
    pub fn splits(self, context_len: usize, num_beams: usize) -> Splits {
        let num_pages = context_len.div_ceil(PAGE_LEN);
        let most = self.most_splits(num_beams);
        let min_pages =
            if most == MAX_SPLITS { MIN_SPLIT_PAGES_OF_FEW_TILES } else { MIN_SPLIT_PAGES };
        let most = most.min(num_pages / min_pages).max(1);
        let pages = num_pages.div_ceil(most).max(1);
        Splits { count: num_pages.div_ceil(pages).max(1), pages }
    }

    /// The most parts of any context of a slot with `num_beams` rows.
    fn most_splits(self, num_beams: usize) -> usize {
        let tile_rows = self.tile_rows([num_beams]);
        let num_tiles = (num_beams * self.group()).div_ceil(tile_rows);
        let num_blocks = num_tiles * self.heads.num_kv_heads;
        (self.blocks_at_once(tile_rows) / num_blocks.max(1)).clamp(1, MAX_SPLITS)
    }

    /// Rows of beams, times parts of contexts where there are several, that a pass of `num_rows`
    /// rows of beams has at most, or one slot of any width.
    pub fn most_part_rows(self, num_rows: usize) -> usize {
        let in_company = num_rows * self.most_splits(1);
        let of_one = |tile_rows: usize| {
            (self.blocks_at_once(tile_rows) * tile_rows).div_ceil(self.heads.num_heads)
        };
        let alone = [PLAIN_ROWS, NARROW_ROWS, WIDE_ROWS].map(of_one).into_iter().max();
        in_company.max(alone.expect("three kinds of tiles"))
    }
}

/// Bytes of dynamic shared memory for arrays of these sizes, as `SharedMemory` in
/// kernels/common/device.cuh lays them out.
pub(super) fn shared_bytes(arrays: &[usize]) -> usize {
    arrays.iter().fold(0, |used: usize, bytes| used.next_multiple_of(128) + bytes)
}

/// The next of the sizes that steps are padded to, so that steps of like shape share a graph:
/// powers of two, then multiples of 64.
pub(super) fn padded(size: usize) -> usize {
    if size <= 64 { size.next_power_of_two() } else { size.next_multiple_of(64) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Devices and heads of many kinds.
    fn tilings() -> Vec<Tiling> {
        let mut found = Vec::new();
        for (num_processors, max_shared_bytes) in [(4, 227 << 10), (132, 227 << 10), (82, 99 << 10)]
        {
            for (dtype, has_warpgroups) in
                [(Dtype::F32, false), (Dtype::Bf16, false), (Dtype::Bf16, true)]
            {
                for (num_heads, num_kv_heads, head_dim) in
                    [(1, 1, 8), (16, 8, 128), (8, 8, 64), (24, 2, 64), (6, 3, 24)]
                {
                    let heads = Heads::new(num_heads, num_kv_heads, head_dim);
                    found.push(Tiling {
                        heads,
                        dtype,
                        num_processors,
                        max_shared_bytes,
                        has_warpgroups,
                    });
                }
            }
        }
        found
    }

    #[test]
    fn parts_cover_a_context_and_none_is_empty() {
        for tiling in tilings() {
            for context_len in (0..700).chain([5000, 32_768]) {
                for num_beams in [1, 7, 64, 256, 1024] {
                    let Splits { count, pages } = tiling.splits(context_len, num_beams);
                    let num_pages = context_len.div_ceil(PAGE_LEN);
                    let what = format!("{tiling:?} {context_len} {num_beams}");
                    assert!(count * pages >= num_pages, "{what}: all pages are in a part");
                    assert!(count == 1 || (count - 1) * pages < num_pages, "{what}: none is empty");
                    assert!(count == 1 || pages >= MIN_SPLIT_PAGES_OF_FEW_TILES, "{what}");
                }
            }
        }
    }

    #[test]
    fn the_parts_of_a_pass_fit_into_the_memory_that_is_taken_for_them() {
        let mut rng = fastrand::Rng::with_seed(1);
        for tiling in tilings() {
            for num_rows in [64, 256, 4096] {
                for _ in 0..50 {
                    let (mut rows, mut parts) = (0, 0);
                    let most = 1 << rng.u32(0..=12);
                    loop {
                        let num_beams = rng.usize(1..=most.min(num_rows));
                        if rows + num_beams > num_rows {
                            break;
                        }
                        rows += num_beams;
                        let splits = tiling.splits(rng.usize(1..20_000), num_beams);
                        parts += if splits.count > 1 { num_beams * splits.count } else { 0 };
                    }
                    assert!(parts <= tiling.most_part_rows(num_rows), "{tiling:?} {num_rows}");
                }
            }
            for num_beams in 1..2000 {
                let splits = tiling.splits(20_000, num_beams);
                let parts = if splits.count > 1 { num_beams * splits.count } else { 0 };
                assert!(parts <= tiling.most_part_rows(1), "{tiling:?} {num_beams}");
            }
        }
    }

    #[test]
    fn a_pass_that_fills_the_device_takes_wide_tiles() {
        for (num_heads, num_kv_heads, head_dim) in [(4, 2, 64), (6, 2, 64), (4, 2, 128)] {
            let heads = Heads::new(num_heads, num_kv_heads, head_dim);
            let tile_rows = |num_processors, counts: &[usize]| {
                let (dtype, max_shared_bytes) = (Dtype::Bf16, 227 << 10);
                let has_warpgroups = false;
                let tiling =
                    Tiling { heads, dtype, num_processors, max_shared_bytes, has_warpgroups };
                tiling.tile_rows(counts.iter().copied())
            };
            assert_eq!((tile_rows(1, &[256]), tile_rows(1000, &[256])), (WIDE_ROWS, NARROW_ROWS));
            assert_eq!(tile_rows(16, &[256; 100]), WIDE_ROWS);
            assert_eq!(tile_rows(1, &[4; 100]), NARROW_ROWS, "each would waste most of a tile");
        }
    }

    #[test]
    fn a_slot_alone_gives_an_h200_work_for_all_its_processors() {
        let heads = Heads::new(16, 8, 128);
        let (dtype, num_processors, max_shared_bytes) = (Dtype::Bf16, 132, 227 << 10);
        let has_warpgroups = true;
        let tiling = Tiling { heads, dtype, num_processors, max_shared_bytes, has_warpgroups };
        // Four tiles for each of eight KV heads, in four parts: 128 blocks. A short context has fewer
        // parts, which cost a full device more than they give an empty one.
        assert_eq!(tiling.splits(1000, 256), Splits { count: 2, pages: 8 });
        assert_eq!(tiling.splits(5000, 256), Splits { count: 4, pages: 20 });
        // With many beams there are enough tiles.
        assert_eq!(tiling.splits(5000, 1024), Splits { count: 1, pages: 79 });
        // One tile for each KV head.
        assert_eq!(tiling.splits(5000, 10), Splits { count: 8, pages: 10 });
        assert_eq!(tiling.splits(1000, 32), Splits { count: 4, pages: 4 });
        assert_eq!(tiling.splits(200, 10), Splits { count: 1, pages: 4 });
    }
}

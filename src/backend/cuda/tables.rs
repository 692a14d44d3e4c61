//! Which row of a pass belongs to whom, as kernels read it.

use std::borrow::Borrow;
use std::ops::Range;

use bytemuck::{Pod, Zeroable};

use super::attend_prefill::attention_bytes;
use super::driver::Driver;
use super::handle::DeviceMemory;
use super::slot::Slot;
use crate::backend::Heads;
use crate::pages::PAGE_LEN;
use crate::tensor::Dtype;

/// Positions that a tail may have: the start, and a step each.
pub(super) const MAX_POSITIONS: usize = 16;
/// Stands for "no search" in a tile that only pads.
const NONE: u32 = u32::MAX;
/// Splits of a context at most.
const MAX_SPLITS: usize = 16;

/// `Prompt` in kernels/common/batch.cuh.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct PromptEntry {
    first_row: u32,
    num_rows: u32,
    start: u32,
    first_page: u32,
    is_kept: u32,
}

/// `Search` in kernels/common/batch.cuh.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct SearchEntry {
    first_row: u32,
    num_rows: u32,
    num_steps: u32,
    context_len: u32,
    first_context_page: u32,
    first_tail_page: u32,
    start_token: u32,
    tail_from: u32,
    position_page: [u32; MAX_POSITIONS],
}

/// `Batch` in kernels/common/batch.cuh.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(super) struct BatchParams {
    prompts: u64,
    searches: u64,
    pages: u64,
    num_prompts: u32,
    pub num_searches: u32,
    pub num_prompt_rows: u32,
    pub num_rows: u32,
}

/// The heads of a pass, their number type and the device: what chooses the kernels of attention.
#[derive(Clone, Copy)]
pub(super) struct Attention {
    pub heads: Heads,
    pub dtype: Dtype,
    pub num_processors: usize,
    pub max_shared_bytes: usize,
}

impl Attention {
    /// Whether the device has the shared memory for a block of so many rows.
    pub fn has_room(self, tile_rows: usize) -> bool {
        attention_bytes(tile_rows, self.heads.head_dim, MAX_POSITIONS) <= self.max_shared_bytes
    }

    /// Rows of a tile of a pass over prompts or searches with so many rows each: tensor cores take
    /// more, and most of all where there are blocks for the whole device even so. A row's result
    /// does not depend on it (`TensorAttention` in kernels/common/attention.cuh).
    fn tile_rows(self, rows: impl Iterator<Item = usize>) -> usize {
        let has_tensor_kernel =
            self.dtype == Dtype::Bf16 && matches!(self.heads.head_dim, 64 | 128);
        if !has_tensor_kernel || !self.has_room(NARROW_ROWS) {
            return PLAIN_ROWS;
        }
        let (num_tiles, most) = rows.fold((0, 0), |(num_tiles, most), rows| {
            (num_tiles + rows.div_ceil(WIDE_ROWS), most.max(rows))
        });
        let num_blocks = num_tiles * self.heads.num_kv_heads;
        let is_full = num_blocks >= self.blocks_at_once(WIDE_ROWS) && most > NARROW_ROWS;
        if is_full && self.has_room(WIDE_ROWS) { WIDE_ROWS } else { NARROW_ROWS }
    }

    /// Blocks of so many rows that the device runs at a time: as many a processor as it has
    /// registers and shared memory for.
    fn blocks_at_once(self, tile_rows: usize) -> usize {
        // Registers: kernels/README.md. A block takes 1 KiB of shared memory for the system.
        let by_registers = match tile_rows {
            WIDE_ROWS | NARROW_ROWS => 2,
            _ => 4,
        };
        let bytes = attention_bytes(tile_rows, self.heads.head_dim, MAX_POSITIONS) + 1024;
        let by_shared = (self.max_shared_bytes + 1024) / bytes;
        self.num_processors * by_shared.clamp(1, by_registers)
    }

    /// Into how many parts contexts are split so that all processors have something to do, and all
    /// blocks run at once.
    fn num_splits(self, num_pages: usize, num_tiles: usize, tile_rows: usize) -> usize {
        // A split reads its queries and writes its sums once more: that wants pages to pay for it.
        let pages_per_split = if tile_rows == WIDE_ROWS { 4 } else { 2 };
        let num_blocks = num_tiles * self.heads.num_kv_heads;
        let wanted = self.blocks_at_once(tile_rows) / num_blocks.max(1);
        wanted.min(num_pages / pages_per_split).clamp(1, MAX_SPLITS)
    }

    /// Rows of beams times splits that a pass has at most, where contexts are split: the blocks of
    /// all splits run at once, and padding at most doubles the rows.
    pub fn most_split_rows(self) -> usize {
        let rows = |tile_rows| 2 * self.blocks_at_once(tile_rows) * tile_rows;
        let most = [PLAIN_ROWS, NARROW_ROWS, WIDE_ROWS].map(rows).into_iter().max();
        most.expect("three kinds").div_ceil(self.heads.num_heads)
    }

    /// Query heads that share a KV head.
    fn group(self) -> usize {
        self.heads.num_heads / self.heads.num_kv_heads
    }
}

/// Rows of a tile without tensor cores, and with them, of 16 and of 32 rows a warp.
pub(super) const PLAIN_ROWS: usize = 16;
pub(super) const NARROW_ROWS: usize = 64;
pub(super) const WIDE_ROWS: usize = 128;

/// What a step's tables are padded to, so that steps of like shape look the same to kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Shape {
    pub num_searches: usize,
    pub num_rows: usize,
    pub tile_rows: usize,
    pub num_tiles: usize,
    pub num_splits: usize,
}

/// The tables of a pass, on the device.
#[derive(Clone, Copy)]
pub(super) struct Tables {
    pub batch: BatchParams,
    /// Rows of each tile.
    pub prompt_tile_rows: usize,
    pub beam_tile_rows: usize,
    pub prompt_tiles: u64,
    pub num_prompt_tiles: usize,
    pub beam_tiles: u64,
    pub num_beam_tiles: usize,
    pub num_splits: usize,
    /// 0, 1, 2 and so on, one for each row.
    pub rows: u64,
}

/// The next of the sizes that are used for padding: powers of two, then multiples of 64.
pub(super) fn padded(size: usize) -> usize {
    if size <= 64 { size.next_power_of_two() } else { size.next_multiple_of(64) }
}

/// The shape of a step in which `slots` read their beams, in so many rows, padded.
pub(super) fn padded_shape<D: Driver>(
    slots: &[Slot<D>],
    num_rows: usize,
    attention: Attention,
) -> Shape {
    let rows = |slot: &Slot<D>| slot.num_rows() * attention.group();
    let tile_rows = attention.tile_rows(slots.iter().map(rows));
    let tiles = |slot: &Slot<D>| rows(slot).div_ceil(tile_rows);
    let num_tiles = padded(slots.iter().map(tiles).sum());
    let longest = slots.iter().map(|slot| slot.spec.context_len).max().unwrap_or(0);
    let num_pages = longest.div_ceil(PAGE_LEN).next_power_of_two();
    Shape {
        num_searches: padded(slots.len()),
        num_rows,
        tile_rows,
        num_tiles,
        num_splits: attention.num_splits(num_pages, num_tiles, tile_rows),
    }
}

/// Writes the tables of a pass over `chunks` of the first slots and the beams of the others. Where the
/// pass is recorded, it has a shape, and slots the rows that begin at these.
pub(super) fn write<D: Driver>(
    memory: &mut DeviceMemory<D>,
    chunks: &[Range<usize>],
    slots: &[impl Borrow<Slot<D>>],
    attention: Attention,
    recorded: Option<(Shape, &[usize])>,
) -> Tables {
    let group = attention.group();
    let (mut prompts, mut searches, mut pages) = (Vec::new(), Vec::new(), Vec::new());
    let (mut prompt_tiles, mut beam_tiles): (Vec<[u32; 2]>, Vec<[u32; 2]>) =
        (Vec::new(), Vec::new());
    let mut row = 0;
    let slots: Vec<&Slot<D>> = slots.iter().map(Borrow::borrow).collect();
    let beams_of = slots[chunks.len()..].iter().map(|slot| slot.num_rows() * group);
    let prompt_tile_rows = attention.tile_rows(chunks.iter().map(|chunk| chunk.len() * group));
    let beam_tile_rows = attention.tile_rows(beams_of);
    for (index, (chunk, slot)) in chunks.iter().zip(&slots).enumerate() {
        prompts.push(PromptEntry {
            first_row: row as u32,
            num_rows: chunk.len() as u32,
            start: chunk.start as u32,
            first_page: pages.len() as u32,
            is_kept: u32::from(!is_kept_before(&chunks[..index], &slots, chunk, slot)),
        });
        pages.extend_from_slice(&slot.spec.context_pages);
        let firsts = (0..chunk.len() * group).step_by(prompt_tile_rows);
        prompt_tiles.extend(firsts.map(|first| [index as u32, first as u32]));
        row += chunk.len();
    }
    // Later tiles see more of a causal context: blocks start in order, and the longest go first.
    prompt_tiles.reverse();
    let num_prompt_rows = row;
    for (index, slot) in slots[chunks.len()..].iter().enumerate() {
        let mut position_page = [0; MAX_POSITIONS];
        for (to, &page) in position_page.iter_mut().zip(&slot.position_page) {
            *to = page as u32;
        }
        let first_context_page = pages.len() as u32;
        pages.extend_from_slice(&slot.spec.context_pages);
        searches.push(SearchEntry {
            first_row: recorded.map_or(row, |(_, first_rows)| first_rows[index]) as u32,
            num_rows: slot.num_rows() as u32,
            num_steps: slot.num_steps as u32,
            context_len: slot.spec.context_len as u32,
            first_context_page,
            first_tail_page: pages.len() as u32,
            start_token: slot.spec.start_token,
            tail_from: slot.tail_from.map_or(u32::MAX, |from| from as u32),
            position_page,
        });
        pages.extend_from_slice(&slot.spec.tail_pages);
        let firsts = (0..slot.num_rows() * group).step_by(beam_tile_rows);
        beam_tiles.extend(firsts.map(|first| [index as u32, first as u32]));
        row += slot.num_rows();
    }
    let num_splits = match recorded {
        Some((shape, _)) => {
            let empty = SearchEntry { first_row: shape.num_rows as u32, ..SearchEntry::zeroed() };
            searches.resize(shape.num_searches, empty);
            beam_tiles.resize(shape.num_tiles, [NONE, 0]);
            row = shape.num_rows;
            shape.num_splits
        }
        None => {
            let longest = slots.iter().map(|slot| slot.spec.context_len).max().unwrap_or(0);
            attention.num_splits(longest.div_ceil(PAGE_LEN), beam_tiles.len(), beam_tile_rows)
        }
    };
    let rows: Vec<u32> = (0..row as u32).collect();

    // What has a fixed size comes first, so that a padded table's parts are always at the same
    // places.
    let mut bytes = Vec::new();
    let mut put = |part: &[u8]| {
        bytes.resize(bytes.len().next_multiple_of(16), 0);
        let offset = bytes.len();
        bytes.extend_from_slice(part);
        offset
    };
    let offsets = [
        put(bytemuck::cast_slice(&prompts)),
        put(bytemuck::cast_slice(&searches)),
        put(bytemuck::cast_slice(&prompt_tiles)),
        put(bytemuck::cast_slice(&beam_tiles)),
        put(bytemuck::cast_slice(&rows)),
        put(bytemuck::cast_slice(&pages)),
    ];
    memory.write_often(&bytes);
    let at = offsets.map(|offset| memory.at(offset));
    Tables {
        batch: BatchParams {
            prompts: at[0],
            searches: at[1],
            pages: at[5],
            num_prompts: prompts.len() as u32,
            num_searches: searches.len() as u32,
            num_prompt_rows: num_prompt_rows as u32,
            num_rows: row as u32,
        },
        prompt_tile_rows,
        beam_tile_rows,
        prompt_tiles: at[2],
        num_prompt_tiles: prompt_tiles.len(),
        beam_tiles: at[3],
        num_beam_tiles: beam_tiles.len(),
        num_splits,
        rows: at[4],
    }
}

/// Whether one of the prompts before has the first of a chunk's tokens in the same place.
fn is_kept_before<D: Driver>(
    before: &[Range<usize>],
    slots: &[&Slot<D>],
    chunk: &Range<usize>,
    slot: &Slot<D>,
) -> bool {
    let page_of = |slot: &Slot<D>| slot.spec.context_pages.get(chunk.start / PAGE_LEN).copied();
    before.iter().zip(slots).any(|(other, of)| {
        other.contains(&chunk.start) && page_of(of).is_some() && page_of(of) == page_of(slot)
    })
}

/// What the tables depend on.
pub(super) fn key<D: Driver>(chunks: &[Range<usize>], slots: &[Slot<D>]) -> Vec<u64> {
    let of_chunks = chunks.iter().flat_map(|chunk| [chunk.start as u64, chunk.end as u64]);
    let of_slots = slots.iter().flat_map(|slot| {
        let tail_from = slot.tail_from.map_or(u64::MAX, |from| from as u64);
        [slot.id, slot.num_steps as u64, slot.room.len() as u64, tail_from]
    });
    std::iter::once(chunks.len() as u64).chain(of_chunks).chain(of_slots).collect()
}

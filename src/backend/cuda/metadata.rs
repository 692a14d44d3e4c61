//! Attention metadata: which rows of a pass belong to which prompt or slot, as kernels read it.

use std::borrow::Borrow;
use std::ops::Range;

use bytemuck::Zeroable;

use super::device_memory::DeviceMemory;
use super::driver::Driver;
use super::shared::shared_struct;
use super::slot::Slot;
use super::tiling::{MAX_POSITIONS, Tiling, padded};
use crate::pages::PAGE_LEN;

/// Stands for "no slot" in a tile that only pads a step.
const NONE: u32 = u32::MAX;

shared_struct! {
    /// A slot with rows of its prompt in this pass.
    struct PromptEntry = "Prompt" {
        first_row: u32,
        num_rows: u32,
        /// The position of its first row.
        start: u32,
        /// The first page of its context, among `Batch::pages`.
        first_page: u32,
        /// Zero where another prompt of the pass stores this KV: one context, two slots.
        is_kept: u32,
        /// Tokens of its context, whether this pass reads all of them or not.
        context_len: u32,
    }
}

shared_struct! {
    /// A slot with beams in this pass.
    struct SlotEntry = "Search" {
        /// The first row of its beams, among the pass's rows.
        first_row: u32,
        /// Rows for beams at this step: there may be fewer beams.
        num_rows: u32,
        /// Steps taken so far.
        num_steps: u32,
        /// Tokens of its context.
        context_len: u32,
        /// The first page of its context, among `Batch::pages`.
        first_context_page: u32,
        /// The first page of its tails, among `Batch::pages`.
        first_tail_page: u32,
        /// The token of the one beam that it starts with.
        start_token: u32,
        /// The first position with KV in the tail; above `num_steps` where there is none.
        tail_from: u32,
        /// By position: its first page, counted from `first_tail_page`.
        position_page: [u32; MAX_POSITIONS],
        /// Parts that attention splits its context into.
        num_splits: u32,
        /// Pages of each part but the last.
        pages_per_split: u32,
        /// The first of its part rows, [num_splits, num_rows], where there are several parts.
        first_part_row: u32,
    }
}

shared_struct! {
    /// Names the prompt or slot of each row of a pass.
    struct BatchParams = "Batch" {
        prompts: u64 = "const Prompt*",
        searches: u64 = "const Search*",
        pages: u64 = "const uint32_t*",
        num_prompts: u32,
        pub num_searches: u32,
        pub num_prompt_rows: u32,
        pub num_rows: u32,
    }
}

/// What a step's metadata is padded to, so that steps of like shape share a graph.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Shape {
    pub num_slots: usize,
    pub num_rows: usize,
    pub tile_rows: usize,
    pub num_tiles: usize,
    pub num_splits: usize,
}

/// The metadata of a pass, on the device.
#[derive(Clone, Copy)]
pub(super) struct Metadata {
    pub batch: BatchParams,
    /// Rows of each tile.
    pub prompt_tile_rows: usize,
    pub beam_tile_rows: usize,
    pub prompt_tiles: u64,
    pub num_prompt_tiles: usize,
    pub beam_tiles: u64,
    pub num_beam_tiles: usize,
    /// Parts of the context that is split most.
    pub num_splits: usize,
    /// Rows of beams, times parts of their contexts, over slots with several parts.
    pub num_part_rows: usize,
    /// Where 0, 1, 2 and so on are, one for each row.
    pub row_numbers: u64,
}

/// The shape of a step in which `slots` read their beams, in `num_rows` padded rows.
pub(super) fn padded_shape<D: Driver>(slots: &[Slot<D>], num_rows: usize, tiling: Tiling) -> Shape {
    let tile_rows = tiling.tile_rows(slots.iter().map(Slot::num_rows));
    let tiles = |slot: &Slot<D>| (slot.num_rows() * tiling.group()).div_ceil(tile_rows);
    let splits = |slot: &Slot<D>| tiling.splits(slot.spec.context_len, slot.num_rows()).count;
    Shape {
        num_slots: padded(slots.len()),
        num_rows,
        tile_rows,
        num_tiles: padded(slots.iter().map(tiles).sum()),
        num_splits: slots.iter().map(splits).max().unwrap_or(1).next_power_of_two(),
    }
}

/// Metadata on the host.
#[derive(Default)]
struct Entries {
    prompts: Vec<PromptEntry>,
    slots: Vec<SlotEntry>,
    pages: Vec<u32>,
    prompt_tiles: Vec<[u32; 2]>,
    beam_tiles: Vec<[u32; 2]>,
    num_rows: usize,
    num_splits: usize,
    num_part_rows: usize,
}

impl Entries {
    fn add_prompts<D: Driver>(
        &mut self,
        chunks: &[Range<usize>],
        slots: &[&Slot<D>],
        group: usize,
        tile_rows: usize,
    ) {
        for (index, (chunk, slot)) in chunks.iter().zip(slots).enumerate() {
            self.prompts.push(PromptEntry {
                first_row: self.num_rows as u32,
                num_rows: chunk.len() as u32,
                start: chunk.start as u32,
                first_page: self.pages.len() as u32,
                is_kept: u32::from(!is_kept_before(&chunks[..index], slots, chunk, slot)),
                context_len: slot.spec.context_len as u32,
            });
            self.pages.extend_from_slice(&slot.spec.context_pages);
            let firsts = (0..chunk.len() * group).step_by(tile_rows);
            self.prompt_tiles.extend(firsts.map(|first| [index as u32, first as u32]));
            self.num_rows += chunk.len();
        }
        // Later tiles see more of a causal context: blocks start in order, and the longest go first.
        self.prompt_tiles.reverse();
    }

    /// Adds a slot whose beams begin at a row.
    fn add_slot<D: Driver>(
        &mut self,
        slot: &Slot<D>,
        first_row: usize,
        tiling: Tiling,
        tile_rows: usize,
    ) {
        let mut position_page = [0; MAX_POSITIONS];
        for (to, &page) in position_page.iter_mut().zip(&slot.position_page) {
            *to = page as u32;
        }
        let splits = tiling.splits(slot.spec.context_len, slot.num_rows());
        let first_context_page = self.pages.len() as u32;
        self.pages.extend_from_slice(&slot.spec.context_pages);
        let index = self.slots.len() as u32;
        self.slots.push(SlotEntry {
            first_row: first_row as u32,
            num_rows: slot.num_rows() as u32,
            num_steps: slot.num_steps as u32,
            context_len: slot.spec.context_len as u32,
            first_context_page,
            first_tail_page: self.pages.len() as u32,
            start_token: slot.spec.start_token,
            tail_from: slot.tail_from.map_or(u32::MAX, |from| from as u32),
            position_page,
            num_splits: splits.count as u32,
            pages_per_split: splits.pages as u32,
            first_part_row: self.num_part_rows as u32,
        });
        self.pages.extend_from_slice(&slot.spec.tail_pages);
        let firsts = (0..slot.num_rows() * tiling.group()).step_by(tile_rows);
        self.beam_tiles.extend(firsts.map(|first| [index, first as u32]));
        self.num_rows += slot.num_rows();
        self.num_splits = self.num_splits.max(splits.count);
        if splits.count > 1 {
            self.num_part_rows += splits.count * slot.num_rows();
        }
    }

    fn pad(&mut self, shape: Shape) {
        let empty = SlotEntry { first_row: shape.num_rows as u32, ..SlotEntry::zeroed() };
        self.slots.resize(shape.num_slots, empty);
        self.beam_tiles.resize(shape.num_tiles, [NONE, 0]);
        self.num_rows = shape.num_rows;
        self.num_splits = shape.num_splits;
    }
}

/// Writes the metadata of a pass over `chunks` of the first slots and the beams of the others. A
/// step that may share a graph is padded to a shape, and its slots have the rows that begin at
/// `first_rows`.
pub(super) fn write<D: Driver>(
    memory: &mut DeviceMemory<D>,
    chunks: &[Range<usize>],
    slots: &[impl Borrow<Slot<D>>],
    tiling: Tiling,
    padding: Option<(Shape, &[usize])>,
) -> Metadata {
    let slots: Vec<&Slot<D>> = slots.iter().map(Borrow::borrow).collect();
    let prompt_tile_rows = tiling.tile_rows(chunks.iter().map(Range::len));
    let beam_tile_rows = tiling.tile_rows(slots[chunks.len()..].iter().map(|slot| slot.num_rows()));
    let mut entries = Entries { num_splits: 1, ..Entries::default() };
    entries.add_prompts(chunks, &slots, tiling.group(), prompt_tile_rows);
    let num_prompt_rows = entries.num_rows;
    for (index, slot) in slots[chunks.len()..].iter().enumerate() {
        let first_row = padding.map_or(entries.num_rows, |(_, first_rows)| first_rows[index]);
        entries.add_slot(slot, first_row, tiling, beam_tile_rows);
    }
    if let Some((shape, _)) = padding {
        entries.pad(shape);
    }
    let row_numbers: Vec<u32> = (0..entries.num_rows as u32).collect();

    // Arrays whose size follows from the shape come first: in steps of one shape they are always at
    // the same addresses.
    let mut bytes = Vec::new();
    let mut put = |part: &[u8]| {
        bytes.resize(bytes.len().next_multiple_of(16), 0);
        let offset = bytes.len();
        bytes.extend_from_slice(part);
        offset
    };
    let offsets = [
        put(bytemuck::cast_slice(&entries.prompts)),
        put(bytemuck::cast_slice(&entries.slots)),
        put(bytemuck::cast_slice(&entries.prompt_tiles)),
        put(bytemuck::cast_slice(&entries.beam_tiles)),
        put(bytemuck::cast_slice(&row_numbers)),
        put(bytemuck::cast_slice(&entries.pages)),
    ];
    memory.write_often(&bytes);
    let [prompts, searches, prompt_tiles, beam_tiles, row_numbers, pages] =
        offsets.map(|offset| memory.at(offset));
    Metadata {
        batch: BatchParams {
            prompts,
            searches,
            pages,
            num_prompts: entries.prompts.len() as u32,
            num_searches: entries.slots.len() as u32,
            num_prompt_rows: num_prompt_rows as u32,
            num_rows: entries.num_rows as u32,
        },
        prompt_tile_rows,
        beam_tile_rows,
        prompt_tiles,
        num_prompt_tiles: entries.prompt_tiles.len(),
        beam_tiles,
        num_beam_tiles: entries.beam_tiles.len(),
        num_splits: entries.num_splits,
        num_part_rows: entries.num_part_rows,
        row_numbers,
    }
}

/// Whether one of the prompts before stores the KV of a chunk's first token in the same page.
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

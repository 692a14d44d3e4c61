//! What a pass works on, and what is leased for it: memory, slots, batches.

use std::ops::Range;

use super::{DeviceOps, KvLayout};

/// The memory for all contexts and tails and for steps, taken once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemorySpec {
    /// What a token of a context and a row of a tail hold.
    pub kv: KvLayout,
    /// Pages of contexts, [`PAGE_LEN`](crate::pages::PAGE_LEN) tokens each.
    pub context_pages: usize,
    /// Pages of tails, [`TAIL_PAGE_LEN`](crate::pages::TAIL_PAGE_LEN) rows each.
    pub tail_pages: usize,
    /// Beams in a step, for which a device takes memory at once; a single search may have more.
    pub rows_per_step: usize,
    /// Tokens of prompts in a step, for which a device takes memory at once; a prompt that is read
    /// as a whole may have more.
    pub tokens_per_step: usize,
}

/// The lease of one search: what it needs is fixed when its request is admitted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SlotSpec {
    /// The pages of the context, in order; searches may have them in common.
    pub context_pages: Vec<u32>,
    /// Tokens of the context.
    pub context_len: usize,
    /// The pages for tails: at each position as many as its beams fill, one position after the
    /// other.
    pub tail_pages: Vec<u32>,
    /// The steps that the search takes; [`DeviceOps::max_steps`] is the limit.
    pub num_steps: usize,
    /// The token of the one beam that a search starts with, where the decoder reads one.
    pub start_token: u32,
}

/// What one pass works on: rows of prompts, slot after slot, then rows of beams, slot after slot.
pub struct Batch<'a, B: DeviceOps> {
    /// Where the KV is.
    pub memory: &'a B::Memory,
    /// Of each of the first slots, the positions of its prompt that are read; those whose prompt
    /// goes on come first.
    pub chunks: &'a [Range<usize>],
    /// The slots with chunks, then those whose beams are rows.
    pub slots: &'a mut [B::Slot],
    /// What the device has planned for these rows.
    pub pass: B::Pass,
}

/// What a device plans for the rows of a batch before it works on them: nothing by default.
pub trait PassPlan: Default + Clone + Send {
    /// The pass over a batch's prompts alone, which is not planned yet.
    fn of_prompts(&self) -> Self;
    /// The pass over some of a batch's slots, with rows of beams alone, which is not planned yet.
    fn of_beams(&self) -> Self;
}

/// A device that plans nothing.
impl PassPlan for () {
    fn of_prompts(&self) {}

    fn of_beams(&self) {}
}

impl<'a, B: DeviceOps> Batch<'a, B> {
    /// A batch for which nothing is planned yet.
    pub fn new(
        memory: &'a B::Memory,
        chunks: &'a [Range<usize>],
        slots: &'a mut [B::Slot],
    ) -> Batch<'a, B> {
        Batch { memory, chunks, slots, pass: B::Pass::default() }
    }

    /// Rows of prompts; rows of beams begin there.
    pub fn num_prompt_rows(&self) -> usize {
        self.chunks.iter().map(Range::len).sum()
    }

    /// The slots with rows of prompts, each with its chunk.
    pub fn prompts(&self) -> impl Iterator<Item = (&Range<usize>, &B::Slot)> {
        self.chunks.iter().zip(&*self.slots)
    }

    /// The slots with rows of beams.
    pub fn beams(&self) -> &[B::Slot] {
        &self.slots[self.chunks.len()..]
    }

    /// Slots whose prompt goes on after this pass.
    pub fn num_unfinished(&self, backend: &B) -> usize {
        let goes_on =
            |(chunk, slot): &(&Range<usize>, &B::Slot)| chunk.end < backend.context_len(slot);
        self.prompts().take_while(goes_on).count()
    }

    /// The slots from `first` on, with rows of beams alone: a search has one beam when its prompt
    /// has been read.
    pub fn beams_from(&mut self, first: usize) -> Batch<'_, B> {
        let pass = match self.chunks.is_empty() && first == 0 {
            true => self.pass.clone(),
            false => self.pass.of_beams(),
        };
        Batch { memory: self.memory, chunks: &[], slots: &mut self.slots[first..], pass }
    }

    /// The slots with rows of prompts, without those whose beams are rows.
    pub fn prompts_alone(&mut self) -> Batch<'_, B> {
        let slots = &mut self.slots[..self.chunks.len()];
        Batch { memory: self.memory, chunks: self.chunks, slots, pass: self.pass.of_prompts() }
    }
}

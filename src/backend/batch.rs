//! What a pass works on.

use std::ops::Range;

use super::{DeviceOps, PassPlan};

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

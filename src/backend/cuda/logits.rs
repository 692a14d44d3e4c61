//! Logits of a step on the device.

use std::sync::Arc;

use super::device::Device;
use super::device_memory::DeviceMemory;
use super::driver::Driver;
use super::plan::{MAX_PARTS, Plan};

/// Tokens of the vocabulary whose exponentials are summed by one block: how the sum over all is put
/// together does not depend on the other rows of a step.
pub(super) const VOCABULARY_STRETCH: usize = 8192;
/// Logits of the vocabulary that are evaluated at a time: few enough for a cache of the device, many
/// enough for few products. A stretch of all rows may be more.
const NUMBERS_AT_ONCE: usize = 4 << 20;

/// Tokens of the vocabulary that are evaluated together in a step of `num_rows` rows: whole stretches.
pub(super) fn vocabulary_columns(num_rows: usize, vocab_size: usize) -> usize {
    let columns = NUMBERS_AT_ONCE / num_rows.max(1) / VOCABULARY_STRETCH * VOCABULARY_STRETCH;
    columns.clamp(VOCABULARY_STRETCH, vocab_size.max(1).next_multiple_of(VOCABULARY_STRETCH))
}

/// The logits of a step, the normalisers of its rows, and memory for the choice of beams.
pub struct Logits<D: Driver> {
    pub(super) values: DeviceMemory<D>,
    pub(super) chunk: DeviceMemory<D>,
    pub(super) vocabulary_sums: DeviceMemory<D>,
    pub(super) vocabulary_parts: DeviceMemory<D>,
    pub(super) level_sums: DeviceMemory<D>,
    pub(super) child_sums: DeviceMemory<D>,
    pub(super) greatest: DeviceMemory<D>,
    pub(super) offsets: DeviceMemory<D>,
    pub(super) failures: DeviceMemory<D>,
    pub(super) keys: DeviceMemory<D>,
    pub(super) num_keys: DeviceMemory<D>,
}

impl<D: Driver> Logits<D> {
    pub(super) fn new(device: &Arc<Device<D>>) -> Logits<D> {
        let none = |name| DeviceMemory::none(device, name);
        Logits {
            values: none("logits"),
            chunk: none("logits of the vocabulary"),
            vocabulary_sums: none("sums over the vocabulary"),
            vocabulary_parts: none("sums over stretches of the vocabulary"),
            level_sums: none("sums over levels"),
            child_sums: none("sums over children"),
            greatest: none("greatest noise"),
            offsets: none("offsets of continuations"),
            failures: none("failures of a step"),
            keys: none("keys"),
            num_keys: none("numbers of keys"),
        }
    }

    /// Takes the memory that a step of up to `num_rows` rows and `num_slots` slots needs.
    pub(super) fn reserve(
        &mut self,
        plan: &Plan,
        num_rows: usize,
        num_slots: usize,
        vocab_size: usize,
    ) {
        self.values.reserve(num_rows * plan.stride * size_of::<f32>());
        let all = vocab_size.next_multiple_of(VOCABULARY_STRETCH);
        let numbers = (num_rows * VOCABULARY_STRETCH).max(NUMBERS_AT_ONCE.min(num_rows * all));
        self.chunk.reserve(numbers * size_of::<f32>());
        let sums = num_rows * size_of::<[f32; 2]>();
        self.vocabulary_parts.reserve(sums * (all / VOCABULARY_STRETCH));
        self.vocabulary_sums.reserve(sums);
        self.level_sums.reserve(sums);
        self.child_sums.reserve(sums);
        self.greatest.reserve(num_rows * size_of::<f64>());
        self.offsets.reserve((num_rows + num_slots + 1) * size_of::<u32>());
        self.failures.reserve(num_slots * size_of::<u32>());
        self.keys.reserve(MAX_PARTS * plan.num_keys.max(num_rows) * size_of::<u64>());
        self.num_keys.reserve(MAX_PARTS * num_slots * size_of::<u32>());
    }

    pub(super) fn address(&self) -> u64 {
        self.values.at(0)
    }
}

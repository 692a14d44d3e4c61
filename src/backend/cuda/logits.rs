//! Logits of a step on the device.

use std::sync::Arc;

use super::device::Device;
use super::device_memory::DeviceMemory;
use super::driver::Driver;
use super::plan::{MAX_PARTS, Plan};

/// Tokens of the vocabulary that are evaluated together where scores are normalised over all.
pub(super) const VOCABULARY_CHUNK: usize = 8192;

/// The logits of a step, the normalisers of its rows, and memory for the choice of beams.
pub struct Logits<D: Driver> {
    pub(super) values: DeviceMemory<D>,
    pub(super) chunk: DeviceMemory<D>,
    pub(super) vocabulary_sums: DeviceMemory<D>,
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
            level_sums: none("sums over levels"),
            child_sums: none("sums over children"),
            greatest: none("greatest noise"),
            offsets: none("offsets of continuations"),
            failures: none("failures of a step"),
            keys: none("keys"),
            num_keys: none("numbers of keys"),
        }
    }

    /// Takes the memory that a step of `num_rows` rows and `num_slots` slots needs.
    pub(super) fn reserve(&mut self, plan: &Plan, num_rows: usize, num_slots: usize) {
        self.values.reserve(num_rows * plan.stride * size_of::<f32>());
        self.chunk.reserve(num_rows * VOCABULARY_CHUNK * size_of::<f32>());
        let sums = num_rows * size_of::<[f32; 2]>();
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

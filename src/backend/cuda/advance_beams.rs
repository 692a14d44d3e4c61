//! Launches `advance_beams.cu`: one step of all searches of a pass.

use super::backend::CudaBackend;
use super::driver::Driver;
use super::head::Head;
use super::logits::Logits;
use super::memory::Beams;
use super::metadata::BatchParams;
use super::plan::CHUNK;
use super::shared::shared_struct;
use super::tiling::shared_bytes;
use crate::backend::{AdvanceBeams, Batch, SearchRule};

/// Keys that a block of `advance_beams_select` reads at a time.
pub(super) const SELECT_CHUNK: usize = 4096;

shared_struct! {
    /// The choice of beams.
    struct Params = "advance_beams::Params" {
        /// By slot.
        rules: u64 = "const Rule*",
        /// By row.
        vocabulary_sums: u64 = "const float2*",
        /// By row.
        level_sums: u64 = "const float2*",
        /// By row: the log of the sum and, for a sample, its greatest noise.
        child_sums: u64 = "float2*",
        /// By row.
        greatest: u64 = "double*",
        /// By row and slot: where a beam's continuations begin, and the end.
        offsets: u64 = "uint32_t*",
        /// By slot.
        failures: u64 = "uint32_t*",
        /// `[parts, num_keys]`
        keys: u64 = "uint64_t*",
        /// `[parts, slots]`
        num_keys_of_part: u64 = "uint32_t*",
        batch: BatchParams,
        beams: Beams,
        num_parts: u32,
        num_keys: u32,
        /// Of a block's keys.
        capacity: u32,
        padding: u32,
    }
}

impl<D: Driver> AdvanceBeams for CudaBackend<D> {
    fn advance_beams(
        &self,
        logits: &Logits<D>,
        _head: &Head<D>,
        rules: &[SearchRule<'_>],
        batch: &mut Batch<'_, CudaBackend<D>>,
    ) {
        assert_eq!(rules.len(), batch.slots.len(), "a rule for each slot");
        if batch.slots.is_empty() {
            return;
        }
        let step = batch.pass.step().expect("the head comes first");
        let plan = &step.plan;
        let (metadata, mut scratch) = self.enter(batch);
        let params = Params {
            rules: scratch.rules.at(0),
            vocabulary_sums: logits.vocabulary_sums.at(0),
            level_sums: logits.level_sums.at(0),
            child_sums: logits.child_sums.at(0),
            greatest: logits.greatest.at(0),
            offsets: logits.offsets.at(0),
            failures: logits.failures.at(0),
            keys: logits.keys.at(0),
            num_keys_of_part: logits.num_keys.at(0),
            batch: metadata.batch,
            beams: batch.memory.0.beams(),
            num_parts: plan.num_parts as u32,
            num_keys: plan.num_keys as u32,
            capacity: 0,
            padding: 0,
        };
        let (rows, searches) =
            (metadata.batch.num_rows as usize, metadata.batch.num_searches as usize);
        let bytes = |keys: usize| shared_bytes(&[keys * size_of::<u64>(), size_of::<u32>()]);
        self.device.launch("advance_beams_count", [searches, 1, 1], 256, 0, &params);
        if plan.needs_children {
            self.device.launch("advance_beams_children", [rows, 1, 1], 256, 0, &params);
        }
        let keys = (plan.width + CHUNK).next_power_of_two();
        let params = Params { capacity: keys as u32, ..params };
        let grid = [plan.num_parts, searches, 1];
        self.device.launch("advance_beams_expand", grid, 256, bytes(keys), &params);
        let keys = (plan.width + SELECT_CHUNK).next_power_of_two();
        let params = Params { capacity: keys as u32, ..params };
        let grid = [searches, 1, 1];
        self.device.launch("advance_beams_select", grid, 1024, bytes(keys), &params);
        batch.pass.reset(&mut scratch);
        drop(scratch);
        step.complete(batch.slots);
    }
}

//! The backend: a device, a number type, and what passes share.

use std::sync::{Arc, Mutex, MutexGuard};

use super::catalog::Catalogs;
use super::device::Device;
use super::device_memory::DeviceMemory;
use super::driver::{Driver, Traffic};
use super::head::Head;
use super::logits::Logits;
use super::memory::Arrays;
use super::metadata::{self, Metadata, Shape};
use super::pass::{Scratch, StepPlan, Workspaces};
use super::plan::{self, Layout, Plan};
use super::rules::{self, SlotRows};
use super::slot::Slot;
use super::tiling::Tiling;
use crate::backend::{Batch, Heads, SearchRule};
use crate::error::Result;
use crate::tensor::Dtype;

/// The operations on a device.
pub struct CudaBackend<D: Driver> {
    /// Graphs, which are in workspaces, are dropped before what they refer to.
    pub(super) workspaces: Workspaces<D>,
    pub(super) device: Arc<Device<D>>,
    /// Of activations and keys and values.
    pub(super) dtype: Dtype,
    /// The memory that slots are opened in.
    pub(super) arrays: Mutex<Option<Arc<Arrays<D>>>>,
    pub(super) sizes: Mutex<Sizes>,
    catalogs: Mutex<Catalogs<D>>,
    pub(super) reader: Mutex<Reader<D>>,
}

/// Rows for which memory is taken at once.
#[derive(Clone, Copy, Default)]
pub(super) struct Sizes {
    /// Beams in a step, with the rows that pad them.
    pub rows_per_step: usize,
    /// Beams and tokens in a pass.
    pub rows_per_pass: usize,
}

/// Memory for beams on their way to the host.
pub(super) struct Reader<D: Driver> {
    pub metadata: DeviceMemory<D>,
    pub parts: DeviceMemory<D>,
    pub words: DeviceMemory<D>,
}

/// Stands for the heads of a pass without slots.
const NO_HEADS: Heads = Heads::new(1, 1, 1);

impl<D: Driver> CudaBackend<D> {
    /// A backend on a device, with activations of `dtype`: [`Dtype::F32`] or [`Dtype::Bf16`].
    ///
    /// # Panics
    /// With any other type.
    pub fn new(driver: D, dtype: Dtype) -> CudaBackend<D> {
        assert!(matches!(dtype, Dtype::F32 | Dtype::Bf16), "kernels are for f32 and bf16");
        let device = Arc::new(Device::new(driver));
        let none = |name| DeviceMemory::none(&device, name);
        let (metadata, parts) = (none("metadata of results"), none("places of results"));
        let reader = Reader { metadata, parts, words: none("results") };
        CudaBackend {
            workspaces: Workspaces::new(&device),
            arrays: Mutex::new(None),
            sizes: Mutex::default(),
            catalogs: Mutex::default(),
            reader: Mutex::new(reader),
            device,
            dtype,
        }
    }

    /// Counts of what the device was asked for so far.
    pub fn traffic(&self) -> Traffic {
        self.device.traffic()
    }

    /// Returns the first failure of the device so far, without waiting for it.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device).
    pub fn check(&self) -> Result<()> {
        self.device.check()
    }

    /// The kernel for this backend's number type.
    pub(super) fn kernel(&self, f32: &'static str, bf16: &'static str) -> &'static str {
        if self.dtype == Dtype::Bf16 { bf16 } else { f32 }
    }

    pub(super) fn tiling(&self, heads: Heads) -> Tiling {
        Tiling {
            heads,
            dtype: self.dtype,
            num_processors: self.device.driver.num_processors(),
            max_shared_bytes: self.device.driver.max_shared_bytes(),
            has_warpgroups: self.device.driver.has_warpgroups(),
        }
    }

    fn tiling_of(&self, slots: &[Slot<D>]) -> Tiling {
        self.tiling(slots.first().map_or(NO_HEADS, |slot| slot.arrays.spec.kv.heads))
    }

    pub(super) fn sizes(&self) -> Sizes {
        *self.sizes.lock().expect("no holder panics")
    }

    /// The metadata of a batch's pass, which is planned where it is not yet, and the memory for its
    /// operations.
    pub(super) fn enter<'b>(
        &self,
        batch: &'b Batch<'_, Self>,
    ) -> (Metadata, MutexGuard<'b, Scratch<D>>) {
        let mut scratch = batch.pass.scratch(&self.workspaces);
        let metadata = batch.pass.metadata(&scratch).unwrap_or_else(|| {
            let tiling = self.tiling_of(batch.slots);
            batch.pass.plan(&mut scratch, batch.chunks, batch.slots, tiling, None)
        });
        (metadata, scratch)
    }

    /// Whether the step that a batch takes is planned, and nothing has changed since.
    pub(super) fn is_step_planned(&self, batch: &Batch<'_, Self>) -> bool {
        let scratch = batch.pass.scratch(&self.workspaces);
        batch.pass.metadata(&scratch).is_some() && batch.pass.step().is_some()
    }

    /// Plans the step that a batch of beams takes by `rules`: makes room for its beams, and writes
    /// metadata and rules. A padded step may share a graph with others of its shape.
    pub(super) fn plan_step(
        &self,
        batch: &mut Batch<'_, Self>,
        head: &Head<D>,
        rules: &[SearchRule<'_>],
        logits: &mut Logits<D>,
        is_padded: bool,
    ) -> (Option<Shape>, Plan) {
        assert!(batch.chunks.is_empty(), "a step is taken by beams alone");
        let layout = Layout::new(head, rules, batch.slots, is_padded);
        let plan = {
            let catalogs = &mut self.catalogs.lock().expect("no holder panics");
            plan::plan(&self.device, catalogs, head, rules, batch.slots, &layout, is_padded)
        };
        plan::begin_step(head, rules, batch.slots);
        let tiling = self.tiling_of(batch.slots);
        let shape =
            is_padded.then(|| metadata::padded_shape(batch.slots, layout.num_rows(), tiling));
        let first_rows = &layout.first_rows[..];
        let padding = shape.map(|shape| (shape, first_rows));
        let scratch = &mut *batch.pass.scratch(&self.workspaces);
        let metadata = batch.pass.plan(scratch, &[], batch.slots, tiling, padding);
        let (num_rows, num_slots) =
            (metadata.batch.num_rows as usize, metadata.batch.num_searches as usize);
        let least = self.sizes().rows_per_step;
        logits.reserve(&plan, num_rows.max(least), num_slots.max(least), head.vocab_size());
        let rows = SlotRows { first_rows, num_slots, logits: logits.address() };
        rules::write(&mut scratch.rules, head, rules, batch.slots, &plan, &rows);
        let steps_after = batch.slots.iter().map(|slot| slot.num_steps + 1).collect();
        batch.pass.plan_step(StepPlan { plan: plan.clone(), steps_after });
        (shape, plan)
    }

    /// The beams' newest position has keys and values from now on.
    pub(super) fn begin_tails(&self, batch: &mut Batch<'_, Self>) {
        let mut has_changed = false;
        for slot in &mut batch.slots[batch.chunks.len()..] {
            has_changed |= slot.tail_from.is_none();
            slot.tail_from.get_or_insert(slot.num_steps);
        }
        if has_changed {
            batch.pass.reset(&mut batch.pass.scratch(&self.workspaces));
        }
    }
}

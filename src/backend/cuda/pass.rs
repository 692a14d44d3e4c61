//! A pass: one run of a network or a part of it over the rows of a batch, planned and then run.
//!
//! A plan is the pass's metadata and, for a step, how its head and choice are run and which steps its
//! slots have taken afterwards. It is made by the first operation that needs it, or by
//! [`Step`](crate::backend::Step) for steps that may share a graph, and travels with the batch. A pass
//! leases a workspace from the backend: the memory that operations use on their way. No two batches
//! share one, so no lock is held across passes.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

use super::device::Device;
use super::device_memory::DeviceMemory;
use super::driver::Driver;
use super::graphs::Graphs;
use super::metadata::{self, Metadata, Shape};
use super::plan::Plan;
use super::slot::Slot;
use super::tiling::Tiling;
use crate::backend::PassPlan;

/// What passes use that follow one another, and the graphs of their steps.
pub(super) struct Workspace<D: Driver> {
    /// Dropped before the memory that they refer to. Steps of one plan and shape are one graph.
    graphs: Graphs<(Shape, Plan), D>,
    scratch: Mutex<Scratch<D>>,
}

/// The memory of a workspace.
pub(super) struct Scratch<D: Driver> {
    /// By [`Rows`].
    metadata: [MetadataMemory<D>; 4],
    pub rules: DeviceMemory<D>,
    pub tokens: DeviceMemory<D>,
    pub row_list: DeviceMemory<D>,
    /// Over relative positions, and the values that were written.
    pub bias: (Vec<f32>, DeviceMemory<D>),
    /// Of split contexts.
    pub parts: DeviceMemory<D>,
    pub part_sums: DeviceMemory<D>,
}

struct MetadataMemory<D: Driver> {
    memory: DeviceMemory<D>,
    /// The number of the plan that was written last; zero if it is out of date.
    plan: u64,
}

impl<D: Driver> Workspace<D> {
    pub fn new(device: &Arc<Device<D>>) -> Workspace<D> {
        let none = |name| DeviceMemory::none(device, name);
        let scratch = Scratch {
            metadata: [
                "metadata",
                "metadata of prompts",
                "metadata of beams",
                "metadata of a step",
            ]
            .map(|name| MetadataMemory { memory: none(name), plan: 0 }),
            rules: none("rules"),
            tokens: none("tokens"),
            row_list: none("list of rows"),
            bias: (Vec::new(), none("bias")),
            parts: none("parts of attention"),
            part_sums: none("sums of parts"),
        };
        Workspace { graphs: Graphs::new(), scratch: Mutex::new(scratch) }
    }

    pub fn scratch(&self) -> MutexGuard<'_, Scratch<D>> {
        self.scratch.lock().expect("no holder panics")
    }
}

/// Workspaces that no pass has leased.
pub(super) struct Workspaces<D: Driver> {
    device: Arc<Device<D>>,
    free: Arc<Mutex<Vec<Workspace<D>>>>,
}

impl<D: Driver> Workspaces<D> {
    pub fn new(device: &Arc<Device<D>>) -> Workspaces<D> {
        Workspaces { device: Arc::clone(device), free: Arc::default() }
    }

    /// The workspace that was used last, or a new one.
    pub fn lease(&self) -> Lease<D> {
        let free = self.free.lock().expect("no holder panics").pop();
        let workspace = free.unwrap_or_else(|| Workspace::new(&self.device));
        Lease { workspace: Some(workspace), free: Arc::clone(&self.free) }
    }
}

/// A workspace that goes back when this is dropped.
pub(super) struct Lease<D: Driver> {
    workspace: Option<Workspace<D>>,
    free: Arc<Mutex<Vec<Workspace<D>>>>,
}

impl<D: Driver> Lease<D> {
    pub fn workspace(&self) -> &Workspace<D> {
        self.workspace.as_ref().expect("until it is dropped")
    }
}

impl<D: Driver> Drop for Lease<D> {
    fn drop(&mut self) {
        let workspace = self.workspace.take();
        // A pass that panicked has left a lock poisoned: its workspace is dropped.
        let is_sound = |workspace: &Workspace<D>| !workspace.scratch.is_poisoned();
        if let Ok(mut free) = self.free.lock() {
            free.extend(workspace.filter(is_sound));
        }
    }
}

/// Which rows of a batch a pass is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Rows {
    All,
    Prompts,
    Beams,
    /// Of beams, padded.
    Step,
}

/// The plan of a step.
#[derive(Clone)]
pub(super) struct StepPlan {
    pub plan: Plan,
    /// By slot: steps taken when this one is.
    pub steps_after: Vec<usize>,
}

#[derive(Clone)]
struct Planned {
    number: u64,
    metadata: Metadata,
    step: Option<Arc<StepPlan>>,
}

/// The pass of a batch on a device.
pub struct Pass<D: Driver> {
    lease: Arc<OnceLock<Lease<D>>>,
    rows: Rows,
    planned: Arc<Mutex<Option<Planned>>>,
}

impl<D: Driver> Default for Pass<D> {
    fn default() -> Pass<D> {
        Pass { lease: Arc::default(), rows: Rows::All, planned: Arc::default() }
    }
}

impl<D: Driver> Clone for Pass<D> {
    fn clone(&self) -> Pass<D> {
        let (lease, planned) = (Arc::clone(&self.lease), Arc::clone(&self.planned));
        Pass { lease, rows: self.rows, planned }
    }
}

impl<D: Driver> PassPlan for Pass<D> {
    fn of_prompts(&self) -> Pass<D> {
        self.over(Rows::Prompts)
    }

    fn of_beams(&self) -> Pass<D> {
        self.over(Rows::Beams)
    }
}

impl<D: Driver> Pass<D> {
    /// A pass over other rows, not planned yet, in the same workspace.
    fn over(&self, rows: Rows) -> Pass<D> {
        Pass { lease: Arc::clone(&self.lease), rows, planned: Arc::default() }
    }

    /// The pass of a step that may share a graph, in the same workspace.
    pub(super) fn of_step(&self) -> Pass<D> {
        self.over(Rows::Step)
    }

    fn workspace(&self, workspaces: &Workspaces<D>) -> &Workspace<D> {
        self.lease.get_or_init(|| workspaces.lease()).workspace()
    }

    /// The memory that the pass's operations use.
    pub(super) fn scratch(&self, workspaces: &Workspaces<D>) -> MutexGuard<'_, Scratch<D>> {
        self.workspace(workspaces).scratch()
    }

    /// The graphs of the pass's workspace.
    pub(super) fn graphs(&self, workspaces: &Workspaces<D>) -> &Graphs<(Shape, Plan), D> {
        &self.workspace(workspaces).graphs
    }

    fn planned(&self) -> MutexGuard<'_, Option<Planned>> {
        self.planned.lock().expect("no holder panics")
    }

    /// The pass's metadata, where it is planned and up to date.
    pub(super) fn metadata(&self, scratch: &Scratch<D>) -> Option<Metadata> {
        let planned = self.planned();
        let is_current =
            |planned: &&Planned| scratch.metadata[self.rows as usize].plan == planned.number;
        planned.as_ref().filter(is_current).map(|planned| planned.metadata)
    }

    /// Plans the pass: writes its metadata, padded to a shape where it may share a graph.
    pub(super) fn plan(
        &self,
        scratch: &mut Scratch<D>,
        chunks: &[Range<usize>],
        slots: &[Slot<D>],
        tiling: Tiling,
        padding: Option<(Shape, &[usize])>,
    ) -> Metadata {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let MetadataMemory { memory, plan } = &mut scratch.metadata[self.rows as usize];
        let metadata = metadata::write(memory, chunks, slots, tiling, padding);
        *plan = number;
        scratch.reserve_parts(metadata.num_part_rows, tiling);
        *self.planned() = Some(Planned { number, metadata, step: None });
        metadata
    }

    /// Adds the plan of the step that the pass ends with.
    pub(super) fn plan_step(&self, step: StepPlan) {
        self.planned().as_mut().expect("metadata is planned first").step = Some(Arc::new(step));
    }

    /// The plan of the step that the pass ends with.
    pub(super) fn step(&self) -> Option<Arc<StepPlan>> {
        self.planned().as_ref().and_then(|planned| planned.step.clone())
    }

    /// What is planned is out of date: slots have changed.
    pub(super) fn reset(&self, scratch: &mut Scratch<D>) {
        scratch.metadata.iter_mut().for_each(|memory| memory.plan = 0);
    }

    /// A copy of the plan, which [`restore`](Pass::restore) brings back.
    pub(super) fn save(&self) -> SavedPlan {
        SavedPlan(self.planned().clone().expect("planned before"))
    }

    /// Brings a plan back after its step was taken in a capture, where nothing was done.
    pub(super) fn restore(&self, scratch: &mut Scratch<D>, SavedPlan(planned): &SavedPlan) {
        scratch.metadata[self.rows as usize].plan = planned.number;
        *self.planned() = Some(planned.clone());
    }
}

/// The plan of a pass that is run more than once: captured, then run eagerly.
pub(super) struct SavedPlan(Planned);

impl SavedPlan {
    /// The plan of its step.
    pub fn step(&self) -> &StepPlan {
        self.0.step.as_ref().expect("a step is planned")
    }
}

impl StepPlan {
    /// Counts the step: the slots have taken it.
    pub fn complete<D: Driver>(&self, slots: &mut [Slot<D>]) {
        for (slot, &num_steps) in slots.iter_mut().zip(&self.steps_after) {
            slot.num_steps = num_steps;
        }
    }
}

impl<D: Driver> Scratch<D> {
    /// Makes room for the parts of split contexts.
    fn reserve_parts(&mut self, num_part_rows: usize, tiling: Tiling) {
        let rows = num_part_rows * tiling.heads.num_heads;
        self.parts.reserve_often(rows * tiling.heads.head_dim() * size_of::<f32>());
        self.part_sums.reserve_often(rows * size_of::<[f32; 2]>());
    }

    /// Takes the memory for the parts of split contexts in steps of `num_rows` rows, and what every
    /// pass writes first: a kind of pass that an engine has not seen yet needs no more.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device).
    pub fn allocate(&mut self, num_rows: usize, tiling: Tiling) -> crate::error::Result<()> {
        let of_passes = self.metadata.iter_mut().map(|metadata| &mut metadata.memory);
        let of_rows = [&mut self.rules, &mut self.tokens, &mut self.row_list];
        of_passes.chain(of_rows).try_for_each(DeviceMemory::allocate_often)?;
        let rows = tiling.most_part_rows(num_rows) * tiling.heads.num_heads;
        self.parts.allocate(rows * tiling.heads.head_dim() * size_of::<f32>())?;
        self.part_sums.allocate(rows * size_of::<[f32; 2]>())
    }
}

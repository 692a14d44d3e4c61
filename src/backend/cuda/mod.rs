//! The CUDA backend: kernels of our own, f32 or bf16, sums in f32.
//!
//! Nothing that a step needs is read back: beams are kept, chosen and put in order on the device,
//! and the host only enqueues. So the steps of a search follow one another without a gap, and a
//! step whose shape came up before is one replay of the graph that was captured then. The host knows
//! how many rows there are for beams, not how many beams there are.
//!
//! A [`Driver`] stands between the backend and the device. `nvidia.rs` has that of an NVIDIA GPU;
//! the tests have one that runs the same kernels on the CPU.

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};

use super::{DeviceOps, Heads, MemorySpec, SearchRule, SlotSpec};
use crate::error::{Error, Result};
use crate::pages::TAIL_PAGE_LEN;
use crate::tensor::{Dtype, Tensor};

mod advance_beams;
mod append_tail;
mod apply_rope;
mod attend_beams;
mod attend_prefill;
#[cfg(feature = "cuda")]
mod blas;
mod buffer;
mod device;
mod device_memory;
mod driver;
mod embed;
mod gather_last;
#[cfg(test)]
mod generated;
mod glu;
mod graphs;
mod head;
mod lm_head;
mod matmul;
mod memory;
mod metadata;
#[cfg(feature = "cuda")]
mod nvidia;
#[cfg(any(feature = "cuda", test))]
mod plans;
mod read_beams;
mod rms_norm;
mod rope_tables;
mod rules;
mod shared;
mod slot;
#[cfg(any(feature = "cuda", test))]
mod staging;
mod step;
mod store_context;
mod tiling;

pub use buffer::{Buffer, Vector, Weights};
pub use driver::{Address, Driver, FusedActivation, Launch, Outcome, Product, Traffic};
pub use head::Head;
pub use lm_head::Logits;
pub use memory::Memory;
#[cfg(feature = "cuda")]
pub use nvidia::{CudaDevice, num_devices};
pub use slot::Slot;

use device::Device;
use device_memory::DeviceMemory;
use graphs::Graphs;
use memory::Arrays;
use metadata::{Metadata, Shape};
use read_beams::MOST_BYTES_OF_BEAM;
use rules::{Layout, Plan, Uploads};
use tiling::{MAX_POSITIONS, Tiling, padded};

/// The operations on a device.
pub struct CudaBackend<D: Driver> {
    device: Arc<Device<D>>,
    /// Of activations and keys and values.
    dtype: Dtype,
    /// The memory that slots are opened in.
    arrays: Mutex<Option<Arc<Arrays<D>>>>,
    state: Mutex<State<D>>,
    /// Steps of one plan and shape are one graph.
    graphs: Graphs<(Shape, Plan), D>,
}

/// What passes use on their way.
struct State<D: Driver> {
    uploads: Uploads<D>,
    /// Of captured steps, and of beams that are read.
    step_metadata: DeviceMemory<D>,
    /// Of other passes: those of all rows and those of the beams alone, which take turns in a pass.
    pass_metadata: [PassMetadata<D>; 2],
    /// Set while the operations of a step are called whose metadata and rules are there already.
    prepared: Option<(Metadata, Plan)>,
    rule_memory: DeviceMemory<D>,
    tokens: DeviceMemory<D>,
    list: DeviceMemory<D>,
    bias: (Vec<f32>, DeviceMemory<D>),
    /// Beams in a step, and rows in a pass, for which memory is taken at once.
    rows_of_a_step: usize,
    rows_of_a_pass: usize,
    parts: DeviceMemory<D>,
    part_sums: DeviceMemory<D>,
    results: DeviceMemory<D>,
}

/// Metadata, and what it was written for.
struct PassMetadata<D: Driver> {
    memory: DeviceMemory<D>,
    written: Option<(Vec<u64>, Metadata)>,
}

impl<D: Driver> CudaBackend<D> {
    /// A backend on a device, with activations of `dtype`: [`Dtype::F32`] or [`Dtype::Bf16`].
    ///
    /// # Panics
    /// With any other type.
    pub fn new(driver: D, dtype: Dtype) -> CudaBackend<D> {
        assert!(matches!(dtype, Dtype::F32 | Dtype::Bf16), "kernels are for f32 and bf16");
        let device = Arc::new(Device::new(driver));
        let none = |name| DeviceMemory::none(&device, name);
        let state = State {
            uploads: Uploads::default(),
            step_metadata: none("metadata of a step"),
            pass_metadata: ["metadata of a pass", "metadata of a pass"]
                .map(|name| PassMetadata { memory: none(name), written: None }),
            prepared: None,
            rule_memory: none("rules"),
            tokens: none("tokens"),
            list: none("list"),
            bias: (Vec::new(), none("bias")),
            rows_of_a_step: 0,
            rows_of_a_pass: 0,
            parts: none("parts of attention"),
            part_sums: none("sums of parts"),
            results: none("results"),
        };
        let (state, graphs) = (Mutex::new(state), Graphs::new());
        CudaBackend { state, graphs, arrays: Mutex::new(None), device, dtype }
    }

    /// What the device was asked for so far.
    pub fn traffic(&self) -> Traffic {
        self.device.traffic()
    }

    /// Waits for nothing and says whether the device has failed so far.
    ///
    /// # Errors
    /// [`Error::Device`].
    pub fn check(&self) -> Result<()> {
        self.device.check()
    }

    fn state(&self) -> MutexGuard<'_, State<D>> {
        self.state.lock().expect("no holder panics")
    }

    /// The kernel for this backend's number type.
    fn kernel(&self, f32: &'static str, bf16: &'static str) -> &'static str {
        if self.dtype == Dtype::Bf16 { bf16 } else { f32 }
    }

    fn tiling(&self, heads: Heads) -> Tiling {
        Tiling {
            heads,
            dtype: self.dtype,
            num_processors: self.device.driver.num_processors(),
            max_shared_bytes: self.device.driver.max_shared_bytes(),
        }
    }

    /// The metadata of a pass: that which is there already, or new.
    fn metadata(
        &self,
        state: &mut State<D>,
        chunks: &[Range<usize>],
        slots: &[Slot<D>],
    ) -> Metadata {
        if let Some((metadata, _)) = &state.prepared {
            return *metadata;
        }
        let key = metadata::key(chunks, slots);
        let mut written = state.pass_metadata.iter().flat_map(|pass| &pass.written);
        if let Some((_, metadata)) = written.find(|(known, _)| *known == key) {
            return *metadata;
        }
        let heads = slots.first().map_or(NO_HEADS, |slot| slot.arrays.spec.kv.heads);
        // The older of the two makes room.
        state.pass_metadata.swap(0, 1);
        let PassMetadata { memory, written } = &mut state.pass_metadata[0];
        let metadata = metadata::write(memory, chunks, slots, self.tiling(heads), None);
        *written = Some((key, metadata));
        state.reserve_parts(&metadata, heads);
        metadata
    }

    /// Puts the metadata and rules of a step of beams where kernels find them.
    fn prepare(
        &self,
        slots: &mut [Slot<D>],
        head: &Head<D>,
        rules: &[SearchRule<'_>],
        logits: &mut Logits<D>,
    ) -> (Shape, Plan) {
        let state = &mut *self.state();
        // A step of beams appends their newest tokens before anything attends to them.
        slots.iter_mut().for_each(|slot| {
            slot.tail_from.get_or_insert(slot.num_steps);
        });
        let layout = Layout::new(head, rules, slots, true);
        let uploads = &mut state.uploads;
        let plan = rules::plan(&self.device, uploads, head, rules, slots, &layout, true);
        rules::begin_step(head, rules, slots);
        let heads = slots[0].arrays.spec.kv.heads;
        let tiling = self.tiling(heads);
        let shape = metadata::padded_shape(slots, layout.num_rows(), tiling);
        let padding = Some((shape, &layout.first_rows[..]));
        let metadata = metadata::write(&mut state.step_metadata, &[], slots, tiling, padding);
        state.reserve_parts(&metadata, heads);
        let least = state.rows_of_a_step;
        logits.reserve(&plan, shape.num_rows.max(least), shape.num_slots.max(least));
        let (memory, address) = (&mut state.rule_memory, logits.address());
        let rows = &layout.first_rows;
        rules::write(memory, head, rules, slots, rows, &plan, address, shape.num_slots);
        state.prepared = Some((metadata, plan.clone()));
        (shape, plan)
    }
}

impl<D: Driver> State<D> {
    /// Makes room for the parts of split contexts.
    fn reserve_parts(&mut self, metadata: &Metadata, heads: Heads) {
        let rows = metadata.num_part_rows * heads.num_heads;
        self.parts.reserve_often(rows * heads.head_dim() * size_of::<f32>());
        self.part_sums.reserve_often(rows * size_of::<[f32; 2]>());
    }
}

/// Stands for the heads of a pass without slots.
const NO_HEADS: Heads = Heads::new(1, 1, 1);

impl<D: Driver> DeviceOps for CudaBackend<D> {
    const COMPUTES_ON_CALLERS: bool = false;

    type Buffer = Buffer<D>;
    type Matrix = Weights<D>;
    type Vector = Vector<D>;
    type Table = Weights<D>;
    type Head = Head<D>;
    type Logits = Logits<D>;
    type Memory = Memory<D>;
    type Slot = Slot<D>;

    fn description(&self) -> String {
        let Device { driver, .. } = &*self.device;
        format!("{}, {}, {}", driver.name(), driver.product_library(), self.dtype.name())
    }

    fn matrix_flops(&self) -> u64 {
        self.device.flops()
    }

    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn take_failure(&self) -> Result<()> {
        self.device.take_failure()
    }

    fn matrix(&self, parts: &[Tensor]) -> Result<Weights<D>> {
        Weights::stack(&self.device, parts, self.dtype)
    }

    fn vector(&self, parts: &[Tensor]) -> Result<Vector<D>> {
        Vector::join(&self.device, parts, self.dtype)
    }

    fn table(&self, weight: Tensor) -> Result<Weights<D>> {
        Weights::stack(&self.device, &[weight], self.dtype)
    }

    fn head(&self, weight: Tensor, levels: &[Vec<u32>], _known: &[u32]) -> Result<Head<D>> {
        Head::new(&self.device, weight, levels, self.dtype)
    }

    fn buffer(&self) -> Buffer<D> {
        let least_rows = self.state().rows_of_a_pass;
        Buffer::new(&self.device, self.dtype, least_rows)
    }

    fn upload(&self, values: &[f32], columns: usize) -> Buffer<D> {
        let mut buffer = Buffer::new(&self.device, self.dtype, 0);
        buffer.write(values, columns, self.dtype);
        buffer
    }

    fn download(&self, buffer: &Buffer<D>) -> Result<Vec<f32>> {
        buffer.read()
    }

    fn logits(&self) -> Logits<D> {
        Logits::new(&self.device)
    }

    fn context_bytes(&self) -> Result<usize> {
        Ok(self.device.driver.free_bytes()? / 2)
    }

    fn memory(&self, spec: &MemorySpec) -> Result<Memory<D>> {
        spec.kv.check()?;
        if !self.tiling(spec.kv.heads).has_room(tiling::PLAIN_ROWS) {
            let head_dim = spec.kv.heads.head_dim();
            return Err(Error::Unsupported {
                what: format!("attention with heads of {head_dim} on this GPU"),
                way_out: "use the CPU".into(),
            });
        }
        let arrays = Arc::new(Arrays::new(&self.device, spec, self.dtype)?);
        let state = &mut *self.state();
        // All beams can be read at once.
        state.results.allocate(spec.tail_pages * TAIL_PAGE_LEN * MOST_BYTES_OF_BEAM)?;
        state.rows_of_a_step = padded(spec.rows_per_step);
        state.rows_of_a_pass = state.rows_of_a_step + spec.tokens_per_step;
        let part_rows = self.tiling(spec.kv.heads).most_part_rows(spec.rows_per_step);
        let part_rows = part_rows * spec.kv.heads.num_heads;
        state.parts.allocate(part_rows * spec.kv.heads.head_dim() * size_of::<f32>())?;
        state.part_sums.allocate(part_rows * size_of::<[f32; 2]>())?;
        *self.arrays.lock().expect("no holder panics") = Some(Arc::clone(&arrays));
        Ok(Memory(arrays))
    }

    fn max_steps(&self) -> usize {
        MAX_POSITIONS - 1
    }

    fn open_slot(&self, spec: SlotSpec) -> Result<Slot<D>> {
        if spec.num_steps > self.max_steps() {
            return Err(Error::Unsupported {
                what: format!("a search of {} steps on a GPU", spec.num_steps),
                way_out: format!("at most {} are; use the CPU", self.max_steps()),
            });
        }
        let arrays = self.arrays.lock().expect("no holder panics");
        Ok(Slot::new(spec, Arc::clone(arrays.as_ref().expect("memory is made before slots are"))))
    }

    fn num_beams(&self, slot: &Slot<D>) -> usize {
        slot.num_rows()
    }

    fn num_steps(&self, slot: &Slot<D>) -> usize {
        slot.num_steps
    }

    fn context_len(&self, slot: &Slot<D>) -> usize {
        slot.spec.context_len
    }
}

//! The CUDA backend: kernels of our own, f32 or bf16, sums in f32.
//!
//! Nothing that a step needs is read back: beams are kept, chosen and put in order on the device,
//! and the host only enqueues. So the steps of a search follow one another without a gap, and a
//! step whose shape was seen before is one replay of what was recorded then. What the host must
//! know is what may be at most: rows for beams, not their number.
//!
//! A [`Driver`] stands between the backend and the device. `device.rs` is that of an NVIDIA GPU;
//! the tests have one that runs the same kernels on the CPU.

use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};

use lru::LruCache;

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
#[cfg(feature = "cuda")]
mod device;
mod driver;
mod embed;
mod gather_last;
mod glu;
mod handle;
mod head;
mod lm_head;
mod matmul;
mod memory;
mod read_beams;
mod rms_norm;
mod rope_tables;
mod rules;
mod slot;
#[cfg(any(feature = "cuda", test))]
mod staging;
mod step;
mod store_context;
mod tables;

pub use buffer::{Buffer, Vector, Weights};
#[cfg(feature = "cuda")]
pub use device::{CudaDevice, num_devices};
pub use driver::{Address, Driver, FusedActivation, Launch, Product, Traffic};
pub use head::Head;
pub use lm_head::Logits;
pub use memory::Memory;
pub use slot::Slot;

use handle::{Device, DeviceMemory, Recording};
use memory::Arrays;
use read_beams::MOST_BYTES_OF_BEAM;
use rules::{Layout, Plan, StepRules, Uploads};
use tables::{Attention, MAX_POSITIONS, Shape, Tables, padded};

/// Recorded steps that are kept: the latest used.
const MAX_RECORDINGS: NonZeroUsize = NonZeroUsize::new(256).expect("not zero");

/// The operations on a device.
pub struct CudaBackend<D: Driver> {
    device: Arc<Device<D>>,
    /// Of activations and keys and values.
    dtype: Dtype,
    /// The memory that slots are opened in.
    arrays: Mutex<Option<Arc<Arrays<D>>>>,
    state: Mutex<State<D>>,
}

/// What passes use on their way. A step of beams is prepared (`Layout`: which rows are whose; `Plan`:
/// what of its products and kernels depends on its rules; `Shape`: what on its rows), and steps of
/// the same plan and shape are one recording.
struct State<D: Driver> {
    /// The first to go, before the memory that they refer to.
    recordings: LruCache<(Shape, Plan), Recorded<D>>,
    uploads: Uploads<D>,
    /// Of recorded steps, and of beams that are read.
    table_memory: DeviceMemory<D>,
    /// Of other passes: those of all rows and those of the beams alone, which take turns in a pass.
    pass_tables: [PassTables<D>; 2],
    /// Set while the operations of a step are called whose tables and rules are there already.
    prepared: Option<(Tables, Plan)>,
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
    /// Releases of memory up to which the recordings are good.
    num_releases: u64,
}

/// Tables, and what they were written for.
struct PassTables<D: Driver> {
    memory: DeviceMemory<D>,
    written: Option<(Vec<u64>, Tables)>,
}

/// A step of a shape: seen so often, so that all memory has its size, or recorded.
enum Recorded<D: Driver> {
    Seen(u32),
    As(Recording<D>),
}

/// Sights of a shape after which it is recorded: what comes rarely does not pay for it.
const SIGHTS: u32 = 2;

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
            table_memory: none("tables"),
            pass_tables: ["tables of a pass", "tables of a pass"]
                .map(|name| PassTables { memory: none(name), written: None }),
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
            recordings: LruCache::new(MAX_RECORDINGS),
            num_releases: 0,
        };
        CudaBackend { state: Mutex::new(state), arrays: Mutex::new(None), device, dtype }
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

    fn attention(&self, heads: Heads) -> Attention {
        Attention {
            heads,
            dtype: self.dtype,
            num_processors: self.device.driver.num_processors(),
            max_shared_bytes: self.device.driver.max_shared_bytes(),
        }
    }

    /// The tables of a pass: those that are there already, or new ones.
    fn tables(&self, state: &mut State<D>, chunks: &[Range<usize>], slots: &[Slot<D>]) -> Tables {
        if let Some((tables, _)) = &state.prepared {
            return *tables;
        }
        let key = tables::key(chunks, slots);
        let mut written = state.pass_tables.iter().flat_map(|tables| &tables.written);
        if let Some((_, tables)) = written.find(|(known, _)| *known == key) {
            return *tables;
        }
        let heads = slots.first().map_or(NO_HEADS, |slot| slot.arrays.spec.kv.heads);
        let attention = self.attention(heads);
        // The older of the two makes room.
        state.pass_tables.swap(0, 1);
        let PassTables { memory, written } = &mut state.pass_tables[0];
        let tables = tables::write(memory, chunks, slots, attention, None);
        *written = Some((key, tables));
        tables
    }

    /// Puts the tables and rules of a step of beams where kernels find them.
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
        let attention = self.attention(slots[0].arrays.spec.kv.heads);
        let shape = tables::padded_shape(slots, layout.num_rows(), attention);
        let (memory, recorded) = (&mut state.table_memory, Some((shape, &layout.first_rows[..])));
        let tables = tables::write(memory, &[], slots, attention, recorded);
        let least = state.rows_of_a_step;
        logits.reserve(&plan, shape.num_rows.max(least), shape.num_searches.max(least));
        let (memory, address) = (&mut state.rule_memory, logits.address());
        let step = StepRules { head, rules, slots, first_rows: &layout.first_rows };
        rules::write(memory, &step, &plan, address, shape.num_searches);
        state.prepared = Some((tables, plan.clone()));
        (shape, plan)
    }
}

impl<D: Driver> State<D> {
    /// Forgets recordings that may refer to memory that was given back.
    fn forget_released(&mut self, device: &Device<D>) {
        let releases = device.num_releases();
        if self.num_releases != releases {
            self.recordings.clear();
            self.num_releases = releases;
        }
    }
}

/// Stands for the heads of a pass without slots.
const NO_HEADS: Heads = Heads::new(1, 1, 1);

/// Bytes of dynamic shared memory for arrays of these sizes, as `SharedMemory` in
/// kernels/common/device.cuh puts them.
fn shared_bytes(arrays: &[usize]) -> usize {
    arrays.iter().fold(0, |used: usize, bytes| used.next_multiple_of(128) + bytes)
}

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
        format!("{}, {}", self.device.driver.name(), self.dtype.name())
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
        if !self.attention(spec.kv.heads).has_room(tables::PLAIN_ROWS) {
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

//! Weights, buffers, memory and slots on a device.

use std::sync::Arc;

use super::backend::{CudaBackend, Sizes};
use super::buffer::{Buffer, Vector, Weights};
use super::device::Device;
use super::driver::Driver;
use super::head::Head;
use super::logits::Logits;
use super::memory::{Arrays, Memory};
use super::pass::Pass;
use super::read_beams::MOST_BYTES_OF_BEAM;
use super::slot::Slot;
use super::tiling::{MAX_POSITIONS, padded};
use crate::backend::{DeviceOps, MemorySpec, SlotSpec};
use crate::error::{Error, Result};
use crate::pages::TAIL_PAGE_LEN;
use crate::tensor::{Dtype, Tensor};

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
    type Pass = Pass<D>;

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

    fn kv_dtype(&self) -> Dtype {
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

    fn table(&self, weight: Tensor, _head: Option<&Head<D>>) -> Result<Weights<D>> {
        Weights::stack(&self.device, &[weight], self.dtype)
    }

    fn head(&self, weight: Tensor, levels: &[Vec<u32>], _known: &[u32]) -> Result<Head<D>> {
        Head::new(&self.device, weight, levels, self.dtype)
    }

    fn buffer(&self) -> Buffer<D> {
        let least_rows = self.sizes().rows_per_pass;
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
        if !self.tiling(spec.kv.heads).is_possible() {
            let head_dim = spec.kv.heads.head_dim();
            return Err(Error::Unsupported {
                what: format!("attention with heads of {head_dim} on this GPU"),
                way_out: "use the CPU".into(),
            });
        }
        let arrays = Arc::new(Arrays::new(&self.device, spec, self.dtype)?);
        // All beams can be read at once.
        let words = spec.tail_pages * TAIL_PAGE_LEN * MOST_BYTES_OF_BEAM;
        self.reader.lock().expect("no holder panics").words.allocate(words)?;
        // Each run of like steps is padded by itself, to less than twice its length.
        let rows_per_step = 2 * spec.rows_per_step;
        let rows_per_pass = rows_per_step.max(padded(spec.rows_per_step) + spec.tokens_per_step);
        *self.sizes.lock().expect("no holder panics") = Sizes { rows_per_step, rows_per_pass };
        let tiling = self.tiling(spec.kv.heads);
        let lease = self.workspaces.lease();
        lease.workspace().scratch().allocate(spec.rows_per_step, tiling)?;
        *self.arrays.lock().expect("no holder panics") = Some(Arc::clone(&arrays));
        Ok(Memory(arrays))
    }

    fn check_phrases(&self) -> Result<()> {
        Err(Error::Unsupported {
            what: "a search of phrases on a GPU".into(),
            way_out: "use the CPU (--device cpu), or name no \"phrases\" in sidereal.json".into(),
        })
    }

    fn check_thoughts(&self) -> Result<()> {
        Err(Error::Unsupported {
            what: "a sampled thought on a GPU".into(),
            way_out: "use the CPU (--device cpu), or leave \"think\" out".into(),
        })
    }

    fn check_free_samples(&self) -> Result<()> {
        Err(Error::Unsupported {
            what: "samples or log-probabilities without the trie on a GPU".into(),
            way_out: "leave \"constraint\" out, or use --device cpu".into(),
        })
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

//! The CPU as a device: weights, buffers, memory and slots.

use std::sync::atomic::Ordering;

use rten_simd::ops::BitOps;
use rten_simd::{Isa, SimdOp};

use super::backend::Numbers;
use super::{Buffer, CpuBackend, Head, Logits, Matrix, Memory, Slot, Table};
use crate::backend::{DeviceOps, MemorySpec, SlotSpec};
use crate::error::Result;
use crate::tensor::{Dtype, Tensor};

/// Default memory for contexts.
const CONTEXT_BYTES: usize = 256 << 20;

/// The numbers of a register.
struct Lanes;

impl SimdOp for Lanes {
    type Output = usize;

    #[inline(always)]
    fn eval<I: Isa>(self, isa: I) -> usize {
        isa.f32().len()
    }
}

impl DeviceOps for CpuBackend {
    const COMPUTES_ON_CALLERS: bool = true;

    type Buffer = Buffer;
    type Matrix = Matrix;
    type Vector = Vec<f32>;
    type Table = Table;
    type Head = Head;
    type Logits = Logits;
    type Memory = Memory;
    type Slot = Slot;
    type Pass = ();

    fn description(&self) -> String {
        let lanes = format!("{} f32x{}", std::env::consts::ARCH, Lanes.dispatch());
        match self.numbers {
            Numbers::F32 => lanes,
            Numbers::Bf16(instructions) => format!("{lanes}, products in bf16 by {instructions}"),
            Numbers::Int8(instructions) => format!("{lanes}, products in int8 by {instructions}"),
        }
    }

    fn dtype(&self) -> Dtype {
        match self.numbers {
            Numbers::F32 => Dtype::F32,
            Numbers::Bf16(_) => Dtype::Bf16,
            Numbers::Int8(_) => Dtype::Int8,
        }
    }

    fn kv_dtype(&self) -> Dtype {
        Dtype::F32
    }

    fn matrix_flops(&self) -> u64 {
        self.matrix_flops.load(Ordering::Relaxed)
    }

    fn take_failure(&self) -> Result<()> {
        Ok(())
    }

    fn matrix(&self, parts: &[Tensor]) -> Result<Matrix> {
        Ok(Matrix::stack(parts, self.kept(parts)))
    }

    fn vector(&self, parts: &[Tensor]) -> Result<Vec<f32>> {
        Ok(parts.iter().flat_map(Tensor::to_vec).collect())
    }

    fn table(&self, weight: Tensor, head: Option<&Head>) -> Result<Table> {
        Ok(Table::new(weight, head))
    }

    fn head(&self, weight: Tensor, levels: &[Vec<u32>], known_tokens: &[u32]) -> Result<Head> {
        let dtype = self.kept_of_head(&weight);
        Ok(Head::new(&weight, dtype, levels, known_tokens))
    }

    fn buffer(&self) -> Buffer {
        Buffer::default()
    }

    fn upload(&self, values: &[f32], columns: usize) -> Buffer {
        Buffer::new(values.to_vec(), columns)
    }

    fn download(&self, buffer: &Buffer) -> Result<Vec<f32>> {
        Ok(buffer.values().to_vec())
    }

    fn logits(&self) -> Logits {
        Logits::default()
    }

    fn context_bytes(&self) -> Result<usize> {
        Ok(CONTEXT_BYTES)
    }

    fn memory(&self, spec: &MemorySpec) -> Result<Memory> {
        spec.kv.check()?;
        Ok(Memory::new(spec))
    }

    fn check_phrases(&self) -> Result<()> {
        Ok(())
    }

    fn check_thoughts(&self) -> Result<()> {
        Ok(())
    }

    fn check_free_samples(&self) -> Result<()> {
        Ok(())
    }

    fn max_steps(&self) -> usize {
        usize::MAX
    }

    fn open_slot(&self, spec: SlotSpec) -> Result<Slot> {
        Ok(Slot::new(spec))
    }

    fn num_beams(&self, slot: &Slot) -> usize {
        slot.beams.len()
    }

    fn num_steps(&self, slot: &Slot) -> usize {
        slot.beams.num_steps + slot.beams.num_skipped
    }

    fn context_len(&self, slot: &Slot) -> usize {
        slot.spec.context_len
    }
}

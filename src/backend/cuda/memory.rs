//! The pages of contexts and tails, and the beams.

use std::sync::Arc;

use bytemuck::{Pod, Zeroable};

use super::driver::Driver;
use super::handle::{Device, DeviceMemory};
use crate::backend::MemorySpec;
use crate::error::Result;
use crate::pages::{PAGE_LEN, TAIL_PAGE_LEN};
use crate::tensor::Dtype;

/// The pages of contexts and tails, and the beams themselves.
pub struct Memory<D: Driver>(pub(super) Arc<Arrays<D>>);

/// A beam that stands at a position is kept in the row that its keys and values would have: so
/// beams are found as tails are, and a search's room for both is one lease.
pub(super) struct Arrays<D: Driver> {
    pub spec: MemorySpec,
    contexts: DeviceMemory<D>,
    tails: DeviceMemory<D>,
    beams: [DeviceMemory<D>; NUM_BEAM_ARRAYS],
}

/// Bytes of each array in [`Beams`], a row (the last two: a page).
const BEAM_BYTES: [usize; NUM_BEAM_ARRAYS] = [4, 8, 4, 4, 4, 4, 8, 8, 8, 4, 4];
const BEAM_NAMES: [&str; NUM_BEAM_ARRAYS] = [
    "beams' scores",
    "beams' places",
    "beams' tokens",
    "beams' parents",
    "beams' ranks",
    "beams by rank",
    "beams' samples",
    "beams' log-probabilities",
    "beams' prefixes",
    "beams' counts",
    "beams' failures",
];
const NUM_BEAM_ARRAYS: usize = 11;

/// `Pages` in kernels/common/batch.cuh.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(super) struct Pages {
    contexts: u64,
    tails: u64,
    context_sets: u32,
    tail_layers: u32,
    num_kv_heads: u32,
    head_dim: u32,
}

/// `Beams` in kernels/common/batch.cuh.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(super) struct Beams([u64; NUM_BEAM_ARRAYS]);

impl<D: Driver> Arrays<D> {
    pub fn new(device: &Arc<Device<D>>, spec: &MemorySpec, dtype: Dtype) -> Result<Arrays<D>> {
        let of_token = spec.kv.numbers_per_token() * dtype.size();
        let of_tail_row = spec.kv.numbers_per_tail_row() * dtype.size();
        let rows = spec.tail_pages * TAIL_PAGE_LEN;
        let mut arrays = Arrays {
            spec: *spec,
            contexts: DeviceMemory::none(device, "contexts"),
            tails: DeviceMemory::none(device, "tails"),
            beams: BEAM_NAMES.map(|name| DeviceMemory::none(device, name)),
        };
        arrays.contexts.allocate(spec.context_pages * PAGE_LEN * of_token)?;
        arrays.tails.allocate(rows * of_tail_row)?;
        for (index, array) in arrays.beams.iter_mut().enumerate() {
            let count = if index + 2 < NUM_BEAM_ARRAYS { rows } else { spec.tail_pages };
            array.allocate(count * BEAM_BYTES[index])?;
        }
        Ok(arrays)
    }

    pub fn pages(&self) -> Pages {
        Pages {
            contexts: self.contexts.at(0),
            tails: self.tails.at(0),
            context_sets: self.spec.kv.context_sets as u32,
            tail_layers: self.spec.kv.tail_layers as u32,
            num_kv_heads: self.spec.kv.heads.num_kv_heads as u32,
            head_dim: self.spec.kv.heads.head_dim() as u32,
        }
    }

    pub fn beams(&self) -> Beams {
        Beams(self.beams.each_ref().map(|array| array.at(0)))
    }
}

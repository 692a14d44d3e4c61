//! The pages of contexts and tails, and the beams.

use std::sync::Arc;

use super::device::Device;
use super::device_memory::DeviceMemory;
use super::driver::Driver;
use super::shared::shared_struct;
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

shared_struct! {
    /// Keys and values. A context's page: `[context sets][kv heads][keys, values][kPageLen][head_dim]`; a
    /// tail's: `[tail layers][kTailPageLen][keys, values][kv heads][head_dim]`.
    struct Pages = "Pages" {
        contexts: u64 = "void*",
        tails: u64 = "void*",
        context_sets: u32,
        tail_layers: u32,
        num_kv_heads: u32,
        head_dim: u32,
    }
}

shared_struct! {
    /// Beams, in arrays over the rows of all tail pages: a beam that stands at a position has the row
    /// that its keys and values would have.
    struct Beams = "Beams" {
        scores: u64 = "float*",
        /// Nodes of the compiled trie and of the added items', or kNone.
        places: u64 = "uint2*",
        /// The newest.
        tokens: u64 = "uint32_t*",
        /// The beam at the position before.
        parents: u64 = "uint32_t*",
        /// By tokens, among the beams of the position.
        ranks: u64 = "uint32_t*",
        /// The inverse of `ranks`.
        by_rank: u64 = "uint32_t*",
        /// Log-probability over legal continuations; the same with its noise.
        samples: u64 = "float2*",
        /// Log-probabilities of the newest token: over the vocabulary, over legal continuations.
        log_probs: u64 = "float2*",
        /// A hash of the tokens, mixed with the seed of a sample.
        prefixes: u64 = "uint64_t*",
        /// By page, at the first page of a position: its beams.
        counts: u64 = "uint32_t*",
        /// By page, at the first page of a position: the step whose scores were not finite plus one, or
        /// zero.
        failures: u64 = "uint32_t*",
    }
}

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
        let arrays = self.beams.each_ref().map(|array| array.at(0));
        let [scores, places, tokens, parents, ranks, by_rank, rest @ ..] = arrays;
        let [samples, log_probs, prefixes, counts, failures] = rest;
        Beams {
            scores,
            places,
            tokens,
            parents,
            ranks,
            by_rank,
            samples,
            log_probs,
            prefixes,
            counts,
            failures,
        }
    }
}

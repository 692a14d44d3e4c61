//! Where cases come from, and the memory and searches that they need.

use std::sync::Arc;

use crate::backend::{Backend, Heads, KvLayout, MemorySpec, SlotSpec};
use crate::catalog::sid::Sid;
use crate::catalog::{CatalogBuilder, Item, Snapshot};
use crate::error::Result;
use crate::pages;
use crate::tensor::Tensor;

/// A source of cases; the seed repeats them.
pub struct Cases {
    /// Where they are drawn from.
    pub rng: fastrand::Rng,
}

impl Cases {
    /// The cases of a seed.
    pub fn new(seed: u64) -> Cases {
        Cases { rng: fastrand::Rng::with_seed(seed) }
    }

    /// A catalog of up to 600 items with three levels of so many codes.
    pub(super) fn snapshot(&mut self, num_codes: u16) -> Result<Arc<Snapshot>> {
        let mut builder = CatalogBuilder::default();
        for item in 0..self.size(600) {
            let codes: Vec<u16> = (0..3).map(|_| self.rng.u16(0..num_codes)).collect();
            builder.add(Item::new(item.to_string(), Sid::new(&codes)?))?;
        }
        Ok(builder.build()?.snapshot())
    }

    /// Numbers between -1 and 1 that 16 bits hold exactly.
    pub fn numbers(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| half::bf16::from_f32(2.0 * self.rng.f32() - 1.0).to_f32()).collect()
    }

    /// Weights of a recurrent cell, so small that a rounding does not grow from row to row.
    pub fn recurrent_weight(&mut self, width: usize) -> Vec<f32> {
        self.numbers(3 * width * width).into_iter().map(|x| x / 8.0).collect()
    }

    /// A size: often one, often small, sometimes `most`.
    pub fn size(&mut self, most: usize) -> usize {
        match self.rng.u8(0..8) {
            0 => 1,
            1 => most,
            2..6 => self.rng.usize(1..=most.min(20)),
            _ => self.rng.usize(1..=most),
        }
    }

    /// Heads of attention: grouped or not, of sizes that have kernels of their own or not.
    pub fn heads(&mut self) -> Heads {
        let num_kv_heads = self.rng.usize(1..4);
        let num_heads = num_kv_heads * self.rng.usize(1..4);
        let dims = [2, 6, 16, 24, 64, 128];
        Heads::new(num_heads, num_kv_heads, dims[self.rng.usize(0..dims.len())])
    }
}

const CONTEXT_PAGES: usize = 128;
const TAIL_PAGES: usize = 2048;

/// Memory and searches for operations that are called one by one. Pages are given out in an order
/// that is not that of their numbers.
pub struct Fixture<'b, B: Backend> {
    /// The backend whose memory it is.
    pub backend: &'b B,
    /// All pages.
    pub memory: B::Memory,
    start_token: u32,
    context_pages: Vec<u32>,
    tail_pages: Vec<u32>,
}

/// Steps that a fixture's searches may take.
const NUM_STEPS: usize = 12;

impl<'b, B: Backend> Fixture<'b, B> {
    /// One layer, for searches that start with token 3.
    ///
    /// # Errors
    /// The backend's, where there is no memory.
    pub fn new(backend: &'b B, heads: Heads) -> Result<Fixture<'b, B>> {
        Fixture::with_layout(backend, KvLayout::new(1, heads), 3)
    }

    /// Keys and values of any layout, for searches that start with a token.
    ///
    /// # Errors
    /// The backend's, where there is no memory.
    pub fn with_layout(backend: &'b B, kv: KvLayout, start_token: u32) -> Result<Fixture<'b, B>> {
        let memory = backend.memory(&MemorySpec {
            kv,
            context_pages: CONTEXT_PAGES,
            tail_pages: TAIL_PAGES,
            rows_per_step: 0,
            tokens_per_step: 0,
        })?;
        let mut rng = fastrand::Rng::with_seed(1);
        let mut shuffled = |count: usize| {
            let mut pages: Vec<u32> = (0..count as u32).collect();
            rng.shuffle(&mut pages);
            pages
        };
        let (context_pages, tail_pages) = (shuffled(CONTEXT_PAGES), shuffled(TAIL_PAGES));
        Ok(Fixture { backend, memory, start_token, context_pages, tail_pages })
    }

    /// The lease of a search in a context of so many tokens, with room for 512 beams at 6 steps.
    ///
    /// # Panics
    /// Where no pages are left.
    pub fn spec(&mut self, context_len: usize) -> SlotSpec {
        let context = self.context_pages.len() - pages::context_pages(context_len);
        let tail = self.tail_pages.len() - pages::tail_pages([1, 512, 512, 512, 512, 512, 512]);
        SlotSpec {
            context_pages: self.context_pages.split_off(context),
            context_len,
            tail_pages: self.tail_pages.split_off(tail),
            num_steps: NUM_STEPS,
            start_token: self.start_token,
        }
    }

    /// An open search in a context of so many tokens, with room for 512 beams at 6 steps.
    ///
    /// # Panics
    /// Where no pages are left.
    pub fn slot(&mut self, context_len: usize) -> B::Slot {
        let spec = self.spec(context_len);
        self.backend.open_slot(spec).expect("few steps")
    }
}

/// A vector of these values.
pub(super) fn vector<B: Backend>(backend: &B, values: Vec<f32>) -> Result<B::Vector> {
    backend.vector(&[Tensor::new(&[values.len()], values)])
}

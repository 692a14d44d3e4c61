//! Memory and searches for operations that are called one by one.

use sidereal::backend::cpu::{CpuBackend, Memory, Slot};
use sidereal::backend::{Backend, Heads, MemorySpec, SlotSpec};
use sidereal::pages;

const CONTEXT_PAGES: usize = 64;
const TAIL_PAGES: usize = 1024;

/// Memory that is given out page by page, in an order that is not that of their numbers.
pub struct World {
    pub backend: CpuBackend,
    pub memory: Memory,
    start_token: u32,
    context_pages: Vec<u32>,
    tail_pages: Vec<u32>,
}

impl World {
    /// One layer, for searches that start with token 3.
    pub fn new(heads: Heads) -> World {
        World::of(1, heads, 3)
    }

    pub fn of(num_layers: usize, heads: Heads, start_token: u32) -> World {
        let backend = CpuBackend::default();
        let memory = backend.memory(&MemorySpec {
            num_layers,
            heads,
            context_pages: CONTEXT_PAGES,
            tail_pages: TAIL_PAGES,
        });
        let mut rng = fastrand::Rng::with_seed(1);
        let mut shuffled = |count: usize| {
            let mut pages: Vec<u32> = (0..count as u32).collect();
            rng.shuffle(&mut pages);
            pages
        };
        let (context_pages, tail_pages) = (shuffled(CONTEXT_PAGES), shuffled(TAIL_PAGES));
        World { backend, memory, start_token, context_pages, tail_pages }
    }

    /// A search in a context of so many tokens, with room for 512 beams at 3 positions.
    pub fn spec(&mut self, context_len: usize) -> SlotSpec {
        let context = self.context_pages.len() - pages::context_pages(context_len);
        let tail = self.tail_pages.len() - pages::tail_pages([512; 3]);
        SlotSpec {
            context_pages: self.context_pages.split_off(context),
            context_len,
            tail_pages: self.tail_pages.split_off(tail),
            start_token: self.start_token,
        }
    }

    pub fn slot(&mut self, context_len: usize) -> Slot {
        let spec = self.spec(context_len);
        self.backend.open_slot(spec)
    }
}

//! Pages of keys and values, and how they lie there.

use std::sync::{RwLock, RwLockReadGuard, RwLockWriteGuard};

use super::matmul::PANEL;
use crate::backend::{KvLayout, MemorySpec};
use crate::pages::{PAGE_LEN, TAIL_PAGE_LEN};

/// The pages of contexts and tails. What one takes up is asked of the system when it is first
/// written, and then kept.
///
/// A page is written by the one search whose prompt or beams it holds, and read by all that have
/// it in common; the locks are never waited for.
pub struct Memory {
    context_pages: Vec<RwLock<Vec<f32>>>,
    tail_pages: Vec<RwLock<Vec<f32>>>,
    pub(super) layout: PageLayout,
}

/// Where things lie in pages.
///
/// A context's page is `[sets][kv heads]` of keys, then values, each a matrix in panels as
/// products read them: the keys `[64 / 32][head_dim][32]` with a token a column, the values
/// `[head_dim / 32][64][32]` with a token a row. A tail's page is `[layers][16]` rows of
/// all heads' keys, then values.
#[derive(Clone, Copy)]
pub(super) struct PageLayout(KvLayout);

impl PageLayout {
    /// Columns of one head.
    pub fn head_dim(&self) -> usize {
        self.0.heads.head_dim()
    }

    fn key_floats(&self) -> usize {
        PAGE_LEN * self.head_dim()
    }

    fn value_floats(&self) -> usize {
        PAGE_LEN * self.head_dim().next_multiple_of(PANEL)
    }

    fn context_floats(&self) -> usize {
        self.0.context_sets * self.0.heads.num_kv_heads * (self.key_floats() + self.value_floats())
    }

    fn tail_floats(&self) -> usize {
        self.0.numbers_per_tail_row() * TAIL_PAGE_LEN
    }

    /// The keys and the values of a set's KV head in a context's page.
    pub fn keys_values<'p>(
        &self,
        page: &'p [f32],
        set: usize,
        kv_head: usize,
    ) -> (&'p [f32], &'p [f32]) {
        let floats = self.key_floats() + self.value_floats();
        let start = (set * self.0.heads.num_kv_heads + kv_head) * floats;
        page[start..start + floats].split_at(self.key_floats())
    }

    /// Writes the keys and values of a token, of a set's KV head, into a context's page.
    pub fn write(
        &self,
        page: &mut [f32],
        set: usize,
        kv_head: usize,
        token: usize,
        keys: &[f32],
        values: &[f32],
    ) {
        let floats = self.key_floats() + self.value_floats();
        let start = (set * self.0.heads.num_kv_heads + kv_head) * floats;
        let (key_panels, value_panels) =
            page[start..start + floats].split_at_mut(self.key_floats());
        let panel = &mut key_panels[token / PANEL * PANEL * keys.len()..];
        let column = panel[token % PANEL..].iter_mut().step_by(PANEL);
        column.zip(keys).for_each(|(to, key)| *to = *key);
        for (panel, values) in
            value_panels.chunks_exact_mut(PAGE_LEN * PANEL).zip(values.chunks(PANEL))
        {
            panel[token * PANEL..][..values.len()].copy_from_slice(values);
        }
    }

    /// The keys and the values of a row in a tail's page, of all KV heads.
    pub fn tail_row<'p>(
        &self,
        page: &'p [f32],
        layer: usize,
        row: usize,
    ) -> (&'p [f32], &'p [f32]) {
        let kv_dim = self.0.heads.kv_dim();
        let start = (layer * TAIL_PAGE_LEN + row) * 2 * kv_dim;
        page[start..start + 2 * kv_dim].split_at(kv_dim)
    }

    /// A row in a tail's page, to be written: keys, then values, of all KV heads.
    pub fn tail_row_mut<'p>(&self, page: &'p mut [f32], layer: usize, row: usize) -> &'p mut [f32] {
        let kv_dim = self.0.heads.kv_dim();
        &mut page[(layer * TAIL_PAGE_LEN + row) * 2 * kv_dim..][..2 * kv_dim]
    }
}

impl Memory {
    pub(super) fn new(spec: &MemorySpec) -> Memory {
        let layout = PageLayout(spec.kv);
        let empty = |count: usize| (0..count).map(|_| RwLock::default()).collect();
        Memory {
            context_pages: empty(spec.context_pages),
            tail_pages: empty(spec.tail_pages),
            layout,
        }
    }

    pub(super) fn context_page_mut(&self, page: u32) -> RwLockWriteGuard<'_, Vec<f32>> {
        writable(&self.context_pages[page as usize], self.layout.context_floats())
    }

    pub(super) fn tail_page_mut(&self, page: u32) -> RwLockWriteGuard<'_, Vec<f32>> {
        writable(&self.tail_pages[page as usize], self.layout.tail_floats())
    }

    pub(super) fn context_pages(&self, pages: &[u32]) -> Vec<RwLockReadGuard<'_, Vec<f32>>> {
        pages.iter().map(|&page| readable(&self.context_pages[page as usize])).collect()
    }

    pub(super) fn tail_pages(&self, pages: &[u32]) -> Vec<RwLockReadGuard<'_, Vec<f32>>> {
        pages.iter().map(|&page| readable(&self.tail_pages[page as usize])).collect()
    }
}

fn readable(page: &RwLock<Vec<f32>>) -> RwLockReadGuard<'_, Vec<f32>> {
    page.read().expect("no writer panics")
}

fn writable(page: &RwLock<Vec<f32>>, floats: usize) -> RwLockWriteGuard<'_, Vec<f32>> {
    let mut page = page.write().expect("no writer panics");
    page.resize(floats, 0.0);
    page
}

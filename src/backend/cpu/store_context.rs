//! Keys and values of prompts, written into the pages of their contexts.

use rayon::prelude::*;

use super::{Buffer, CpuBackend, Memory};
use crate::backend::{Batch, Heads, StoreContext};
use crate::pages::PAGE_LEN;

impl StoreContext for CpuBackend {
    fn store_context(
        &self,
        set: usize,
        kv: &Buffer,
        offset: usize,
        heads: Heads,
        batch: &Batch<'_, CpuBackend>,
    ) {
        // The page, its first token of the batch, and the rows of the tokens.
        let mut stretches = Vec::new();
        let mut row = 0;
        for (chunk, slot) in batch.prompts() {
            let mut at = chunk.start;
            while at < chunk.end {
                let end = chunk.end.min((at / PAGE_LEN + 1) * PAGE_LEN);
                let page = slot.spec.context_pages[at / PAGE_LEN];
                stretches.push((page, at % PAGE_LEN, row..row + (end - at)));
                row += end - at;
                at = end;
            }
        }
        let memory: &Memory = batch.memory;
        stretches.into_par_iter().for_each(|(page, first, rows)| {
            let mut page = memory.context_page_mut(page);
            for (token, row) in (first..).zip(rows) {
                let (keys, values) = kv.row(row)[offset..].split_at(heads.keys_dim());
                for head in 0..heads.num_kv_heads {
                    let columns = head * heads.head_dim()..(head + 1) * heads.head_dim();
                    let (keys, values) = (&keys[columns.clone()], &values[columns]);
                    memory.layout.write(&mut page, set, head, token, keys, values);
                }
            }
        });
    }
}

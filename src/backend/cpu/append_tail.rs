//! Keys and values of beams: a row a beam, written once at the position of its step.

use super::{Buffer, CpuBackend};
use crate::backend::{AppendTail, Batch, Heads};
use crate::pages::TAIL_PAGE_LEN;

impl AppendTail for CpuBackend {
    fn append_tail(
        &self,
        layer: usize,
        qkv: &Buffer,
        heads: Heads,
        batch: &mut Batch<'_, CpuBackend>,
    ) {
        let (memory, mut row) = (batch.memory, batch.num_prompt_rows());
        for slot in &mut batch.slots[batch.chunks.len()..] {
            let num_beams = slot.beams.len();
            let (pages, first_row) = slot.append_position();
            for (&page, first) in pages.iter().zip((0..num_beams).step_by(TAIL_PAGE_LEN)) {
                let mut page = memory.tail_page_mut(page);
                for beam in first..num_beams.min(first + TAIL_PAGE_LEN) {
                    let kv = memory.layout.tail_row_mut(&mut page, layer, first_row + beam - first);
                    kv.copy_from_slice(&qkv.row(row + beam)[heads.query_dim()..]);
                }
            }
            row += num_beams;
        }
    }
}

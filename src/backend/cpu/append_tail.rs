use super::{Buffer, CpuBackend, Heads};
use crate::backend::Batch;
use crate::pages::TAIL_PAGE_LEN;

pub(super) fn append_tail(
    layer: usize,
    qkv: &Buffer,
    heads: Heads,
    batch: &mut Batch<'_, CpuBackend>,
) {
    let (memory, mut row) = (batch.memory, batch.num_prompt_rows());
    for slot in &mut batch.slots[batch.chunks.len()..] {
        let num_beams = slot.beams.len();
        let pages = slot.append_position();
        for (&page, first) in pages.iter().zip((0..num_beams).step_by(TAIL_PAGE_LEN)) {
            let mut page = memory.tail_page_mut(page);
            for beam in first..num_beams.min(first + TAIL_PAGE_LEN) {
                let kv = memory.layout.tail_row_mut(&mut page, layer, beam - first);
                kv.copy_from_slice(&qkv.row(row + beam)[heads.query_dim()..]);
            }
        }
        row += num_beams;
    }
}

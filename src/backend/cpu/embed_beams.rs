use super::embed::copy_rows;
use super::{Buffer, Slot};
use crate::tensor::Tensor;

pub(super) fn embed_beams(table: &Tensor, slots: &[Slot], out: &mut Buffer) {
    out.reshape(slots.iter().map(|slot| slot.beams.len()).sum(), table.shape()[1]);
    copy_rows(table, slots.iter().flat_map(|slot| slot.beams.newest_tokens()), out);
}

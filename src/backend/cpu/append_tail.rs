use super::scratch::Scratch;
use super::{Buffer, Heads, Slot};

pub(super) fn append_tail(layer: usize, qkv: &Buffer, heads: Heads, slots: &mut [Slot]) {
    let (query_dim, kv_dim) = (heads.query_dim(), heads.kv_dim());
    let mut first_row = 0;
    for slot in slots {
        let rows = first_row..first_row + slot.beams.len();
        first_row = rows.end;
        let mut keys = Scratch::new(rows.len() * kv_dim);
        let mut values = Scratch::new(rows.len() * kv_dim);
        let outs = keys.chunks_exact_mut(kv_dim).zip(values.chunks_exact_mut(kv_dim));
        for (row, (keys, values)) in rows.zip(outs) {
            let (row_keys, row_values) = qkv.row(row)[query_dim..].split_at(kv_dim);
            keys.copy_from_slice(row_keys);
            values.copy_from_slice(row_values);
        }
        slot.tails[layer].positions.push((keys, values));
    }
}

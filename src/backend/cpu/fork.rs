use std::sync::Arc;

use super::{Buffer, Slot};

pub(super) fn fork(slots: Vec<Slot>, copies: &[usize], hidden: &mut Buffer) -> Vec<Slot> {
    assert_eq!(slots.len(), copies.len(), "a number of copies for each slot");
    let before = std::mem::take(hidden);
    hidden.reshape(copies.iter().sum(), before.num_columns());
    let mut forks: Vec<Slot> = Vec::with_capacity(hidden.num_rows());
    for (row, (slot, &copies)) in slots.iter().zip(copies).enumerate() {
        assert_eq!(slot.beams.num_steps, 0, "a slot is forked before its first step");
        for _ in 0..copies {
            let columns = before.num_columns();
            let fork = forks.len();
            hidden.values[fork * columns..(fork + 1) * columns].copy_from_slice(before.row(row));
            forks.push(Slot {
                spec: slot.spec,
                contexts: Arc::clone(&slot.contexts),
                tails: slot.tails.clone(),
                beams: slot.beams.clone(),
            });
        }
    }
    forks
}

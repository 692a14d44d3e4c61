//! A step of beams: prepared, run, and from the third of its shape on replayed as a graph.

use super::driver::Driver;
use super::{CudaBackend, Head, Logits, Recorded, SIGHTS};
use crate::backend::{Batch, SearchRule, Step};

impl<D: Driver> Step for CudaBackend<D> {
    fn step(
        &self,
        batch: &mut Batch<'_, Self>,
        head: &Head<D>,
        rules: &[SearchRule<'_>],
        logits: &mut Logits<D>,
        mut work: impl FnMut(&mut Batch<'_, Self>, &mut Logits<D>),
    ) {
        if !batch.chunks.is_empty() || batch.slots.is_empty() {
            return work(batch, logits);
        }
        let key = self.prepare(batch.slots, head, rules, logits);
        let recorded = {
            let mut state = self.state();
            state.forget_released(&self.device);
            state.recordings.pop(&key)
        };
        let recorded = match recorded {
            Some(Recorded::Seen(SIGHTS)) => self.device.record(|| work(batch, logits)).map_or_else(
                || {
                    // There is no memory to keep it: it is done as it comes, and the older ones go.
                    self.state().recordings.clear();
                    work(batch, logits);
                    Recorded::Seen(0)
                },
                Recorded::As,
            ),
            Some(Recorded::As(recording)) => Recorded::As(recording),
            // The first time everything gets the size that it needs.
            seen => {
                work(batch, logits);
                match seen {
                    Some(Recorded::Seen(sights)) => Recorded::Seen(sights + 1),
                    _ => Recorded::Seen(1),
                }
            }
        };
        if let Recorded::As(recording) = &recorded {
            self.device.replay(recording);
        }
        let mut state = self.state();
        // What this step grew, others may have recorded; what it recorded is still there.
        state.forget_released(&self.device);
        // A step that failed has not taken all memory that it needs.
        if self.device.check().is_ok() {
            state.recordings.put(key, recorded);
        }
        state.prepared = None;
        batch.slots.iter_mut().for_each(|slot| slot.num_steps += 1);
    }
}

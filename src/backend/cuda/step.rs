//! A step of beams: planned, then run eagerly, captured or replayed as its shape wants it.

use super::driver::Driver;
use super::{CudaBackend, Head, Logits};
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
        self.graphs.run(&self.device, key, || work(batch, logits));
        self.state().prepared = None;
        batch.slots.iter_mut().for_each(|slot| slot.num_steps += 1);
    }
}

//! A step of beams: planned, then run as its shape wants it.

use super::backend::CudaBackend;
use super::driver::Driver;
use super::head::Head;
use super::logits::Logits;
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
        // A step appends its beams' newest tokens before anything attends to them.
        self.begin_tails(batch);
        if !batch.chunks.is_empty() || batch.slots.is_empty() {
            return work(batch, logits);
        }
        batch.pass = batch.pass.of_step();
        let (shape, plan) = self.plan_step(batch, head, rules, logits, true);
        let (pass, saved) = (batch.pass.clone(), batch.pass.save());
        let key = (shape.expect("the step is padded"), plan);
        pass.graphs(&self.workspaces).run(&self.device, key, || {
            pass.restore(&mut pass.scratch(&self.workspaces), &saved);
            work(batch, logits);
        });
        saved.step().complete(batch.slots);
        pass.reset(&mut pass.scratch(&self.workspaces));
    }
}

//! A step on the CPU is done as it comes: there is nothing to capture.

use super::{CpuBackend, Head, Logits};
use crate::backend::{Batch, SearchRule, Step};

impl Step for CpuBackend {
    fn step(
        &self,
        batch: &mut Batch<'_, CpuBackend>,
        _head: &Head,
        _rules: &[SearchRule<'_>],
        logits: &mut Logits,
        mut work: impl FnMut(&mut Batch<'_, CpuBackend>, &mut Logits),
    ) {
        work(batch, logits);
    }
}
